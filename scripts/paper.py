"""The paper's rows: writes configs/paper and docs/PAPER.md from docs/paper_rows.yaml and the table of the small runs.

    python scripts/paper.py                                        both, from what the repository holds
    python scripts/paper.py --results runs/claims/table.json       first takes a finished sweep's table in

`tests/test_paper.py` holds both to what this program makes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from unite_fast.analysis import plots  # noqa: E402
from unite_fast.base import files  # noqa: E402
from unite_fast.config import Config, yaml_text  # noqa: E402
from unite_fast.plan import throughput  # noqa: E402
from unite_fast.plan.cost import step_flops  # noqa: E402

ROWS = ROOT / "docs" / "paper_rows.yaml"
PAGE = ROOT / "docs" / "PAPER.md"
CONFIGS = ROOT / "configs" / "paper"
RESULTS = ROOT / "benchmarks" / "results" / "claims"
MFU = 0.4
PATHS = "data.path=imagenet/train objective.perceptual_trunk=vgg16-397923af.pth"


def rows() -> dict[str, Any]:
    return yaml.safe_load(ROWS.read_text())


def values_of(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """What a row's file says: its base, and where it differs from it."""
    values: dict[str, Any] = {"base": f"../{row['base']}.yaml", "name": name}
    for section, changes in row.get("changes", {}).items():
        values[section] = dict(changes)
    if "steps" in row:
        values.setdefault("objective", {})["flow_steps"] = row["steps"]
    if "epochs" in row:
        values.setdefault("train", {})["epochs"] = row["epochs"]
    return values


def plan(config: Config) -> tuple[float, float, float]:
    """(GFLOP per sample, FLOPs of the run, hours of one H200), by the planner; the hours are a prediction."""
    flops = step_flops(config.model, config.objective)["total"]
    (projection,) = throughput.project(config.model, config.objective, MFU)
    samples = projection.samples * config.train.epochs
    return flops / 1e9, flops * samples, projection.minutes(1) * config.train.epochs / 60


def command(name: str, row: dict[str, Any]) -> str:
    program = "torchrun --standalone --nproc_per_node=8 train.py"
    paths = "data.path=mp_20" if row["base"] == "mp20" else PATHS
    return f"{program} --config configs/paper/{name}.yaml {paths}"


def config_text(name: str, row: dict[str, Any]) -> str:
    """A row's file, its header with the published figure and what the run takes."""
    values = values_of(name, row)
    body = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=110)
    per_sample, total, hours = plan(config_of(name, row))
    thing = "crystal" if row["base"] == "mp20" else "image"
    first, *words = command(name, row).split(" --config ")[0], *command(name, row).split(" --config ")[1:]
    return "\n".join(
        [
            f"# {row['where']} of the paper (arXiv 2603.22283): {row['published']}; not reproduced here.",
            "#",
            f"#   {first} \\",
            f"#       --config {words[0]}",
            "#",
            f"# {per_sample:,.0f} GFLOP per {thing}, {total:.2g} FLOPs in all.",
            f"# PREDICTION, not measured: {hours:,.0f} H200 hours at an MFU of {MFU:.0%}.",
            "# Written by scripts/paper.py from docs/paper_rows.yaml.",
            body,
        ]
    )


def config_of(name: str, row: dict[str, Any]) -> Config:
    """As its file says; the file need not be there."""
    values = values_of(name, row)
    base = yaml_text.load(CONFIGS / values.pop("base"))
    return yaml_text.from_dict(values, name, base)


# --- what the small runs say ---


HELD, FAILED, OPEN, FEW, ABSENT = "held", "did not hold", "not decidable", ", fewer than 3 seeds", "not run"
ORDER = [HELD, HELD + FEW, "in part", FAILED, FAILED + FEW, OPEN, ABSENT]


def seeds_of(found: dict[str, Any], column: str, run: Any, beside: str) -> list[float]:
    """The numbers of a test's side: of a run, a number itself, or another column of the run ``beside`` it."""
    if isinstance(run, (int, float)):
        return [float(run)]
    cell = found.get(run, {}).get(column) or found.get(beside, {}).get(run)
    return list(cell["values"].values()) if cell else []


def decide(found: dict[str, Any], test: list[Any]) -> tuple[str, str]:
    """(held, did not hold, not decidable or not run; the numbers) of [column, run, below or above, run].

    Held: all seeds of the one lie below (above) all of the other. Did not hold: the reverse. Else not decidable.
    """
    column, run, relation, other = test
    mine, theirs = seeds_of(found, column, run, run), seeds_of(found, column, other, run)
    if not mine or not theirs:
        return ABSENT, f"{column}: {run} {relation} {other}"
    said = f"{column}: {run} {spread(mine)}, {other} {spread(theirs) if isinstance(other, str) else ''}".rstrip(", ")
    few = len(mine) < 3 or (len(theirs) < 3 and isinstance(other, str))
    if relation == "above":
        mine, theirs = theirs, mine
    if max(mine) < min(theirs):
        verdict = HELD
    elif min(mine) > max(theirs):
        verdict = FAILED
    else:
        verdict = OPEN
    return verdict + FEW * (few and verdict != OPEN), said  # more seeds do not part what overlaps


