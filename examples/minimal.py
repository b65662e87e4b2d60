"""UNITE (arXiv 2603.22283) on handwritten digits in one file: what the package computes, without what makes it fast.

One transformer, the Generative Encoder, has two uses. With noise registers and the patches of an image it gives the
image's latents (tokenization); with noised latents alone it gives the clean ones (denoising: how it generates). A
decoder turns latents into the image. All weights learn at once from two losses. tests/test_minimal.py holds losses and
updates of this page equal to those of the package with configs/digits.yaml.

    python examples/minimal.py            # a minute or two on one CPU core
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

# Batch, registers, latent width, width, heads, flow steps. An image has 16 patches of 2 x 2 pixels.
B, K, C, D, H, N, CLASSES = 32, 16, 8, 64, 4, 3, 10
PIXEL_WEIGHT, FLOW_WEIGHT, SHIFT = 4.0, 0.025, 0.5


def angles(positions, width):  # of sin-cos tables and of rotary positions
    return positions[:, None] * 10000.0 ** -(torch.arange(width // 2) / (width / 2))


def rotate(x, prefix):  # pairs of channels by an angle that grows with the place behind the prefix, which stays
    angle = torch.cat([torch.zeros(prefix, x.shape[3] // 2), angles(torch.arange(x.shape[2] - prefix), x.shape[3])])
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


class Block(nn.Module):  # of the encoder: attention and MLP, both modulated by c, the embedding of time and label
    def __init__(self, hidden=int(2 / 3 * 4 * D)):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.RMSNorm(D, 1e-6) for _ in range(3))
        self.q_norm, self.k_norm = nn.RMSNorm(D // H, 1e-6), nn.RMSNorm(D // H, 1e-6)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down, self.modulation = nn.Linear(D, 2 * hidden), nn.Linear(hidden, D), nn.Linear(D, 6 * D)

    def forward(self, x, c, prefix):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)
        parts = self.qkv(self.norm1(x) * (1 + scale1) + shift1).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in parts)  # (B, H, T, D / H)
        q, k = rotate(self.q_norm(q), prefix), rotate(self.k_norm(k), prefix)
        x = x + gate1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        gate, value = self.up(self.norm2(x) * (1 + scale2) + shift2).chunk(2, dim=-1)
        return self.norm3(x + gate2 * self.down(F.silu(gate) * value))


class Unite(nn.Module):
    def __init__(self):
        super().__init__()
        angle, side = angles(torch.arange(K), D), torch.arange(4).repeat(4, 1)
        column, row = angles(side.flatten(), D // 2), angles(side.T.flatten(), D // 2)
        grid = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
        self.register_buffer("grid", torch.cat([torch.zeros(1, D), grid]))
        self.register_buffer("frequencies", torch.randn(256))
        self.registers = nn.Parameter(torch.cat([angle.sin(), angle.cos()], dim=1))
        self.class_token, self.cls = nn.Parameter(torch.randn(1, D) * 0.02), nn.Parameter(torch.zeros(D))
        self.patches, self.latents_in = nn.Conv2d(1, D, 2, stride=2), nn.Linear(C, D)
        self.time = nn.Sequential(nn.Linear(512, D), nn.SiLU(), nn.Linear(D, D))
        self.labels = nn.Embedding(CLASSES + 2, D)  # number CLASSES is the null class, for guidance
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.last_norm, self.last_modulation = nn.RMSNorm(D, 1e-6), nn.Linear(D, 2 * D)
        self.latents_out, self.latent_norm = nn.Linear(D, C), nn.LayerNorm(C)
        self.decoder_in, self.decoder_embed, self.pixels = nn.Linear(C, D), nn.Linear(D, D), nn.Linear(D, 4)
        layer = nn.TransformerEncoderLayer(D, H, 4 * D, 0.0, "gelu", 1e-12, batch_first=True, norm_first=True)
        self.layers, self.decoder_norm = nn.ModuleList(copy.deepcopy(layer) for _ in range(2)), nn.LayerNorm(D, 1e-12)
        for linear in (*(block.modulation for block in self.blocks), self.last_modulation, self.latents_out):
            linear.weight.data.zero_(), linear.bias.data.zero_()

    def generative_encoder(self, latents, t, labels, images=None):  # (B, K, C) -> (B, K, C), normalised
        wave, label = t[:, None] * self.frequencies * 2 * math.pi, self.labels(labels)
        c = self.time(torch.cat([wave.sin(), wave.cos()], dim=1)) + label
        x = self.latents_in(latents) + self.registers
        if images is not None:
            x = torch.cat([x, self.patches(images).flatten(2).transpose(1, 2)], dim=1)
        x = torch.cat([label[:, None] + self.class_token, self.blocks[0](x, c, 0)], dim=1)
        for block in self.blocks[1:]:
            x = block(x, c, 1)
        shift, scale = self.last_modulation(F.silu(c))[:, None].chunk(2, dim=-1)
        return self.latent_norm(self.latents_out(self.last_norm(x[:, 1 : K + 1]) * (1 + scale) + shift))

    def decode(self, z):  # (B, K, C) -> images (B, 1, 8, 8)
        x = self.decoder_embed(self.decoder_in(z))
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1) + self.grid
        for layer in self.layers:
            x = layer(x)
        patches = self.pixels(self.decoder_norm(x))[:, 1:]
        return patches.view(-1, 4, 4, 2, 2).transpose(2, 3).reshape(-1, 1, 8, 8)


def draw(batch):  # all randomness of a step
    time = torch.sigmoid(torch.randn(N, batch))
    return {
        "register_noise": torch.randn(batch, K, C), "register_t": 0.01 * torch.rand(batch),
        "noised": torch.rand(batch) < 0.5, "noised_t": 0.7 + 0.3 * torch.rand(batch), "noise": torch.randn(batch, K, C),
        "flow_t": SHIFT * time / (1 + (SHIFT - 1) * time), "flow_noise": torch.randn(N, batch, K, C),
        "dropped": torch.rand(N, batch) < 0.1,
    }  # fmt: skip


def losses(model, images, labels, d):  # of reconstruction, of the flow, and what is minimised
    each, null = (slice(None), None, None), torch.full_like(labels, CLASSES)
    z = model.generative_encoder(d["register_noise"], d["register_t"], null, images)  # tokenize
    t = d["noised_t"][each]
    decoded = model.decode(torch.where(d["noised"][each], t * z + (1 - t) * d["noise"], z))
    reconstruction, flow = (decoded - images).square().mean(), 0.0
    z = z.detach()  # the flow loss shapes the weights, not the latents that it is given
    for t, noise, dropped in zip(d["flow_t"], d["flow_noise"], d["dropped"], strict=True):
        noisy = t[each] * z + (1 - t[each]) * noise
        clean = model.generative_encoder(noisy, t, torch.where(dropped, CLASSES, labels))  # denoise
        flow = flow + ((clean - z) / (1 - t).clamp_min(0.05)[each]).square().mean()  # of the velocities
    return reconstruction, flow, PIXEL_WEIGHT * reconstruction + FLOW_WEIGHT * flow


def optimizers(model, lr):  # Muon for the matrices, AdamW for what goes in and out and for all else
    ends = ("registers", "class_token", "last_modulation", "latents_out")
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith(ends)}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    muon = torch.optim.Muon(matrices.values(), lr, weight_decay=0.0, eps=1e-6, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(others, lr, eps=1e-6, weight_decay=0.0)


def step(model, average, both, images, labels, d):
    found = losses(model, images, labels, d)
    found[-1].backward()
    nn.utils.clip_grad_norm_(model.parameters(), 3.0)
    for optimizer in both:
        optimizer.step()
        optimizer.zero_grad()
    for mean, p in zip(average.parameters(), model.parameters(), strict=True):
        mean.data.lerp_(p.data, 1 - 0.995)
    return [loss.item() for loss in found]


if __name__ == "__main__":
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    images, model, steps = images.float().view(-1, 1, 8, 8) / 16, Unite(), 1000
    average, both = copy.deepcopy(model), optimizers(model, 6e-3)
    for i in range(steps):
        for optimizer in both:
            optimizer.param_groups[0]["lr"] = 6e-3 * min(1, i / 50) * (1 + math.cos(math.pi * i / steps)) / 2
        chosen = torch.randperm(len(images))[:B]
        found = step(model, average, both, images[chosen], labels[chosen], draw(B))
        if i % 50 == 0:
            print("step {}  reconstruction {:.4f}  flow {:.4f}  total {:.4f}".format(i, *found))
