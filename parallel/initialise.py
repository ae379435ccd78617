"""Initial weights that do not depend on the layout.

Each logical tensor is drawn on the host in panels of rows, each from a generator seeded by (seed, logical
name, panel); every rank draws the panels that it needs and keeps its boxes. TP1 PP1 and TP4 PP2 start as the
same model, bit for bit, on CPU and on GPUs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch

from parallel.naming import Block, NamedParameter, Shape

PANEL_ROWS = 1024  # so few that ranks share the drawing, so many that a draw costs more than its generator

Draw = Callable[[str, Shape, torch.Generator], torch.Tensor]


def generator_for(seed: int, name: str, panel: int) -> torch.Generator:
    """A host generator that depends on the seed, the logical name and the panel only."""
    digest = hashlib.blake2b(f"{seed}/{name}/{panel}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal_draw(std: float, num_layers: int) -> Draw:
    """Megatron's rule: weights ~ N(0, std), output projections ~ N(0, std / sqrt(2 num_layers)).

    Norms start at one and biases at zero. Source: GPT-2 (Radford et al. 2019, section 2.3); megatron-core's
    `init_method_normal` and `scaled_init_method_normal`.
    """
    scaled = std / (2.0 * num_layers) ** 0.5

    def draw(name: str, shape: Shape, generator: torch.Generator) -> torch.Tensor:
        if name.endswith(".bias"):
            return torch.zeros(shape)
        if "norm" in name.rsplit(".", 2)[-2]:
            return torch.ones(shape)
        deviation = scaled if name.endswith(("o_proj.weight", "down_proj.weight")) else std
        return torch.empty(shape).normal_(0.0, deviation, generator=generator)

    return draw


@torch.no_grad()
def blank(named: Iterable[NamedParameter]) -> None:
    """Set every parameter to zero: what a checkpoint will fill, and the padding that it will not."""
    for entry in named:
        entry.parameter.data.zero_()


@torch.no_grad()
def initialise(named: Iterable[NamedParameter], seed: int, draw: Draw) -> None:
    """Fill every parameter in place; rows that are padding become zero."""
    blank(named := list(named))
    wanted: dict[str, list[tuple[torch.Tensor, Block]]] = {}
    for entry in named:
        for block in entry.blocks:
            wanted.setdefault(block.name, []).append((entry.parameter.data, block))
    for name, places in wanted.items():
        for first in range(0, places[0][1].shape[0], PANEL_ROWS):
            _fill_panel(name, first, places, seed, draw)


def _fill_panel(
    name: str, first: int, places: list[tuple[torch.Tensor, Block]], seed: int, draw: Draw
) -> None:
    """Draw the rows of a logical tensor from `first` on, if this rank holds any, and keep what it holds."""
    rows, *rest = places[0][1].shape
    last = min(rows, first + PANEL_ROWS)
    panel: torch.Tensor | None = None
    for data, block in places:
        begin, end = max(first, block.offset[0]), min(last, block.offset[0] + block.size[0])
        if begin >= end:
            continue
        if panel is None:
            panel = draw(name, (last - first, *rest), generator_for(seed, name, first // PANEL_ROWS))
        columns = [slice(o, o + s) for o, s in zip(block.offset[1:], block.size[1:], strict=True)]
        inside = block.view(data)[begin - block.offset[0] : end - block.offset[0]]
        inside.copy_(panel[(slice(begin - first, end - first), *columns)])
