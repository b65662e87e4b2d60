"""One checkpoint as files to share: python -m unite_fast.export CHECKPOINT --out FOLDER

    model.safetensors   weights under stock names; configuration and provenance in its metadata
    config.json         the model's sizes and the sampling options that were chosen for it
    README.md           a model card: what it is, how to load it, its classes, its scores with their protocols
    pipeline.py, model_index.json   with which diffusers loads the folder (library/diffusers_pipeline.py); of images
    samples.png         the newest picture grid of the run, where there is one

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

from unite_fast import __version__, checkpoint, interop, modality
from unite_fast.base import files, outputs
from unite_fast.base.command import run
from unite_fast.base.errors import UserError, first_line, idle
from unite_fast.checkpoint.shards import write_tensors
from unite_fast.config import Config, SampleConfig
from unite_fast.config.yaml_text import to_dict

ABSOLUTE = re.compile(r"^(~|[A-Za-z]:\\|/)|[\\/]")
SCORES = ("fid", "sfid", "is", "kid", "rfid", "rsfid", "psnr", "l1", "lpips", "images")  # of results, those in a card
PIPELINE = ("pipeline.py", "model_index.json")
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
    config = checkpoint.official_config(
        content, interop.infer_config(state, interop.known_of(content, path), str(path))
    )
    interop.check_model(config.model, state, str(path))
    return state, config, checkpoint.step_in(content)


def origin(located: Path) -> tuple[str, dict[str, Any]]:
    """("run" or "official", the run's provenance where there is one, which holds no paths)."""
    kind, text = ("run" if located.is_dir() else "official"), "{}"
    try:
        if located.is_dir():
            text = files.read_text(located.parent.parent / "provenance.json")
        elif located.suffix == ".safetensors":
            said = checkpoint.facts(located)
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


def score_lines(located: Path) -> str:
    """The scores that lie beside the checkpoint, a line each with what they were measured with; else that none do."""
    run = located.parent.parent if located.is_dir() else located.parent
    lines = []
    for path in sorted((run / "scores").glob("*.json")):
        try:
            content = json.loads(files.read_text(path))
            protocol, result = content["protocol"], content["result"]
            kept = {k: v for k, v in result.items() if k in SCORES and isinstance(v, (int, float))}
            looked = (protocol.get("extractor") or {}).get("name", "no network")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if kept:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in kept.items())
            lines.append(f"- {figures} (`{path.stem}`, features of {looked})")
    return "\n".join(["Scores of the run:", "", *lines, "", ""]) if lines else "No score is claimed here. "


def is_export(folder: Path) -> bool:
    """Whether a folder holds what ``export`` writes, perhaps with its scores, and nothing else."""
    names = {"model.safetensors", "config.json", "README.md", "samples.png", "scores", *PIPELINE}
    marked = "unite_fast" in checkpoint.facts(folder / "model.safetensors")
    return marked and {p.name for p in folder.iterdir()} <= names


def export(
    source: str, out: Path, weights: str, trust_pickle: bool = False, overwrite: bool = False, license: str = ""
) -> Path:
    """Writes the files into ``out``: a new or empty folder, or with ``overwrite`` an export. Raises UserError."""
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
    names = checkpoint.class_names(located) if not trusted else []
    facts |= {"class_names": json.dumps(names)} if names else {}
    kept = checkpoint.facts(located).get("scores", "") if located.suffix == ".safetensors" else ""
    facts["scores"] = kept or ("No score is claimed here. " if trusted else score_lines(located))
    run = located.parent.parent if located.is_dir() else located.parent
    grid = next(iter(sorted((run / "samples").glob("step_*.png"), reverse=True)), run / "samples.png")
    grid = grid if grid.is_file() and not trusted else None
    m, options = config.model, sampling_options(config.sample, kind)
    counted = "" if kind == "run" else " by its own count"  # the official code's is of micro-batches
    card = modality.of(m).card.format(
        name=values["name"], parameters=sum(v.numel() for v in state.values()), size=m.image_size,
        classes=m.num_classes, latents=m.num_latents, width=m.latent_dim,
        weights={"ema": "EMA weights", "model": "Raw weights"}.get(weights, f"Weights {weights}"),
        step="" if step is None else f", step {step}{counted}", version=__version__,
        commit=f" at commit {str(provenance['commit'])[:12]}" if provenance.get("commit") else "",
        sampling=sampling_line(options), scores=facts["scores"],
        license=f"license: {license}\n" if license else "", example=example_of(names),
        named=f"Classes: {', '.join(names)}.\n\n" if names else "",
        picture="![Samples while training](samples.png)\n\n" if grid else "",
    )  # fmt: skip
    with files.refusals(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        with files.replacing(out / "model.safetensors") as file:
            own = Path(f"/proc/self/fd/{file.fileno()}")  # whoever else may write under the name
            write_tensors(own, {name: state[name].contiguous() for name in sorted(state)}, facts)
        files.write_json(out / "config.json", {"model": values["model"], "sample": options})
        files.write(out / "README.md", card)
        if modality.of(m).shared_pipeline:
            files.write(out / "pipeline.py", (Path(__file__).parent / "library" / "diffusers_pipeline.py").read_text())
            files.write_json(
                out / "model_index.json", {"_class_name": ["pipeline", "UnitePipeline"], "_diffusers_version": "0.42.0"}
            )
        if grid is not None and grid.resolve() != (out / "samples.png").resolve():
            files.write(out / "samples.png", grid.read_bytes())
    return out


def example_of(names: list[str]) -> str:
    return json.dumps(names[:2], ensure_ascii=False) if names else "seeds=range(4)"


def push(folder: Path, name: str) -> str:
    """Uploads an export to the hub of Hugging Face, as this user is known there. Raises UserError."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError("--push-to-hub needs huggingface_hub: pip install huggingface_hub") from None
    hub = HfApi()
    try:
        hub.create_repo(name, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=str(folder))
    except Exception as error:  # of somebody else's code, over a network
        raise UserError(f"--push-to-hub {name}: {first_line(error)}; the export is in {folder}") from None
    return f"pushed to the hub as {name}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="run folder, step-N folder, export, or official .pt")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--weights", default="ema", metavar="NAME", help="ema (default), model, or another average")
    parser.add_argument("--trust-pickle", action="store_true", help="load a .pt that can execute code; see above")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in FOLDER")
    parser.add_argument("--license", default="", metavar="NAME", help="for the card, as apache-2.0; nothing by default")
    parser.add_argument("--push-to-hub", default="", metavar="USER/NAME", help="upload it; needs huggingface_hub")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    options = (arguments.trust_pickle, arguments.overwrite, arguments.license)
    export(arguments.checkpoint, arguments.out, arguments.weights, *options)
    print(f"model.safetensors, config.json and README.md in {arguments.out}")
    if arguments.push_to_hub:
        print(push(arguments.out, arguments.push_to_hub))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
