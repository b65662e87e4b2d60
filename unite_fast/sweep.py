"""Trains a list of configurations by seeds, one after another, and puts their scores into one table.

    python -m unite_fast sweep configs/claims/claims.yaml data.path=/usr/share/datasets/fashion-mnist

    config: fashion.yaml                      what all runs begin with, by its path from this file
    out: runs/claims                          (default: runs/ and the file's name)
    seeds: [0, 1, 2]
    runs:
      shared: []                              overrides, as on train.py's command line
      separate: [model.separate_denoiser=true]
      other: {config: other.yaml, overrides: []}
    then:                                     commands on each finished run, whose folder is {run}; each makes a file
      - {command: [small, "{run}", --out, "{run}/sweep/small.json"], makes: sweep/small.json}
    table:                                    of each run: a file below its folder, and the keys that lead to a number;
      PSNR: [sweep/small.json, result, psnr]         "*" stands for the one entry there is

What those commands make lies best in a folder of the sweep's own: a later look at the run by hand then leaves it alone.

A run lies in OUT/NAME/seed_N. What is finished is left alone, what was interrupted goes on: start the same command
again. The table is OUT/table.json and table.md, with a picture. On a cluster --slurm FILE writes a job array instead,
one task a run; --collect makes the table of what there is.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unite_fast import checkpoint
from unite_fast.analysis import plots
from unite_fast.base import command, files, outputs, verbs
from unite_fast.base.errors import RunError, UserError
from unite_fast.base.parent import end_with_parent
from unite_fast.base.provenance import ROOT
from unite_fast.checkpoint.compare import differences
from unite_fast.config import yaml_text

KEYS = ("config", "out", "seeds", "overrides", "runs", "then", "table")
TABLE = "table.json"
JOB = "scripts/slurm/train.sbatch"
ANY = "*"  # in a column: the one entry there is, whatever its name
FOLDER = "{run}"  # in a command: the run's
FREE = ("name", "run_dir", "resume", "device")  # what may differ from the configuration that a run was made with


class Then(NamedTuple):
    command: list[str]
    makes: str


class Sweep(NamedTuple):
    out: Path
    seeds: list[int]
    runs: dict[str, tuple[Path, list[str]]]  # configuration and overrides
    then: list[Then]
    table: dict[str, list[str]]


class Run(NamedTuple):
    name: str
    seed: int
    folder: Path
    config: Path
    overrides: list[str]

    def words(self) -> list[str]:
        """Of train.py."""
        own = [f"name={self.name}", f"seed={self.seed}", f"run_dir={self.folder}"]
        return ["--config", str(self.config), *self.overrides, *own]


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise UserError(f"{where} must be a list of texts, got {value!r}")
    return value


def _section(content: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = content.get(key, {})
    if not isinstance(value, dict) or not all(isinstance(name, str) and name for name in value):
        raise UserError(f"{where}: {key} must have a name in front of each entry")
    return value


def read(path: Path, more: Sequence[str] = ()) -> Sweep:
    """A sweep's file; more: overrides of all runs. Raises UserError."""
    content, where = yaml_text.read(path, "sweep"), str(path)
    if not isinstance(content, dict) or not content.get("runs"):
        raise UserError(f"{where}: no sweep; it needs runs")
    if not isinstance(content.get("then", []), list):
        raise UserError(f"{where}: then must be a list of commands, got {content['then']!r}")
    if not isinstance(content.get("out") or "", str):
        raise UserError(f"{where}: out must be a folder, got {content['out']!r}")
    if unknown := [key for key in content if key not in KEYS]:
        raise UserError(f"{where}: unknown key '{unknown[0]}'; known: {', '.join(KEYS)}")
    common = [*_texts(content.get("overrides", []), f"{where}: overrides"), *more]
    runs: dict[str, tuple[Path, list[str]]] = {}
    for name, entry in _section(content, "runs", where).items():
        if not name.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"{where}: runs: {name!r} is no name of a folder; take letters, digits, - and _")
        entry = entry if isinstance(entry, dict) else {"overrides": entry or []}
        config = entry.get("config", content.get("config"))
        if not isinstance(config, str) or entry.keys() - {"config", "overrides"}:
            raise UserError(f"{where}: runs: {name}: give overrides as a list, or config and overrides by name")
        own = _texts(entry.get("overrides", []), f"{where}: runs: {name}: overrides")
        runs[name] = (path.parent / files.expanded(config, f"{where}: runs: {name}: config"), [*own, *common])
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"{where}: seeds must be a list of whole numbers, got {seeds!r}")
    then = []
    for entry in content.get("then", []):
        if not isinstance(entry, dict) or entry.keys() != {"command", "makes"} or not isinstance(entry["makes"], str):
            raise UserError(
                f"{where}: then: each entry has a command (a list) and what it makes (a file), got {entry!r}"
            )
        words = _texts(entry["command"], f"{where}: then: command")
        try:
            verbs.check(words[0] if words else "")
        except UserError as error:
            raise UserError(f"{where}: then: {error}") from None
        then.append(Then(words, entry["makes"]))
    table = {
        name: _texts(value, f"{where}: table: {name}") for name, value in _section(content, "table", where).items()
    }
    out = files.expanded(content.get("out") or f"runs/{path.stem}", f"{where}: out")
    return Sweep(Path(out), seeds, runs, then, table)


