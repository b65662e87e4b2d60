"""Data as users have it: transparent images, folders without classes, Hugging Face's Parquet files."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import add, crop
from PIL import Image
from support import command, command_of

from unite_fast import checkpoint, export
from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data import index, open_source, pack, parquet
from unite_fast.data.containers import open_container
from unite_fast.data.transforms import adm_crop, to_tensor
from unite_fast.sampling.request import classes_of

MODEL = ModelConfig(image_size=16, num_classes=2)


def garbage_under_alpha(mode: str = "RGBA") -> Image.Image:
    """Left half transparent with noise under it, right half opaque blue."""
    pixels = np.zeros((16, 16, 4), dtype=np.uint8)
    pixels[:, :8, :3] = np.random.default_rng(0).integers(0, 255, (16, 8, 3))
    pixels[:, 8:] = (0, 0, 255, 255)
    image = Image.fromarray(pixels)
    return image.convert(mode) if mode != "P" else image.quantize(8)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def transparent(tmp_path_factory) -> Path:
    """Two classes of four images each, of which three have an alpha channel and two are really transparent."""
    root = tmp_path_factory.mktemp("transparent")
    for number in range(8):
        folder = root / f"class_{number % 2}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(crop(number)))
    (root / "class_0" / "0.png").write_bytes(png(garbage_under_alpha()))
    (root / "class_1" / "1.png").write_bytes(png(garbage_under_alpha("P")))
    (root / "class_1" / "3.png").write_bytes(png(crop(3).convert("RGBA")))  # opaque
    return root


def tars_of(root: Path, folder: Path) -> Path:
    import tarfile

    root.mkdir()
    with tarfile.open(root / "0.tar", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            add(archive, path.name, path.read_bytes())
            add(archive, f"{path.stem}.cls", path.parent.name[-1].encode())
    assert command_of(index.main, root).returncode == 0
    return root


def table_of(
    path: Path, folder: Path, image="image", label: str | None = "label", names=("cat", "dog"), **more
) -> Path:
    """One Parquet file of a folder's images as Hugging Face's datasets writes them."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = sorted(folder.rglob("*.png"))
    columns = {image: [{"bytes": f.read_bytes(), "path": f.name} for f in files]}
    features = {image: {"_type": "Image"}}
    for name in filter(None, (label, *more)):
        columns[name] = more.get(name) or [int(f.parent.name[-1]) for f in files]
        features[name] = {"_type": "ClassLabel", "names": list(names)}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path


def first(source) -> torch.Tensor:
    """The transparent RGBA image, by its name."""
    return next(source.load(i) for i in range(len(source)) if "0.png" in source.name(i) or "row 0" in source.name(i))


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet", "dali"])
def test_what_lies_under_alpha_is_never_seen(kind, transparent, tmp_path):
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    path = transparent
    if kind == "tar":
        path = tars_of(tmp_path / "tars", transparent)
    elif kind == "parquet":
        path = table_of(tmp_path / "a.parquet", transparent)
    data = DataConfig(source=kind, path=str(path), flip=False)
    for ground, level in (("white", 255), ("black", 0)):
        source = open_source(replace(data, alpha=ground), MODEL)
        assert (first(source)[:, :, :7] == level).all()
        assert source.remarks() == [f"3 of 8 images have an alpha channel: laid on {ground} (data.alpha)"]
        assert f"alpha-{ground}" in source.pipeline_id()
    refusing = open_source(replace(data, alpha="refuse"), MODEL)
    with pytest.raises(UserError, match=r"parts of it are transparent; .*data.alpha=white or black"):
        refusing.remarks()


def test_before_packing_a_few_row_groups_are_looked_at(transparent, tmp_path, monkeypatch):
    """Each is read as a whole, and again when it is packed."""
    path = table_of(tmp_path / "a.parquet", transparent)
    tables = pytest.importorskip("pyarrow.parquet")
    tables.write_table(tables.read_table(path), path, row_group_size=1)
    read, original = [], parquet._read_group
    monkeypatch.setattr(parquet, "_read_group", lambda table, group, column: (
        read.append(group), original(table, group, column))[1])  # fmt: skip
    source = open_container(path, "SOURCE", DataConfig(source="parquet", path=str(path), flip=False), MODEL)
    assert source.remarks() == ["about 4 of 8 images have an alpha channel: laid on white (data.alpha)"]
    assert read == [0, 2, 4, 6]


