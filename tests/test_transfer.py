"""init_from: what fits another model is taken, classes and positions are adapted, and all of it is said."""

from __future__ import annotations

import torch
from support import TINY, command

from unite_fast.checkpoint import transfer
from unite_fast.config.yaml_text import from_dict, parse_yaml
from unite_fast.model.unite import build


def model_of(**changes):
    values = parse_yaml(TINY, "tiny")
    values["model"] |= changes
    model = build(from_dict(values).model, seed=len(changes)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.add_(torch.randn(p.shape, generator=generator) * 0.05 * ("position" not in name))
    return model


def moved(old, new, there=(), here=()):
    origin = transfer.Origin("old", old.config, there)
    return transfer.take(new, old.state_dict(), origin, here)


def test_classes_go_by_name():
    old, new = model_of(num_classes=3), model_of(num_classes=4)
    fresh = new.encoder.y_embedder.embedding_table.weight.clone()
    lines = moved(old, new, ["cat", "dog", "owl"], ["ant", "dog", "cat", "elk"])
    assert lines == [
        f"init_from old: took {len(new.state_dict()) - 1} of {len(new.state_dict())} tensors as they are",
        "  encoder.y_embedder.embedding_table.weight: by name dog, cat; begun anew ant, elk; the null class "
        "(3 classes there, 4 here)",
    ]
    table, given = (m.encoder.y_embedder.embedding_table.weight for m in (new, old))
    assert torch.equal(table[[2, 1, 4, 5]], given[[0, 1, 3, 4]])
    assert torch.equal(table[[0, 3]], fresh[[0, 3]])
    same = model_of(num_classes=3)
    assert "by name dog, cat, owl" in moved(old, same, ["cat", "dog", "owl"], ["dog", "cat", "owl"])[1]
    z, t = torch.randn(1, 8, 4), torch.tensor([0.5])
    assert torch.equal(same.denoise(z, t, torch.tensor([0])), old.denoise(z, t, torch.tensor([1])))
    assert "have no names to go by" in moved(old, model_of(num_classes=7))[1]
    assert "the null class" in moved(old, model_of(num_classes=0), ["a", "b", "c"])[1]
    assert len(moved(old, model_of(num_classes=3))) == 1  # equal counts without names: by number


def test_the_same_picture_in_other_channels():
    """Of an image without color the latents are the same, and what is decoded has three equal channels."""
    old = model_of()
    new = model_of(channels=3)
    lines = moved(old, new)
    assert [line.split(":")[1] for line in lines[1:]] == [" from 1 to 3 channels"] * 3
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    z = old.tokenize(images)
    assert torch.allclose(new.tokenize(images.expand(-1, 3, -1, -1)), z, atol=1e-5)
    assert torch.allclose(new.decode(z), old.decode(z).expand(-1, 3, -1, -1), atol=1e-5)
    back = model_of()
    moved(new, back)
    assert torch.allclose(back.tokenize(images), z, atol=1e-5)
    assert torch.allclose(back.decode(z), old.decode(z), atol=1e-5)


def test_positions_are_resampled():
    old, new = model_of(num_latents=16), model_of(num_latents=64, image_size=16)
    lines = moved(old, new)
    assert "  latent_tokens: resampled from 16 to 64 places" in lines
    assert torch.allclose(new.latent_tokens.mean(1), old.latent_tokens.mean(1), atol=0.05)
    ramp = torch.arange(4.0).repeat(4)[None, :, None]  # a square grid, rising to the right
    larger = transfer.resampled(ramp, 64).reshape(8, 8)
    inside = larger[:, 2:6]
    assert torch.allclose(inside, torch.tensor([0.75, 1.25, 1.75, 2.25]), atol=0.1)
    assert (larger.diff(dim=1) >= -0.1).all()
    assert torch.allclose(larger[0], larger[-1])
    line = transfer.resampled(torch.arange(3.0)[None, :, None], 6).flatten()
    assert torch.allclose(line, torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2]))
    assert torch.equal(transfer.resampled(ramp, 16), ramp)


def test_what_does_not_fit_is_said(tiny, tmp_path):
    def train(name, *keys):
        words = ("--config", tiny, f"run_dir={tmp_path / name}", "train.max_steps=1", *keys)
        return command("train.py", *words)

    assert train("a").returncode == 0
    wider = ["model.decoder={depth: 2, width: 64, heads: 1, mlp_hidden: 64, in_features: 32}"]
    done = train("b", f"init_from={tmp_path / 'a'}", *wider)
    assert done.returncode == 0, done.stderr
    assert "begun anew: decoder." in done.stdout
    assert "but decoder.heads is 2 there and 1 here" in done.stdout
    assert "init_from" not in train("b", f"init_from={tmp_path / 'a'}", "train.max_steps=2", *wider).stdout
    assert "init_from" in train("c", f"init_from={tmp_path / 'a'}").stdout
    strict = train("d", f"init_from={tmp_path / 'a'}", "init_strict=true", *wider)
    assert strict.returncode == 2
    assert "holds another model: model.decoder" in strict.stderr
    other = {"depth": 3, "width": 48, "heads": 2, "in_context_start": 1, "in_context_len": 2}
    nothing = train("e", f"init_from={tmp_path / 'a'}", f"model.encoder={other}".replace("'", ""))
    assert nothing.returncode == 2
    assert "of which no block fits" in nothing.stderr
