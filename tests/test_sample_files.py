"""sample.py: seeds and labels, images as files and archives, the same for any batch and number of processes."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import command_on_ranks
from support import TINY, command

import sample as program
from unite_fast import checkpoint
from unite_fast.base.errors import UserError
from unite_fast.checkpoint import guide
from unite_fast.config import SampleConfig
from unite_fast.modality import pictures
from unite_fast.parallel.distributed import Ranks
from unite_fast.sampling.guide import check_latents
from unite_fast.sampling.makers import MAKERS, maker_of
from unite_fast.sampling.request import as_ranges, parse_labels, parse_seeds


def test_seeds_and_labels():
    assert parse_seeds("0-3,8") == [0, 1, 2, 3, 8]
    for text in ("0-3,8", "5", "7,3-4,6,5", ""):
        assert as_ranges(parse_seeds(text) if text else []) == text
    assert parse_labels("equal", [0, 11, 5], 10) == [0, 1, 5]
    assert parse_labels("3,7", [0, 1, 2], 10) == [3, 7, 3]
    random = parse_labels("random", list(range(2000)), 10)
    assert parse_labels("random", [1999], 10) == random[-1:]
    assert np.bincount(random, minlength=10).min() > 140


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY)
    assert (
        command(
            "train.py",
            "--config",
            folder / "tiny.yaml",
            f"run_dir={folder / 'run'}",
            "train.max_steps=60",
            "optim.lr=6e-3",
        ).returncode
        == 0
    )
    return folder / "run"


def make(trained, out, *options: object) -> str:
    result = command("sample.py", "--checkpoint", trained, "--out", out, *options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def pixels(folder) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted(folder.glob("*.png"))}


def hashes(folder) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.png"))}


def test_equal_files_for_any_batch_and_processes(trained, tmp_path):
    """70 seeds in three tiles, on 1, 2 and 3 processes, and with batch sizes 1, 7, 32 and 64."""
    for batch in (1, 7, 32, 64):
        make(trained, tmp_path / str(batch), "--seeds", "0-69", "--batch", batch)
    for world in (2, 3):
        options = ("--checkpoint", trained, "--out", tmp_path / f"w{world}", "--seeds", "0-69", "--device", "cpu")
        result = command_on_ranks(world, program.main, *options)
        assert result.returncode == 0, result.stderr
    expected = hashes(tmp_path / "64")
    assert len(expected) == 70
    assert len(set(expected.values())) > 30  # a barely trained model: some are alike
    for other in ("1", "7", "32", "w2", "w3"):
        assert hashes(tmp_path / other) == expected, other


def test_rerun_makes_only_the_missing(trained, tmp_path):
    out = tmp_path / "out"
    make(trained, out, "--seeds", "0-4")
    (out / "0000002_class2.png").unlink()
    kept = (out / "0000001_class1.png").stat().st_mtime_ns
    assert "made 1 of 5" in make(trained, out, "--seeds", "0-4")
    assert (out / "0000001_class1.png").stat().st_mtime_ns == kept
    refused = command("sample.py", "--checkpoint", trained, "--out", out, "--seeds", "0-4", "--cfg", "3")
    assert refused.returncode == 2
    assert "other options" in refused.stderr


def test_archives(trained, tmp_path):
    make(trained, tmp_path / "f", "--seeds", "5-9")
    make(trained, tmp_path / "s.npz", "--seeds", "5-9")
    make(trained, tmp_path / "s.tar", "--seeds", "5-9")
    make(trained, tmp_path / "s.png", "--seeds", "5-9")
    expected = pixels(tmp_path / "f")
    with np.load(tmp_path / "s.npz") as content:
        assert content["arr_0"].shape == (5, 8, 8, 1)
        assert content["labels"].tolist() == [5, 6, 7, 8, 9]
        assert all((a[..., 0] == b).all() for a, b in zip(content["arr_0"], expected.values(), strict=True))
    with tarfile.open(tmp_path / "s.tar") as tar:
        assert tar.getnames() == list(expected)
        for name in tar.getnames():
            file = tar.extractfile(name)
            assert file is not None
            assert (np.asarray(Image.open(io.BytesIO(file.read()))) == expected[name]).all()
    assert Image.open(tmp_path / "s.png").size[0] > 5 * 32
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize("suffix", [".npz", ".tar", ".png"])
def test_an_archive_is_not_replaced_unasked(trained, tmp_path, suffix):
    """It carries its protocol: the same request has nothing to do, another one is refused, or replaces it."""
    out = tmp_path / f"s{suffix}"
    make(trained, out, "--seeds", "0-3")
    first = out.read_bytes()
    said = make(trained, out, "--seeds", "0-2,3")
    assert said.splitlines()[-1] == f"{out} holds these images already; nothing to do"
    for other in ("--cfg 3", "--weights model", "--labels 1", "--seeds 0-4", "--seeds 1,0,2,3"):
        refused = command("sample.py", "--checkpoint", trained, "--out", out, "--seeds", "0-3", *other.split())
        assert refused.returncode == 2
        assert refused.stderr == (
            f"error: {out} was made with other seeds, options or another checkpoint; choose another --out, or "
            "replace it with --overwrite\n"
        )
    assert out.read_bytes() == first
    make(trained, out, "--seeds", "0-3", "--labels", "1", "--overwrite")
    assert out.read_bytes() != first
    make(trained, out, "--seeds", "0-3", "--overwrite")
    assert out.read_bytes() == first
    out.write_bytes(b"something else")
    refused = command("sample.py", "--checkpoint", trained, "--out", out, "--seeds", "0-3")
    assert "does not say what it was made with; choose another --out" in refused.stderr
    assert out.read_bytes() == b"something else"
    assert not list(tmp_path.glob("*.parts"))


def test_overwriting_a_folder(trained, tmp_path):
    """Only images of this program go, and only when they were made otherwise."""
    out = tmp_path / "out"
    make(trained, out, "--seeds", "0-4")
    (out / "notes.txt").write_text("mine")
    assert "nothing was missing" in make(trained, out, "--seeds", "0-4", "--overwrite")
    assert "made 2 of 2" in make(trained, out, "--seeds", "3,4", "--cfg", "3", "--overwrite")
    assert sorted(p.name for p in out.iterdir()) == [
        "0000003_class3.png", "0000004_class4.png", "notes.txt", "protocol.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "words",
    ["--overwrite", "--seeds 0-3", "--labels random", "--cfg 2", "--cfg-interval 0,1", "--cfg-order both",
     "--autoguidance a", "--autoguidance-weights model", "--solver heun", "--steps 3", "--last state", "--compile",
     "--graph"],
)  # fmt: skip
def test_what_does_nothing_with_reconstruct_is_refused(words):
    name = words.split()[0]
    with pytest.raises(UserError, match=f"^{name} does nothing with --reconstruct"):
        program.parse(["--checkpoint", "a", "--out", "b", "--reconstruct", "c", *words.split()])


def test_guided_by_another_average_of_the_run(trained, tmp_path):
    """The files say by what; without classes, too; what would do nothing, or cannot be, is refused in a line."""
    guided = ("--cfg", 2, "--autoguidance", trained, "--autoguidance-weights", "model")
    out, plain = tmp_path / "a", tmp_path / "b"
    said = make(trained, out, "--seeds", "0-3", "--labels", "none", *guided)
    assert f"w 2 by {trained} for t in [0.0, 1.0], norm_first" in said
    assert re.search(
        rf"^guided by {trained}, which explains [1-9]\d?% of the variance of latents at t = 0.3$", said, re.M
    )
    make(trained, plain, "--seeds", "0-3", "--labels", "none")
    assert hashes(out).keys() == hashes(plain).keys()
    assert hashes(out) != hashes(plain)

    def refused(*words: object) -> str:
        said = command("sample.py", "--checkpoint", trained, "--out", tmp_path / "c", "--seeds", "0-3", *words)
        assert said.returncode == 2
        return said.stderr

    same = command(
        "sample.py", "--checkpoint", trained, "--out", out, "--seeds", "0-3", "--labels", "none", *guided[:4]
    )
    assert "holds images of another checkpoint or other options" in same.stderr  # the guide's weights are others
    assert refused(*guided[2:]).startswith("error: --autoguidance does nothing without guidance, which --cfg gives")
    assert refused("--autoguidance-weights", "model").startswith(
        "error: --autoguidance-weights does nothing without --a"
    )
    assert refused(*guided, "--cfg-order", "cfg_first").startswith("error: cfg_first combines before the LayerNorm")


def test_a_model_of_other_latents_does_not_guide(trained, reference):
    model = checkpoint.load_model(trained)[0]
    assert check_latents(model, model, "a") > 0.5
    other = checkpoint.load_model(trained)[0]
    with torch.no_grad():  # as good a model, whose latents have the other sign
        for parameter in other.encoder_layer_norm.parameters():
            parameter.neg_()
    with pytest.raises(UserError, match=r"^--autoguidance a has other latents: what it makes .* \(-\d+\.\d\d of the"):
        check_latents(model, other, "a")
    with pytest.raises(UserError, match=r"tiny\.pt: its model\.\w+ is \d+, that of the guided model \d+$"):
        guide.load(str(reference / "tiny.pt"), "ema", model, ())
    with pytest.raises(UserError, match=r": its class 1 is 1, that of the guided model one$"):
        guide.load(str(trained), "ema", model, ["0", "one", *map(str, range(2, 10))])


def test_what_is_decoded_can_be_chosen_and_is_said(tmp_path):
    """It changes every image."""
    run = SampleConfig(solver="heun", steps=5, last="prediction")
    for words, last in (([], "prediction"), (["--last", "state"], "state")):
        arguments = program.parse(["--checkpoint", "a", "--out", "b", *words])
        how = program.request(arguments, run, 10).how
        assert how.last == last
        assert program.describe(tmp_path, arguments, how).endswith(f"; heun, steps 5, w 1, last {last}")


def test_only_the_first_rank_speaks(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    pictures.save_png(tmp_path / "in" / "a.png", torch.zeros(1, 8, 8))
    monkeypatch.setattr(program.distributed, "start", lambda device: Ranks(1, 1, torch.device("cpu")))
    maker = MAKERS["image"]
    monkeypatch.setitem(MAKERS, "image", maker._replace(reconstruct=lambda *a: "a line"))
    words = ("--checkpoint", trained, "--out", tmp_path / "out", "--reconstruct", tmp_path / "in")
    assert program.main([str(word) for word in words]) == 0
    assert capsys.readouterr().out == ""


def test_a_modality_without_files_is_one_line():
    with pytest.raises(UserError, match=r"^points have no files; give them a row of sampling/makers\.py$"):
        maker_of(SimpleNamespace(thing="point"))


def test_reconstruct_a_folder(trained, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    Image.new("RGB", (30, 20), (200, 200, 200)).save(tmp_path / "in" / "a.jpg")
    Image.new("L", (9, 9), 90).save(tmp_path / "in" / "sub" / "b.png")
    Image.new("L", (9, 9), 90).save(tmp_path / "in" / "sub" / "b.webp")
    said = make(trained, tmp_path / "out", "--reconstruct", tmp_path / "in")
    assert "3 images, mean PSNR" in said
    assert (tmp_path / "out" / "a.png").is_file()
    assert sorted(p.name for p in (tmp_path / "out" / "sub").iterdir()) == ["b.png.png", "b.webp.png"]
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    result = command("sample.py", "--checkpoint", trained, "--out", tmp_path / "o2", "--reconstruct", tmp_path / "in")
    assert result.returncode == 2
    assert "bad.png" in result.stderr


def test_weights_by_name(trained, tmp_path):
    """Every average that a checkpoint holds can be named; the error lists them. In our format and in the official."""
    config = trained.parent / "tiny.yaml"
    words = ("--config", config, f"run_dir={tmp_path / 'run'}", "train.max_steps=20", "optim.ema_extra=[0.5]")
    assert command("train.py", *words).returncode == 0
    model, _ = checkpoint.load_model(tmp_path / "run", "ema_0.5")
    name = "encoder.blocks.0.attn.qkv.weight"
    stored = checkpoint.read(checkpoint.locate(tmp_path / "run"))
    assert torch.equal(model.get_parameter(name), stored[f"ema_0.5.{name}"])
    assert not torch.equal(stored[f"ema.{name}"], stored[f"ema_0.5.{name}"])
    words = ("--checkpoint", tmp_path / "run", "--weights", "ema_0.99", "--out", tmp_path / "a.npz")
    said = command("sample.py", *words)
    assert said.returncode == 2
    assert said.stderr.endswith(
        "has no 'ema_0.99' weights; it has ema, ema_0.5, model, or posthoc_std0.07 for example\n"
    )
    make(tmp_path / "run", tmp_path / "b", "--weights", "ema_0.5", "--seeds", "0-3")
    refused = command("sample.py", "--checkpoint", tmp_path / "run", "--seeds", "0-3", "--out", tmp_path / "b")
    assert "other options" in refused.stderr  # the folder holds images of other weights

    content = {"model": model.state_dict(), "ema": {}, "ema_0.999": model.state_dict(), "ema_decay": 0.999}
    torch.save(content, tmp_path / "official.pt")
    found, _ = checkpoint.load_weights(tmp_path / "official.pt", "ema_0.999")
    assert torch.equal(found[name], model.get_parameter(name))
    with pytest.raises(UserError, match=r"no weights called 'ema'; it has model, ema_0\.999"):
        checkpoint.load_weights(tmp_path / "official.pt", "ema")
