"""A model with averaged or raw weights, for pictures and scores between the steps of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from unite_fast.model.unite import UNITE, build
from unite_fast.parallel.tensors import local, whole
from unite_fast.training.state import TrainState


@contextmanager
def weights_of(state: TrainState, tensors: Mapping[str, Tensor]) -> Iterator[UNITE]:
    """The model in evaluation mode with ``tensors`` for its parameters, by their names; the run does not change.

    It is the model that is trained, whose raw weights come back bit for bit. Where ranks share the weights it is a
    whole one of this rank's own, so that each may compute what it likes with it; all ranks must enter.
    """
    if state.optimizer.sharded:
        yield _whole_model(state, tensors)
        return
    raw = {name: p.detach().clone() for name, p in state.optimizer.parameters.items()}
    state.model.eval()
    try:
        _copy(state, tensors)
        yield state.model
    finally:
        _copy(state, raw)
        state.model.train()


@torch.no_grad()
def _copy(state: TrainState, values: Mapping[str, Tensor]) -> None:
    for name, parameter in state.optimizer.parameters.items():
        parameter.copy_(values[name])


@torch.no_grad()
def _whole_model(state: TrainState, tensors: Mapping[str, Tensor]) -> UNITE:
    """4 bytes per parameter on each rank, gathered tensor by tensor."""
    sharded = state.model
    model = build(sharded.config, device=local(next(iter(tensors.values()))).device)
    state.execution.serve(model)
    for name, buffer in model.named_buffers():
        buffer.copy_(sharded.get_buffer(name))
    given = dict(sharded.named_parameters()) | dict(tensors)
    for name, parameter in model.named_parameters():
        parameter.copy_(whole(given[name]))
    return model.eval()