def listed(sweep: Sweep) -> list[Run]:
    """All runs, the first seed of each before the second of any."""
    return [
        Run(name, seed, sweep.out / name / f"seed_{seed}", config, overrides)
        for seed in sweep.seeds
        for name, (config, overrides) in sweep.runs.items()
    ]


def check(run: Run) -> None:
    """Raises UserError for overrides that train.py would refuse, and for a folder of another configuration."""
    wanted = yaml_text.to_dict(yaml_text.load(run.config, run.words()[2:]))
    before = run.folder / "config.resolved.yaml"
    if not before.is_file():
        return
    for key, had, says in differences(yaml_text.read(before) or {}, wanted):
        if key not in FREE and not key.endswith("path") and says != "auto":  # which the machine has decided
            raise UserError(
                f"{run.folder} was made with {key}={had}, this sweep says {says}; move it away, or choose another out"
            )


def finished(run: Run) -> bool:
    try:
        return json.loads(files.read_text(run.folder / "status.json"))["state"] == "finished"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_made(run: Run, path: Path) -> bool:
    """Whether a result is there, and not of another checkpoint than the run's newest, where it says of which."""
    try:
        protocol = json.loads(files.read_text(path)).get("protocol", {})
        of = [protocol["checkpoint"]] if "checkpoint" in protocol else list(protocol.get("checkpoints", {}).values())
        known = [entry["sha256"] for entry in of]
    except OSError:
        return False
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # a file of another kind
        return True
    newest = checkpoint.newest_first(run.folder / "checkpoints")
    return not known or not newest or checkpoint.identity(newest[0]) in known


def _call(words: Sequence[str], log: Path) -> None:
    """Runs a program, its output in a file. Raises RunError with where to read what went wrong.

    Ctrl-C is passed on, and what the program then saves is waited for.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        # A run that this process leaves behind would hold its folder's lock: asked to stop, it saves.
        follow = functools.partial(end_with_parent, signal.SIGTERM)
        run = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, preexec_fn=follow,
            start_new_session=True,  # else the terminal would ask it as well, and to be asked twice ends it at once
        )  # fmt: skip
        interrupted = None
        while True:
            try:
                code = run.wait()
                break
            except KeyboardInterrupt as error:
                interrupted = error
                run.send_signal(signal.SIGINT)
    if interrupted:
        raise interrupted
    if code:
        raise RunError(f"{shlex.join(words)} ended with code {code}; its output is at the end of {log}")


def train(run: Run, then: Sequence[Then]) -> None:
    """What is missing of one run. Raises RunError."""
    log = run.folder.with_name(f"{run.folder.name}.log")
    if not finished(run):
        _call([sys.executable, "-m", "unite_fast", "train", *run.words()], log)
        if not finished(run):  # it was asked to stop, or train.max_minutes did
            raise RunError(f"{run.folder} has stopped before its end; the same command goes on. Its output: {log}")
    for step in then:
        if not is_made(run, run.folder / step.makes):
            words = [word.replace(FOLDER, str(run.folder)) for word in step.command]
            _call([sys.executable, "-m", "unite_fast", *words], log)
            if not (run.folder / step.makes).is_file():
                raise RunError(f"{shlex.join(words)} did not make {run.folder / step.makes}")


def number(run: Run, column: Sequence[str]) -> float | None:
    """One number of a run; None where it is not there, or not finite."""
    try:
        found: Any = json.loads(files.read_text(run.folder / column[0]))
        for key in column[1:]:
            if key == ANY:
                (found,) = found.values()
            else:
                found = found[int(key)] if isinstance(found, list) else found[key]
        found = float(found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return found if math.isfinite(found) else None


def astray(sweep: Sweep, rows: dict[str, Any]) -> list[str]:
    """Columns that have no number in a run that has finished, though their file is there: where each should lead.

    rows: of ``collect``.
    """
    found: dict[str, str] = {}
    for run in listed(sweep):
        for column, where in sweep.table.items() if finished(run) else ():
            known = rows.get(run.name, {}).get(column, {"values": {}})["values"]
            if where and column not in found and str(run.seed) not in known and (run.folder / where[0]).is_file():
                found[column] = f"{column} ({' '.join(where[1:])} in {run.folder / where[0]})"
    return list(found.values())


def collect(sweep: Sweep) -> dict[str, Any]:
    """{run: {column: {"mean", "low", "high", "values": {seed: number}}}} of what there is."""
    rows: dict[str, Any] = {}
    for run in listed(sweep):
        for column, where in sweep.table.items():
            if (value := number(run, where)) is not None:
                rows.setdefault(run.name, {}).setdefault(column, {})[str(run.seed)] = value
    return {
        name: {
            column: {
                "mean": sum(values.values()) / len(values), "low": min(values.values()), "high": max(values.values()),
                "values": values,
            }
            for column, values in rows[name].items()
        }
        for name in sweep.runs if name in rows
    }  # fmt: skip


def shown(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    span = f" ({cell['low']:.4g} to {cell['high']:.4g})" if len(cell["values"]) > 1 else ""
    return f"{cell['mean']:.4g}{span}"


def markdown(rows: dict[str, Any], columns: Sequence[str]) -> str:
    lines = [f"| run | seeds | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for name, row in rows.items():
        seeds = max((len(cell["values"]) for cell in row.values()), default=0)
        lines.append(f"| {name} | {seeds} | {' | '.join(shown(row.get(column)) for column in columns)} |")
    return "\n".join([*lines, ""])


def write_table(sweep: Sweep, names: Sequence[str]) -> str:
    """The table of the whole sweep into its folder. Where it lies, and the text of the runs ``names`` of it."""
    rows = collect(sweep)
    lost = astray(sweep, rows)
    warning = f"no number in: {', '.join(lost)}; look at the keys of table\n" if lost else ""
    if not rows:
        return f"{warning}no run has a number for the table yet"
    text = markdown({name: row for name, row in rows.items() if name in names}, list(sweep.table))
    with files.refusals(str(sweep.out)):
        files.write_json(sweep.out / TABLE, {"rows": rows, "columns": sweep.table})
        files.write(sweep.out / "table.md", markdown(rows, list(sweep.table)))
        if plots.available():
            plots.sweep(sweep.out / "table.png", rows, list(sweep.table))
    return f"{text}{warning}in {sweep.out}: {TABLE}, table.md"


def array(runs: Sequence[Run], then: Sequence[Then], source: str) -> str:
    """The text of a job array: task k trains run k as scripts/slurm/train.sbatch does, and then measures it."""
    if not (ROOT / JOB).is_file():
        raise UserError(f"--slurm: the tasks run {JOB}, which a checkout has and an installed package has not")
    template = (ROOT / JOB).read_text().splitlines()
    lines = [
        "#!/bin/bash",
        f"# Written by python -m unite_fast sweep {source}: one task a run, with the resources of train.sbatch.",
        f"#SBATCH --array=0-{len(runs) - 1}",
        "#SBATCH --job-name=unite-sweep",
        *(line for line in template if line.startswith("#SBATCH") and not re.search("job-name|output", line)),
        "#SBATCH --output=slurm-%A_%a.log",
        "set -uo pipefail",
        '[ -n "${PYTHON:-}" ] || PYTHON=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)',
        "export PYTHON   # train.sbatch takes the same",
        "case $SLURM_ARRAY_TASK_ID in",
    ]
    for number, run in enumerate(runs):
        words = shlex.join([str(run.config), *run.words()[2:]])
        lines.append(f"{number}) RUN={shlex.quote(str(run.folder))}; bash {JOB} {words} || exit ;;")
    lines.append("esac")
    lines.append("""grep -q '"state": "finished"' "$RUN/status.json" || exit 0   # put back into the queue""")
    for step in then:
        words = " ".join(shlex.quote(word).replace(FOLDER, """'"$RUN"'""") for word in step.command)
        lines.append(f'[ -f "$RUN"/{shlex.quote(step.makes)} ] || "$PYTHON" -m unite_fast {words} || exit')
    return "\n".join([*lines, ""])


