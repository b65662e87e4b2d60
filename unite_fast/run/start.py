"""From where a run begins: a fresh start, its own newest checkpoint, or one that was named; and where it ends."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from unite_fast import checkpoint
from unite_fast.base import files, outputs
from unite_fast.base.errors import UserError
from unite_fast.checkpoint import saving
from unite_fast.config import Config, DataConfig, TrainConfig
from unite_fast.config.yaml_text import to_dict
from unite_fast.parallel.distributed import Ranks
from unite_fast.run.agreement import changed_images
from unite_fast.training.state import TrainState

log = logging.getLogger("unite_fast.run.start")
BEGAN_FROM = "began_from.txt"  # in the run folder: the checkpoint from which resume=PATH began this run


def check_paths(path: Path, resume: str, init_from: str, reading: DataConfig, fine_tunes: bool = False) -> None:
    """What can be wrong with a run's folder and the checkpoints that the command names, before any rank waits.

    Of their content nothing is hashed yet. fine_tunes: it makes no sense without the weights of a trained model.
    """
    # A run among its data would be data at the next start: folders of images become classes.
    read = [reading.path, reading.heldout_path] if reading.reads_files else []
    outputs.check(path, "run_dir", [place for place in read if place])
    if _is_named(resume) and not _began_there(path, resume):
        checkpoint.locate(resume, quiet=True, content=False)
    if resume == "must" and not checkpoint.newest_first(path / "checkpoints"):
        raise UserError(f"resume=must, but {path} has no usable checkpoint")
    if fine_tunes and not init_from and not _is_named(resume) and not goes_on(resume, path):
        raise UserError(
            "objective.adversarial fine-tunes the decoder of a trained model, and init_from names none; give a run "
            "folder, a step-N folder, an export or an official .pt with init_from=PATH"
        )
    if init_from and not goes_on(resume, path):
        checkpoint.locate(init_from, quiet=True, content=False)


def goes_on(resume: str, folder: Path) -> bool:
    """Whether the run has checkpoints of its own, so that where its first weights came from may be gone by now."""
    return resume != "never" and bool(checkpoint.newest_first(folder / "checkpoints"))


class Choice(NamedTuple):
    """The checkpoint from which a run begins or goes on, and why."""

    path: Path | None
    why: str
    lines: list[str]  # one for each newer checkpoint that is damaged, and for each setting that changed
    rejected: list[Path]  # those
    begins: bool = True  # false: goes on from the run's own checkpoints

    def said(self, step: int) -> str:
        """What is printed, once the checkpoint's step is known."""
        chosen = f"resuming from {self.path} at step {step}: {self.why}" if self.path else f"starting fresh: {self.why}"
        return "\n".join([*self.lines, chosen])


def _is_named(resume: str) -> bool:
    return resume not in ("auto", "must", "never")


def _began_there(path: Path, resume: str) -> bool:
    """Whether the run in the folder ``path`` began from the checkpoint that ``resume=PATH`` names."""
    try:
        noted, asked = Path(files.read_text(path / BEGAN_FROM, "surrogateescape").strip()), Path(resume).absolute()
        return noted == asked or noted.resolve() == asked.resolve()  # it may be gone by now, or called otherwise
    except (OSError, ValueError, RuntimeError):
        return False


def hash_together(path: Path, resume: str, ranks: Ranks) -> None:
    """Each rank hashes its share of the newest checkpoint's files of the run folder ``path``, or of the one that
    ``resume`` names, which ``choose`` on rank 0 then knows: the more ranks there are, the larger is what they have
    saved. An older one, should the newest be damaged, is left to rank 0. All ranks together."""
    if ranks.world_size == 1 or resume == "never":
        return

    def candidate() -> Path | None:
        own = checkpoint.newest(path / "checkpoints", content=False)[0]
        if own is None and _is_named(resume):
            with contextlib.suppress(UserError):  # ``choose`` will say it
                named = checkpoint.locate(resume, quiet=True, content=False)
                return named if named.is_dir() else None
        return own

    chosen = ranks.decide(candidate)
    if chosen is not None:
        parts = ranks.each(lambda: checkpoint.hash_part(chosen, ranks.rank, ranks.world_size))
        for found in parts if ranks.is_main else ():  # it alone chooses: others need not look at every file
            checkpoint.take_hashes(chosen, found)


