"""What is asked of sampling: seeds, labels, guidance; from the words of a command line, and what files keep of it."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unite_fast import sampling
from unite_fast.base.errors import UserError
from unite_fast.config import SampleConfig
from unite_fast.config.yaml_text import to_dict
from unite_fast.model.unite import UNITE
from unite_kernels import philox

LABEL_STREAM = 1 << 17
MAX_SEEDS = 10_000_000


@dataclass(frozen=True)
class Request:
    seeds: list[int]
    labels: list[int]
    how: SampleConfig
    batch: int
    null: int = -1  # the label of what has no class
    class_names: Sequence[str] = ()
    guide: UNITE | None = None  # for autoguidance; what it is belongs to the ``identity`` below

    def protocol(self, identity: str) -> dict[str, object]:
        """What an image depends on besides its own seed and label."""
        return {"checkpoint": identity, **to_dict(self.how), "tile": sampling.TILE}

    def whole(self, identity: str) -> dict[str, object]:
        """What a grid, npz or tar depends on."""
        labels = hashlib.sha256(json.dumps(self.labels).encode()).hexdigest()[:16]
        return self.protocol(identity) | {"seeds": as_ranges(self.seeds), "labels": labels}


def parse_seeds(text: str) -> list[int]:
    """ "0-3,8" -> [0, 1, 2, 3, 8]. Raises UserError."""
    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        try:
            first = int(low)
            last = int(high) if dash else first
        except ValueError:
            raise UserError(f"--seeds {text}: write ranges and numbers such as 0-49,100") from None
        if max(abs(first), abs(last)) >= 1 << 62:
            raise UserError(f"--seeds {text}: {part} is too large a number")
        if last < first or len(seeds) + last - first >= MAX_SEEDS:
            raise UserError(f"--seeds {text}: the range {part} is empty or too long")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds {text}: a seed stands twice; each makes one image")
    return seeds


def as_ranges(seeds: list[int]) -> str:
    """The inverse of ``parse_seeds``."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def parse_interval(text: str) -> tuple[float, float]:
    """ "0.1,1.0" -> (0.1, 1.0). Raises UserError."""
    try:
        low, high = (float(x) for x in text.split(","))
    except ValueError:
        raise UserError(f"--cfg-interval {text}: write LOW,HIGH such as 0.1,1.0") from None
    return low, high


def parse_labels(text: str, seeds: list[int], num_classes: int, names: Sequence[str] = ()) -> list[int]:
    """One class per seed. "equal": seed modulo classes; "random": a function of the seed; "none": the null class, whose
    samples are those of no class; else a list of numbers or of ``names`` used in turn. Raises UserError."""
    if num_classes == 0 and text not in ("equal", "random", "none"):
        raise UserError(f"--labels {text}: this model has no classes; leave it out")
    if num_classes == 0 or text == "none":
        return [num_classes] * len(seeds)
    if text == "equal":
        return [seed % num_classes for seed in seeds]
    if text == "random":
        u = philox.uniform(0, LABEL_STREAM, torch.tensor(seeds))
        return (u * num_classes).long().clamp(max=num_classes - 1).tolist()
    classes = classes_of(text, num_classes, names)
    return [classes[i % len(classes)] for i in range(len(seeds))]


def classes_of(text: str, num_classes: int, names: Sequence[str] = ()) -> list[int]:
    """ "dog,3,cat" -> [1, 3, 0]: names of classes, which may hold commas, and numbers that are no class's name.

    Raises UserError.
    """
    numbers = {name.casefold(): i for i, name in reversed(list(enumerate(names)))}
    numbers |= {name: i for i, name in reversed(list(enumerate(names)))}
    words, at, found = text.split(","), 0, []
    while at < len(words):
        for end in range(len(words), at, -1):
            word = ",".join(words[at:end]).strip()
            number = numbers.get(word, numbers.get(word.casefold()))
            if number is None and word.isdecimal() and int(word) < num_classes:
                number = int(word)
            if number is not None:
                found.append(number)
                at = end
                break
        else:
            raise _no_class(text, words[at].strip(), num_classes, names)
    return found


def named(labels: Sequence[int], names: Sequence[str], most: int = 20) -> str:
    """Which classes occur, in words: the first ``most`` of them."""
    chosen = sorted({label for label in labels if label < len(names)})
    said = ", ".join(f"{i} {names[i]}" for i in chosen[:most]) or "none"
    return f"classes {said}" + (f" and {len(chosen) - most} more" if len(chosen) > most else "")


def _no_class(text: str, word: str, num_classes: int, names: Sequence[str]) -> UserError:
    if word.lstrip("-").isdecimal():
        return UserError(f"--labels {text}: class {word} does not exist; this model has 0 to {num_classes - 1}")
    if not names:
        return UserError(f"--labels {text}: write equal, random, none, or classes such as 3,7")
    close = difflib.get_close_matches(word, names, 3, 0.5) or list(names[:8])
    more = ", ..." if len(close) < len(names) else ""
    return UserError(f"--labels {text}: there is no class {word!r}; there are {', '.join(close)}{more}")
