"""Autoguidance: a weaker model in the null class's place (Karras et al. 2024, arXiv 2406.02507).

x0 = weak + w (own - weak), both for the asked class. It also guides a model without classes, and costs less than the
null class where the weaker model is smaller. Both must mean the same by a latent: UNITE learns its latents while it
learns to denoise them, so another run's are other ones, however good it is. What fits are another average of the same
run, one of its late checkpoints, or a denoiser trained on frozen latents. ``checkpoint.guide`` loads it.
"""

from __future__ import annotations

import torch

from unite_fast import sampling
from unite_fast.base.errors import UserError
from unite_fast.data.batch import slots_taken
from unite_fast.flow import interpolate
from unite_fast.model.unite import UNITE
from unite_kernels import philox

T = 0.3  # at which the predictions are compared: so noisy that they show what a model knows of the latents
STEPS = 8  # of exp3, for the latents that are predicted
NOISE_STREAM = (1 << 19) + 1  # of the noise that they are predicted from


@torch.no_grad()
def explained(model: UNITE, guide: UNITE) -> float:
    """How much of the variance of a tile of samples' latents the guide's predictions from time T explain; 1 is all.

    Below 0 they are further off than the mean of all latents is.
    """
    device = next(model.parameters()).device
    seeds = torch.arange(sampling.TILE, device=device)
    labels = seeds % max(1, model.config.num_classes)
    sizes = model.modality.draw_sizes(model, seeds.cpu(), labels)
    sizes = None if sizes is None else sizes.to(device)
    _, z = sampling.sample(model, labels, seeds=seeds, sizes=sizes, return_latents=True, solver="exp3", steps=STEPS)
    times = torch.full((len(seeds),), T, device=device)
    zt = interpolate(z, philox.normal(0, NOISE_STREAM, seeds, model.latent_shape), times)
    taken = torch.ones_like(z[..., 0], dtype=torch.bool) if sizes is None else slots_taken(sizes, z.shape[1])
    there, predicted = z[taken], guide.denoise(zt, times, labels, sizes)[taken].to(z.dtype)
    return float(1 - (predicted - there).square().sum() / (there - there.mean(0)).square().sum())


def check_latents(model: UNITE, guide: UNITE, path: str) -> float:
    """``explained``, if it is positive. Raises UserError for a model of other latents."""
    share = explained(model, guide)
    if not share > 0:
        raise UserError(
            f"--autoguidance {path} has other latents: what it makes of noised ones is further off than their mean is "
            f"({share:.2f} of the variance explained); take another average or a late checkpoint of the same run"
        )
    return share
