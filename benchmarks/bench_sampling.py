"""Evaluations, network passes and time of the samplers, at equal distance from the exact solution of the ODE.

    python benchmarks/bench_sampling.py runs/digits                # scale 1 and the run's guidance
    python benchmarks/bench_sampling.py runs/digits --images 16 --rounds 3

The exact solution is torchdiffeq's dopri5 in float64 at rtol 1e-7 (without guidance) and exp3 with 500 steps, which
agree; the latter alone is used with guidance, where dopri5's steps stumble over the interval's ends. The official
sampler is torchdiffeq's odeint with dopri5, rtol 1e-3, atol 1e-6, on the same network in the same batch. For each
solver the smallest number of steps whose latents are as close as the official sampler's, and within 1e-3, is reported:
distance is |z - exact| / |exact| over the batch. Times are interleaved in one process.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from harness import interleaved, quantiles, ratio, record
from torch import Tensor

from unite_fast import checkpoint, flow, sampling
from unite_fast.flow import solvers
from unite_fast.model.flops import encoder_forward
from unite_fast.model.unite import UNITE

STEPS = (8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 40, 48, 56, 64, 80, 100, 140, 200)
CLOSE = 1e-3


class Problem:
    """One batch of noise and labels with one guidance; every solver meets the same."""

    def __init__(self, model: UNITE, count: int, scale: float, interval: tuple[float, float]) -> None:
        self.model, self.scale, self.interval = model, scale, interval
        self.labels = torch.arange(count) % model.config.num_classes
        self.noise = sampling.initial_noise(model, range(count), "cpu")
        self.exact = self.fixed("exp3", 500)[0].double()

    def field(self) -> sampling.GuidedField:
        return sampling.GuidedField(self.model, self.labels, self.scale, self.interval, "norm_first")

    def odeint(self, rtol: float, atol: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, int]]:
        from torchdiffeq import odeint

        field = self.field()

        def velocity(t: Tensor, z: Tensor) -> Tensor:
            return flow.velocity(field.predict(t, z.float()).to(z.dtype), z, t)

        grid = flow.time_grid(50, self.model.time_shift).to(dtype)
        result: Tensor = odeint(velocity, self.noise.to(dtype), grid, rtol=rtol, atol=atol, method="dopri5")[-1]
        return result, {"evaluations": field.evaluations, "passes": field.passes}

    def fixed(self, solver: str, steps: int) -> tuple[Tensor, dict[str, int]]:
        field = self.field()
        shift = self.model.time_shift
        times = solvers.phi_grid(steps + 1) if solver == "exp3" else flow.time_grid(steps + 1, shift).tolist()
        latents = solvers.solve(solver, field.at, self.noise, times, None if self.scale == 1 else self.interval)
        return latents, {"evaluations": field.evaluations, "passes": field.passes}

    def distance(self, latents: Tensor) -> float:
        return float((latents.double() - self.exact).norm() / self.exact.norm())


def fewest(problem: Problem, solver: str, target: float) -> int | None:
    """The smallest of STEPS from which on the solver stays within ``target``."""
    best = None
    for steps in reversed(STEPS):
        if problem.distance(problem.fixed(solver, steps)[0]) > target:
            break
        best = steps
    return best


def tightened(problem: Problem) -> float | None:
    """The loosest rtol of a decade's halves at which odeint comes within CLOSE."""
    for rtol in (5e-4, 2e-4, 1e-4, 5e-5, 2e-5, 1e-5):
        if problem.distance(problem.odeint(rtol, rtol * 1e-3)[0]) <= CLOSE:
            return rtol
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="run folder of a trained model")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.set_grad_enabled(False)
    model, config = checkpoint.load_model(arguments.run)
    pass_flops = encoder_forward(config.model, config.model.num_latents)
    rows = []
    for scale in sorted({1.0, config.sample.cfg_scale}):
        problem = Problem(model, arguments.images, scale, config.sample.cfg_interval)
        if scale == 1:
            agreement = problem.distance(problem.odeint(1e-7, 1e-9, torch.float64)[0])
            print(f"odeint in float64 at rtol 1e-7 and the exact solution differ by {agreement:.1e}")
            if agreement > CLOSE / 4:
                sys.exit("the two references disagree; nothing is reported")
        official = problem.distance(problem.odeint(sampling.RTOL, sampling.ATOL)[0])
        variants = {"odeint, official": lambda p=problem: p.odeint(sampling.RTOL, sampling.ATOL)}
        rtol = tightened(problem)
        if rtol is not None:
            variants[f"odeint, rtol {rtol:g}"] = lambda p=problem, r=rtol: p.odeint(r, r * 1e-3)
        for target, name in ((official, "as close"), (CLOSE, "1e-3")):
            for solver in solvers.FIXED:
                steps = fewest(problem, solver, target)
                if steps is not None:
                    variants[f"{solver} {steps}, {name}"] = lambda p=problem, s=solver, n=steps: p.fixed(s, n)
        times = interleaved(variants, torch.device("cpu"), arguments.rounds)
        print(f"\nguidance {scale:g} in {list(config.sample.cfg_interval)}, {arguments.images} images")
        print(f"{'solver':28}{'NFE':>6}{'passes':>8}{'distance':>11}{'ms':>9}{'images/s':>10}{'faster':>9}")
        for name, call in variants.items():
            latents, counts = call()
            ms = quantiles(times[name])["median"]
            row = {"scale": scale, "solver": name, "images": arguments.images, "distance": problem.distance(latents)}
            row |= counts | {"ms": ms, "images_per_second": arguments.images * 1e3 / ms}
            row |= {"gflop_per_image": counts["passes"] * pass_flops / 1e9, "rounds": arguments.rounds}
            row |= {"faster_than_official": ratio(times, "odeint, official", name)["median"]}
            rows.append(row)
            print(
                f"{name:28}{row['evaluations']:>6}{row['passes']:>8}{row['distance']:>11.1e}{ms:>9.0f}"
                f"{row['images_per_second']:>10.1f}{row['faster_than_official']:>8.2f}x"
            )
    print(f"recorded in {record('sampling', torch.device('cpu'), rows)}")


if __name__ == "__main__":
    main()
