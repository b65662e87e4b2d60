"""Training steps: ours in the settings that are open, the official code in both its forms, and the two in turn."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import compare_official
import torch
from compare_official import PER_UPDATE, TOLERANCE, agrees, differences, images_for, origin_of, our_config
from harness import interleaved, quantiles
from official import FORMS, Official, wake
from torch.profiler import ProfilerActivity, profile
from training import Origin, OurStep, composed, configuration, peak_memory, release

from gpu_parts import Bench
from unite_fast.base.errors import RunError, UserError
from unite_fast.data import Batch
from unite_fast.efficiency import compiling, precision

FLOW_STEPS = 3
GRAPH = "efficiency.cuda_graph=step"
CHOSEN = ("efficiency.kernels=fused", "efficiency.flow_mini_batch=3")
TRUNKS = {"default": None, "eager": False, "compiled": True}  # of LPIPS: as train.py has it, or the package's
ROUNDS = 7
KERNELS = 40  # rows of the kernel table


class Setting(dict):
    """batch, overrides, lpips (a key of TRUNKS) and cudnn.benchmark of one way to do a step of ours."""

    def build(self, bench: Bench, origin: Origin) -> OurStep:
        sizes = ("tiny" if bench.toy else "b", FLOW_STEPS, self["batch"])
        torch.backends.cudnn.benchmark = self["cudnn_benchmark"]
        config = configuration(*sizes, bench.device, tuple(self["overrides"]))
        return OurStep(config, origin, compile_lpips=TRUNKS[self["lpips"]])


def switch(bench: Bench) -> None:
    """What holds for the whole process."""
    precision.setup(bench.device)
    if bench.toy:
        compiling.BACKEND = "eager"  # traced, not compiled


def usual(bench: Bench) -> Setting:
    """As train.py does with configs/imagenet_b.yaml, at the official code's batch if that is known."""
    batch = (kept(bench, "official") or {}).get("batch") or bench.official_batches()[0]
    overrides = [*CHOSEN, "efficiency.compile=decoder"]
    return Setting(batch=batch, overrides=overrides, lpips="default", cudnn_benchmark=True)


def begin(bench: Bench) -> Origin:
    switch(bench)
    config = configuration("tiny" if bench.toy else "b", FLOW_STEPS, 1, bench.device, ())
    return Origin(config.model, bench.device, perceptual=not bench.toy)


def kept(bench: Bench, name: str, value: object = None):
    """Reads, or with a value writes, what a later part or the second command wants to know."""
    path = Path(bench.settings["run"]) / f"{name}.json"
    if value is not None:
        path.write_text(json.dumps(value))
        return value
    return json.loads(path.read_text()) if path.is_file() else None


def attempt(bench: Bench, setting: Setting, kind: str, function: Callable[[], dict | None]) -> dict | None:
    """What ``function`` returns; None where it does not fit into memory or cannot run, which is a row as well."""
    try:
        return function()
    except (torch.OutOfMemoryError, UserError, RunError, RuntimeError) as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    finally:
        release(bench.device)
    release(bench.device)  # again: the error, and with it what its frames held, is gone now alone
    bench.row(kind, **setting, ok=False, why=why)
    return None


def measure(bench: Bench, origin: Origin, setting: Setting, kind: str) -> dict | None:
    """One row of ``kind``, or None."""
    row = attempt(bench, setting, kind, lambda: times_of(bench, origin, setting))
    if row is not None:
        bench.row(kind, **row)
    return row


def times_of(bench: Bench, origin: Origin, setting: Setting) -> dict:
    """A row: warm-up apart, then passes and update, composed to images/s."""
    begun = time.monotonic()
    with peak_memory(bench.device) as gib:
        step = setting.build(bench, origin)
        loss = step.warm_up()
        warm = time.monotonic() - begun
        ms = {
            part: quantiles(interleaved({"x": getattr(step, part)}, bench.device, ROUNDS, 1.0, warmup=0)["x"])
            for part in ("passes", "update")
        }
    row = {**setting, "ok": True, "ms": ms, "loss": loss, "warm_up_s": round(warm, 1), "gib": gib(), "n": ROUNDS}
    return row | {"images_per_second": rates(ms["passes"]["median"], ms["update"]["median"], setting["batch"])}


