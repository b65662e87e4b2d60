"""Official .pt files as people have them: torch's older format, pages in their place, fields gone wrong."""

from __future__ import annotations

import json
import math
import resource
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import TINY

from unite_fast import checkpoint
from unite_fast.base.errors import UserError
from unite_fast.config import OptimConfig
from unite_fast.config.yaml_text import from_dict, parse_yaml, to_dict
from unite_fast.interop import best_scale, load_reference, load_training, read_official, save_reference
from unite_fast.model.unite import UNITE, build
from unite_fast.optim.optimizer import Optimizer

OPTIONS = {"in_context_start": 1, "decoder_heads": 2}


def trained() -> tuple[UNITE, Optimizer]:
    """A model of which every tensor has had an update."""
    model = build(from_dict(parse_yaml(TINY, "tiny")).model)
    optimizer = Optimizer(model, OptimConfig())
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step(torch.tensor(1e-3))
    return model, optimizer


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("official") / "tiny.pt"
    save_reference(path, *trained(), lr=1e-3, step=1, best_cfg_scale=3.4)
    return path


def test_the_older_format_of_torch_loads(official, tmp_path):
    torch.save(torch.load(official), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    new, old = (load_reference(p, **OPTIONS).state_dict() for p in (official, tmp_path / "old.pt"))
    assert all(torch.equal(new[name], old[name]) for name in new)


def test_a_saved_model_is_the_same_when_it_is_loaded(official, tmp_path):
    """Heads, the block of the class tokens, the time shift: what shapes do not tell stands in the file."""
    values = parse_yaml(TINY, "tiny")
    values["model"] |= {"time_shift": 0.3}
    values["model"]["decoder"] |= {"width": 128, "heads": 8}
    model = build(from_dict(values).model).eval()
    save_reference(tmp_path / "a.pt", model)
    loaded = load_reference(tmp_path / "a.pt")
    assert loaded.config == model.config
    z = torch.randn(2, *model.latent_shape)
    assert torch.equal(loaded.decode(z), model.decode(z))
    content = torch.load(tmp_path / "a.pt")
    del content["unite_fast_model"]
    torch.save(content, tmp_path / "b.pt")
    with pytest.raises(UserError, match=r"heads cannot be told from its width 128; pass decoder_heads=.*b.json"):
        load_reference(tmp_path / "b.pt", in_context_start=1)
    (tmp_path / "b.json").write_text('{"decoder": {"heads": 8}}')
    assert load_reference(tmp_path / "b.pt", in_context_start=1).config.decoder.heads == 8


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; fetch it again"),
        (b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS's pointer .* git lfs pull"),
        (b"PK\3\4 and no more", "is damaged or not a checkpoint"),
        (b"any words", "is damaged or not a checkpoint"),
    ],
)
def test_what_is_there_instead_of_a_checkpoint(content, words, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_official(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def drop(content: dict[str, Any]) -> None:
    del content["ema"]["encoder.blocks.1.attn.qkv.weight"]


def scalar(content: dict[str, Any]) -> None:
    content["ema"]["encoder.blocks.1.attn.qkv.weight"] = torch.tensor(1.0)


def nan_weight(content: dict[str, Any]) -> None:
    content["model"]["encoder.blocks.1.attn.qkv.weight"][0, 0] = math.nan


def nan_moment(content: dict[str, Any]) -> None:
    content["optimizer_muon"]["state"][0]["momentum_buffer"][0, 0] = math.inf


def meta(content: dict[str, Any]) -> None:
    content["model"]["latent_tokens"] = content["model"]["latent_tokens"].to("meta")


def endless(content: dict[str, Any]) -> None:
    content["model"]["latent_tokens"] = torch.zeros(1).expand(1, 1 << 40, 4)


def endless_moment(content: dict[str, Any]) -> None:
    content["optimizer_muon"]["state"][0]["momentum_buffer"] = torch.zeros(1).expand(1 << 40, 4)


def float8(content: dict[str, Any]) -> None:
    content["ema"]["latent_tokens"] = content["ema"]["latent_tokens"].to(torch.float8_e4m3fn)


def no_groups(content: dict[str, Any]) -> None:
    del content["optimizer"]["param_groups"]


def odd_step(content: dict[str, Any]) -> None:
    content["optimizer"]["state"][0]["step"] = "soon"


def no_state(content: dict[str, Any]) -> None:
    del content["optimizer_muon"]["state"][3]


def no_average(content: dict[str, Any]) -> None:
    content["ema"] = None


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (drop, "'ema', holds another model: encoder.blocks.1.attn.qkv.weight is missing"),
        (scalar, r"qkv.weight is \(\), the model has"),
        (nan_weight, "encoder.blocks.1.attn.qkv.weight is not finite"),
        (nan_moment, "'optimizer_muon' holds a momentum_buffer of .* that is not finite"),
        (meta, "'model' holds 'latent_tokens', which is not a dense tensor"),
        (endless, "'model' holds 'latent_tokens', which is not a dense tensor"),
        (endless_moment, r"'optimizer_muon' holds a momentum_buffer of .* that is \(1099511627776, 4\)"),
        (float8, "'ema' holds 'latent_tokens', which is not a dense tensor"),
        (no_groups, "'optimizer' is not a state of torch.optim"),
        (odd_step, "'optimizer' is not a state of torch.optim"),
        (no_state, "'optimizer_muon' has no state of"),
        (no_average, "'ema' is not a state dict"),
    ],
)
def test_a_wrong_field_is_one_line_and_changes_nothing(
    harm: Callable[[dict[str, Any]], None], words, official, tmp_path
):
    content = torch.load(official)
    harm(content)
    torch.save(content, tmp_path / "x.pt")
    model, optimizer = trained()
    before = {name: value.clone() for name, value in (model.state_dict() | optimizer.state_dict()).items()}
    with pytest.raises(UserError, match=words) as caught:
        load_training(read_official(tmp_path / "x.pt"), model, optimizer, "x.pt")
    assert "\n" not in str(caught.value)
    after = model.state_dict() | optimizer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "tiny.json is not a JSON object"),
        ("[" * 100_000, "tiny.json is not a JSON object"),
        ('{"encoder": {"depth": 100000}}', "tiny.pt: model.encoder.depth must be above 0 and at most 1024"),
        ('{"encoder": {"depth": "deep"}}', "tiny.pt: model.encoder.depth must be a whole number, got 'deep'"),
        ('{"decoder": {"heads": 0}}', "the decoder's heads cannot be told"),
        ('{"encoder": {"width": 1099511627776}}', "tiny.pt is not a UNITE model: Storage size"),
    ],
)
def test_what_stands_beside_a_checkpoint_is_checked(official, tmp_path, text, words):
    shutil.copy(official, tmp_path)
    (tmp_path / "tiny.json").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        load_reference(tmp_path / "tiny.pt", in_context_start=1)
    assert "\n" not in str(caught.value)


