"""The paper's rows: writes configs/paper and docs/PAPER.md from docs/paper_rows.yaml and the table of the small runs.

    python scripts/paper.py                                        both, from what the repository holds
    python scripts/paper.py --results runs/claims/table.json       first takes a finished sweep's table in

`tests/test_paper.py` holds both to what this program makes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

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
AT = f" at an MFU of {MFU:.0%}"
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


class Plan(NamedTuple):
    gflop: float  # per sample
    flops: float  # of the whole run
    hours: float  # of one H200; a prediction


def plan(config: Config) -> Plan:
    """What a run takes, by the planner."""
    frozen = config.optim.frozen
    flops = step_flops(config.model, config.objective, frozen)["total"]
    (projection,) = throughput.project(config.model, config.objective, MFU, frozen=frozen)
    samples = projection.samples * config.train.epochs
    return Plan(flops / 1e9, flops * samples, projection.minutes(1) * config.train.epochs / 60)


def command(name: str, row: dict[str, Any]) -> str:
    program = "torchrun --standalone --nproc_per_node=8 train.py"
    paths = "data.path=mp_20" if row["base"] == "mp20" else PATHS
    return f"{program} --config configs/paper/{name}.yaml {paths} {row.get('more', '')}".rstrip()


def config_text(name: str, row: dict[str, Any], takes: Plan) -> str:
    """A row's file, its header with the published figure and what the run takes."""
    values = values_of(name, row)
    body = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=110)
    hours = f"{short(row['hours'])} H200 hours" if "hours" in row else f"{short(takes.hours)} H200 hours{AT}"
    thing = "crystal" if row["base"] == "mp20" else "image"
    program, _, words = command(name, row).partition(" --config ")
    return "\n".join(
        [
            f"# {row['where']} of the paper (arXiv 2603.22283): {row['published']}; not reproduced here.",
            "#",
            f"#   {program} \\",
            f"#       --config {words}",
            "#",
            f"# {takes.gflop:,.0f} GFLOP per {thing}, {takes.flops:.2g} FLOPs in all.",
            f"# PREDICTION, not measured: {hours}.",
            "# Written by scripts/paper.py from docs/paper_rows.yaml.",
            body,
        ]
    )


def first_of(content: dict[str, Any]) -> dict[str, str]:
    """{row: the first row that is the same training}."""
    seen: dict[str, str] = {}
    return {
        name: seen.setdefault(repr(dataclasses.replace(config_of(name, row), name="")), name)
        for name, row in content["configs"].items()
    }


def config_of(name: str, row: dict[str, Any]) -> Config:
    """As its file says; the file need not be there."""
    values = values_of(name, row)
    base = yaml_text.load(CONFIGS / values.pop("base"))
    return yaml_text.from_dict(values, name, base)


# --- what the small runs say ---

SCORES = ("KID", "PSNR")  # of the full-scale table's rows
HELD, FAILED, OPEN, FEW, ABSENT = "held", "did not hold", "not decidable", ", fewer than 3 seeds", "not run"
REAL = {"feature distance": "feature_distance", "recognised": "recognised", "KID": "kid", "KID lite0": "kid_lite0"}
LONG = "_long"  # behind the name of a variant: the same, four times as long
SETS = {  # scores that decide together
    "generation": {"recognised": "above", "KID": "below", "KID lite0": "below"},
    "reconstruction": {"PSNR": "above", "feature distance": "below"},
}


def tests_of(claim: dict[str, Any]) -> list[list[Any]]:
    """[column, run, above, below or like, run or number], those of a set one by one."""
    found: list[list[Any]] = []
    for what, run, relation, other in claim["tests"]:
        scores = SETS.get(what, {what: relation})
        found += [[column, run, side if relation == "better" else relation, other] for column, side in scores.items()]
    return found


