"""What a small model computes, of our own computing, for clones that have no official values beside them.

    python tests/golden_small.py      writes golden_small.json: only after a change that is meant to change results, and
                                      where tests/test_golden.py passes against the official values

Weights, images and draws are functions of numbers, so no generator of a library decides them. Of each tensor two
numbers are kept: its norm, and its product with a fixed random tensor, which any other tensor would miss.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from stepping import backward, load_tiny
from torch import Tensor

from unite_fast import sampling
from unite_fast.config import ObjectiveConfig, OptimConfig
from unite_fast.model.unite import UNITE, build
from unite_fast.objective import Draws
from unite_fast.optim.optimizer import Optimizer
from unite_kernels import philox

FILE = Path(__file__).with_suffix(".json")


def drawn(number: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """A normal float32 tensor that ``number`` determines."""
    return philox.normal(number, 3, torch.zeros(1, dtype=torch.int64), tuple(shape))[0]


def model() -> UNITE:
    made = build(load_tiny().model)
    with torch.no_grad():
        for number, (name, value) in enumerate(sorted(made.state_dict().items())):
            scale = 0.1 if value.ndim < 2 else value.shape[-1] ** -0.5
            value.copy_(drawn(number, value.shape) * scale + ("norm" in name and name.endswith("weight")))
    return made


def kept(tensor: Tensor, number: int) -> list[float]:
    """Its norm, and its product with a random tensor of norm 1 or so, in float64."""
    x = tensor.detach().double()
    return [float(x.norm()), float((x * drawn(1000 + number, x.shape).double()).sum() / max(1, x.numel()) ** 0.5)]


def computed() -> dict[str, list[float]]:
    """Latents, predictions, losses, all gradients, one update, guided samples."""
    network, objective = model(), ObjectiveConfig(flow_steps=2)
    images = drawn(500, (4, 1, 8, 8)).sigmoid()
    labels, samples = torch.tensor([0, 3, 7, 9]), torch.arange(4)
    draws = Draws.make(network, objective, 5, samples)
    with torch.no_grad():
        z = network.tokenize(images, *draws.tokenizer())
        found = {"latents": z, "image": network.decode(z), "decoder's input": draws.decoder_input(z, objective)}
        found["prediction"] = network.denoise(draws.flow_noise[0], draws.flow_t[0], labels)
        how = {"steps": 4, "cfg_scale": 2.0, "cfg_interval": (0.1, 1.0)}
        for solver in ("heun", "exp3"):
            found[f"samples {solver}"] = sampling.sample(network, labels, seeds=[1, 2, 3, 4], solver=solver, **how)
    found |= {f"loss {name}": loss for name, loss in backward(network, images, labels, draws, objective).items()}
    parameters = dict(network.named_parameters())
    found |= {f"gradient {name}": p.grad for name, p in parameters.items() if p.grad is not None}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = Optimizer(network, OptimConfig(newton_schulz_dtype="fp32"))
    found["gradient norm"] = optimizer.step(torch.tensor(1e-3))
    found |= {f"update {name}": p.detach() - before[name] for name, p in optimizer.parameters.items()}
    found |= {f"average {name}": value for name, value in optimizer.ema.items() if value.ndim == 1}
    return {name: kept(tensor, number) for number, (name, tensor) in enumerate(sorted(found.items()))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in computed().items()) + "\n}\n")
