"""What a GPU would be given, found without one: steps and samples on fake_gpu.py's machine.

python tests/cuda_trace.py [NAME ...]        one JSON object: what each scenario did, and every compiled kernel
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / name) for name in ("kernels", "benchmarks", "tests", "tests/ops"))]

import torch  # noqa: E402
from fake_gpu import DEVICE, Launches, OnTheGpu, code_generator, gpu, moved  # noqa: E402  first: it switches Triton's interpreter off
from stepping import load_tiny  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import unset_fake_temporarily  # noqa: E402

from unite_fast import sampling  # noqa: E402
from unite_fast.config import (  # noqa: E402
    Config,
    batch_split,
    yaml_text,
)
from unite_fast.data import Batch, batch_of_images  # noqa: E402
from unite_fast.efficiency import precision  # noqa: E402
from unite_fast.modality.images import ImageLosses  # noqa: E402
from unite_fast.modality.lpips import Perceptual, Undrawn  # noqa: E402
from unite_fast.model.unite import UNITE  # noqa: E402
from unite_fast.objective import Objective  # noqa: E402
from unite_fast.parallel.distributed import Ranks  # noqa: E402
from unite_fast.run import assemble  # noqa: E402
from unite_fast.training.means import Means  # noqa: E402
from unite_fast.training.step import TrainStep  # noqa: E402
from unite_kernels import probe  # noqa: E402


def batch_of(config: Config, images_seen: int) -> Batch:
    n, m = config.train.global_batch, config.model
    samples = torch.arange(images_seen, images_seen + n, device=DEVICE)
    images = torch.empty(n, m.channels, m.image_size, m.image_size, dtype=torch.uint8, device=DEVICE)
    return batch_of_images(images, samples % m.num_classes, samples)


def train(*overrides: str, tiny: bool = False, steps: int = 1) -> Callable[[OnTheGpu], None]:
    """Whole optimizer steps, as train.py does them, and the log line's sums."""

    def scenario(seen: OnTheGpu) -> None:
        config = load_tiny(*overrides) if tiny else published(*overrides)
        state = assemble.fresh_state(config, Ranks(0, 1, DEVICE), moved(UNITE(config.model)).train())
        perceptual = None
        if config.objective.perceptual_weight:
            with unset_fake_temporarily(), Undrawn():
                perceptual = Perceptual(None, backend=config.efficiency.kernels)
            moved(perceptual)
        e = config.efficiency
        losses = ImageLosses(config.objective, perceptual)
        objective = Objective(config.objective, losses, e.kernels, e.flow_mini_batch)
        step = TrainStep(state, config, Ranks(0, 1, DEVICE), batch_split(config.train, 1), 1000, objective)
        means = Means(step.metrics, step.ranks)
        for _ in range(steps):
            batch = batch_of(config, state.images_seen)
            with seen:
                means.add(step(batch))

    return scenario


def compiled(*overrides: str) -> Callable[[OnTheGpu], None]:
    """Compiled regions up to the code that Inductor writes, forward and backward. Fake tensors alone watch the devices,
    since Dynamo does not look into functions under other modes."""
    blocks = "model.encoder.depth=2"  # one before the class tokens and one behind them
    scenario = train("efficiency.kernels=fused", "efficiency.compile=all", blocks, *overrides, tiny=True)

    def generated(seen: OnTheGpu) -> None:
        modules: list[str] = []
        with code_generator(modules):
            scenario(mock.MagicMock())
        seen.graphs = len(modules)

    return generated


def published(*overrides: str) -> Config:
    """UNITE-B with fewer blocks, of which each kind is there: before, at and after the class tokens, and the last."""
    fewer = ("model.encoder.depth=4", "model.encoder.in_context_start=2", "model.decoder.depth=2")
    ours = ("train.global_batch=64", "efficiency.compile=none", "data.source=synthetic", "optim.ema_extra=[std0.05]")
    return yaml_text.load(ROOT / "configs" / "imagenet_b.yaml", [*fewer, *ours, *overrides])