def seeds_of(found: dict[str, Any], column: str, run: Any, beside: str) -> list[float]:
    """The numbers of a test's side: of a run, a number itself, or another column of the run ``beside`` it."""
    if isinstance(run, (int, float)):
        return [float(run)]
    cell = found.get(run, {}).get(column) or found.get(beside, {}).get(run)
    return list(cell["values"].values()) if cell else []


def how_many(found: dict[str, Any], test: list[Any]) -> int:
    """Seeds of a test: those of the side that has fewer."""
    column, run, _, other = test
    sides = [run, other] if isinstance(other, str) else [run]
    return min(len(seeds_of(found, column, side, run)) for side in sides)


def decide(found: dict[str, Any], test: list[Any]) -> tuple[str, str]:
    """(held, did not hold, not decidable or not run; the numbers) of a test of ``tests_of``.

    Held: all seeds of the one lie below (above) all of the other. Did not hold: the reverse, or, of what is claimed to
    be alike, either of the two. Else not decidable.
    """
    column, run, relation, other = test
    mine, theirs = seeds_of(found, column, run, run), seeds_of(found, column, other, run)
    if not mine or not theirs:
        return ABSENT, ""
    said = f"{spread(mine)}; {spread(theirs)}" if isinstance(other, str) else spread(mine)
    below, above = max(mine) < min(theirs), min(mine) > max(theirs)
    if relation == "like":
        verdict = FAILED if below or above else OPEN
    else:
        held, failed = (below, above) if relation == "below" else (above, below)
        verdict = HELD if held else FAILED if failed else OPEN
    return verdict + FEW * (how_many(found, test) < 3 and verdict != OPEN), said  # more seeds do not part what overlaps


def longer(found: dict[str, Any], test: list[Any]) -> list[Any]:
    """The same test of the long runs; of the others where one side has none, or fewer seeds of them than decide."""
    column, run, relation, other = test
    longest = [column, run + LONG, relation, other + LONG if other in found else other]
    return longest if how_many(found, longest) >= max(1, min(3, how_many(found, test))) else test


def short(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(values: list[float]) -> str:
    """Mean and range; how many, where they are not three."""
    mean, few = short(sum(values) / len(values)), f", n = {len(values)}" * (len(values) != 3)
    return f"{mean} ({short(min(values))} to {short(max(values))}{few})" if len(values) > 1 else mean


def summed(verdicts: list[str]) -> str:
    """Of a claim with several tests."""
    kinds, few = {v.removesuffix(FEW) for v in verdicts}, FEW * any(v.endswith(FEW) for v in verdicts)
    if len(kinds) == 1:
        return kinds.pop() + few
    if {HELD, FAILED} <= kinds:
        return "mixed" + few
    return next((f"{kind} in part{few}" for kind in (HELD, FAILED) if kind in kinds), OPEN)


def claims(content: list[dict[str, Any]], found: dict[str, Any]) -> list[str]:
    """The table of claims, a row for each and for each of its tests, and how many came out how."""
    table, verdicts, pairs, last = [], [], [], []
    for claim in content:
        rows, outcomes = [], []
        for test in tests_of(claim):
            column, run, relation, other = test
            longest = longer(found, test)
            early, late = decide(found, test), decide(found, longest)
            outcomes.append((early[0], late[0]))
            if longest != test and early[0] != ABSENT:
                pairs.append([verdict.removesuffix(FEW) for verdict in outcomes[-1]])
            said = ["", ""] if longest == test else [late[1], late[0]]
            beside = f"`{other}`" if other in found else other
            rows.append([f"{column}: `{run}` {relation} {beside}", early[1], early[0], *said])
        verdict = summed([late for _, late in outcomes])
        verdicts.append(verdict)
        last += [late.removesuffix(FEW) for _, late in outcomes]
        table += [[f"**{claim['says']}**", "", "", "", f"**{verdict}**"], *rows]
    counted = ", ".join(f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts)))
    same, turned = sum(a == b for a, b in pairs), sum({a, b} == {HELD, FAILED} for a, b in pairs)
    apart = sum(v in (HELD, FAILED) for v in last)
    return [
        f"Of {len(verdicts)} claims, each by its longest training: {counted}. Of {len(pairs)} comparisons made at both "
        f"lengths {same} came out the same, {turned} turned to the opposite, {len(pairs) - same - turned} were "
        f"undecided at one of them. Of all {len(last)} comparisons some {len(last) / 10:.0f} would fall to one side by "
        f"chance alone; {apart} did. They are not independent: the same runs stand in many.",
        "",
        "| the paper says; what was compared | 375 steps | | 1,500 steps | |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in table),
        "",
    ]


