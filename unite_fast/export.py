"""One checkpoint as files to share: python -m unite_fast.export CHECKPOINT --out FOLDER

    model.safetensors   weights under stock names; configuration and provenance in its metadata
    config.json         the model's sizes and the sampling options
    README.md           a model card

Nothing in them can execute code, and no path of this machine is in them. sample.py and unite_fast.evaluate take FOLDER
as --checkpoint, train.py as init_from. CHECKPOINT is a run folder, a step-N folder, or an official .pt. A .pt that
holds pickled objects is refused; with --trust-pickle, for a file whose author you trust as you trust a program, it is
loaded all the same and only its tensors are written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from unite_fast import __version__, checkpoint, interop
from unite_fast.command import run
from unite_fast.config import Config, UserError
from unite_fast.config_io import from_dict, to_dict
from unite_fast.shards import write_tensors

ABSOLUTE = re.compile(r"^(~|[A-Za-z]:\\|/)|[\\/]")
PATHS = ("run_dir", "resume", "init_from", "path", "heldout_path", "perceptual_trunk")

CARD = """\
---
library_name: unite-fast
tags: [image-tokenizer, flow-matching, image-generation]
---
# {name}

A UNITE model ([arXiv 2603.22283](https://arxiv.org/abs/2603.22283)): one transformer that tokenizes images and
generates them. {parameters:,} parameters, images of {size}x{size}, {classes} classes, {latents} latents of width
{width}. {weights}, step {step}, written by unite-fast {version}{commit}.

Sampling options of the run: solver {solver}, {steps} steps, guidance {scale:g} for t in {interval}.

No FID is claimed here. A score means something only together with its protocol: Inception weights and reference
statistics by hash, number of samples, labels, solver, steps, guidance and its interval, weights (EMA or raw), dtype,
rounding to 8 bits, seeds, and the commit.
"""


def scrub(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration without paths: what a path was becomes its last part, and what looks like a folder goes."""
    clean: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            clean[key] = scrub(value)
        elif isinstance(value, str) and (key in PATHS or ABSOLUTE.search(value)):
            clean[key] = "" if key in PATHS else Path(value).name
        else:
            clean[key] = value
    return clean


def load_trusted(path: Path, weights: str) -> tuple[dict[str, torch.Tensor], Config]:
    """(weights, configuration) of a .pt that is unpickled without restriction: it can run anything."""
    content = torch.load(path, map_location="cpu", weights_only=False)
    found = interop.weights_of(content if isinstance(content, dict) else {}, weights, str(path))
    state = interop.clean_keys({k: v for k, v in found.items() if isinstance(v, torch.Tensor)})
    return state, from_dict({"model": to_dict(interop.infer_config(state, where=str(path)))})


def provenance(located: Path) -> dict[str, Any]:
    """The run's provenance.json where there is one. It holds no paths."""
    file = located.parent.parent / "provenance.json"
    try:
        return json.loads(file.read_text()) if located.is_dir() else {}
    except (OSError, ValueError):
        return {}


def export(source: str, out: Path, weights: str, trust_pickle: bool = False) -> Path:
    """Writes the three files into ``out``. Raises UserError."""
    if trust_pickle and Path(source).is_file():
        state, config = load_trusted(Path(source), weights)
        located = Path(source)
    else:
        located = checkpoint.locate(source)
        model, config = checkpoint.load_model(located, weights)
        state = dict(model.state_dict())
    if bad := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise UserError(f"{source}: {bad[0]} is not finite; export an older checkpoint")
    values, origin = scrub(to_dict(config)), provenance(located)
    step = checkpoint.step_of(located) or 0
    facts = {"format": "pt", "unite_fast": __version__, "weights": weights, "step": str(step)}
    facts |= {"config": json.dumps(values), "provenance": json.dumps(origin)}
    m, s = config.model, config.sample
    commit = f" at commit {origin['commit'][:12]}" if origin.get("commit") else ""
    said = {"ema": "EMA weights", "model": "Raw weights"}.get(weights, f"Weights {weights}")
    card = CARD.format(
        name=values["name"], parameters=sum(v.numel() for v in state.values()), size=m.image_size,
        classes=m.num_classes, latents=m.num_latents, width=m.latent_dim, step=step, version=__version__,
        commit=commit, weights=said, solver=s.solver, steps=s.steps,
        scale=s.cfg_scale, interval=list(s.cfg_interval),
    )  # fmt: skip
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = out / "model.safetensors.incomplete"
        write_tensors(temporary, {name: state[name].contiguous() for name in sorted(state)}, facts)
        os.replace(temporary, out / "model.safetensors")
        (out / "config.json").write_text(json.dumps({"model": values["model"], "sample": values["sample"]}, indent=1))
        (out / "README.md").write_text(card)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    return out


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="run folder, step-N folder, or official .pt")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--weights", default="ema", metavar="NAME", help="ema (default), model, or another average")
    parser.add_argument("--trust-pickle", action="store_true", help="load a .pt that can execute code; see above")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    export(arguments.checkpoint, arguments.out, arguments.weights, arguments.trust_pickle)
    print(f"model.safetensors, config.json and README.md in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