def rates(passes: float, update: float, batch: int) -> dict[str, float]:
    return {str(images): composed(passes, update, batch, images) for images in PER_UPDATE}


def speed(row: dict | None) -> float:
    return row["images_per_second"][str(PER_UPDATE[-1])] if row else 0.0


def ours(bench: Bench) -> None:
    """One choice after the other, each from the best so far; the settings that won are kept for the later parts."""
    origin = begin(bench)
    plain = usual(bench)
    shared, best, found = plain["batch"], plain, measure(bench, origin, plain, "ours")
    changes = {"cudnn_benchmark": False}, {"lpips": "eager"}, {"lpips": "compiled"}
    for change in (*changes, {"overrides": [*plain["overrides"], GRAPH]}):
        tried = Setting(best | change)
        row = measure(bench, origin, tried, "ours")
        if speed(row) > speed(found):
            best, found = tried, row
        for name in ("shared", "best"):  # shared: the official code's batch. At once: the next may end the process
            kept(bench, name, best)
    for batch in bench.batches():
        if batch > shared and (row := larger(bench, origin, best, batch)):
            if speed(row) > speed(found):
                best = Setting({name: row[name] for name in best})
            break
    kept(bench, "best", best)
    attempt(bench, best, "kernel", lambda: kernel_table(bench, best.build(bench, origin)))


def larger(bench: Bench, origin: Origin, best: Setting, batch: int) -> dict | None:
    """The best at more images; without its graph, which keeps the activations of its pass, where it does not fit."""
    row = measure(bench, origin, Setting(best | {"batch": batch}), "ours")
    if row is None and GRAPH in best["overrides"]:
        overrides = [o for o in best["overrides"] if o != GRAPH]
        row = measure(bench, origin, Setting(best | {"batch": batch, "overrides": overrides}), "ours")
    return row


def kernel_table(bench: Bench, step: OurStep) -> None:
    """Where the time of one optimizer step goes, by kernel."""
    step.warm_up()
    activity = ProfilerActivity.CPU if bench.toy else ProfilerActivity.CUDA
    with profile(activities=[activity]) as seen:
        step.whole()
        if not bench.toy:
            torch.cuda.synchronize()
    time_of = "self_cpu_time_total" if bench.toy else "self_device_time_total"
    kernels = sorted(seen.key_averages(), key=lambda e: -getattr(e, time_of))[:KERNELS]
    for event in kernels:
        bench.row("kernel", name=event.key[:160], calls=event.count, ms=getattr(event, time_of) / 1e3)


def ours_again(bench: Bench) -> None:
    for name in ("shared", "best"):
        if (setting := kept(bench, name)) and (name == "shared" or setting != kept(bench, "shared")):
            measure(bench, begin(bench), Setting(setting), "ours again")


def official(bench: Bench) -> None:
    """Compiles both forms at the first batch that fits, waits for its turn, then is timed."""
    if bench.official is None:
        bench.row("missing", what="official code", why="no clone: give OFFICIAL_DIR, or make gpu-pack with it")
        return
    recipe = "fp32" if bench.toy else "bf16"
    switch(bench)
    code = Official(bench.official, bench.device, FLOW_STEPS, toy=bench.toy)
    wake(code.model)
    code.prepare()
    compare(bench, code, recipe)
    code.compile()
    batch, images, forms = compiled_for(bench, code, recipe)
    kept(bench, "official", {"batch": batch})
    bench.wait()
    updates = timed(bench, code.update)
    for form in forms:
        times = timed(bench, lambda form=form: code.passes(images.images, images.labels, recipe, form))
        ms = {"passes": quantiles(times), "update": quantiles(updates)}
        speeds = rates(ms["passes"]["median"], ms["update"]["median"], batch)
        bench.row("official", form=form, batch=batch, ms=ms, images_per_second=speeds, n=len(times))


