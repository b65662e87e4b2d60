"""What denoising gives back: predicted against clean latents over t (arXiv 2603.22283, Figure 6 right), and, of images,
what the decoder makes of the prediction (Figure 7).

Shape letters: B samples of a tile, K registers, C latent dim, T times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from unite_fast.analysis.walk import ROUNDING, Denoised, Tile
from unite_fast.flow import EPS
from unite_fast.modality.images import psnr
from unite_fast.model.unite import UNITE
from unite_fast.parallel.distributed import Ranks

TIMES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LIVE = 0.5
SMALL = 0.01  # of the largest eigenvalue: what is below is not in use
DEFINITION = {
    "cosine": "mean over samples and registers of the cosine between clean latents z and their prediction from "
    "z_t = t z + (1 - t) eps, without a class",
    "cosine_mean": "the same of clean latents and their mean over samples: what a prediction that knows nothing of z "
    "reaches; a cosine says something of the prediction by what it has above this",
    "explained": "1 - (sum of (prediction - z)^2) / (sum of (z - mean over samples of z)^2), each coordinate of each "
    "register by its own mean, over registers that are there: the share of the latents' variance that the prediction "
    "explains; 0 for their mean, negative for what is farther from them",
    "velocity_loss": "mean over samples and latents that are there of ((prediction - z) / max(1 - t, 0.05))^2",
    "x0_loss": "mean of (prediction - z)^2",
    "latent_std": "standard deviation over samples of each latent coordinate, mean over coordinates; absent registers "
    "count as 0",
    "latent_spectrum": "eigenvalues of each register's covariance over samples, largest first, mean over registers; 0 "
    "at the level of rounding",
    "latent_dimensions": "eigenvalues above 1 % of the largest, mean over registers: how many numbers of a latent are "
    "in use; the LayerNorm holds its norm, which takes one of them",
    "gains": "absolute gains of the latent LayerNorm, sorted; live: how many are at least 0.5, half of the first",
    "psnr": "dB, mean over images: the decoder's image of the prediction at t, clamped to [0, 1], against the input; "
    "psnr_clean: of the clean latents",
}


def gains(model: UNITE) -> dict[str, Any]:
    """{"gains", "live"} of the latent LayerNorm."""
    found = model.encoder_layer_norm.weight.detach().abs().sort().values.tolist()
    return {"gains": found, "live": sum(gain >= LIVE for gain in found)}


class Trajectory:
    """Sums over samples for each time; ``images``: whether latents and predictions are decoded and compared in pixels,
    a pass of the decoder for each time."""

    def __init__(
        self,
        device: torch.device,
        shape: tuple[int, int],
        images: bool,
        times: Sequence[float] = TIMES,
    ) -> None:
        """shape: (K, C)."""
        self.times, self.images = tuple(times), images
        zeros = {"dtype": torch.float64, "device": device}
        # cosine, registers, velocity, x0, samples, PSNR, squared errors
        self.sums = torch.zeros(len(self.times), 7, **zeros)
        self.clean = torch.zeros(2, **zeros)  # PSNR, samples
        self.moments = torch.zeros(2, *shape, **zeros)
        self.there = torch.zeros(shape[0], **zeros)  # samples that have a register
        self.directions = torch.zeros(*shape, **zeros)  # sums of z / |z|
        self.products = torch.zeros(*shape, shape[1], **zeros)  # of each register's latents with themselves

    def _psnr(self, tile: Tile, latents: Tensor) -> Tensor:
        if not self.images:
            return latents.new_zeros(())
        return psnr(tile.content["images"], tile.model.decode(latents).float().clamp(0, 1)).double().sum()

    def begin(self, tile: Tile) -> None:
        z = tile.latents.double()
        self.clean += torch.stack([self._psnr(tile, tile.latents).double(), z.new_tensor(len(z))])
        self.moments += torch.stack([z.sum(0), z.square().sum(0)])
        self.products += torch.einsum("bkc,bkd->kcd", z, z)
        self.there += tile.taken.sum(0)
        self.directions += normalize(z, dim=2).sum(0)  # absent latents are 0

    def add(self, tile: Tile, denoised: Denoised) -> None:
        taken, z, x0 = tile.taken, tile.latents.double(), denoised.prediction.double()
        cosine = cosine_similarity(z, x0, dim=2)[taken].sum()
        errors = (x0 - z).square().sum(2) * taken
        squares = errors.sum(1) / taken.sum(1).clamp_min(1) / z.shape[2]
        velocity = squares.sum() / max(1 - denoised.t, EPS) ** 2
        counts = [z.new_tensor(float(taken.sum())), velocity, squares.sum(), z.new_tensor(float(len(z)))]
        decibels = self._psnr(tile, denoised.prediction).double()
        self.sums[self.times.index(denoised.t)] += torch.stack([cosine, *counts, decibels, errors.sum()])

    def reduce(self, ranks: Ranks) -> None:
        ranks.sum_([self.sums, self.clean, self.moments, self.products, self.there, self.directions])

    def _constant(self) -> tuple[Tensor, float]:
        """Of the mean over samples as a prediction: its squared errors, nan where there are none, and its cosine."""
        sums, squares = self.moments
        mean = sums / self.there.clamp_min(1)[:, None]
        errors = (squares - sums * mean).sum()
        cosine = (self.directions * normalize(mean, dim=1)).sum() / self.there.sum()
        return torch.where(errors > ROUNDING * squares.sum(), errors, torch.nan), float(cosine)

    def result(self) -> dict[str, Any]:
        """{"times", "samples", and by measure a number per time}."""
        cosine, registers, velocity, x0, samples, decibels, errors = self.sums.unbind(1)
        n, (least, cosine_mean) = float(self.clean[1]), self._constant()
        mean = self.moments[0] / n
        variance = (self.moments[1] / n - mean.square()).clamp_min(0)
        eigenvalues = torch.linalg.eigvalsh(self.products / n - mean[:, :, None] * mean[:, None, :])
        rounding = ROUNDING * self.moments[1].sum(1, keepdim=True) / n
        eigenvalues = torch.where(eigenvalues > rounding, eigenvalues, 0.0)
        found: dict[str, Any] = {
            "times": list(self.times),
            "samples": int(n),
            "cosine": (cosine / registers).tolist(),
            "cosine_mean": cosine_mean,
            "explained": (1 - errors / least).tolist(),
            "velocity_loss": (velocity / samples).tolist(),
            "x0_loss": (x0 / samples).tolist(),
            "latent_std": float(variance.sqrt().mean()),
            "latent_spectrum": eigenvalues.flip(1).mean(0).tolist(),
            "latent_dimensions": float((eigenvalues > SMALL * eigenvalues[:, -1:]).sum(1).double().mean()),
        }
        if self.images:
            found["psnr"] = (decibels / samples).tolist()
            found["psnr_clean"] = float(self.clean[0]) / n
        return found
