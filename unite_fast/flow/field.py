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
from unite_fast.model.unite import UNITE

WARM_UP = 3  # runs before a capture: libraries choose their kernels and workspaces there
# (z, labels, t, scale, sizes) -> x0
X0 = Callable[[Tensor, Tensor, Tensor, Tensor | float, Tensor | None], Tensor]


def _uncached_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast as it is, but without its cache of cast weights, which a graph would keep reading after it is freed."""
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)


def _conditions(z: Tensor, labels: Tensor, sizes: Tensor | None) -> dict[str, object]:
    """What has to be at every replay as it was at the capture."""
    kind = z.device.type
    return {
        "fixed shape": (tuple(z.shape), tuple(labels.shape)),
        "fixed dtype": (z.dtype, labels.dtype),
        "fixed device": (z.device, labels.device),
        "fixed precision": (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
        "no gradients": torch.is_grad_enabled(),
        "sizes or none": sizes is not None,
    }


class Replay:
    """``function(z, labels, t, scale, sizes)`` on buffers that stay: captured at the first call, then replayed.

    t and scale reach it as 0-d float32 tensors on the device. Preconditions, checked by name at every call: fixed
    shape, dtype, device and precision (autocast), and no gradients. Two that cannot be checked: the weights are changed
    in place only, and the function reads nothing back (the capture of one that does fails with CUDA's own error). On a
    CPU, or with ``capture`` false, the function runs at each call on the same buffers.
    """

    def __init__(
        self,
        function: X0,
        z: Tensor,
        labels: Tensor,
        capture: bool,
        pool: object = None,
        sizes: Tensor | None = None,
    ) -> None:
        """z (B, K, C), labels, sizes (B,): of the shapes that will come. pool: memory shared with other graphs."""
        if torch.is_grad_enabled():
            raise RuntimeError("a replayed evaluation records no gradients: call it under torch.no_grad()")
        self.conditions = _conditions(z, labels, sizes)
        self.function = function
        self.z, self.labels = z.clone(), labels.clone()
        self.sizes = None if sizes is None else sizes.clone()
        self.t, self.scale = torch.zeros(2, device=z.device).unbind()
        self.graph: torch.cuda.CUDAGraph | None = None
        if capture:
            self._capture(pool)
        else:
            self.result = torch.empty_like(z)

    def _run(self) -> Tensor:
        with _uncached_autocast(self.z.device):
            return self.function(self.z, self.labels, self.t, self.scale, self.sizes)

    def _capture(self, pool: object) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):  # pyright: ignore[reportArgumentType]
            self.result = self._run()

    def __call__(self, z: Tensor, labels: Tensor, t: float, scale: float, sizes: Tensor | None = None) -> Tensor:
        """x0 (B, K, C), a tensor of its own. Raises RuntimeError naming a precondition that does not hold."""
        for name, now in _conditions(z, labels, sizes).items():
            if now != self.conditions[name]:
                raise RuntimeError(
                    f"replayed evaluation: {name} is required; it had {self.conditions[name]}, got {now}"
                )
        self.z.copy_(z)
        self.labels.copy_(labels)
        if self.sizes is not None and sizes is not None:
            self.sizes.copy_(sizes)
        self.t.fill_(t)
        self.scale.fill_(scale)
        if self.graph is None:
            self.result.copy_(self._run())
        else:
            self.graph.replay()
        return self.result.clone()


class Replays:
    """The captured evaluations of one model: one per guidance order (and one unguided) and batch shape.

    Times, labels and the guidance scale are inputs, so one capture serves all steps, tiles and scales.
    """

    def __init__(self, capture: bool) -> None:
        """capture: record CUDA graphs; false keeps the buffers and runs the function, on any device."""
        self.capture = capture
        self.pool = torch.cuda.graph_pool_handle() if capture else None
        self.known: dict[tuple[object, ...], Replay] = {}

    def __call__(
        self, name: str, function: X0, z: Tensor, labels: Tensor, t: float, scale: float, sizes: Tensor | None = None
    ) -> Tensor:
        key = (name, tuple(z.shape))
        if key not in self.known:
            self.known[key] = Replay(function, z, labels, self.capture, self.pool, sizes)
        return self.known[key](z, labels, t, scale, sizes)


def there(x: Tensor, sizes: Tensor | None) -> Tensor:
    """Latents (B, K, C), 0 where a sample of ``sizes`` (B,) has no register."""
    return x if sizes is None else x * slots_taken(sizes, x.shape[1])[:, :, None]


class GuidedField:
    """The guided x0 prediction and the ODE's velocity for given labels, and sizes where samples have some.

    Counts ``evaluations`` (NFE) and ``passes``, the forward passes of the network per image: two where guidance acts.
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
    ) -> None:
        self.model, self.labels, self.order, self.replays, self.sizes = model, labels, order, replays, sizes
        self.scale, self.interval = scale, interval
        self.evaluations = self.passes = 0

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
        self.passes += 1 + guided
        name, function = (self.order, self._guided) if guided else ("plain", self._plain)
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