def spread(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return (
        f"{mean:.3g} ({min(values):.3g} to {max(values):.3g}, n = {len(values)})" if len(values) > 1 else f"{mean:.3g}"
    )


def summed(verdicts: list[str]) -> str:
    """Of a claim with several tests."""
    run = [v for v in verdicts if v != ABSENT]
    if not run:
        return ABSENT
    if all(v == run[0] for v in run):
        return run[0]
    if len({v.removesuffix(FEW) for v in run}) == 1:
        return max(run, key=len)
    return "in part: " + ", ".join(f"{v} {run.count(v)}" for v in dict.fromkeys(run))


def page(content: dict[str, Any], results: dict[str, Any]) -> str:
    """docs/PAPER.md."""
    found, lines = results.get("rows", {}), [PROLOGUE]
    decided = []
    for claim in content["claims"]:
        outcomes = [decide(found, test) for test in claim["tests"]]
        verdict, numbers = summed([v for v, _ in outcomes]), "; ".join(f"{said}: {v}" for v, said in outcomes)
        decided.append((verdict, f"| {claim['says']} | **{verdict}** | {numbers} |"))
    about = results.get("about", {})
    lines += ["## Claims, at small scale", "", SMALL.format(machine=about.get("machine", "none"), commit=about.get(
        "commit", "none"), seeds=about.get("seeds", "none"))]  # fmt: skip
    verdicts = [verdict.partition(":")[0] for verdict, _ in decided]
    counted = ", ".join(f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts), key=ORDER.index))
    lines += [*(f"- {note}" for note in content["notes"]), "", f"Of {len(decided)} claims: {counted}.", ""]
    lines += ["| the paper says | at this scale | by |", "|---|---|---|", *(line for _, line in decided), ""]
    if found:
        lines += ["Real images: " + "; ".join(f"{k} {v:.4g}" for k, v in results.get("real", {}).items()) + ".", ""]
        lines += ["![Every run, its seeds as dots](../benchmarks/results/claims/table.png)", ""]
        lines += [results["markdown"], ""]
        for name in FIGURES:
            if (RESULTS / f"{name}.png").is_file():
                lines += [f"![{FIGURES[name]}](../benchmarks/results/claims/{name}.png)", "", f"*{FIGURES[name]}*", ""]
        for variant in VARIANTS:
            if (RESULTS / f"denoised_{variant}.png").is_file():
                lines += [f"![Figure 7 of {variant}](../benchmarks/results/claims/denoised_{variant}.png)", ""]
        lines += [f"*{PICTURES}.*", ""]
    lines += [
        "## Full scale",
        "",
        FULL,
        "| where | published | FLOPs, H200 hours (predicted) | command |",
        "|---|---|---|---|",
    ]
    for name, row in content["configs"].items():
        _, total, hours = plan(config_of(name, row))
        how = f"`--config configs/paper/{name}.yaml`"
        lines.append(f"| {row['where']} | {row['published']} | {total:.2g}, {hours:,.0f} | {how} |")
    lines += ["", "Without a training of its own:", "", "| where | published | how |", "|---|---|---|"]
    lines += [f"| {row['where']} | {row['published']} | {row['how']} |" for row in content["others"]]
    lines += [
        "",
        "## Where the paper and the code contradict themselves",
        "",
        *(f"- {c}" for c in content["contradictions"]),
    ]
    lines += ["", "## Not measured", "", *(f"- {c}" for c in content["unmeasured"]), ""]
    return "\n".join(lines)


