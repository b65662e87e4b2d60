"""A folder that is to benchmarks/official.py a clone of the official code, and computes with our own tiny model."""

from __future__ import annotations

from pathlib import Path

FILES = {
    "configs/imagenet.yaml": """
training: {torch_compile_decoder: true, grad_accum_steps: 2}
gen_tok: {flow_mini_batch: 3, in_content_start: 1}
""",
    "modules/autoencoding_utils/lpips.py": """
import lpips, torch
models = None

def _ensure_torchvision_weights_cached(url):
    raise AssertionError("a download")

class LPIPS(lpips.LPIPS):
    def __init__(self):
        super().__init__(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
        self._load_pretrained_weights()
        self.requires_grad_(False)

    def _load_pretrained_weights(self):
        raise AssertionError("a download")
""",
    "models/unite.py": """
import torch
from modules.autoencoding_utils.lpips import LPIPS
from unite_fast.config import ModelConfig
from unite_fast.config.keys import DecoderConfig, EncoderConfig
from unite_fast.model import unite
from unite_fast.optim.groups import split_parameters

ENCODER_CONFIGS, DECODER_CONFIGS = {}, {}
TINY = ModelConfig(
    image_size=64, patch_size=16, num_latents=16, latent_dim=8, num_classes=10,
    encoder=EncoderConfig(depth=2, width=64, heads=2, in_context_start=1, in_context_len=4),
    decoder=DecoderConfig(depth=1, width=64, heads=1, mlp_hidden=128, in_features=64),
)

class UNITE(unite.UNITE):
    def __init__(self, settings):
        super().__init__(TINY)
        self.lpips_loss = LPIPS()
        self.transport = type("Transport", (), {"sample_logit_normal": None})()
        self.modulation_recon_timestep_max, self.noising_t_start, self.timestep_shift_alpha = 0.01, 0.7, 0.5
        self.flow_mini_batch = settings["flow_mini_batch"]

    def get_learnable_params(self, muon=False, non_muon=False):
        return list(split_parameters(self, True)[0 if muon else 1].values())

    def forward(self, images, labels):
        recon = self.decode(self.tokenize(images))
        l1, lpips = (recon - images).abs().mean(), self.lpips_loss(images, recon).mean()
        return l1 + lpips, {"rec_loss": l1, "lpips_loss": lpips, "flow/flow_loss": l1 * 0}
""",
    "utils/optim.py": """
import torch

def build_optimizer(parameters, training):
    return torch.optim.AdamW(parameters, lr=1e-4), ""

def build_optimizer_muon(parameters, training):
    return torch.optim.SGD(parameters, lr=1e-4), ""
""",
    "utils/ema.py": """
import torch

@torch.no_grad()
def update_ema(ema, model, decay):
    for a, b in zip(ema.parameters(), model.parameters()):
        a.lerp_(b, 1 - decay)
""",
}


def write(folder: Path) -> Path:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
