"""CUDA graphs of the training step: work recorded once and replayed, so that the host launches one thing instead of
thousands.

    flow   one flow mini-batch, forward and backward, replayed for every mini-batch; the rest runs as it does without
    step   a whole micro-batch, forward and backward, replayed for every one; then the update, where one rank trains
           alone. With several ranks the averaging of gradients and the update, which talk to the others, run outside
    accumulation   the micro-batch, replayed for all of a step but the last, whose gradients leave while its backward
           runs. The graph keeps its memory meanwhile, so activations take twice their room

What a capture demands, and how it is met:
    fixed addresses   inputs are copied into buffers; gradients are kept and zeroed (``Gradients``) instead of dropped;
                      the learning rate, sample positions and step counts are tensors; parameters, states and averages
                      are only ever changed in place
    fixed shapes      checked at every replay; a step of another micro-batch size is an error; one graph for each
                      number of registers
    no waiting        nothing in a step reads the device (tests/test_efficiency.py)
    own stream        the first calls run on the stream of the capture, doing their work as usual: libraries choose
                      their kernels, the compilers compile; no autograd node of another stream lives on into a capture
    shared memory     graphs of one ``Place`` reuse each other's: they never run at once, and their results are copied
    autocast          without its cache of cast weights, which a replay would find stale; a recipe's own copies of the
                      weights are written in place, outside the graph, once per step
    other threads     the loaders' threads pin memory and copy meanwhile: capture errors are this thread's alone
    random numbers    made by counters from sample positions, not by a generator
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WARM_UP = 3  # calls before the capture
Function = Callable[..., dict[str, Tensor]]  # of tensors by name


class CudaRecording:
    """``function`` on ``inputs``, recorded without being run."""

    def __init__(self, function: Function, inputs: Mapping[str, Tensor], place: Place) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            self.graph,
            pool=place.pool,  # pyright: ignore[reportArgumentType]
            stream=place.stream,
            capture_error_mode="thread_local",
        ):
            self.outputs = function(**inputs)

    def replay(self) -> None:
        """Runs what was recorded: reads ``inputs`` as they are now, writes ``outputs``."""
        self.graph.replay()


# By device type. The tests add one for CPUs that repeats recorded operations on recorded tensors.
RECORDINGS: dict[str, Callable[..., Any]] = {"cuda": CudaRecording}


class Place(NamedTuple):
    """Where graphs are recorded: their device, stream and pool of memory."""

    device: torch.device
    stream: torch.cuda.Stream | None
    pool: object

    @classmethod
    def on(cls, device: torch.device) -> Place:
        if device.type != "cuda":
            return cls(device, None, None)
        return cls(device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle())


class Captured:
    """``function`` with a graph of it: the first ``WARM_UP`` calls run it, the next records it and replays, as do all
    later ones. Each call waits for what was launched before it, and what follows waits for it."""

    def __init__(self, name: str, function: Function, place: Place) -> None:
        """name: of the function, for errors."""
        self.name, self.function, self.place = name, function, place
        self.calls = 0
        self.inputs: dict[str, Tensor] = {}
        self.recording: Any = None

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """New tensors. Raises RuntimeError naming an input that is not as it was recorded."""
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._plain(inputs)
        if self.recording is None:
            self.inputs = {name: tensor.detach().clone() for name, tensor in inputs.items()}
            self.recording = RECORDINGS[self.place.device.type](self.function, self.inputs, self.place)
        self._fill(inputs)
        self.recording.replay()
        return {name: value.clone() for name, value in self.recording.outputs.items()}

    def _fill(self, inputs: Mapping[str, Tensor]) -> None:
        if inputs.keys() != self.inputs.keys():
            raise RuntimeError(f"{self.name} was captured with {', '.join(self.inputs)}, not {', '.join(inputs)}")
        for name, tensor in inputs.items():
            buffer = self.inputs[name]
            captured, given = ((tuple(t.shape), t.dtype, t.device) for t in (buffer, tensor))
            if captured != given:
                raise RuntimeError(f"{self.name}: {name} was captured as {captured}, and is now {given}")
            buffer.copy_(tensor)

    def _plain(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stream = self.place.stream
        if stream is None:
            return self.function(**inputs)
        current = torch.cuda.current_stream(self.place.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results = self.function(**inputs)
        current.wait_stream(stream)
        return results


class Gradients:
    """Gradients that stay where they are from step to step, so that a graph can add to them.

    Parameters that the first step gave no gradient have none later either: an optimizer leaves them alone.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.buffers: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Before the first backward of a step: all zero. (The optimizer drops ``.grad``; the buffers remain.)"""
        if self.buffers:
            torch._foreach_zero_(list(self.buffers.values()))
            for name, buffer in self.buffers.items():
                self.parameters[name].grad = buffer

    def keep(self) -> None:
        """After the last backward of a step."""
        if not self.buffers:
            self.buffers = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