def test_pack_lays_on_what_it_is_told(transparent, tmp_path):
    done = command_of(pack.main, transparent, tmp_path / "black", "--size", 16, "--workers", 0, "--alpha", "black")
    assert "3 of 8 images have an alpha channel: laid on black" in done.stderr
    packed = open_source(DataConfig(source="packed", path=str(tmp_path / "black"), flip=False), MODEL)
    assert (packed.load(0)[:, :, :7] == 0).all()
    again = command_of(pack.main, transparent, tmp_path / "black", "--size", 16, "--workers", 0)
    assert "holds a pack of other images or options" in again.stderr
    assert command_of(pack.main, transparent, tmp_path / "no", "--size", 16, "--alpha", "refuse").returncode == 2


def test_opaque_images_have_the_pixels_of_pillow(transparent):
    source = open_source(DataConfig(path=str(transparent), flip=False), replace(MODEL, image_size=40))
    number = next(i for i in range(len(source)) if source.name(i).endswith("3.png"))
    assert torch.equal(source.load(number), to_tensor(adm_crop(crop(3), 40)))


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet", "packed"])
def test_unlabelled(kind, transparent, tmp_path):
    """Images in one flat folder, tars and tables without labels; all of them with label 0 and no class names."""
    model = replace(MODEL, num_classes=0)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in transparent.rglob("*.png"):
        (flat / path.name).write_bytes(path.read_bytes())
    path = flat
    if kind == "tar":
        import tarfile

        path = tmp_path / "tars"
        path.mkdir()
        with tarfile.open(path / "0.tar", "w") as archive:
            for image in sorted(flat.iterdir()):
                add(archive, image.name, image.read_bytes())
        assert "--unlabelled" in command_of(index.main, path).stderr
        assert command_of(index.main, path, "--unlabelled").returncode == 0
        (path / "0.tar").touch()  # its index is then compared with the tar
    elif kind == "parquet":
        path = table_of(tmp_path / "a.parquet", transparent, label=None)
    elif kind == "packed":
        path = tmp_path / "packed"
        assert command_of(pack.main, flat, path, "--size", 16, "--workers", 0, "--unlabelled").returncode == 0
    data = DataConfig(source=kind, path=str(path))
    source = open_source(data, model)
    assert (len(source), source.class_names, source.labels.tolist()) == (8, [], [0] * 8)
    assert source.load(0).shape == (3, 16, 16)
    with pytest.raises(UserError, match="num_classes=0"):
        open_source(data, MODEL)


def test_labels_are_forgotten_where_the_model_has_no_classes(transparent):
    source = open_source(DataConfig(path=str(transparent)), replace(MODEL, num_classes=0))
    assert (len(source), source.class_names, int(source.labels.sum())) == (8, [], 0)


def test_columns_of_parquet(transparent, tmp_path):
    """CIFAR-100's layout: img, fine_label, coarse_label; names from the schema; texts as labels."""
    data = DataConfig(source="parquet", path=str(tmp_path / "cifar100"), flip=False)
    table_of(tmp_path / "cifar100" / "train-0.parquet", transparent, "img", "fine_label", coarse_label=[0] * 8)
    with pytest.raises(UserError, match=r"several columns of classes: fine_label, coarse_label; .*label_column=NAME"):
        open_source(data, MODEL)
    source = open_source(replace(data, label_column="fine_label"), MODEL)
    assert source.class_names == ["cat", "dog"]
    with pytest.raises(UserError, match=r"no column 'labels' \(data.label_column\); it has img, fine_label"):
        open_source(replace(data, label_column="labels"), MODEL)
    table_of(tmp_path / "texts.parquet", transparent, label=None, species=["owl", "elk"] * 4)
    texts = replace(data, path=str(tmp_path / "texts.parquet"), label_column="species")
    assert open_source(texts, MODEL).class_names == ["elk", "owl"]
    with pytest.raises(UserError, match=r"has 2 classes but model\.num_classes is 7; set model\.num_classes=2"):
        open_source(texts, replace(MODEL, num_classes=7))


def test_a_repository_of_hugging_face(transparent, tmp_path):
    """Files of several splits are not mixed; a folder data/ below the one that is named is found."""
    for split in ("train", "test"):
        table_of(tmp_path / "hf" / "data" / f"{split}-00000-of-00001.parquet", transparent)
    data = DataConfig(source="parquet", path=str(tmp_path / "hf"))
    with pytest.raises(UserError, match=r"several splits \(test, train\)"):
        open_source(data, MODEL)
    pattern = str(tmp_path / "hf" / "data" / "train-*.parquet")
    assert len(open_source(replace(data, path=pattern), MODEL)) == 8