def small_scale(found: dict[str, Any], run: str) -> str:
    """What a row's small run reached after 375 steps, which all of them have."""
    cells = found.get(run, {})
    scores = [f"{column} {spread(list(cells[column]['values'].values()))}" for column in SCORES if column in cells]
    return f"`{run}`: {'; '.join(scores)}" if scores else ABSENT


def every_run(columns: dict[str, dict[str, str]], found: dict[str, Any], real: dict[str, float]) -> list[str]:
    """Means and ranges of all runs in two tables, the first beside real images; what their columns are."""
    lines = []
    for part, about in columns.items():
        rows = {}
        if part == "quality":
            rows["real images"] = [short(real[key]) if (key := REAL.get(name)) in real else "" for name in about]
        for run, cells in found.items():
            rows[f"`{run}`"] = [spread(list(cells[c]["values"].values())) if c in cells else "-" for c in about]
        lines += [f"| {part} | {' | '.join(about)} |", f"|---|{'---|' * len(about)}"]
        lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
        lines += ["", *(f"- {name}: {says}." for name, says in about.items()), ""]
    return [*lines, "![Every run, its seeds as dots](../benchmarks/results/claims/table.png)", ""]


def page(content: dict[str, Any], results: dict[str, Any], plans: dict[str, Plan]) -> str:
    """docs/PAPER.md."""
    texts = content["texts"]
    found, about, lines = results.get("rows", {}), results.get("about", {}), [texts["prologue"]]
    said = {key: about.get(key, "none") for key in ("machine", "commit", "seeds")}
    lines += ["## Claims, at small scale", "", texts["small"].format(**said)]
    lines += [*(f"- {note}" for note in content["notes"]), "", *claims(content["claims"], found)]
    lines += ["What it comes to:", "", *(f"- {one}" for one in content["reading"]), ""]
    if found:
        lines += every_run(content["columns"], found, results.get("real", {}))
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
        texts["full"],
        "| where | published | at small scale | FLOPs, H200 hours (predicted) | command |",
        "|---|---|---|---|---|",
    ]
    same = first_of(content)
    for name, row in content["configs"].items():
        takes = f"{plans[name].flops:.2g}, {short(row.get('hours', plans[name].hours))}"
        if same[name] != name:
            takes = f"the training of {content['configs'][same[name]]['where']}"
        how = f"`--config configs/paper/{name}.yaml`"
        small = row.get("small") or small_scale(found, row.get("run", ""))
        lines.append(f"| {row['where']} | {row['published']} | {small} | {takes} | {how} |")
    lines += [
        "",
        "Without a training of its own:",
        "",
        "| where | published | at small scale | how |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row['where']} | {row['published']} | {row['small']} | {row['how']} |" for row in content["others"]]
    lines += [
        "",
        "## Where the paper and the code contradict themselves",
        "",
        *(f"- {c}" for c in content["contradictions"]),
    ]
    lines += ["", "## Not measured", "", *(f"- {c}" for c in content["unmeasured"]), ""]
    return "\n".join(lines)


