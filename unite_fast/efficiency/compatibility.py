"""What goes together of the ways to compute a step, and what a device can run; refusals in one line that says why."""

from __future__ import annotations

import os

import torch

from unite_fast.base.errors import UserError
from unite_fast.config import EfficiencyConfig, ObjectiveConfig, TrainConfig, batch_split
from unite_fast.efficiency import graph, precision
from unite_fast.parallel import sharding
from unite_kernels import backend


def check(efficiency: EfficiencyConfig, train: TrainConfig, world_size: int) -> None:
    """Refuses what does not go together, before any rank waits for another. Raises UserError."""
    _check_precision(efficiency, train.micro_batch)
    _check_strategy(efficiency, train, world_size)
    _check_accumulation(efficiency, train, world_size)


def _check_accumulation(e: EfficiencyConfig, t: TrainConfig, world_size: int) -> None:
    """``efficiency.cuda_graph=accumulation`` is for gradients that leave during a backward that is not captured."""
    if e.cuda_graph != "accumulation":
        return
    problems = {
        "one process has no gradients to average; start several": world_size == 1,
        "efficiency.overlap_gradients=false averages after the backward; set efficiency.overlap_gradients=true": (
            not e.overlap_gradients
        ),
        "a step has one micro-batch, the last; set a smaller train.micro_batch": batch_split(t, world_size)[1] == 1,
    }
    for problem, there in problems.items():
        if there:
            raise UserError(f"efficiency.cuda_graph=accumulation: {problem}, or efficiency.cuda_graph=step")


def _check_precision(e: EfficiencyConfig, micro_batch: int) -> None:
    asked = f"efficiency.precision={e.precision}"
    if e.residual == "bf16" and e.precision == "fp32":
        raise UserError("efficiency.residual=bf16 needs a precision other than fp32")
    if e.precision in precision.TE_FLOAT8 and micro_batch % 8:
        raise UserError(f"{asked} needs train.micro_batch to be a multiple of 8, got {micro_batch}")
    for key, value in {"recompute": e.recompute, "compile": e.compile}.items():
        if e.precision in precision.TE and value != "none":
            raise UserError(
                f"efficiency.{key}={value} does not work with {asked}: Transformer Engine's layers keep state between "
                "passes; use fp8 or bf16, or none"
            )


def _check_strategy(e: EfficiencyConfig, t: TrainConfig, world_size: int) -> None:
    if t.shard_size and t.strategy != "hsdp":
        raise UserError(f"train.shard_size is for train.strategy=hsdp, and this is {t.strategy}; leave it out")
    sharding.shard_size(t, world_size)
    if t.strategy == "ddp":
        return
    # What is asked for, whether it is refused, why, and the neutral value.
    refused = (
        (
            "train.on_oom=halve",
            t.on_oom == "halve",
            "a rank that starts its micro-batch again would gather weights alone",
            "train.on_oom=fail",
        ),
        (
            f"efficiency.cuda_graph={e.cuda_graph}",
            e.cuda_graph != "none",
            "gathered weights lie elsewhere in each step, and a graph has fixed addresses",
            "efficiency.cuda_graph=none",
        ),
        (
            "efficiency.shard_muon=false",
            not e.shard_muon,
            "no rank has whole matrices",
            "efficiency.shard_muon=true",
        ),
        (
            "efficiency.overlap_gradients=false",
            not e.overlap_gradients,
            "gradients are reduced by the backward itself",
            "efficiency.overlap_gradients=true",
        ),
        (
            f"train.replica_check_every={t.replica_check_every}",
            t.strategy == "fsdp2" and t.replica_check_every > 0,
            "there are no replicas",
            "train.replica_check_every=0",
        ),
        (
            f"efficiency.precision={e.precision}",
            world_size > 1 and e.precision in precision.TE,
            "Transformer Engine's layers keep whole weights",
            "efficiency.precision=fp8" if e.precision in precision.TE_FLOAT8 else "efficiency.precision=bf16",
        ),
    )
    for key, asked, why, neutral in refused:
        if asked:
            raise UserError(
                f"train.strategy={t.strategy} does not work with {key}: {why}; set {neutral}, or train.strategy=ddp"
            )


def check_device(
    efficiency: EfficiencyConfig, train: TrainConfig, o: ObjectiveConfig, device: torch.device, planned: bool = False
) -> None:
    """Refuses what cannot run on ``device``, before the first step asks for it. Raises UserError.

    planned: nothing will run; a plan made on a machine without a GPU is for one that has it.
    """
    if o.adversarial.weight:
        _check_adversarial(efficiency, train)
    if not (planned and device.type == "cpu"):
        check_graph(efficiency, train, o, device)
    if why := backend.obstacle(efficiency.kernels, device, update=True):
        raise UserError(f"efficiency.kernels={efficiency.kernels}: {why}; or set efficiency.kernels=eager")
    precision.check(efficiency.precision, device)


def _check_adversarial(e: EfficiencyConfig, t: TrainConfig) -> None:
    """Raises UserError for what a step with a discriminator cannot be computed with."""
    refused = (
        # the gradient at the decoder's last layer is taken between the passes that would gather its weights
        ("train.reshard=pass", t.strategy != "ddp" and t.reshard == "pass", "train.reshard=step"),
        # whether each of the two networks learns is decided on the host
        (f"efficiency.cuda_graph={e.cuda_graph}", e.cuda_graph != "none", "efficiency.cuda_graph=none"),
        # its layers keep state between passes, of which there are more than one through the same encoder
        (f"efficiency.precision={e.precision}", e.precision in precision.TE, "efficiency.precision=bf16"),
    )
    for key, asked, neutral in refused:
        if asked:
            raise UserError(f"objective.adversarial does not work with {key}; set {neutral}")


def check_graph(e: EfficiencyConfig, train: TrainConfig, o: ObjectiveConfig, device: torch.device) -> None:
    """Raises UserError naming the first precondition of ``efficiency.cuda_graph`` that does not hold."""
    mode = e.cuda_graph
    if mode == "none":
        return
    problems = {
        f"a GPU is needed, the device is {device.type}": device.type not in graph.RECORDINGS,
        "CUDA_LAUNCH_BLOCKING=1 waits after every launch; unset it": os.environ.get("CUDA_LAUNCH_BLOCKING") == "1",
        f"the layers of efficiency.precision={e.precision} decide on the host; use bf16 or fp8": (
            e.precision in precision.TE
        ),
        "train.on_oom=halve would change the micro-batch; set train.on_oom=fail": train.on_oom == "halve",
    }
    if mode == "flow":
        problems |= {
            "objective.flow_steps=0 leaves no flow to capture": o.flow_steps == 0,
            "objective.stop_gradient=false has one backward for all; use step": not o.stop_gradient,
            f"objective.flow_steps={o.flow_steps} must be a multiple of efficiency.flow_mini_batch="
            f"{e.flow_mini_batch}, so that all mini-batches have one size; or use step": (
                o.flow_steps % e.flow_mini_batch > 0
            ),
        }
    for problem, there in problems.items():
        if there:
            raise UserError(f"efficiency.cuda_graph={mode}: {problem}; efficiency.cuda_graph=none runs without graphs")