PROLOGUE = """# The paper, claim by claim

Written by `scripts/paper.py` from `docs/paper_rows.yaml` and `benchmarks/results/claims`; do not edit.
What the paper is: arXiv 2603.22283. **None of its ImageNet numbers is reproduced here**: that takes
GPUs, which have not been at hand. What a small model on real images can say of its claims is the first
table, what each row would take the second.
"""
SMALL = """Fashion-MNIST (60,000 real images of 28x28, Debian's `dataset-fashion-mnist`), 375 steps of 32 images, a
model of 0.5 million parameters: `configs/claims/fashion.yaml`. Seeds {seeds}; trained
at commit {commit}; {machine}. Everything again, in one command:

```
python -m unite_fast sweep configs/claims/claims.yaml && python scripts/paper.py --results runs/claims/table.json
```

**held**: every seed of the one lies on the claimed side of every seed of the other; **did not hold**:
on the other side; **not decidable**: they overlap. With three seeds a side, chance alone gives one of
the two first verdicts once in ten, with two once in three. The model and its training are far smaller
than the paper's, and without LPIPS; this confirms or refutes nothing at its scale.
"""
FULL = """`torchrun --standalone --nproc_per_node=8 train.py --config ...` with `data.path=imagenet/train
objective.perceptual_trunk=vgg16-397923af.pth`, then `python -m unite_fast evaluate fid` and `rfid`; all
of them: `python -m unite_fast sweep configs/paper/paper.yaml data.path=... --slurm array.sh`. Hours are
a PREDICTION at an MFU of 40 %. The learning rates are those of `configs/imagenet_b.yaml`, the published
code's.
"""
PICTURES = (
    "Figure 7 at small scale, seed 0 of the four variants: held-out images, their reconstructions, and what is decoded "
    "of the predictions from latents noised to t; mean PSNR of the eight on the left"
)
VARIANTS = ("shared", "separate", "shared_no_stop", "separate_no_stop")
FIGURES = {
    "alignment": "Figure 6, left and middle, at small scale: how alike the two passes are, by layer; seed 0",
    "trajectory": "Figures 6, right, and 7: predictions over t; seed 0",
    "entropy": "Section 4: bits of the weights; seed 0",
    "probes": "Section 7: classes read out of latents; seed 0",
    "dynamics": "Figure 4: curves; seed 0",
}


def sweep_text(content: dict[str, Any]) -> str:
    """configs/paper/paper.yaml: every row as one sweep."""
    lines = [
        "# Every row of configs/paper that trains on images, for python -m unite_fast sweep; scripts/paper.py wrote it."
    ]
    lines += ["out: runs/paper", "runs:"]
    lines += [f"  {name}: {{config: {name}.yaml}}" for name, row in content["configs"].items() if row["base"] != "mp20"]
    return "\n".join([*lines, ""])


def made() -> dict[Path, str]:
    """{file: text} of everything that is generated."""
    content = rows()
    results = json.loads((RESULTS / "claims.json").read_text()) if (RESULTS / "claims.json").is_file() else {}
    found = {CONFIGS / f"{name}.yaml": config_text(name, row) for name, row in content["configs"].items()}
    return found | {CONFIGS / "paper.yaml": sweep_text(content), PAGE: page(content, results)}


def take(table: Path) -> None:
    """A finished sweep's table into the repository, with real images' scores, machine, commit, seeds and pictures."""
    out = table.parent
    content = json.loads(table.read_text())
    scored = [json.loads(p.read_text())["real"] for p in sorted(out.glob("*/seed_*/scores/small.json"))]
    real = max(scored, key=len, default={})  # where a pretrained network has looked as well
    runs = [json.loads(p.read_text()) for p in sorted(out.glob("*/seed_*/provenance.json"))]
    about = {
        "machine": ", ".join(sorted({f"{r['device']}, torch {r['torch']}, {r['threads']} thread" for r in runs})),
        "commit": ", ".join(sorted({r["commit"][:10] for r in runs})),
        "seeds": ", ".join(
            sorted({seed for row in content["rows"].values() for c in row.values() for seed in c["values"]})
        ),
    }
    found = {"about": about, "real": real, "rows": content["rows"], "markdown": (out / "table.md").read_text()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    files.write_json(RESULTS / "claims.json", found)
    if (out / "table.png").is_file():
        files.write(RESULTS / "table.png", (out / "table.png").read_bytes())
    for name in FIGURES:
        side_by_side(out, name)
    for variant in VARIANTS:
        picture = out / variant / "seed_0" / "analysis" / "trajectory_1.png"
        if picture.is_file():
            files.write(RESULTS / f"denoised_{variant}.png", picture.read_bytes())


def side_by_side(out: Path, name: str) -> None:
    """One analysis of seed 0 of the four variants in a picture, from what the sweep measured."""
    models: dict[str, Any] = {}
    for variant in VARIANTS:
        path = out / variant / "seed_0" / "analysis" / f"{name}.json"
        if path.is_file():
            models |= json.loads(path.read_text())["models"]
    if models and plots.available():
        plots.DRAWN[name](RESULTS / f"{name}.png", models)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, metavar="table.json", help="of a sweep over configs/claims/claims.yaml")
    arguments = parser.parse_args(argv)
    if arguments.results:
        take(arguments.results)
    CONFIGS.mkdir(parents=True, exist_ok=True)
    for path, text in made().items():
        files.write(path, text)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
