"""Which parameters a rank of megatron-core held, and in which order it registered them.

No file says so. Stages hold runs of layers, the first one the embedding, the last one the final norm and the
output layer. The order inside a layer depends on the modules it was built of (megatron-core's own, or
Transformer Engine's, which fuse the norm), so that there are a few candidates; values tell which is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from checkpoint.readers.torch_dist_shards import Shard, Whole, cut

_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_EXPERT = re.compile(r"mlp\.experts\.experts\.(?:(\d+)\.)?(.+)")
_HALVES = ("_w", "_v")
"""Gate and up, where they are stored apart (`singleton_local_shards`)."""
_NORM = "self_attention.linear_qkv.layer_norm_"
_IN_LAYER = (
    ("input_layernorm.",),
    ("self_attention.linear_proj.",),
    (_NORM,),
    ("self_attention.linear_qkv.",),
    ("self_attention.q_layernorm.",),
    ("self_attention.k_layernorm.",),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("mlp.router.",),
    ("mlp.experts.",),
    ("mlp.shared_experts.",),
    ("mlp.linear_fc1.",),
    ("mlp.linear_fc2.",),
)
"""Order of registration in a layer made of Transformer Engine's modules."""
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


class _Name(NamedTuple):
    """What a stored tensor's name says.

    Attributes:
        layer: its number; None: all layers are stacked on the first axis.
        below: the name inside the layer; "" outside of layers.
        expert: its number; None: experts are stacked on the next axis.
    """

    layer: int | None
    below: str
    of_expert: bool
    expert: int | None


@cache
def _name(stored: str) -> _Name:
    match = _LAYER.fullmatch(stored)
    if match is None:
        return _Name(None, "", of_expert=False, expert=None)
    inside = _EXPERT.fullmatch(match[2])
    number = int(match[1]) if match[1] else None
    expert = int(inside[1]) if inside and inside[1] else None
    return _Name(number, match[2], inside is not None, expert)


class Chunk(NamedTuple):
    """What one virtual stage holds of the model.

    Attributes:
        layers: global numbers.
        is_first: whether it has the embedding.
        is_last: whether it has the final norm and the output layer.
    """

    layers: range
    is_first: bool
    is_last: bool


class Place(NamedTuple):
    """A rank's place in the layout, as far as one of its optimizers goes.

    Attributes:
        dense: the parameters outside of experts: (rank, ranks) of the tensor axis; None: not wanted.
        experts: (rank, ranks) of the expert-tensor axis; None: not wanted.
        expert: (rank, ranks) of the expert axis.
    """

    dense: tuple[int, int] | None = (0, 1)
    experts: tuple[int, int] | None = (0, 1)
    expert: tuple[int, int] = (0, 1)


class Slot(NamedTuple):
    """A parameter of a chunk, where it stands.

    Attributes:
        section: 0 before the layers, 1 in them, 2 behind.
        layer: its number; 0 outside of layers.
        below: the name inside the layer, or the whole one.
        expert: its number; -1 for no expert.
    """

    section: int
    layer: int
    below: str
    expert: int
    shard: Shard


