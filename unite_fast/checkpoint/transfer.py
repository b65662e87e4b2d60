"""Weights of another model for a new run (``init_from``): what fits is taken, the rest adapted or begun anew, and said.

    class table       rows by class name where both sides have names, by number where the counts are equal; else anew.
                      The null class is always taken
    positions         of registers, patches and latents on a square grid: bicubic; otherwise linear in their order
    channels          the patch embedding and the decoder's last layer, from gray to color and back
    anything else     of another shape: begun anew

Shape letters: K positions, D width, Q channels, P patch size.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unite_fast import interop
from unite_fast.base.errors import UserError
from unite_fast.config import ModelConfig
from unite_fast.model.unite import UNITE

CLASSES = re.compile(r"\.embedding_table\.weight$")
POSITIONS = re.compile(r"^latent_tokens(_denoiser)?$|\.position_embeddings$|^decoder\.latent_positions$")
PATCHES = "patch_embed.patch_embeddings.projection.weight"
PIXELS = re.compile(r"^decoder\.decoder_pred\.(weight|bias)$")
MOST_NAMED = 4  # entries of a list in a line


class Origin(NamedTuple):
    """Where weights come from. model: None for an official .pt."""

    where: str
    model: ModelConfig | None
    class_names: Sequence[str]


def take(model: UNITE, state: dict[str, Tensor], origin: Origin, class_names: Sequence[str]) -> list[str]:
    """Puts of ``state`` what fits into a newly made ``model``, on the CPU or a GPU; says what, a line each.

    class_names: of the model's classes; empty where they have none. Raises UserError when not even a block fits.
    """
    state, own = interop.clean_keys(state), model.state_dict()
    if bad := [name for name, value in state.items() if name in own and not torch.isfinite(value).all()]:
        raise UserError(f"{origin.where}: {bad[0]} is not finite; take another checkpoint")
    whole, adapted, anew = [], [], []
    names = (list(origin.class_names), list(class_names))
    by_name = all(names) and names[0] != names[1]
    with torch.no_grad():
        for name, tensor in own.items():
            given = state.get(name)
            if given is not None and given.shape == tensor.shape and not (by_name and CLASSES.search(name)):
                tensor.copy_(given)
                whole.append(name)
            elif given is not None and (said := _adapt(name, given, tensor, model.config, names)):
                adapted.append(f"  {name}: {said}")
            elif given is not None or not interop.OPTIONAL.search(name):
                there = "not there" if given is None else f"{tuple(given.shape)} there"
                anew.append(f"{name} ({there}, {tuple(tensor.shape)} here)")
    if not any(re.match(r"encoder\.blocks\.\d+\.attn\.qkv\.weight", name) for name in whole):
        raise UserError(
            f"{origin.where} holds another model, of which no block fits; {anew[0]}" if anew else origin.where
        )
    left = [name for name in state if name not in own]
    first = f"init_from {origin.where}: took {len(whole)} of {len(own)} tensors as they are"
    lines = [first, *adapted]
    lines += [f"  begun anew: {_listed(anew)}"] if anew else []
    lines += [f"  left there: {_listed(left)}"] if left else []
    if origin.model is not None and (heads := _heads(origin.model, model.config)):
        lines.append(f"  but {heads}: attention does something else with the same weights")
    return lines


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _heads(there: ModelConfig, here: ModelConfig) -> str:
    """Differences that shapes do not show."""
    pairs = (
        ("encoder.heads", there.encoder.heads, here.encoder.heads),
        ("decoder.heads", there.decoder.heads, here.decoder.heads),
    )
    return ", ".join(f"{key} is {a} there and {b} here" for key, a, b in pairs if a != b)


def _adapt(name: str, given: Tensor, tensor: Tensor, config: ModelConfig, names: tuple[list[str], list[str]]) -> str:
    """Fills ``tensor`` from one of another shape or other classes, and says how; empty where there is no way."""
    if CLASSES.search(name) and given.shape[1] == tensor.shape[1]:
        return _classes(given, tensor, *names)
    if POSITIONS.search(name) and given.shape[2] == tensor.shape[2]:
        first = int(name.endswith("position_embeddings"))  # a class token's, which has no place on the grid
        tensor[:, :first].copy_(given[:, :first])
        tensor[:, first:].copy_(resampled(given[:, first:], tensor.shape[1] - first))
        return f"resampled from {given.shape[1] - first} to {tensor.shape[1] - first} places"
    if name == PATCHES and given.shape[2:] == tensor.shape[2:] and len(given) == len(tensor):
        tensor.copy_(recolored(given, tensor.shape[1]))
        return f"from {given.shape[1]} to {tensor.shape[1]} channels"
    if PIXELS.search(name):
        area = config.patch_size**2
        channels = len(given) // area
        if (
            len(given) == area * channels
            and given.shape[1:] == tensor.shape[1:]
            and {channels, config.channels} == {1, 3}
        ):
            pixels = given.unflatten(0, (area, channels))
            mixed = pixels.mean(1, keepdim=True) if channels == 3 else pixels.expand(-1, 3, *pixels.shape[2:])
            tensor.copy_(mixed.flatten(0, 1))
            return f"from {channels} to {config.channels} channels"
    return ""


def _classes(given: Tensor, tensor: Tensor, there: list[str], here: list[str]) -> str:
    """Rows of a table of classes, whose last two are the null class and an unused one."""
    tensor[-2:].copy_(given[-2:])
    counts = f"{len(given) - 2} classes there, {len(tensor) - 2} here"
    if len(tensor) == 2:
        return f"the null class ({counts})"
    if not (there and here):
        return f"the null class; classes have no names to go by, and begin anew ({counts})"
    places = {unicodedata.normalize("NFC", name): i for i, name in enumerate(there)}
    found = {i: places[name] for i, one in enumerate(here) if (name := unicodedata.normalize("NFC", one)) in places}
    for i, place in found.items():
        tensor[i].copy_(given[place])
    taken, fresh = ([here[i] for i in range(len(here)) if (i in found) is wanted] for wanted in (True, False))
    said = f"by name {_listed(taken)}" if taken else "no class by name"
    return f"{said}; {f'begun anew {_listed(fresh)}; ' if fresh else ''}the null class ({counts})"


def resampled(table: Tensor, count: int) -> Tensor:
    """Positions (1, K, D) at ``count`` places: bicubic where both numbers are squares, else linear."""
    sides = [math.isqrt(n) for n in (table.shape[1], count)]
    if sides[0] ** 2 == table.shape[1] and sides[1] ** 2 == count:
        grid = table.float().transpose(1, 2).unflatten(2, (sides[0], sides[0]))
        grid = F.interpolate(
            grid, (sides[1], sides[1]), mode="bicubic", align_corners=False, antialias=sides[1] < sides[0]
        )
        return grid.flatten(2).transpose(1, 2)
    return F.interpolate(table.float().transpose(1, 2), count, mode="linear", align_corners=False).transpose(1, 2)


def recolored(weight: Tensor, channels: int) -> Tensor:
    """A patch embedding (D, Q, P, P) for other channels: a gray image gives what the same one in color gave."""
    if weight.shape[1] == channels:
        return weight
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return (weight.sum(1, keepdim=True) / channels).expand(-1, channels, -1, -1)
