"""What the commands share: a model, the settings that options, an earlier result or its run give, a result's place."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from unite_fast import checkpoint
from unite_fast.base import files, outputs
from unite_fast.base.errors import UserError, idle
from unite_fast.config import Config, EvaluationConfig
from unite_fast.evaluation.generation import Settings, of_run
from unite_fast.evaluation.results import beside_other_commits, is_result_of, timeless
from unite_fast.model.unite import UNITE
from unite_fast.optim.groups import freeze
from unite_fast.parallel.distributed import Ranks
from unite_fast.sampling.request import parse_interval


@dataclasses.dataclass(frozen=True)
class Context:
    arguments: argparse.Namespace
    located: Path
    model: UNITE
    config: Config
    ranks: Ranks
    earlier: dict[str, Any] | None  # the result that --protocol names

    def weights(self) -> dict[str, str]:
        return {"sha256": checkpoint.identity(self.located), "weights": self.arguments.weights}

    def trained(self) -> dict[str, Tensor]:
        """The weights that the run trains, which its scores while training know."""
        freeze(self.model, self.config.optim.frozen)
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def folder(self) -> Path:
        """Where results lie."""
        if self.arguments.out:
            return Path(self.arguments.out).parent
        if self.located.is_dir() or self.located.name == checkpoint.EXPORTED:
            return (checkpoint.run_of(self.located) or self.located.parent) / "scores"
        return Path("scores")

    def check_out(self) -> None:
        """Raises UserError where results lie in what is read, would replace something else, or cannot be written."""
        a, folder = self.arguments, self.folder()
        if a.out:
            given = ("reference", "protocol", "inception", "lpips", "data")
            read = [path for name in given if (path := getattr(a, name, None))]
            if Path(a.out).suffix != ".json":
                raise UserError(f"--out {a.out}: name a .json file; what else is kept lies beside it")
            outputs.check_file(Path(a.out), "--out", [*checkpoint.reads(self.located), *read], is_result_of(a.command))
        else:
            outputs.check(folder, "the scores' folder")
        with files.refusals(str(folder), "; choose another place with --out"):
            folder.mkdir(parents=True, exist_ok=True)

    def out(self, protocol: dict[str, Any], what: str = "") -> Path:
        """--out, or a name that no other protocol has. ``what``: the readable part of the difference."""
        if self.arguments.out:
            return Path(self.arguments.out)
        counted = self.located.is_dir() or self.located.name == checkpoint.EXPORTED  # an official step counts otherwise
        step = checkpoint.recorded_step(self.located) if counted else None
        of = self.located.stem if step is None else f"step_{step:07d}"
        parts = [self.arguments.command, of, self.arguments.weights, what, files.digest(timeless(protocol))[:8]]
        path = self.folder() / f"{'_'.join(filter(None, parts))}.json"
        return self.ranks.decide(lambda: beside_other_commits(path, protocol.get("environment", {})))

    def settings(self) -> Settings:
        """Those of the run, or the protocol's, with what the options change."""
        a = self.arguments
        c = self.config
        base = of_run(c.sample, c.evaluation, c.efficiency)
        if scale := checkpoint.found_scale(self.located):
            base = dataclasses.replace(base, cfg_scale=scale)
        if self.earlier:
            base = Settings.read(self.earlier["protocol"]["settings"])
        changes: dict[str, Any] = {
            "count": a.count,
            "cfg_scale": a.cfg,
            "cfg_interval": None if a.cfg_interval is None else parse_interval(a.cfg_interval),
            "precision": a.precision,
            "kernels": a.kernels,
            "compile": a.compile or None,
        }
        changes |= {name: getattr(a, name, None) for name in ("labels", "solver", "steps", "cfg_order")}
        changed = dataclasses.replace(base, **{k: v for k, v in changes.items() if v is not None})
        changed.check(self.model.config)
        if changed.cfg_scale == 1 and a.command != "search":
            for option in ("cfg_interval", "cfg_order", "autoguidance"):
                if getattr(a, option, None) is not None:
                    raise idle(f"--{option.replace('_', '-')}", "without guidance, which --cfg gives")
        return changed

    def save(self, path: Path, content: dict[str, Any], finished: bool = True) -> None:
        """Writes the result whole, on one process. Raises UserError when the disk refuses."""
        if not self.ranks.is_main:
            return
        with files.refusals(f"--out {path}"):
            files.write_json(path, {"command": self.arguments.command} | content)
        if finished:
            print(f"written to {path}")


def short(settings: Settings) -> str:
    """The guidance scale and the solver, for a file's name."""
    return f"w{settings.cfg_scale:g}_{settings.solver}{'' if settings.solver == 'dopri5' else settings.steps}"


def fill_in(arguments: argparse.Namespace, earlier: dict[str, Any] | None, located: Path) -> None:
    """Gives each of these options that was not on the command line its value of the protocol, or else its default."""
    scored = checkpoint.saved_config(located).evaluation if located.is_dir() else EvaluationConfig
    protocol = earlier["protocol"] if earlier else {"checkpoint": {"weights": scored.weights}, "kid_subset": None}
    if arguments.weights is None:
        arguments.weights = protocol["checkpoint"]["weights"]
    if arguments.command == "heldout":
        return
    if arguments.extractor is None and not arguments.inception:
        arguments.extractor, arguments.inception = scored.extractor, scored.inception
        if scored.inception_sha256 != EvaluationConfig.inception_sha256:
            arguments.inception_sha256 = scored.inception_sha256
    arguments.extractor = arguments.extractor or "inception"
    if arguments.extractor != "inception" and arguments.inception == scored.inception:
        arguments.inception = ""  # the run's, for another day
    if arguments.command != "rfid":
        arguments.reference = arguments.reference or scored.reference
        if not arguments.reference:
            raise UserError("--reference names no statistics of the real images, nor does the run; make them with "
                            "python -m unite_fast.evaluation.statistics")  # fmt: skip
        arguments.pairs = arguments.pairs or protocol["kid_subset"] is not None
        if arguments.kid_subset is None:
            arguments.kid_subset = protocol["kid_subset"] or 1000
