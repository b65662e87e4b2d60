"""Checkpoints on disk: any layout of ranks loads what any other saved, and what is not whole is one line."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from support import TINY
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from unite_fast import checkpoint
from unite_fast.base.errors import UserError
from unite_fast.checkpoint import find, saving, shards
from unite_fast.config.yaml_text import from_dict, parse_yaml
from unite_fast.model.unite import build
from unite_fast.optim.optimizer import Optimizer
from unite_fast.parallel.distributed import Ranks
from unite_fast.parallel.tensors import local
from unite_fast.training.state import STEPS, Part, TrainState, tensors_of

CONFIG = from_dict(parse_yaml(TINY, "tiny"))
LAYOUTS = {"one process": 1, "DDP": 2, "FSDP2": 2, "FSDP2 on 3": 3, "HSDP": 4}


def made(filled: bool) -> TrainState:
    """A state of random numbers, the same everywhere, or of zeros."""
    model = build(CONFIG.model)
    state = TrainState({"": Part(model, Optimizer(model, CONFIG.optim))}, 7 if filled else 0, 112 if filled else 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in tensors_of(state).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) if filled else torch.zeros(()))
        state.optimizer.steps.fill_(5 if filled else 0)
    return state


def laid_out(state: TrainState, layout: str) -> TrainState:
    """The same state as the ranks of ``layout`` hold it."""
    if layout.startswith("FSDP2") or layout == "HSDP":
        shape = (2, 2) if layout == "HSDP" else (dist.get_world_size(),)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")[-len(shape) :])
        placements = [Replicate(), Shard(0)][-len(shape) :]
        fully_shard(state.model, mesh=mesh)
        o = state.optimizer
        for part in (o.momentum, o.exp_avg, o.exp_avg_sq, o.ema):
            part.update({name: distribute_tensor(t, mesh, placements) for name, t in part.items()})
        assert sum(isinstance(t, DTensor) for t in tensors_of(state).values()) > 100
    return state


def ranks(count: int, work, *arguments) -> None:
    """Runs work(Ranks, *arguments) on ``count`` forked gloo ranks."""
    fork = multiprocessing.get_context("fork")
    failures = fork.Queue()
    store = arguments[0] / "store"
    store.unlink(missing_ok=True)

    def child(rank: int) -> None:
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
            control = dist.new_group(backend="gloo")
            work(Ranks(rank, count, torch.device("cpu"), control), *arguments)  # type: ignore[arg-type]
            dist.destroy_process_group()
        except BaseException:
            failures.put(traceback.format_exc())

    processes = [fork.Process(target=child, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
            failures.put("a rank hangs")
    assert failures.empty(), failures.get()


def save_as(own: Ranks, folder: Path, layout: str) -> None:
    state = laid_out(made(True), layout)
    writer = saving.Writer(folder / "checkpoints", CONFIG, own)
    writer.save(state, {"count": 0.0})
    with torch.no_grad():  # what comes after the save is not in it
        for tensor in tensors_of(state).values():
            local(tensor).add_(1)
    writer.wait()
    assert writer.failures == 0


def load_as(own: Ranks, folder: Path, layout: str, sources: list[Path]) -> None:
    state = laid_out(made(False), layout)
    expected = {name: local(t).clone() for name, t in tensors_of(laid_out(made(True), layout)).items()}
    for source in sources:
        for tensor in tensors_of(state).values():
            local(tensor.detach()).zero_()
        state.step = state.images_seen = 0
        path, _, _ = checkpoint.newest(source / "checkpoints")
        assert path is not None
        assert checkpoint.resume(path, state, CONFIG.train.global_batch) == {"count": 0.0}
        assert (state.step, state.images_seen, int(state.optimizer.steps)) == (7, 112, 5)
        for name, tensor in tensors_of(state).items():
            assert torch.equal(local(tensor), expected[name]), (source, name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each layout."""
    folders = {}
    for layout, count in LAYOUTS.items():
        folders[layout] = tmp_path_factory.mktemp(layout.replace(" ", "_"))
        ranks(count, save_as, folders[layout], layout)
    return folders


def step(folder: Path) -> Path:
    return folder / "checkpoints" / "step-0000007"


