"""From the rows of gpu_check.py to words and tables: run anywhere, after the GPU is gone.

    python benchmarks/gpu_report.py rows.jsonl [more.jsonl]      what the rows say, and what they would change
    python benchmarks/gpu_report.py rows.jsonl --write           changes it; then look at it, and commit

README.md                     figures between <!-- gpu:DEVICE.NAME --> and <!-- /gpu -->, DEVICE h200 or h100
benchmarks/RECORDS.md         a line, if ours is the fastest on this device so far
unite_fast, PREFERRED         the device's row: attention backends by number of keys, the fastest first
unite_fast, SLOWER_IN_FLOAT8  the device's row: the large layers that float8 recipes leave in bfloat16
kernels/unite_kernels/launch_tables/  the device's table: launches that were faster than the present ones
benchmarks/results/<device>/  the rows themselves, and choices.md: what configs/imagenet_b.yaml should say

Each with device, date and commit. What has no row stays as it is: "not measured". Red checks stand beside every figure.
A rehearsal's rows are refused. All files are made first, then each is put into its place whole.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from harness import ROOT

sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from unite_fast.base import files  # noqa: E402
from unite_kernels import launches  # noqa: E402

WIDE, NARROW = "1024", "128"  # images per update: of eight GPUs' step or an accumulated one; of one GPU alone
GAIN = 1.02  # how much faster a launch or a layer must be to take the place of what is there
GRAPH = "efficiency.cuda_graph=step"
LAST_KEYS = 544  # the most keys that are measured: its row serves all above


class Rows:
    """All rows of one device; questions about them. An answer without rows is None."""

    def __init__(self, rows: list[dict]) -> None:
        if any(row.get("rehearsal") for row in rows):
            raise SystemExit("these are rows of a rehearsal: they mean nothing")
        devices = {row["device"] for row in rows if "device" in row}
        if len(devices) != 1:
            raise SystemExit(f"rows of one device are needed, these are of: {', '.join(sorted(devices)) or 'none'}")
        (self.device,) = devices
        self.rows = rows
        self.key = "h200" if "H200" in self.device else "h100" if "H100" in self.device else ""
        dated = [row for row in rows if row.get("commit")]
        self.date = max((row["date"] for row in dated), default="")[:10] or "no date"
        self.commit = (dated[-1]["commit"][:7] + ("-dirty" if dated[-1]["dirty"] else "")) if dated else "no commit"
        self.red = [r.get("check") or r.get("test") for r in self.of("check", "test") if not r["ok"]]

    def of(self, *benchmarks: str, **facts: object) -> list[dict]:
        found = [row for row in self.rows if row.get("benchmark") in benchmarks]
        return [row for row in found if all(row.get(name) == value for name, value in facts.items())]

    def source(self) -> str:
        red = f"; RED: {', '.join(self.red)}" if self.red else ""
        return f"{self.device}, {self.date}, {self.commit}{red}"

    def capability(self) -> tuple[int, int] | None:
        found = [row["capability"] for row in self.of("machine") if row.get("capability")]
        return tuple(found[-1]) if found else None  # type: ignore[return-value]

    def triton(self) -> str:
        """The minor version that compiled the launches."""
        found = [row["triton"] for row in self.rows if row.get("triton")]
        return launches.minor_of(found[-1]) if found else ""

    def best(self, benchmark: str = "ours") -> dict | None:
        rows = [row for row in self.of(benchmark) if row.get("images_per_second")]
        return max(rows, key=lambda row: row["images_per_second"][WIDE], default=None)


def ours(rows: Rows) -> str | None:
    row = rows.best()
    if row is None:
        return None
    rate = row["images_per_second"]
    speed = f"{rate[WIDE]:.0f} ({rate[NARROW]:.0f} at {NARROW} images per update)"
    return f"{speed}, micro-batch {row['batch']}{with_overrides(row)}"


def with_overrides(row: dict) -> str:
    """What of our configuration was overridden for a figure."""
    return "".join(f", {override}" for override in row.get("overrides", ()))


def official(rows: Rows) -> str | None:
    found = {row["form"]: row for row in rows.of("official") if row.get("form") and row.get("ok", True)}
    listed = [f"{found[f]['images_per_second'][WIDE]:.0f} {words}" for f, words in FORMS.items() if f in found]
    batch = next((row["batch"] for row in found.values()), 0)
    return f"{', '.join(listed)}, micro-batch {batch}" if listed else None


FORMS = {"official": "as published", "compiled": "with its encoder compiled"}


def ratio(rows: Rows) -> str | None:
    """In turn within rounds, at one batch size: the second command's."""
    found = rows.of("official", component="whole step", images_per_update=int(WIDE))
    if not found:
        return None
    row = found[-1]
    parts = [
        f"{r['median']:.2f} ({r['p20']:.2f} to {r['p80']:.2f}) {FORMS[form]}" for form, r in row["faster_than"].items()
    ]
    agrees = "" if row["agrees"] else "; the losses DISAGREE"
    return f"{', '.join(parts)}, n = {row['n']}, micro-batch {row['batch']}{with_overrides(row)}{agrees}"