def test_too_large_to_hold_points_to_pack(transparent, tmp_path, monkeypatch):
    from unite_fast.data import parquet

    path = table_of(tmp_path / "a.parquet", transparent)
    tables = parquet.list_parquet([path], "data.path", DataConfig())
    with pytest.raises(UserError, match=r"data.pack .* DEST --size 16, then data.source=packed data.path=DEST"):
        parquet.Held(tables, DataConfig(), MODEL, most=1000)
    with pytest.raises(UserError, match=rf"pack what is there with .*data.pack {tmp_path} {tmp_path}-packed"):
        open_source(DataConfig(source="packed", path=str(tmp_path)), MODEL)


def test_training_says_how_many_are_transparent(tiny, transparent, tmp_path):
    keys = ["data.source=folder", "model.num_classes=2", "model.channels=3", "train.max_steps=1", "data.workers=0"]
    keys += [f"data.path={transparent}", "train.global_batch=8", f"run_dir={tmp_path / 'run'}"]
    done = command("train.py", "--config", tiny, *keys)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 of 8 images have an alpha channel: laid on white (data.alpha)\n")
    refused = command("train.py", "--config", tiny, *keys, "data.alpha=refuse", f"run_dir={tmp_path / 'other'}")
    assert refused.returncode == 2
    assert "parts of it are transparent" in refused.stderr


def test_classes_by_name_and_without(tiny, transparent, tmp_path):
    """Names are kept by checkpoint and export; --labels takes them; a model without classes samples, too."""
    pets = tmp_path / "pets"
    for old, new in (("class_0", "Cat, big"), ("class_1", "dog")):
        (pets / new).mkdir(parents=True)
        for path in (transparent / old).iterdir():
            (pets / new / path.name).write_bytes(path.read_bytes())
    keys = ["data.source=folder", "model.channels=3", "train.max_steps=1", "data.workers=0", f"data.path={pets}"]
    keys += ["train.global_batch=8", "sample.cfg_scale=1"]
    for classes in (2, 0):
        run = tmp_path / f"run{classes}"
        done = command("train.py", "--config", tiny, *keys, f"model.num_classes={classes}", f"run_dir={run}")
        assert done.returncode == 0, done.stderr
    run = tmp_path / "run2"
    assert checkpoint.class_names(checkpoint.locate(run)) == ["Cat, big", "dog"]
    export.export(str(run), tmp_path / "shared", "ema")
    out = tmp_path / "by_name"
    words = ("--checkpoint", tmp_path / "shared", "--seeds", "0-3", "--out", out)
    done = command("sample.py", *words, "--labels", "dog,cat, big,0")
    assert "classes 0 Cat, big, 1 dog" in done.stdout, done.stderr
    assert [int(p.stem[-1]) for p in sorted(out.glob("*.png"))] == [1, 0, 0, 1]
    wrong = command("sample.py", *words, "--labels", "dgo")
    assert wrong.stderr == "error: --labels dgo: there is no class 'dgo'; there are dog, ...\n"
    none = command("sample.py", "--checkpoint", run, "--seeds", "0-3", "--labels", "none", "--out", tmp_path / "null")
    assert none.returncode == 0, none.stderr
    unconditional = ("--checkpoint", tmp_path / "run0", "--seeds", "0-3", "--out", tmp_path / "free")
    assert command("sample.py", *unconditional).returncode == 0
    assert "this model has no classes" in command("sample.py", *unconditional, "--labels", "1").stderr
    assert "--cfg" in command("sample.py", *unconditional, "--cfg", "2").stderr
    for folder in ("null", "free"):
        assert sorted(p.name for p in (tmp_path / folder).glob("*.png")) == [f"{seed:07d}.png" for seed in range(4)]


def test_names_of_classes_before_their_numbers():
    assert classes_of("1", 3, ["0", "2", "1"]) == [2]
    assert classes_of("2, 10", 20, [str(i) for i in range(20)]) == [2, 10]
    with pytest.raises(UserError, match="class 3 does not exist; this model has 0 to 2"):
        classes_of("3", 3, ["a", "b", "c"])
