"""A second module with its own optimizer beside UNITE: updated with it, saved and loaded under its own names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from stepping import trainer
from torch import Tensor, nn

from unite_fast import checkpoint
from unite_fast.base.errors import UserError
from unite_fast.checkpoint import saving
from unite_fast.config import OptimConfig
from unite_fast.data import Batch
from unite_fast.objective import Objective
from unite_fast.optim.optimizer import Optimizer
from unite_fast.parallel.distributed import Ranks
from unite_fast.training.state import Part, tensors_of
from unite_fast.training.step import TrainStep


class WithCritic(Objective):
    """Beside the usual passes, in odd micro-batches, a critic learns to tell the mean of an image."""

    def __init__(self, usual: Objective, critic: nn.Module) -> None:
        super().__init__(usual.config, usual.losses)
        self.critic, self.asked = critic, True

    def backward(self, model, batch: Batch, draws, scale=1.0, *more) -> dict[str, Tensor]:
        losses = super().backward(model, batch, draws, scale, *more)
        if self.asked:
            images = batch.content["images"].flatten(1)
            ((self.critic(images)[:, 0] - images.mean(1)).square().mean() * scale).backward()
        return losses


def with_critic(ranks: Ranks | None = None) -> tuple[TrainStep, Batch]:
    """A step of both, and this rank's share of a batch of 16."""
    step, batch = trainer("optim.warmup_epochs=0", ranks=ranks)
    torch.manual_seed(3)
    critic = nn.Linear(64, 1)
    optim = OptimConfig(ema_decay=0.5, ema_extra=(0.9,))
    step.state.parts["critic"] = Part(critic, Optimizer(critic, optim))
    objective = WithCritic(step.objective, critic)
    again = TrainStep(step.state, step.config, step.ranks, (8 // step.ranks.world_size, 2), 1000, objective)
    return again, batch()


def save(step: TrainStep, folder: Path) -> Path:
    writer = saving.Writer(folder, step.config, step.ranks)
    writer.save(step.state, {"count": 0.0})
    writer.wait()
    return folder / f"step-{step.state.step:07d}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[TrainStep, Batch, Path]:
    step, batch = with_critic()
    step(batch)
    return step, batch, save(step, tmp_path_factory.mktemp("checkpoints"))


def test_each_part_is_updated_by_its_own_gradients():
    alone, batch = trainer("optim.warmup_epochs=0")
    content = batch()
    alone(content)
    step, _ = with_critic()
    critic = step.state.parts["critic"]
    before = {name: p.detach().clone() for name, p in critic.optimizer.parameters.items()}
    step(content)
    for name, p in alone.state.optimizer.parameters.items():  # UNITE learns as it does alone
        assert torch.equal(p, step.state.optimizer.parameters[name]), name
    assert all(not torch.equal(p, before[name]) for name, p in critic.optimizer.parameters.items())
    ema = {name: 0.5 * before[name] + 0.5 * p.detach() for name, p in critic.optimizer.parameters.items()}
    assert all(torch.allclose(critic.optimizer.ema[name], value) for name, value in ema.items())
    after = {name: p.detach().clone() for name, p in critic.optimizer.parameters.items()}
    step.objective.asked = False  # type: ignore[attr-defined]
    step(content)
    assert all(torch.equal(p, after[name]) for name, p in critic.optimizer.parameters.items())
    assert (int(critic.optimizer.steps), int(step.state.optimizer.steps)) == (1, 2)


def test_an_update_that_any_part_skips_is_counted():
    """UNITE is updated; the critic, whose gradient is not finite, keeps its weights until it has a finite one."""
    step, batch = with_critic()
    weight = step.state.parts["critic"].optimizer.parameters["weight"]
    before, updates = weight.detach().clone(), int(step.state.optimizer.steps)
    broken = weight.register_hook(lambda gradient: gradient * torch.inf)
    metrics = step(batch)
    assert (float(metrics["skipped"]), float(metrics["total"])) == (1, 0)
    assert torch.equal(weight, before)
    assert int(step.state.optimizer.steps) == updates + 1
    step.objective.asked = False  # type: ignore[attr-defined]
    assert float(step(batch)["skipped"]) == 0  # of a part that has no update nothing is counted
    assert step.skips.drain() == (1, [0])
    broken.remove()


def after_two_steps(ranks: Ranks) -> dict[str, Tensor]:
    step, batch = with_critic(ranks)
    for _ in range(2):  # the first averages after its backward, the second meanwhile
        step(batch)
    return {name: tensor.detach().clone() for name, tensor in step.state.parts["critic"].tensors().items()}


def test_ranks_average_the_gradients_of_every_part():
    alone = after_two_steps(Ranks(0, 1, torch.device("cpu")))
    first, second = on_ranks(2, after_two_steps)
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], tensor, rtol=1e-4, atol=1e-7), name
    assert first["optimizer_steps"] == 2


def test_names_in_a_checkpoint(saved):
    step, _, path = saved
    names = set(checkpoint.stored(path))
    alone = set(tensors_of(trainer()[0].state)) - {"optimizer_steps"}
    assert {name for name in names if not name.startswith("critic.")} == alone
    assert names - alone == {
        *(f"critic.{kind}.{name}" for kind in ("model", "ema", "ema_0.9") for name in ("weight", "bias")),
        *("critic.momentum.weight", "critic.exp_avg.bias", "critic.exp_avg_sq.bias"),
    }
    counts = json.loads((path / "state.json").read_text())
    assert (counts["optimizer_steps"], counts["critic.optimizer_steps"]) == (1, 1)
    weights, _ = checkpoint.load_weights(path)
    assert weights.keys() == step.state.model.state_dict().keys()


def test_a_run_that_resumes_goes_on_with_every_part(saved, tmp_path):
    step, batch, path = saved
    again, _ = with_critic()
    with torch.no_grad():
        for tensor in tensors_of(again.state).values():
            tensor.zero_()
    checkpoint.resume(path, again.state, again.config.train.global_batch)
    expected, found = tensors_of(step.state), tensors_of(again.state)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    step(batch)
    again(batch)
    expected, found = tensors_of(step.state), tensors_of(again.state)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_part_that_is_missing_or_too_many_is_named(saved, tmp_path):
    alone, batch = trainer()
    with pytest.raises(UserError, match="holds a critic as well, which this run has not"):
        checkpoint.resume(saved[2], alone.state, alone.config.train.global_batch)
    alone(batch())
    with pytest.raises(UserError, match="holds no critic, so a run with one cannot go on"):
        checkpoint.resume(save(alone, tmp_path), with_critic()[0].state, alone.config.train.global_batch)


def test_another_average_of_a_part_begins_anew(saved):
    other, _ = with_critic()
    critic = other.state.parts["critic"].module
    other.state.parts["critic"].optimizer = Optimizer(critic, OptimConfig(ema_extra=(0.8,)))
    checkpoint.resume(saved[2], other.state, other.config.train.global_batch)
    averages = other.state.parts["critic"].optimizer.averages
    assert all(torch.equal(averages["ema_0.8"][name], p) for name, p in critic.named_parameters())