@dataclass(frozen=True)
class Model:
    """The weights of a checkpoint, by stored name, in the order of the index."""

    weights: Mapping[str, Whole]

    @cached_property
    def num_layers(self) -> int:
        counts = [0]
        for stored, whole in self.weights.items():
            name = _name(stored)
            if name.below:
                counts.append(whole.shape[0] if name.layer is None else name.layer + 1)
        return max(counts)

    @cached_property
    def is_stacked(self) -> bool:
        """Whether layers are stacked on the first axis."""
        return any(_name(stored).below and _name(stored).layer is None for stored in self.weights)

    @cached_property
    def num_experts(self) -> int:
        counts = [0]
        for stored, whole in self.weights.items():
            name = _name(stored)
            if name.of_expert:
                counts.append(whole.shape[name.layer is None] if name.expert is None else name.expert + 1)
        return max(counts)

    @cached_property
    def is_tied(self) -> bool:
        return OUTPUT not in self.weights

    def lead(self, stored: str) -> int:
        """Axes of a stored tensor that count layers and experts."""
        name = _name(stored)
        return (bool(name.below) and name.layer is None) + (name.of_expert and name.expert is None)

    def tensor_ranks(self) -> int:
        """Ranks that share the embedding."""
        return len(self.weights[EMBEDDING].cuts[0]) if EMBEDDING in self.weights else 1

    def slots(self, chunk: Chunk, place: Place) -> Iterator[Slot]:
        """The parameters of a chunk on a rank, in no particular order."""
        for stored, whole in self.weights.items():
            name = _name(stored)
            ranks = place.experts if name.of_expert else place.dense
            if ranks is None or stored.endswith(_HALVES[1]):
                continue
            section = 1 if name.below else 2 * (not stored.startswith("embedding."))
            if section != 1:
                if (chunk.is_first, True, chunk.is_last)[section]:
                    yield Slot(section, 0, stored, -1, self._shard(whole, (), ranks))
                continue
            for layer in chunk.layers if name.layer is None else {name.layer} & set(chunk.layers):
                lead = (layer,) if name.layer is None else ()
                for expert, within in self._experts(name, place):
                    yield Slot(1, layer, name.below, expert, self._shard(whole, lead + within, ranks))
        if (
            chunk.is_last
            and not chunk.is_first
            and self.is_tied
            and place.dense
            and EMBEDDING in self.weights
        ):
            shard = self._shard(self.weights[EMBEDDING], (), place.dense)
            yield Slot(2, 0, OUTPUT, -1, Shard(shard.name, shard.parts, is_copy=True))

    def _experts(self, name: _Name, place: Place) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(number, position on the axis of experts) of the experts that a rank holds."""
        if not name.of_expert:
            yield -1, ()
            return
        rank, ranks = place.expert
        each = self.num_experts // ranks
        mine = range(rank * each, (rank + 1) * each)
        if name.expert is None:
            yield from ((expert, (expert,)) for expert in mine)
        elif name.expert in mine:
            yield name.expert, ()

    def _shard(self, whole: Whole, lead: tuple[int, ...], ranks: tuple[int, int]) -> Shard:
        both = [whole]
        if whole.name.endswith(_HALVES[0]):
            both.append(self.weights[whole.name[: -len(_HALVES[0])] + _HALVES[1]])
        parts, split = [], True
        for half in both:
            boxes, split = cut(half, lead, *ranks)
            parts += [(half, box) for box in boxes]
        return Shard(whole.name, tuple(parts), is_copy=ranks[0] > 0 and not split)


def orders(slots: Sequence[Slot], listed: Sequence[str]) -> Iterator[list[Shard]]:
    """A chunk's parameters in every order in which it may have registered them, the likeliest first.

    Args:
        listed: stored names in the order of the index.
    """
    number = {stored: index for index, stored in enumerate(listed)}
    seen: set[tuple[int, ...]] = set()
    for of_layer in (_fused, _unfused, _as_listed(number)):
        for of_expert in (_expert_by_expert, _matrix_by_matrix):

            def key(
                index: int, of_layer: _Order = of_layer, of_expert: _Order = of_expert
            ) -> tuple[object, ...]:
                slot = slots[index]
                below = _kind(slot.below)
                # Outside of layers the index has the order of one rank, but for the copy of a tied embedding.
                outside = (
                    number.get(slot.shard.name, 0) if slot.section != 1 and not slot.shard.is_copy else 0
                )
                last = slot.section == 2 and slot.below == OUTPUT
                return (slot.section, last, slot.layer, outside, *of_layer(slot), *of_expert(slot), below)

            order = sorted(range(len(slots)), key=key)
            if tuple(order) not in seen:
                seen.add(tuple(order))
                yield [slots[index].shard for index in order]


_Order = Callable[[Slot], tuple[int, ...]]


def _rank(below: str) -> int:
    ranks = [number for number, names in enumerate(_IN_LAYER) if below.startswith(names)]
    return ranks[0] if ranks else len(_IN_LAYER)


def _fused(slot: Slot) -> tuple[int, ...]:
    return (_rank(slot.below),)


def _unfused(slot: Slot) -> tuple[int, ...]:
    """Norms are modules of their own, before attention, whatever their keys say."""
    return (0 if slot.below.startswith(_NORM) else _rank(slot.below),)


def _as_listed(number: Mapping[str, int]) -> _Order:
    return lambda slot: (1, 0) if slot.expert >= 0 else (0, number.get(slot.shard.name, 0))


def _expert_by_expert(slot: Slot) -> tuple[int, ...]:
    return (slot.expert, "linear_fc2" in slot.below)


def _matrix_by_matrix(slot: Slot) -> tuple[int, ...]:
    return ("linear_fc2" in slot.below, _kind(slot.below), slot.expert)


def _kind(below: str) -> int:
    """Biases are registered behind weights."""
    return int(below.removesuffix(_HALVES[0]).endswith("bias"))