def utilisation(rows: Rows) -> str | None:
    """MFU, epoch and eta of the best setting; eta against this day's ceilings where they are there."""
    from unite_fast.config import Config
    from unite_fast.modality.images import IMAGENET
    from unite_fast.model.flops import peak_of, training_flops
    from unite_fast.plan.throughput import NODE, epoch_minutes

    row, config = rows.best(), Config()
    peak = peak_of(rows.device)
    if row is None or peak is None:
        return None
    rate = row["images_per_second"][WIDE]
    mfu = rate * training_flops(config.model, 3, True)["total"] / peak
    text = f"MFU {mfu:.1%}, {epoch_minutes(IMAGENET, rate, NODE):.1f} minutes per epoch on {NODE} at that rate"
    found = eta(rows, rate)
    return text + (f", eta {found:.2f}" if found else "")


def eta(rows: Rows, rate: float) -> float | None:
    """The step's kernels at the ceilings that were measured, over the measured time."""
    import roofline
    import step_work
    from roofline_measure import Ceilings

    found = rows.of("ceiling")
    products = {(r["form"], *r["shape"]): r["tflops"] for r in found if r["kind"] == "product"}
    copies = [r["tb_per_s"] for r in found if r["kind"] == "copy"]
    convolutions = {tuple(r["shape"]): r["tflops"] for r in found if r["kind"] == "convolution"}
    attention = {
        r["tokens"]: (r["tflops"]["forward"], r["tflops"]["backward"]) for r in found if r["kind"] == "attention"
    }
    square = [r["tflops"] for r in found if r.get("form") == "square"]
    if not (copies and products and convolutions and attention and square):
        return None
    from unite_fast.config import yaml_text

    batch = found[0]["batch"]
    config = yaml_text.load(ROOT / "configs" / "imagenet_b.yaml", ["efficiency.flow_mini_batch=3"])
    conv = sum(convolutions.values()) / len(convolutions)
    ceilings = Ceilings(rows.device, square[-1], conv, copies[-1], attention, products, convolutions)
    return roofline.eta(step_work.step(config, batch), ceilings, 3, batch, rate)


FIGURES: dict[str, Callable[[Rows], str | None]] = {
    "ours": ours, "official": official, "ratio": ratio, "utilisation": utilisation,
}  # fmt: skip


def fill(text: str, rows: Rows) -> tuple[str, list[str]]:
    """README's text with the figures of this device that have rows; what was said of each."""
    said = []
    for name, figure in FIGURES.items():
        value = figure(rows)
        if value is None:
            said.append(f"{name}: not measured")
            continue
        marker = f"<!-- gpu:{rows.key}.{name} -->"
        pattern = rf"({re.escape(marker)}).*?(<!-- /gpu -->)"
        text, count = re.subn(pattern, lambda m, v=value: f"{m[1]}{v} ({rows.source()}){m[2]}", text, flags=re.S)
        said.append(f"{name}: {value}" + ("" if count else f" (no marker {marker} in README.md)"))
    return text, said


def record_line(text: str, rows: Rows, what: str) -> str | None:
    """RECORDS.md's next line, if it is one."""
    best = rows.best()
    if best is None:
        return None
    rate = best["images_per_second"][WIDE]
    before = [float(m[1]) for m in re.finditer(r"^\| (\d+) \| [^|]* \| ([^|]*) \|", text, re.M) if m[2] == rows.device]
    if before and rate <= before[-1]:
        return None
    change = f"{rate / before[-1] - 1:+.1%}" if before else "-"
    red = f" (RED: {', '.join(rows.red)})" if rows.red else ""
    return f"| {rate:.0f} | {change} | {rows.device} | {what}{red} | {rows.date} | {rows.commit} |"


def attention_row(rows: Rows) -> str | None:
    """PREFERRED's row: per number of keys the two fastest backends, forward and backward together."""
    times: dict[tuple[int, str], dict[str, float]] = defaultdict(dict)
    for row in rows.of("attention"):
        if row["queries"] == row["keys"] and row["head_size"] == 64 and row["backend"] not in ("math", "sdpa"):
            times[row["keys"], row["backend"]][row["pass"]] = row["median_ms"]
    entries = []
    for keys in sorted({keys for keys, _ in times}):
        both = {name: sum(ms.values()) for (k, name), ms in times.items() if k == keys and len(ms) == 2}
        ranked = sorted(both, key=lambda name: both[name])[:2]
        if ranked:
            bound = "1 << 30" if keys == LAST_KEYS else str(keys)
            entries.append(f"({bound}, ({', '.join(json.dumps(name) for name in ranked)},))")
    if not entries or "1 << 30" not in entries[-1]:
        return None  # without the longest there is no row for what is above
    return f"({', '.join(entries)},)"