def choose(config: Config, images: dict[str, Any]) -> Choice:
    """Applies ``resume=auto|never|must|PATH``. images: ``Source.identity`` of those to train on. Raises UserError."""
    path = config.folder

    def changes(since: Path) -> list[str]:
        saved = checkpoint.saved_images(since)
        return checkpoint.changes(since, config.model, to_dict(config)) + changed_images(
            saved, images, config.data, since.name
        )

    if config.resume == "never":
        if checkpoint.newest_first(path / "checkpoints"):
            raise UserError(f"resume=never, but {path} already holds checkpoints; choose another name or run_dir")
        return Choice(None, "resume=never", [], [])
    found, lines, rejected = checkpoint.newest(path / "checkpoints")
    if found is None and rejected and config.init_from:
        raise UserError(
            f"none of the checkpoints of {path} is usable ({lines[0]}); to begin again from init_from, "
            "choose another name or run_dir"
        )
    why = "the newest that verifies"
    if _is_named(config.resume):
        if found is None or not _began_there(path, config.resume):
            named = _named(config.resume, path, found)
            return Choice(named, "it was named", lines + changes(named), rejected)
        why += f" of the run that began from {config.resume}"
    if found is None:
        if config.resume == "must":
            detail = f" ({lines[0]})" if lines else ""
            raise UserError(f"resume=must, but {path} has no usable checkpoint{detail}")
        return Choice(None, f"no usable checkpoint in {path}", lines, rejected)
    return Choice(found, why, lines + changes(found), rejected, begins=False)


def _named(resume: str, folder: Path, own: Path | None) -> Path:
    """The PATH of ``resume=PATH``: for a run that has no checkpoint, or one of its own, to go back. Raises UserError.

    own: the newest checkpoint of the run.
    """
    named = checkpoint.locate(resume)
    if own is not None and named.resolve().parent != own.resolve().parent:
        raise UserError(
            f"resume={resume}, but {folder} holds checkpoints of a run that did not begin from there; "
            "choose another name or run_dir, or go on with resume=auto"
        )
    return named


def tidy(path: Path, resume: str, choice: Choice, step: int) -> None:
    """Removes unfinished saves; renames damaged checkpoints to step-N.damaged and those newer than ``step``, from which
    the run goes on, to step-N.abandoned; notes from where a run begins. For the holder of the lock."""
    checkpoints = path / "checkpoints"
    saving.clean(checkpoints)
    newer = [p for p in checkpoint.newest_first(checkpoints) if (checkpoint.step_of(p) or 0) > step]
    for one in newer:
        _put_aside(one, "damaged" if one in choice.rejected else "abandoned")
    # Last: if this process ends before it, the same start does all of it again.
    if choice.begins:
        note = path / BEGAN_FROM
        with files.refusals(str(note), "; choose another folder with run_dir=PATH"):
            note.unlink(missing_ok=True)
            if choice.path is not None:
                files.write(note, f"{Path(resume).absolute()}\n")


def _put_aside(path: Path, why: str) -> None:
    """Renames a checkpoint to step-N.WHY, or step-N.WHY-2 and so on where earlier starts have left some."""
    aside = path.with_name(f"{path.name}.{why}")
    for number in itertools.count(2):
        if not os.path.lexists(aside):
            break
        aside = path.with_name(f"{path.name}.{why}-{number}")
    try:
        path.rename(aside)
    except OSError as error:  # what cannot be read can perhaps not be renamed: the next start passes it over again
        log.warning("%s cannot be renamed to %s (%s)", path, aside.name, error.strerror)


def clear_dev_folder(path: Path) -> None:
    """Removes what an earlier --fast-dev-run left; anything else in its place is a UserError."""
    if path.exists() and any(path.iterdir()) and not (path / "config.resolved.yaml").is_file():
        raise UserError(f"--fast-dev-run writes to {path}, which holds something else; choose another run_dir")
    shutil.rmtree(path, ignore_errors=True)


def last_step(t: TrainConfig, state: TrainState, images_per_epoch: int) -> int:
    """The number of the run's last step: whole batches until ``epochs`` of images are seen, or ``max_steps``."""
    total = state.step + max(0, int(t.epochs * images_per_epoch) - state.images_seen) // t.global_batch
    return min(total, t.max_steps or total)
