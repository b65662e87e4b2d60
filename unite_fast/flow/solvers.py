"""Fixed-step solvers of the sampling ODE dz/dt = (x0(t, z) - z) r(t), with r(t) = 1 / max(1 - t, 0.05).

Everything about the times is decided on the host before the first step, and nothing is read back from the device: a
solution is a fixed sequence of launches, fit for torch.compile and CUDA graphs.

euler and heun are the official ones: the velocity at the grid's points, guidance wherever the point lies inside the
interval. The multistep solvers use one evaluation per step and the predictions of earlier steps:

    ab2       Adams-Bashforth of order 2 on the velocity
    dpmpp2m   DPM-Solver++(2M) in x0 form (Lu et al., 2022): x0 linear in log(t / sigma)
    exp3      exponential Adams-Bashforth: the linear part exactly, x0 as a polynomial in phi through the last three
              predictions; on arrival the step is done once more with the prediction found there, which costs nothing
              because the next step needs it anyway (as in UniPC, Zhao et al., 2023): order 4; on a grid even in
              phi(t) = log((t + 0.05) / (1.05 - t)), dense at both ends

With A(t) the integral of r, sigma(t) = exp(-A(t)) equals 1 - t up to t = 0.95, and

    z(s) = sigma(s)/sigma(t) z(t) + integral from t to s of r(u) sigma(s)/sigma(u) x0(u) du.

Guidance makes x0 jump at the interval's ends. The multistep solvers move the nearest grid point there, guide a step
as a whole, and forget earlier predictions after a jump. Each end needs a point of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from unite_fast.base.errors import UserError
from unite_fast.config import SampleConfig, choices
from unite_fast.flow import EPS, inside

Predict = Callable[[float, Tensor, bool], Tensor]  # (t, z, guided) -> x0
MULTISTEP = ("ab2", "dpmpp2m", "exp3")
FIXED = tuple(name for name in choices(SampleConfig, "solver") if name != "dopri5")
KINK = 1 - EPS  # where r(t) stops growing
NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)


def rate(t: float) -> float:
    """r(t)."""
    return 1 / max(1 - t, EPS)


def log_decay(t: float) -> float:
    """A(t), the integral of r from 0 to t."""
    return -math.log(1 - t) if t <= KINK else -math.log(EPS) + (t - KINK) / EPS


def phi(t: Any) -> Any:
    """The variable in which exp3 interpolates; a float or an array."""
    return np.log((t + EPS) / (1 + EPS - t))


def phi_grid(points: int) -> list[float]:
    """Times from 0 to 1, even in phi."""
    e = np.exp(np.linspace(phi(0.0), phi(1.0), points)[1:-1])
    return [0.0, *((e * (1 + EPS) - EPS) / (1 + e)).tolist(), 1.0]


def euler(predict: Predict, z: Tensor, times: Sequence[float], interval: tuple[float, float]) -> Tensor:
    for t, s in itertools.pairwise(times):
        z = z + (s - t) * rate(t) * (predict(t, z, inside(t, interval)) - z)
    return z


def heun(predict: Predict, z: Tensor, times: Sequence[float], interval: tuple[float, float]) -> Tensor:
    for t, s in itertools.pairwise(times):
        v = rate(t) * (predict(t, z, inside(t, interval)) - z)
        ahead = z + (s - t) * v
        w = rate(s) * (predict(s, ahead, inside(s, interval)) - ahead)
        z = z + (s - t) / 2 * (v + w)
    return z


class Step(NamedTuple):
    """z(s) = decay z(t) + sum of weights[j] x0_j over the newest predictions, this step's first.

    corrector: weights that do the step before once more, with the prediction at t in front; empty for no correction.
    """

    t: float
    guided: bool
    decay: float
    weights: tuple[float, ...]
    corrector: tuple[float, ...]


def exponential_weights(t: float, s: float, nodes: Sequence[float]) -> tuple[float, ...]:
    """Integrals of r(u) sigma(s)/sigma(u) L_j(u) from t to s, L_j the Lagrange polynomials in phi."""
    at = [float(phi(node)) for node in nodes]
    total = np.zeros(len(nodes))
    for a, b in ((t, min(s, KINK)), (max(t, KINK), s)):  # the integrand is smooth on either side of the kink
        if b > a:
            u = (a + b) / 2 + (b - a) / 2 * NODES
            kernel = np.array([rate(x) * math.exp(log_decay(x) - log_decay(s)) for x in u]) * WEIGHTS * (b - a) / 2
            for j, own in enumerate(at):
                others = [(phi(u) - k) / (own - k) for i, k in enumerate(at) if i != j]
                total[j] += kernel @ np.prod([np.ones_like(u), *others], axis=0)
    return tuple(float(w) for w in total)


def jumps(steps: int, interval: Sequence[float]) -> list[float]:
    """The ends of the guidance interval that lie inside (0, 1). Raises UserError when the grid has too few points."""
    ends = [end for end in interval if 0 < end < 1]
    if steps <= len(ends):
        raise UserError(
            f"guidance on {list(interval)} with a multistep solver needs at least {len(ends) + 1} steps, got {steps}; "
            "raise the steps or widen the interval"
        )
    return ends


def align(times: Sequence[float], interval: Sequence[float]) -> list[float]:
    """The grid with interior points moved onto the ends of the guidance interval: the nearest, but one for each end."""
    aligned, last = list(times), len(times) - 2

    def distance(places: tuple[int, ...]) -> float:
        return sum(abs(times[i] - end) for i, end in zip(places, ends, strict=True))

    ends = jumps(len(times) - 1, interval)
    places = tuple(min(range(1, last + 1), key=lambda i: abs(times[i] - end)) for end in ends)
    if len(set(places)) < len(places):
        i = places[0]
        places = min([p for p in ((i - 1, i), (i, i + 1)) if p[0] > 0 and p[1] <= last], key=distance)
    for i, end in zip(places, ends, strict=True):
        aligned[i] = end
    return aligned


def plan(solver: str, times: Sequence[float], interval: tuple[float, float] | None) -> list[Step]:
    """The steps of a multistep solver. ``interval`` is None without guidance: there is then no jump."""
    times = list(times) if interval is None else align(times, interval)
    steps: list[Step] = []
    earlier: list[float] = []  # times of the predictions that can be used, newest first
    for t, s in itertools.pairwise(times):
        guided = interval is not None and interval[0] < (t + s) / 2 < interval[1]
        if steps and guided != steps[-1].guided:
            earlier = []
        corrector = exponential_weights(earlier[0], t, [t, *earlier]) if solver == "exp3" and earlier else ()
        earlier = [t, *earlier][: 3 if solver == "exp3" else 2]
        decay = math.exp(log_decay(t) - log_decay(s))
        if solver == "exp3":
            weights = exponential_weights(t, s, earlier)
        elif len(earlier) == 1 or earlier[1] == 0:  # log(t / sigma) of t = 0 is infinitely far: no slope
            weights = (1 - decay,)
        else:
            h, h_before = (math.log(b / a) + log_decay(b) - log_decay(a) for a, b in ((t, s), (earlier[1], t)))
            slope = h / h_before / 2
            weights = ((1 - decay) * (1 + slope), -(1 - decay) * slope)
        steps.append(Step(t, guided, decay, weights, corrector))
    return steps


def multistep(
    solver: str, predict: Predict, z: Tensor, times: Sequence[float], interval: tuple[float, float] | None
) -> Tensor:
    """dpmpp2m and exp3."""
    predictions: list[Tensor] = []
    decayed = z  # the state that the last step started from, times its decay
    for step in plan(solver, times, interval):
        predictions = [predict(step.t, z, step.guided), *predictions]
        if step.corrector:
            z = _combined(decayed, step.corrector, predictions)
        decayed = step.decay * z
        predictions = predictions[: len(step.weights)]
        z = _combined(decayed, step.weights, predictions)
    return z


def _combined(z: Tensor, weights: Sequence[float], predictions: Sequence[Tensor]) -> Tensor:
    for weight, x0 in zip(weights, predictions, strict=True):
        z = z + weight * x0
    return z


def adams_bashforth(
    predict: Predict, z: Tensor, times: Sequence[float], interval: tuple[float, float] | None
) -> Tensor:
    """ab2: z + h ((1 + h/2k) v - h/2k v_before), k the step before."""
    times = list(times) if interval is None else align(times, interval)
    before: tuple[float, bool, Tensor] | None = None
    for t, s in itertools.pairwise(times):
        guided = interval is not None and interval[0] < (t + s) / 2 < interval[1]
        v = rate(t) * (predict(t, z, guided) - z)
        slope = (s - t) / (t - before[0]) / 2 if before is not None and before[1] == guided else 0.0
        z = z + (s - t) * ((1 + slope) * v - slope * before[2] if slope and before is not None else v)
        before = (t, guided, v)
    return z


def solve(
    solver: str, predict: Predict, z: Tensor, times: Sequence[float], interval: tuple[float, float] | None
) -> Tensor:
    """The state at times[-1] from ``z`` at times[0]. ``interval``: where guidance acts, None for nowhere."""
    if solver == "ab2":
        return adams_bashforth(predict, z, times, interval)
    if solver in MULTISTEP:
        return multistep(solver, predict, z, times, interval)
    return {"euler": euler, "heun": heun}[solver](predict, z, times, interval or (2.0, 3.0))