def sample(recipe: str, order: str) -> Callable[[OnTheGpu], None]:
    """Tokenize, reconstruct and generate with guidance, as sample.py does."""

    def scenario(seen: OnTheGpu) -> None:
        config = published()
        model = assemble.fresh_state(config, Ranks(0, 1, DEVICE), moved(UNITE(config.model))).model.eval()
        labels, seeds = (torch.arange(32, device=DEVICE) for _ in range(2))
        images = torch.empty(8, 3, 256, 256, device=DEVICE)
        options = {"solver": "exp3", "steps": 4, "cfg_scale": 2.0, "cfg_interval": (0.3, 1.0), "cfg_order": order}
        with seen, torch.no_grad(), precision.autocast(recipe, DEVICE):
            model.decode(model.tokenize(images))
            sampling.sample(model, labels, seeds=seeds, **options)

    return scenario


@torch.library.custom_op("unite_kernels::turned", mutates_args=())
def turned(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[::-1])


turned.register_fake(torch.empty_like)  # which is wrong


def fault(function: Callable[[], object]) -> Callable[[OnTheGpu], None]:
    """What one of the checks above is there to find."""

    def scenario(seen: OnTheGpu) -> None:
        with seen:
            function()

    return scenario


def new(*shape: int) -> Tensor:
    return torch.empty(shape, device=DEVICE)


FAULTS = {
    "fault: a number of the host": fault(lambda: new(3) * torch.tensor(2.0)),
    "fault: a value is read back": fault(lambda: float(new())),
    "fault: no such grid": fault(lambda: probe._double_kernel[1, 65536](new(1), new(1), 64)),  # type: ignore[index]
    "fault: a fake that is wrong": fault(lambda: turned(new(2, 3))),
}
SCENARIOS: dict[str, Callable[[OnTheGpu], None]] = {
    "tiny, fp32, eager": train("efficiency.kernels=eager", "train.micro_batch=16", tiny=True),
    "tiny, fp32, fused": train("efficiency.kernels=fused", tiny=True, steps=2),
    "tiny, fp32, fused, one image": train(
        "efficiency.kernels=fused", "train.micro_batch=1", "train.global_batch=2", tiny=True
    ),
    "tiny, bf16, fused": train("efficiency.kernels=fused", "efficiency.precision=bf16", tiny=True),
    "tiny, bf16, compiled": compiled("efficiency.precision=bf16"),
    "tiny, fp8, compiled": compiled("efficiency.precision=fp8"),
    "B, bf16, fused": train(),
    "B, bf16, fused, residual bf16": train(
        "efficiency.residual=bf16", "efficiency.flow_mini_batch=1", "objective.flow_steps=2"
    ),
    "B, bf16, fused, one image": train("train.micro_batch=1", "train.global_batch=2"),
    "B, bf16, fused, recompute": train("efficiency.recompute=blocks", "train.micro_batch=8"),
    "B, bf16, eager": train("efficiency.kernels=eager"),
    "B, fp32, fused": train("efficiency.precision=fp32"),
    "B, fp8": train("efficiency.precision=fp8"),
    "B, fp8_rowwise": train("efficiency.precision=fp8_rowwise"),
    "B, bf16, fused, against a discriminator": train(
        "objective.flow_steps=0",
        "objective.adversarial.weight=0.75",
        "optim.frozen=[encoder, encoder_layer_norm, latent_tokens, patch_embed]",
    ),
    "L, bf16, fused": train("model.encoder.width=1024", "model.encoder.heads=16"),
    "XL, bf16, fused": train("model.encoder.width=1152", "model.encoder.heads=16"),
    "samples, bf16": sample("bf16", "cfg_first"),
    "samples, fp32": sample("fp32", "norm_first"),
}


def main(names: list[str]) -> int:
    gc.disable()  # of objects without data there is room for all
    launches = Launches()
    report: dict[str, Any] = {}
    for name in names or list(SCENARIOS):
        before, known = launches.count, len(launches.kernels)
        row: dict[str, Any] = {"error": ""}
        launches.scenario = name
        with gpu(launches) as seen:
            try:
                (SCENARIOS | FAULTS)[name](seen)
            except Exception:  # the report says it, and its reader what of it was meant to fail
                row["error"] = traceback.format_exc()
        row |= {"operations": seen.operations, "registered": seen.registered, "launches": launches.count - before}
        row |= {"kernels": len(launches.kernels) - known, "graphs": seen.graphs}
        report[name] = row
    print(json.dumps({"scenarios": report, "kernels": launches.read()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