def float8_row(rows: Rows) -> str | None:
    """SLOWER_IN_FLOAT8's row; empty when every layer gains. Forms beside the ones measured do not matter here."""
    found = rows.of("ceiling", kind="fp8")
    totals: dict[tuple[int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in found:
        _, outputs, inputs = row["shape"]
        totals[outputs, inputs][0] += row["ms"]["half"]
        totals[outputs, inputs][1] += row["ms"]["scaled"]
    slow = [shape for shape, (half, scaled) in sorted(totals.items()) if scaled * GAIN > half]
    return f"({''.join(f'{shape}, ' for shape in slow)})" if found else None


def module_of(table: str, root: Path) -> Path:
    """The file of unite_fast in which ``table`` stands."""
    (found,) = [p for p in (root / "unite_fast").rglob("*.py") if re.search(rf"^{table}\b", p.read_text(), re.M)]
    return found


def set_row(text: str, table: str, capability: tuple[int, int], value: str, source: str) -> str:
    """The source text of a module with the row of ``capability`` in its dict ``table``, and the line above saying where
    it comes from."""
    head, opening, rest = re.split(rf"(^{table}\b[^\n]*= {{\n)", text, maxsplit=1, flags=re.M)
    body, closing, tail = re.split(r"(^})", rest, maxsplit=1, flags=re.M)
    body = re.sub(rf"(    #[^\n]*\n)?    {re.escape(str(capability))}: [^\n]*\n", "", body)
    return head + opening + f"    # {source}\n    {capability}: {value},\n" + body + closing + tail


def new_launches(rows: Rows, table: launches.Table) -> dict[launches.Key, launches.Launch]:
    """Of each operation that was swept, the launch that is fastest over its shapes, where it beats the table's."""
    found: dict[launches.Key, dict[launches.Launch, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows.of("launch", ok=True):
        key = launches.Key(row["op"], row["direction"], row["width"])
        found[key][launches.Launch(**row["launch"])][row["shape"]] = row["ms"]["median"]
    better = {}
    for key, tried in found.items():
        present = table.rows[key].with_triton(rows.triton()) if key in table.rows else None
        base = tried.get(present) if present else None
        if not base:
            continue  # nothing to compare with
        complete = {launch: times for launch, times in tried.items() if times.keys() == base.keys()}
        # A launch's time over the present one's, mean over the shapes.
        score = {launch: sum(times[s] / base[s] for s in base) / len(base) for launch, times in complete.items()}
        fastest = min(score, key=lambda launch: score[launch])
        if score[fastest] * GAIN < 1:
            better[key] = fastest
    return better


def new_table(rows: Rows, folder: Path) -> tuple[dict[Path, str], list[str]]:
    """The device's own table, from the one that it would take without, as a file's text; what has changed."""
    capability = rows.capability()
    if capability is None or not rows.of("launch", ok=True):
        return {}, ["launches: not measured"]
    names = [folder / f"{name}.json" for name in (*launches.names_of(rows.device, capability), launches.DEFAULT)]
    table = launches.read(next(path for path in names if path.is_file()))
    better = new_launches(rows, table)
    merged = table.rows | {key: launches.Row(launch, rows.date) for key, launch in better.items()}
    count = max((row["multiprocessors"] for row in rows.of("machine")), default=table.multiprocessors)
    made = launches.text_of(replace(table, device=rows.device, multiprocessors=count, rows=merged))
    said = [f"launches: {key.op} {key.direction} {key.width}: {launch}" for key, launch in better.items()]
    return {names[0]: made}, said or [f"launches: none is {GAIN - 1:.0%} faster than the table's"]


# What is chosen elsewhere than in a configuration, and where.
PLACES = {
    "cudnn_benchmark": "torch.backends.cudnn.benchmark (`setup` in unite_fast/efficiency/precision.py)",
    "lpips": "LPIPS' trunk (`fused` and `compile_trunk` in unite_fast/modality/lpips.py)",
}


def choices(rows: Rows) -> list[str]:
    """What configs/imagenet_b.yaml should say, by what was measured, and what stands elsewhere."""
    best, lines = rows.best(), []

    def line(key: str, value: object, why: str) -> None:
        lines.append(f"- `{key}: {value}`: {why}")

    tried = [row for row in rows.of("ours") if row.get("images_per_second")]
    if best is None:
        return ["- not measured"]

    def rate(**facts: object) -> dict | None:
        known = [row | {"graph": GRAPH in row["overrides"]} for row in tried]
        same = [row for row in known if all(row.get(n) == v for n, v in facts.items())]
        return max(same, key=lambda row: row["images_per_second"][WIDE], default=None)

    def text(row: dict) -> str:
        return f"{row['images_per_second'][WIDE]:.0f}"

    batches = {batch: rate(batch=batch) for batch in sorted({row["batch"] for row in tried})}
    line("train.micro_batch", best["batch"], ", ".join(f"{b}: {text(r)}" for b, r in batches.items() if r))
    graphed = {row["batch"]: row for row in tried if GRAPH in row["overrides"]}
    plain = {batch: rate(batch=batch, graph=False) for batch in graphed}
    if both := [batch for batch in graphed if plain[batch]]:
        graph, without = graphed[max(both)], plain[max(both)]
        wins = graph["images_per_second"][WIDE] > without["images_per_second"][WIDE] * 1.01
        line("efficiency.cuda_graph", "step" if wins else "none", f"step: {text(graph)}, none: {text(without)}")
    for name, place in PLACES.items():
        sides = {value: rate(**{name: value}) for value in sorted({row[name] for row in tried}, key=str)}
        if len(sides) > 1:
            listed = ", ".join(f"{value}: {text(row)}" for value, row in sides.items() if row)
            lines.append(f"- {place}: {best[name]}: {listed}")
    base = rows.of("option", option="")
    for row in rows.of("option"):
        if row.get("images_per_second") and row["option"] and base and base[-1].get("images_per_second"):
            gain = row["images_per_second"][WIDE] / base[-1]["images_per_second"][WIDE]
            off = abs(row["loss"] / base[-1]["loss"] - 1)
            lines.append(f"- {row['option']} (other numerics, opt-in): {gain:.3f} times, first loss off by {off:.1e}")
    return lines


def apply(rows: Rows, root: Path, write: bool, what: str) -> list[str]:
    """What the rows say; with ``write`` the files of ``root`` say it too, once all of them are made."""
    made: dict[Path, str] = {}

    def change(name: str, value: str | None, changed: Callable[[str], str]) -> str:
        if value is not None:
            made[root / name] = changed((root / name).read_text())
        return f"{name}: {value or 'not measured'}"

    source, capability = rows.source(), rows.capability() or (0, 0)
    made[root / "README.md"], said = fill((root / "README.md").read_text(), rows)
    if (again := rows.best("ours again")) and (first := rows.best()) and again["batch"] == first["batch"]:
        drift = again["images_per_second"][WIDE] / first["images_per_second"][WIDE] - 1
        said.append(f"drift: the same settings minutes later: {drift:+.1%}")
    records = root / "benchmarks" / "RECORDS.md"
    line = record_line(records.read_text(), rows, what)
    said.append(change("benchmarks/RECORDS.md", line, lambda t: t.rstrip("\n") + f"\n{line}\n"))
    for table, value in {"PREFERRED": attention_row(rows), "SLOWER_IN_FLOAT8": float8_row(rows)}.items():
        value = value if rows.capability() else None
        name = str(module_of(table, root).relative_to(root))
        said.append(change(name, value, lambda t, n=table, v=value: set_row(t, n, capability, v or "", source)))
    tables, changes = new_table(rows, root / "kernels" / "unite_kernels" / "launch_tables")
    chosen = choices(rows)
    said += [*changes, "what configs/imagenet_b.yaml should choose, and what stands elsewhere:", *chosen]
    results = root / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", rows.device.lower()).strip("-")
    kept = results / "gpu_check.jsonl"
    before = kept.read_text() if kept.is_file() else ""
    made |= tables | {kept: before + "".join(json.dumps(row) + "\n" for row in rows.rows)}
    made[results / "choices.md"] = f"# {source}\n\n" + "\n".join(chosen) + "\n"
    for path, text in made.items() if write else ():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, text)
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path, help="rows.jsonl of the commands, in their order")
    parser.add_argument("--write", action="store_true", help="change the files")
    parser.add_argument("--what", default="first measurement", help="what changed, for RECORDS.md")
    arguments = parser.parse_args()
    if absent := [str(path) for path in arguments.rows if not path.is_file()]:
        parser.error(
            f"no file {', '.join(absent)}; give the rows.jsonl that gpu_check.py wrote (ROWS= of make gpu-report)"
        )
    found = [json.loads(line) for path in arguments.rows for line in path.read_text().splitlines()]
    rows = Rows(found)
    print(f"{len(found)} rows: {rows.source()}")
    print("\n".join(apply(rows, ROOT, arguments.write, arguments.what)))
    return 1 if rows.red else 0


if __name__ == "__main__":
    sys.exit(main())
