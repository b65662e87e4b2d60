"""The way of a new user: scripts/new_user.py, with a model and a training that are as small as they can be."""

from __future__ import annotations

import importlib.util

from photographs import crop
from support import ROOT, command

import train

SMALL = (
    "model.patch_size=8", "model.num_latents=16", "train.max_steps=2", "train.image_every=2", "train.global_batch=8",
    "train.log_every=1", "data.workers=0", "evaluation.heldout_epoch=0.01", "sample.steps=2",
    "model.encoder={depth: 2, width: 32, heads: 2, in_context_start: 1, in_context_len: 1}",
    "model.decoder={depth: 1, width: 32, heads: 2, mlp_hidden: 64, in_features: 32}",
)  # fmt: skip


def test_the_way_of_a_new_user(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("new_user", ROOT / "scripts" / "new_user.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main([str(tmp_path), *SMALL])
    said = capsys.readouterr().out
    assert "the score of held-out samples at step 2: psnr" in said
    assert "by name sky, temple; begun anew flowers; the null class (4 classes there, 3 here)" in said
    assert "classes 2 sky, 1 petals" in said or "classes 1 petals, 2 sky" in said
    assert "from the export: latents (1, 16, 8), a picture (32, 32), a sample of flowers (32, 32)" in said
    page = (tmp_path / "runs" / "photos" / "report" / "index.html").read_text()
    for words in ("samples in 4 classes: leaves, petals, sky, temple", "held-out PSNR", "step 2"):
        assert words in page
    for name in ("by_name.png", "runs/photos/report/gallery_guidance.png", "runs/photos/samples/step_0000002.png"):
        assert (tmp_path / name).is_file()


def test_a_template_runs_as_it_stands(tmp_path):
    """With the keys that the README gives it alone, up to the first step."""
    for number in range(64):
        folder = tmp_path / "pets" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        crop(number).save(folder / f"{number}.png")
    for name in ("images_32", "images_64"):
        keys = (f"data.path={tmp_path / 'pets'}", "model.num_classes=2", f"run_dir={tmp_path / name}")
        done = command("train.py", "--config", ROOT / "configs" / f"{name}.yaml", *keys, "--dry-run")
        assert "64 images/epoch" in done.stdout, done.stderr
        settings = train.parse(["--config", str(ROOT / "configs" / f"{name}.yaml"), *keys])[1]
        assert len(train.Inputs.open(settings).source) == 64
