"""What a solver asks the network for: x0 at one time, guided or not; computed afresh, or replayed from a CUDA graph.

Shape letters: B batch, K registers, C latent dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from unite_fast import flow
from unite_fast.data.batch import slots_taken
from unite_fast.efficiency import graph
from unite_fast.model.flops import denoiser_flops
from unite_fast.model.unite import UNITE

# (z, labels, t, scale, sizes) -> x0
X0 = Callable[[Tensor, Tensor, Tensor, Tensor | float, Tensor | None], Tensor]


def _uncached_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast as it is, but without its cache of cast weights, which a graph would keep reading after it is freed."""
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)


class Replays:
    """The captured evaluations of one model, for ``GuidedField``: see ``efficiency.graph`` for what a capture demands.

    Times, labels, sizes and the guidance scale are inputs, so one graph serves all steps, tiles and scales. There is
    one per guidance order (and one unguided), batch shape and precision (autocast).
    """

    def __init__(self, device: torch.device) -> None:
        self.place = graph.Place.on(device)
        self.known: dict[tuple[object, ...], graph.Captured] = {}

    def __call__(
        self, name: str, function: X0, z: Tensor, labels: Tensor, t: float, scale: float, sizes: Tensor | None = None
    ) -> Tensor:
        """x0 (B, K, C), a tensor of its own. Raises RuntimeError where gradients are recorded."""
        if torch.is_grad_enabled():
            raise RuntimeError("a replayed evaluation records no gradients: call it under torch.no_grad()")
        kind = z.device.type
        key = name, tuple(z.shape), sizes is None, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        if key not in self.known:

            def evaluate(z: Tensor, labels: Tensor, t: Tensor, scale: Tensor, sizes: Tensor | None = None):
                with _uncached_autocast(z.device):
                    return {"x0": function(z, labels, t, scale, sizes)}

            self.known[key] = graph.Captured(f"the evaluation {name}", evaluate, self.place)
        numbers = {"t": t, "scale": scale}
        inputs = {"z": z, "labels": labels} | {n: torch.full((), v, device=z.device) for n, v in numbers.items()}
        return self.known[key](**inputs if sizes is None else inputs | {"sizes": sizes})["x0"]


def there(x: Tensor, sizes: Tensor | None) -> Tensor:
    """Latents (B, K, C), 0 where a sample of ``sizes`` (B,) has no register."""
    return x if sizes is None else x * slots_taken(sizes, x.shape[1])[:, :, None]


class GuidedField:
    """The guided x0 prediction and the ODE's velocity for given labels, and sizes where samples have some.

    guide: a weaker model of the same latents, whose prediction for the same labels stands in the null class's place
    (autoguidance, Karras et al. 2024, arXiv 2406.02507, equation 5); it is combined after the LayerNorm, each model's
    own, so the order is not cfg_first.
    Counts ``evaluations`` (NFE) and ``passes``, the forward passes of the network per image: two where guidance acts,
    one and the guide's by its share of FLOPs.
    """

    def __init__(
        self,
        model: UNITE,
        labels: Tensor,
        scale: float,
        interval: tuple[float, float],
        order: str,
        replays: Replays | None = None,
        sizes: Tensor | None = None,
        guide: UNITE | None = None,
    ) -> None:
        self.model, self.labels, self.order, self.replays, self.sizes = model, labels, order, replays, sizes
        self.scale, self.interval, self.guide = scale, interval, guide
        self.second = 1.0 if guide is None else denoiser_flops(guide.config) / denoiser_flops(model.config)
        self.evaluations, self.passes = 0, 0.0

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        """The velocity (B, K, C) at a scalar tensor t, for adaptive solvers, which read their times back anyway."""
        return flow.velocity(self.predict(t, z), z, t)

    def predict(self, t: Tensor, z: Tensor) -> Tensor:
        """x0 (B, K, C), guided if t lies in the interval."""
        return self.at(float(t), z, flow.inside(float(t), self.interval))

    def at(self, t: float, z: Tensor, guided: bool) -> Tensor:
        """x0 (B, K, C) at a time that the host knows, guided if it says so: nothing is read from the device."""
        guided = guided and self.scale != 1
        self.evaluations += 1
        self.passes += 1 + guided * self.second
        name, function = "plain", self._plain
        if guided and self.guide is None:
            name, function = self.order, self._guided
        elif guided:
            name, function = f"{self.order} by a model", self._autoguided
        if self.replays is not None:
            return self.replays(name, function, z, self.labels, t, self.scale, self.sizes)
        return function(z, self.labels, torch.full((), t, device=z.device), self.scale, self.sizes)

    def _plain(
        self, z: Tensor, labels: Tensor, t: Tensor, scale: Tensor | float, sizes: Tensor | None = None
    ) -> Tensor:
        raw = self.model.denoise_raw(z, t.expand(len(z)), labels, sizes)
        return there(self.model.normalise(raw.to(z.dtype)), sizes)

    def _guided(
        self, z: Tensor, labels: Tensor, t: Tensor, scale: Tensor | float, sizes: Tensor | None = None
    ) -> Tensor:
        """Both halves pass together. Under bf16 they are combined in the state's precision, not in theirs."""
        both = torch.cat([torch.full_like(labels, self.model.null_class), labels])
        twice = None if sizes is None else torch.cat([sizes, sizes])
        raw = self.model.denoise_raw(torch.cat([z, z]), t.expand(2 * len(z)), both, twice).to(z.dtype)
        null, conditional = raw.chunk(2)
        return there(flow.combine(null, conditional, scale, self.order, self.model.normalise), sizes)

    def _autoguided(
        self, z: Tensor, labels: Tensor, t: Tensor, scale: Tensor | float, sizes: Tensor | None = None
    ) -> Tensor:
        assert self.guide is not None
        weak, own = (
            model.normalise(model.denoise_raw(z, t.expand(len(z)), labels, sizes).to(z.dtype))
            for model in (self.guide, self.model)
        )
        x0 = weak + scale * (own - weak)
        return there(self.model.normalise(x0) if self.order == "both" else x0, sizes)
