"""Autograd's backward without its engine, which asks a device for a thread and a stream of its own.

The same nodes of the graph are called, one after the other, in the calling thread. Gradients get the dtypes and shapes
of what they belong to, and Python's functions zeros for missing ones, as the engine does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Gradients = list[Tensor | None]


def backward(loss: Tensor, *_: Any, **__: Any) -> None:
    """``loss.backward()`` of a scalar."""
    _walk([loss], [torch.ones_like(loss)], [])


def grad(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | Sequence[Tensor | None] | None = None,
    **_: Any,
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad``; None for inputs that nothing depends on."""
    outputs, inputs = ([x] if isinstance(x, Tensor) else x for x in (outputs, inputs))
    if grad_outputs is None:
        grad_outputs = [torch.ones_like(x) for x in outputs]
    return tuple(_walk(outputs, [grad_outputs] if isinstance(grad_outputs, Tensor) else grad_outputs, inputs))


@torch.no_grad()
def _walk(outputs: Sequence[Tensor], given: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Gradients:
    """The gradients of ``inputs``; without any, leaves get theirs in ``.grad``."""
    roots = [get_gradient_edge(output) for output in outputs]
    wanted = [get_gradient_edge(tensor) for tensor in inputs]
    missing: dict[Any, int] = {root.node: 0 for root in roots}  # gradients that a node still waits for
    found = list(missing)
    for node in found:  # grows
        for following, _ in node.next_functions:
            if following is not None:
                if following not in missing:
                    found.append(following)
                missing[following] = missing.get(following, 0) + 1
    sums: dict[Any, Gradients] = {node: [None] * len(node._input_metadata) for node in found}

    def add(node: Any, place: int, gradient: Tensor | None) -> None:
        if gradient is not None:
            like, before = node._input_metadata[place], sums[node][place]
            gradient = gradient.sum_to_size(like.shape).to(like.dtype)
            sums[node][place] = gradient if before is None else before + gradient

    for root, gradient in zip(roots, given, strict=True):
        add(root.node, root.output_nr, gradient)
    ready = [node for node in found if not missing[node]]
    device = outputs[0].device
    with mock.patch.object(torch._C, "_current_graph_task_id", return_value=id(sums)):  # checkpointing asks for it
        while ready:
            node = ready.pop()
            accumulates = not node.next_functions
            if not (accumulates and inputs):
                for (following, place), gradient in _call(node, sums[node], device):
                    add(following, place, gradient)
                    missing[following] -= 1
                    if not missing[following]:
                        ready.append(following)
            if not inputs:
                del sums[node]
    return [sums[edge.node][edge.output_nr] if edge.node in sums else None for edge in wanted]


def _call(node: Any, gradients: Gradients, device: torch.device) -> list[tuple[tuple[Any, int], Tensor | None]]:
    """What the node gives, beside the edges along which it goes."""
    python = isinstance(node, torch.autograd.function.BackwardCFunction)
    if python:
        metadata = zip(gradients, node._input_metadata, strict=True)
        gradients = [torch.zeros(m.shape, dtype=m.dtype, device=device) if g is None else g for g, m in metadata]
    results, edges = (node.apply if python else node)(*gradients), node.next_functions
    results = results if isinstance(results, tuple) else (results,)
    if python:  # it has edges for its tensors alone
        results = [r for r, needed in zip(results, node.needs_input_grad, strict=True) if needed]
        edges = [edge for edge in edges if edge[0] is not None]
    return [(edge, result) for edge, result in zip(edges, results, strict=True) if edge[0] is not None]
