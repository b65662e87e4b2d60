"""What a run carries from step to step, and under which names a checkpoint holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from unite_fast.efficiency.execution import Execution
from unite_fast.efficiency.precision import Recipe
from unite_fast.model.unite import UNITE
from unite_fast.optim.optimizer import Optimizer

STEPS = "optimizer_steps"  # among the tensors of a save; goes into state.json


@dataclass
class Part:
    """A module that is trained, with its own optimizer and averages, and its precision.

    lr_ratio: its learning rate over that of the run.
    """

    module: nn.Module
    optimizer: Optimizer
    recipe: Recipe = field(default_factory=Recipe)  # not saved
    lr_ratio: float = 1.0  # not saved

    def step(self, lr: Tensor) -> Tensor:
        """One update by the run's learning rate (0-d); the gradient norm before the clip."""
        return self.optimizer.step(lr if self.lr_ratio == 1 else lr * self.lr_ratio)

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{k}": v for k, v in self.module.state_dict().items()}
        for average, values in self.optimizer.averages.items():
            tensors |= {f"{average}.{k}": v for k, v in values.items()}
        return tensors | self.optimizer.state_dict() | {STEPS: self.optimizer.steps}


@dataclass
class TrainState:
    """What a run carries from step to step. ``images_seen`` fixes the data order, every draw and the schedule.

    ``parts[""]`` is UNITE. Another part, say "discriminator", is updated in every step in which the objective has given
    it gradients, and a checkpoint holds it as discriminator.model.*, discriminator.ema.*, ... All ranks must give
    gradients to the same parts in a step, and to the same parameters of a part in all steps that give it any.
    """

    parts: dict[str, Part]
    step: int = 0
    images_seen: int = 0
    best_cfg_scale: float = 0.0  # that the evaluation during training found; 0 before the first
    origin: dict[str, Any] = field(default_factory=dict)  # of the weights that the run began with; empty: of none
    unreadable: dict[int, str] = field(default_factory=dict)  # images that were replaced by others, and why
    execution: Execution = field(default_factory=Execution)  # how a step is computed, as resolved; not saved

    @property
    def model(self) -> UNITE:
        return cast(UNITE, self.parts[""].module)

    @property
    def optimizer(self) -> Optimizer:
        """That of ``model``."""
        return self.parts[""].optimizer

    @property
    def recipe(self) -> Recipe:
        return self.parts[""].recipe

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Of all parts: what is trained, by name."""
        return {prefix(part) + n: p for part, held in self.parts.items() for n, p in held.optimizer.parameters.items()}


def prefix(part: str) -> str:
    """Of the names of a part's tensors in a checkpoint."""
    return f"{part}." if part else ""


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """Every tensor that a checkpoint holds, by its name there, and the optimizers' step counts.

    A tensor that is sharded over ranks is a DTensor; of any other, every rank has the same.
    """
    return {prefix(name) + n: tensor for name, part in state.parts.items() for n, tensor in part.tensors().items()}
