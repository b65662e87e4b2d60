"""What a run carries from step to step, and under which names a checkpoint holds it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from unite_fast.efficiency.execution import Execution
from unite_fast.efficiency.precision import Recipe
from unite_fast.model.unite import UNITE
from unite_fast.optim.optimizer import Optimizer


@dataclass
class TrainState:
    """What a run carries from step to step. ``images_seen`` fixes the data order, every draw and the schedule."""

    model: UNITE
    optimizer: Optimizer
    step: int = 0
    images_seen: int = 0
    best_cfg_scale: float = 0.0  # that the evaluation during training found; 0 before the first
    # How a step is computed, which is not saved: as resolved, and its precision on this model.
    execution: Execution = field(default_factory=Execution)
    recipe: Recipe = field(default_factory=Recipe)


STEPS = "optimizer_steps"  # among the tensors of a save; goes into state.json


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """Every tensor that a checkpoint holds, by its name there, and the optimizer's step count.

    A tensor that is sharded over ranks is a DTensor; of any other, every rank has the same.
    """
    tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    for average, values in state.optimizer.averages.items():
        tensors |= {f"{average}.{k}": v for k, v in values.items()}
    tensors |= state.optimizer.state_dict()
    return tensors | {STEPS: state.optimizer.steps}