@pytest.mark.parametrize("to", LAYOUTS)
def test_any_layout_loads_any_other(saved, to, tmp_path):
    ranks(LAYOUTS[to], load_as, tmp_path, to, list(saved.values()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_process_group(saved, layout):
    """Sampling, export and tests read whole tensors; every optimizer state is complete."""
    expected = tensors_of(made(True))
    found = checkpoint.read(step(saved[layout]))
    assert set(found) == set(expected) - {STEPS}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    weights, config = checkpoint.load_weights(saved[layout], "ema")
    assert config == CONFIG
    for name, value in weights.items():
        assert torch.equal(value, expected[f"ema.{name}" if f"ema.{name}" in expected else f"model.{name}"])


def test_work_is_spread_over_ranks(saved):
    sizes = [path.stat().st_size for path in step(saved["DDP"]).glob("*.safetensors")]
    assert len(sizes) == 2
    assert max(sizes) < 1.05 * min(sizes)
    tensors = tensors_of(made(True))
    parts = [saving.share(tensors, rank, 3) for rank in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(tensors)


@pytest.mark.parametrize("layout", ["DDP", "FSDP2", "HSDP"])
def test_torch_reads_it_too(saved, layout):
    expected = tensors_of(made(True))
    del expected[STEPS]
    state = {name: torch.zeros_like(t) for name, t in expected.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = torch_dcp.HuggingFaceStorageReader(str(step(saved[layout])))
        torch_dcp.load(state, storage_reader=reader, no_dist=True)
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_no_file_is_a_pickle(saved):
    for folder in saved.values():
        for path in step(folder).iterdir():
            assert path.suffix in (".json", ".safetensors")
            assert path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"PK")
        assert set(json.loads((step(folder) / "manifest.json").read_text())) == {
            path.name for path in step(folder).iterdir() if path.name != "manifest.json"
        }


def rewrite(path: Path, tensors=None, metadata=None, file: str = "training.safetensors", **counters) -> Path:
    """Changes a checkpoint and its manifest with it, so that all hashes are right."""
    if tensors is not None:
        shards.write_tensors(path / file, tensors, metadata)
    state = json.loads((path / "state.json").read_text()) | counters
    (path / "state.json").write_text(json.dumps({k: v for k, v in state.items() if v is not ...}))
    files = {p.name: p.read_bytes() for p in path.iterdir() if p.name != "manifest.json"}
    manifest = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert not checkpoint.verify(path)
    return path


def copied(path: Path) -> dict[str, torch.Tensor]:
    """What is read maps the files, which ``rewrite`` overwrites."""
    return {name: tensor.clone() for name, tensor in checkpoint.read(path).items()}


@pytest.fixture
def single(tmp_path) -> Path:
    save_as(Ranks(0, 1, torch.device("cpu")), tmp_path, "one process")
    return step(tmp_path)


def refuses(path: Path, words: str) -> None:
    before, state = tensors_of(made(False)), made(False)
    with pytest.raises(UserError, match=words) as caught:
        checkpoint.resume(path, state, CONFIG.train.global_batch)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    if "not finite" not in words:
        assert all(torch.equal(t, before[n]) for n, t in tensors_of(state).items())
        assert state.step == 0


NAME = "model.encoder.blocks.0.attn.proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.flatten(), r"attn.proj.weight is \(1024,\), expected \(32, 32\)"),
        (lambda t: t[:-1], r"is \(31, 32\), expected"),
        (lambda t: t.half(), "is float16, expected float32"),
        (lambda t: t.long(), "is int64, expected float32"),
        (lambda t: t * torch.nan, "attn.proj.weight is not finite"),
        (lambda t: None, "attn.proj.weight is missing"),
    ],
)
def test_junk_in_tensors(single, change, words):
    tensors = copied(single)
    new = change(tensors.pop(NAME))
    rewrite(single, tensors if new is None else tensors | {NAME: new.contiguous()})
    refuses(single, words)


def test_tensor_that_nobody_knows(single):
    rewrite(single, copied(single) | {"momentum.extra": torch.zeros(2)})
    refuses(single, "momentum.extra is unknown")


@pytest.mark.parametrize(
    ("counters", "words"),
    [
        ({"step": -1}, "step in state.json"),
        ({"step": 1.5}, "step in state.json"),
        ({"images_seen": True}, "images_seen in state.json"),
        ({"images_seen": 1 << 60}, "images_seen in state.json"),
        ({"optimizer_steps": "7"}, "optimizer_steps in state.json"),
        ({"optimizer_steps": ...}, "optimizer_steps in state.json"),
        ({"means": [1]}, "means in state.json"),
        ({"means": {"total": "much"}}, "means in state.json"),
        ({"format": 99}, "has format 99, this program reads"),
        ({"format": None}, "has format None"),
    ],
)
def test_junk_in_counters(single, counters, words):
    refuses(rewrite(single, **counters), words)


def sharded(offsets) -> dict[str, str]:
    return {shards.SHARDING: json.dumps({NAME: {shards.OFFSETS: offsets}})}


@pytest.mark.parametrize(
    ("begins", "rows", "words"),
    [
        ([20, 0], 16, "leave gaps or overlap"),
        ([8, 0], 16, "leave gaps or overlap"),
        ([16], 16, "cannot be read"),
        ([-16, 0], 16, "cannot be read"),
        (["x", 0], 16, "cannot be read"),
        ([16, 0], 8, r"is \(24, 32\), expected \(32, 32\)"),
    ],
)
def test_pieces_that_do_not_fit_together(single, begins, rows, words):
    tensors = copied(single)
    whole = tensors.pop(NAME)
    (single / "training.safetensors").unlink()
    rewriting = {"file": "training-00001-of-00002.safetensors"}
    shards.write_tensors(single / "training-00002-of-00002.safetensors", {NAME: whole[:rows]}, sharded(begins))
    refuses(rewrite(single, tensors | {NAME: whole[:16]}, **rewriting), words)


def test_pieces_of_any_shape(tmp_path):
    """A tensor cut into rows and columns, and the same with two pieces over each other and a gap of their size."""
    whole = torch.arange(24.0).view(4, 6)
    boxes = {"a": ((0, 0), (4, 2)), "b": ((0, 2), (2, 4)), "c": ((2, 2), (2, 4))}
    for name, ((row, column), (rows, columns)) in boxes.items():
        part = whole[row : row + rows, column : column + columns].contiguous()
        shards.write_tensors(tmp_path / name, {"t": part}, shards.sharding({"t": (row, column)}))
    files = [tmp_path / name for name in boxes]
    assert torch.equal(shards.read(shards.index(files))["t"], whole)
    shards.write_tensors(tmp_path / "c", {"t": torch.zeros(2, 4)}, shards.sharding({"t": (1, 2)}))
    shards.write_tensors(tmp_path / "d", {"t": torch.zeros(0, 6)}, shards.sharding({"t": (4, 0)}))
    with pytest.raises(UserError, match="leave gaps or overlap"):
        shards.index([*files, tmp_path / "d"])


def test_a_file_of_another_rank_is_missing(saved, tmp_path):
    path = tmp_path / "step-0000007"
    shutil.copytree(step(saved["FSDP2"]), path)
    lost = next(path.glob("*-00002-of-*"))
    lost.unlink()
    assert checkpoint.verify(path) == f"{lost.name} is missing"
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest[lost.name]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.verify(path) == "its manifest is incomplete"


def test_what_another_process_has_hashed_counts_while_the_file_is_as_it_was(single, monkeypatch, tmp_path):
    """A file that has been written to since is hashed here; of a folder that is not there nothing is known."""
    found = checkpoint.hash_part(single, 0, 2) | checkpoint.hash_part(single, 1, 2)
    assert set(found) == {path.name for path in single.iterdir()} - {"manifest.json"}
    monkeypatch.setattr(find, "_hashes", {})
    monkeypatch.setattr(find, "file_sha256", lambda path: pytest.fail(f"{path} was hashed again"))
    checkpoint.take_hashes(single, found)
    assert not checkpoint.verify(single)
    monkeypatch.undo()
    monkeypatch.setattr(find, "_hashes", {})
    file = single / "training.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    checkpoint.take_hashes(single, found)
    assert "training.safetensors does not have the recorded sha256" in checkpoint.verify(single)
    assert checkpoint.hash_part(tmp_path / "absent", 0, 1) == {}


def test_text_instead_of_tensors(single):
    (single / "training.safetensors").write_text("no tensors")
    refuses(rewrite(single), "cannot be read")
    (single / "manifest.json").write_text("[" * 100_000)
    assert checkpoint.verify(single) == "it has no readable manifest.json"


def test_weights_that_are_not_finite_are_not_sampled_from(single):
    tensors = copied(single)
    rewrite(single, tensors | {NAME.replace("model.", "ema."): torch.full((32, 32), torch.inf)})
    with pytest.raises(UserError, match=r"blocks.0.attn.proj.weight is not finite; take an older one"):
        checkpoint.load_weights(single)