PICTURES = (
    "Figure 7 at small scale, seed 0 of the four variants after 1,500 steps: held-out images, reconstructions, and "
    "what is decoded of the predictions from latents noised to t; mean PSNR of the eight on the left"
)
VARIANTS = ("shared", "separate", "shared_no_stop", "separate_no_stop")
FIGURES = {
    "alignment": "Figure 6, left and middle, at small scale: how alike the passes are, by layer; 1,500 steps, seed 0",
    "trajectory": "Figures 6, right, and 7: predictions over t; 1,500 steps, seed 0",
    "entropy": "Section 4: bits of the weights; 1,500 steps, seed 0",
    "probes": "Section 7: classes read out of latents; 1,500 steps, seed 0",
    "dynamics": "Figure 4: curves; 1,500 steps, seed 0",
    "scores": "Losses beside scores of reconstructions that were taken while training (Figure 4 has FID of samples): "
    "the digits (`configs/claims/digits_states.yaml`), seed 0 of `as_it_is` (with noise) and `no_noise` (without)",
}


def sweep_text(content: dict[str, Any]) -> str:
    """configs/paper/paper.yaml: every training on images as one sweep."""
    lines = [
        f"  {name}: {{config: {name}.yaml}}"
        for name, first in first_of(content).items()
        if name == first and content["configs"][name]["base"] != "mp20" and "more" not in content["configs"][name]
    ]
    return content["texts"]["sweep"] + "\n".join([*lines, ""])


def made() -> dict[Path, str]:
    """{file: text} of everything that is generated."""
    content = rows()
    results = json.loads((RESULTS / "claims.json").read_text()) if (RESULTS / "claims.json").is_file() else {}
    plans = {name: plan(config_of(name, row)) for name, row in content["configs"].items()}
    found = {CONFIGS / f"{name}.yaml": config_text(name, row, plans[name]) for name, row in content["configs"].items()}
    return found | {CONFIGS / "paper.yaml": sweep_text(content), PAGE: page(content, results, plans)}


def take(table: Path) -> None:
    """A finished sweep's table into the repository, with real images' scores, machine, commit, seeds and pictures."""
    out = table.parent
    content = json.loads(table.read_text())
    known = files.read_json(RESULTS / "claims.json").get("rows", {})
    if lost := [name for name in known if name not in content["rows"]]:
        sys.exit(f"error: {table} has no {', '.join(lost)}, which the page has; train them, or collect the whole sweep")
    scored = [json.loads(p.read_text())["real"] for p in sorted(out.glob("*/seed_*/sweep/small.json"))]
    real = max(scored, key=len, default={})  # where a pretrained network has looked as well
    runs = [json.loads(p.read_text()) for p in sorted(out.glob("*/seed_*/provenance.json"))]
    about = {
        "machine": ", ".join(sorted({f"{r['device']}, torch {r['torch']}, {r['threads']} thread" for r in runs})),
        "commit": ", ".join(sorted({r["commit"][:10] for r in runs})),
        "seeds": ", ".join(
            sorted({seed for row in content["rows"].values() for c in row.values() for seed in c["values"]})
        ),
    }
    found = {"about": about, "real": real, "rows": content["rows"]}
    RESULTS.mkdir(parents=True, exist_ok=True)
    files.write_json(RESULTS / "claims.json", found)
    if (out / "table.png").is_file():
        files.write(RESULTS / "table.png", (out / "table.png").read_bytes())
    for name in FIGURES:
        side_by_side(out, name)
    for variant in VARIANTS:
        picture = analysed(out, variant) / "trajectory_1.png"
        if picture.is_file():
            files.write(RESULTS / f"denoised_{variant}.png", picture.read_bytes())


def analysed(out: Path, variant: str) -> Path:
    """Where the analyses of seed 0 lie, of the long run where there is one."""
    long = out / f"{variant}{LONG}"
    return (long if long.is_dir() else out / variant) / "seed_0" / "sweep"


def side_by_side(out: Path, name: str) -> None:
    """One analysis of seed 0 of the four variants in a picture, from what the sweep measured."""
    models: dict[str, Any] = {}
    for variant in VARIANTS:
        path = analysed(out, variant) / f"{name}.json"
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
