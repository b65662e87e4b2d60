"""Which parameters of a network are gathered together when ranks share it (``parallel.sharding``).

a block or a layer     its large matrices, before it runs
an encoder's modulations   the matrices of all blocks' modulations, which a pass computes before the first block
around the blocks      everything else of an encoder or a decoder: norms and biases of its blocks, which are read
                       outside of them, embeddings, the time's MLP, the last layers. Small, and kept in float32
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from unite_fast.layers import Linear
from unite_fast.parallel.sharding import Unit


def _products(modules: Sequence[nn.Module], linears: Sequence[nn.Module]) -> Unit:
    return Unit(list(modules), [linear.weight for linear in linears], products=True)  # type: ignore[misc]


def _large(block: nn.Module) -> Unit:
    """The large matrices of one block or layer."""
    return _products([block], [m for m in block.modules() if isinstance(m, Linear) and m.large])


def _around(network: nn.Module, inner: Sequence[Unit]) -> list[Unit]:
    """What none of ``inner`` has, then these."""
    taken = {id(p) for unit in inner for p in unit.parameters}
    return [Unit([network], [p for p in network.parameters() if id(p) not in taken]), *inner]


def encoder_units(encoder: Any) -> list[Unit]:
    """Of a ``GenerativeEncoder``."""
    modulations = [block.adaLN_modulation[1] for block in encoder.blocks] + [encoder.final_layer.adaLN_modulation[1]]
    return _around(encoder, [_products(modulations, modulations), *(_large(block) for block in encoder.blocks)])


def decoder_units(decoder: Any) -> list[Unit]:
    """Of a ``ViT``."""
    return _around(decoder, [_large(layer) for layer in decoder.decoder_layers])
