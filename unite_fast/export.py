"""One checkpoint as files to share: python -m unite_fast.export CHECKPOINT --out FOLDER

    model.safetensors   weights under stock names; configuration and provenance in its metadata
    config.json         the model's sizes and the sampling options that were chosen for it
    README.md           a model card

Nothing in them can execute code, and no path of this machine is in them. sample.py and unite_fast.evaluate take FOLDER
as --checkpoint, train.py as init_from. CHECKPOINT is a run folder, a step-N folder, an export, or an official .pt.
A .pt that holds pickled objects is refused; with --trust-pickle, for a file whose author you trust as you trust a
program, it is loaded all the same and only its tensors are written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from unite_fast import __version__, checkpoint, interop, modality
from unite_fast.base import files, outputs
from unite_fast.base.command import run
from unite_fast.base.errors import UserError, idle
from unite_fast.checkpoint.shards import write_tensors
from unite_fast.config import Config, SampleConfig
from unite_fast.config.yaml_text import to_dict

ABSOLUTE = re.compile(r"^(~|[A-Za-z]:\\|/)|[\\/]")
PATHS = ("run_dir", "resume", "init_from", "path", "heldout_path", "perceptual_trunk")


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


def load_trusted(path: Path, weights: str) -> tuple[dict[str, torch.Tensor], Config, int | None]:
    """(weights, configuration, step) of a .pt that is unpickled without restriction: it can run anything."""
    loaded = torch.load(path, map_location="cpu", weights_only=False)
    content: dict[str, Any] = loaded if isinstance(loaded, dict) else {}
    found = interop.weights_of(content, weights, str(path))
    state = interop.clean_keys({k: v for k, v in found.items() if isinstance(v, torch.Tensor)})
    config = checkpoint.official_config(content, interop.infer_config(state, interop.sidecar(path), str(path)))
    interop.check_model(config.model, state, str(path))
    return state, config, checkpoint.step_in(content)


def origin(located: Path) -> tuple[str, dict[str, Any]]:
    """("run" or "official", the run's provenance where there is one, which holds no paths)."""
    kind, text = ("run" if located.is_dir() else "official"), "{}"
    try:
        if located.is_dir():
            text = (located.parent.parent / "provenance.json").read_text()
        elif located.suffix == ".safetensors":
            with safe_open(located, "pt") as file:
                said = file.metadata()
            kind, text = said.get("origin", "run"), said.get("provenance", "{}")
        found = json.loads(text)
    except (OSError, ValueError):
        found = {}
    return kind, found if isinstance(found, dict) else {}


def sampling_options(how: SampleConfig, kind: str) -> dict[str, Any]:
    """Those that somebody chose or found: a run's, or the guidance that an official .pt records."""
    options = to_dict(how)
    if kind == "run":
        return options
    return {k: options[k] for k in ("cfg_scale", "cfg_interval")} if how != SampleConfig() else {}


def sampling_line(options: dict[str, Any]) -> str:
    if not options:
        return ""
    guidance = f"guidance {options['cfg_scale']:g} for t in {options['cfg_interval']}"
    if "solver" in options:
        return f"Sampling options of the run: solver {options['solver']}, {options['steps']} steps, {guidance}.\n\n"
    return f"The search during its training found {guidance} the best.\n\n"


def is_export(folder: Path) -> bool:
    """Whether a folder holds what ``export`` writes, perhaps with its scores, and nothing else."""
    names = {"model.safetensors", "config.json", "README.md", "scores"}
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            return "unite_fast" in (file.metadata() or {}) and {p.name for p in folder.iterdir()} <= names
    except (OSError, SafetensorError):
        return False


def export(source: str, out: Path, weights: str, trust_pickle: bool = False, overwrite: bool = False) -> Path:
    """Writes the three files into ``out``: a new or empty folder, or with ``overwrite`` an export. Raises UserError."""
    if not overwrite and is_export(out):
        raise UserError(f"--out {out} holds an export; choose another folder, or replace it with --overwrite")
    if trust_pickle and Path(source).suffix not in (".pt", ".pth"):
        raise idle("--trust-pickle", f"for {source}, which is no .pt file")
    trusted = trust_pickle and Path(source).is_file()
    located = Path(source) if trusted else checkpoint.locate(source)
    outputs.check_folder(out, "--out", checkpoint.reads(located), is_export)
    if trusted:
        state, config, step = load_trusted(located, weights)
    else:
        model, config = checkpoint.load_model(located, weights)
        state, step = dict(model.state_dict()), checkpoint.recorded_step(located)
    if bad := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise UserError(f"{source}: {bad[0]} is not finite; export an older checkpoint")
    values, (kind, provenance) = scrub(to_dict(config)), origin(located)
    facts = {"format": "pt", "unite_fast": __version__, "weights": weights, "step": "" if step is None else str(step)}
    facts |= {"config": json.dumps(values), "origin": kind, "provenance": json.dumps(provenance)}
    m, options = config.model, sampling_options(config.sample, kind)
    counted = "" if kind == "run" else " by its own count"  # the official code's is of micro-batches
    card = modality.of(m).card.format(
        name=values["name"], parameters=sum(v.numel() for v in state.values()), size=m.image_size,
        classes=m.num_classes, latents=m.num_latents, width=m.latent_dim,
        weights={"ema": "EMA weights", "model": "Raw weights"}.get(weights, f"Weights {weights}"),
        step="" if step is None else f", step {step}{counted}", version=__version__,
        commit=f" at commit {str(provenance['commit'])[:12]}" if provenance.get("commit") else "",
        sampling=sampling_line(options),
    )  # fmt: skip
    with files.refusals(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        with files.replacing(out / "model.safetensors") as file:
            write_tensors(Path(file.name), {name: state[name].contiguous() for name in sorted(state)}, facts)
        files.write_json(out / "config.json", {"model": values["model"], "sample": options})
        files.write(out / "README.md", card)
    return out


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="run folder, step-N folder, export, or official .pt")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--weights", default="ema", metavar="NAME", help="ema (default), model, or another average")
    parser.add_argument("--trust-pickle", action="store_true", help="load a .pt that can execute code; see above")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in FOLDER")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    export(arguments.checkpoint, arguments.out, arguments.weights, arguments.trust_pickle, arguments.overwrite)
    print(f"model.safetensors, config.json and README.md in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