def is_array(path: Path) -> bool:
    return "python -m unite_fast sweep" in path.read_text(errors="replace")[:200]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="the sweep, in YAML")
    add("--only", metavar="A,B,...", help="train, or show, these runs alone; the table's files hold all")
    add("--collect", action="store_true", help="train nothing; make the table of what there is")
    add("--slurm", type=Path, metavar="FILE", help="train nothing; write a job array for sbatch")
    add("--debug", action="store_true", help="show tracebacks")
    add("overrides", nargs="*", metavar="section.key=value", help="of all runs")
    a = parser.parse_intermixed_args(argv)
    sweep = read(a.file, a.overrides)
    if a.collect and a.slurm:
        raise UserError("--collect and --slurm: give one of them")
    names = a.only.split(",") if a.only else list(sweep.runs)
    if unknown := [name for name in names if name not in sweep.runs]:
        raise UserError(f"--only {unknown[0]}: {a.file} has {', '.join(sweep.runs)}")
    ours = {TABLE, *sweep.runs}
    outputs.check_folder(sweep.out, "out", [a.file], lambda path: any((path / name).exists() for name in ours))
    runs = [run for run in listed(sweep) if run.name in names]
    if not a.collect:
        for run in runs:
            check(run)
    if a.slurm:
        outputs.check_file(a.slurm, "--slurm", [a.file], is_array)
        with files.refusals(f"--slurm {a.slurm}"):
            files.write(a.slurm, array(runs, sweep.then, str(a.file)))
        print(f"{len(runs)} tasks in {a.slurm}; sbatch {a.slurm}, and afterwards: sweep {a.file} --collect")
        return
    for k, run in enumerate([] if a.collect else runs):
        print(f"{k + 1} of {len(runs)}: {run.folder}", flush=True)
        train(run, sweep.then)
    print(write_table(sweep, names))


if __name__ == "__main__":
    sys.exit(command.run(main))