def timed(bench: Bench, function) -> list[float]:
    function()  # the cache was given back: the first call asks for its memory anew
    return interleaved({"x": function}, bench.device, 2 if bench.toy else 5, 1.0, warmup=0)["x"]


def compare(bench: Bench, code: Official, recipe: str) -> None:
    """Losses and gradient norm of one small step on both sides, from equal draws."""
    size = 1 if bench.toy else 8
    config = our_config(code, size, recipe, FLOW_STEPS, ("efficiency.kernels=fused",))
    step = OurStep(config, origin_of(code, config), images_for(config, bench.device))
    found = differences(code, step, recipe)
    del step
    release(bench.device)
    why = f"losses or gradient norm differ by more than {TOLERANCE[recipe]:g}" if found else "not compared: see the log"
    why = "" if agrees(found, recipe) else why
    bench.check("losses of the official code", why, differences=found)


def compiled_for(bench: Bench, code: Official, recipe: str) -> tuple[int, Batch, list[str]]:
    """The first batch size whose passes and update fit, with everything compiled for it and searched; its images, and
    the forms that compile."""
    for size in bench.official_batches():
        images = images_for(our_config(code, size, recipe, FLOW_STEPS, ()), bench.device)
        begun, forms = time.monotonic(), []
        try:
            for form in FORMS:
                if warm(bench, code, images, recipe, form):
                    forms.append(form)
            code.update()
        except torch.OutOfMemoryError as error:
            bench.row("official", batch=size, ok=False, why=f"OutOfMemoryError: {str(error)[:120]}")
        else:
            bench.row("official compiled", batch=size, forms=forms, seconds=round(time.monotonic() - begun, 1))
            release(bench.device)
            return size, images, forms
        release(bench.device)
    raise torch.OutOfMemoryError("no batch size of the official code fits")


def warm(bench: Bench, code: Official, images: Batch, recipe: str, form: str) -> bool:
    """Whether ``form`` compiles and runs; what a compiler refuses is a row, and leaves the other form."""
    try:
        for _ in range(2):
            code.passes(images.images, images.labels, recipe, form)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        traceback.print_exc()
        bench.row("official", form=form, ok=False, why=f"{type(error).__name__}: {str(error)[:200]}")
        return False
    return True


def options(bench: Bench) -> None:
    """What computes in other numbers, beside the best settings: its speed, and its first loss."""
    origin = begin(bench)
    best = Setting(kept(bench, "shared") or usual(bench))
    more = {"fp8": ["efficiency.precision=fp8"], "bf16 residual": ["efficiency.residual=bf16"]}
    for name, changes in {"": [], **more}.items():
        measure(bench, origin, Setting(best | {"overrides": [*best["overrides"], *changes], "option": name}), "option")


def winners(bench: Bench) -> None:
    """Ours as it won and the official code in both forms, one after the other in every round."""
    if bench.official is None:
        bench.row("missing", what="winners", why="no official code")
        return
    best = kept(bench, "shared") or usual(bench)
    switch(bench)
    torch.backends.cudnn.benchmark = best["cudnn_benchmark"]
    words = ["--official-dir", str(bench.official), "--device", bench.device.type, "--sample-steps", "0"]
    words += ["--precision", "fp32" if bench.toy else "bf16", "--rounds", "2" if bench.toy else "9"]
    words += ["--batch", ",".join(str(b) for b in bench.batches() if b <= best["batch"])]
    words += ["--toy"] if bench.toy else []
    arguments: argparse.Namespace = compare_official.parse([*words, *best["overrides"]])
    compare_official.compare(arguments, compile_lpips=TRUNKS[best["lpips"]])
