"""Initial weights that do not depend on the layout.

Each logical tensor is drawn whole, on the host, from a generator seeded by (seed, logical name), and every
rank keeps its boxes: TP1 PP1 and TP4 PP2 start as the same model, bit for bit, on CPU and on GPUs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch

from parallel.naming import Block, NamedParameter, Shape

Draw = Callable[[str, Shape, torch.Generator], torch.Tensor]


def generator_for(seed: int, name: str) -> torch.Generator:
    """A host generator that depends on the seed and the logical name only."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
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
    for name, places in wanted.items():  # one logical tensor in memory at a time
        whole = draw(name, places[0][1].shape, generator_for(seed, name))
        for data, block in places:
            box = tuple(slice(o, o + s) for o, s in zip(block.offset, block.size, strict=True))
            block.view(data).copy_(whole[box])