def test_a_name_of_a_block_makes_no_blocks(official, tmp_path):
    content = torch.load(official)
    content["ema"]["encoder.blocks.900000000.attn.qkv.bias"] = torch.zeros(1)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"model\.encoder\.depth must be above 0 and at most 1024, got 900000001"):
        load_reference(tmp_path / "x.pt", **OPTIONS)


def test_compressed_records_are_not_taken_for_numbers(official, tmp_path):
    """torch maps the file and would give the compressed bytes as weights."""
    with zipfile.ZipFile(official) as read, zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as written:
        for name in read.namelist():
            written.writestr(name, read.read(name))
    with pytest.raises(UserError, match="its records are compressed"):
        read_official(tmp_path / "x.pt")


SIZES = {
    "depth": {"encoder": {"depth": 1024, "width": 4096}}, "width": {"encoder": {"width": 1 << 40}},
    "classes": {"num_classes": 1 << 40}, "latents": {"num_latents": 1 << 40}, "decoder": {"decoder": {"depth": 1024}},
    "image": {"image_size": 1 << 16},
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_an_export_of_other_sizes_allocates_nothing(name, tmp_path):
    """Its configuration is compared with its tensors before there is a model of that size."""
    config = from_dict(parse_yaml(TINY, "tiny"))
    state = dict(build(config.model).state_dict())
    del state["patch_embed.position_embeddings"]  # the one that need not be there
    values = to_dict(config)
    for key, value in SIZES[name].items():
        values["model"][key] = values["model"][key] | value if isinstance(value, dict) else value
    facts = {"config": json.dumps(values), "weights": "ema"}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors", facts)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"holds another model|is not a UNITE model|bytes of positions"):
        checkpoint.load_model(tmp_path / "model.safetensors")
    assert time.process_time() - began < 10  # of a network without blocks' contents, 1,024 deep
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19  # KiB


@pytest.mark.parametrize("scale", [None, math.nan, math.inf, -1.0, "3.4"])
def test_an_odd_guidance_scale_counts_as_none(scale):
    assert best_scale({"current_best_cfg_scale": scale}) == 0.0
    assert best_scale({"current_best_cfg_scale": 3.4}) == 3.4
