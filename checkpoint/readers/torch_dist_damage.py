"""Damage that megatron-core did when it saved `fully_reshardable`: masters and moments of other parameters.

Up to 0.19 it packs an optimizer's buckets without the padding at their ends, and cuts parameters out as if it
was there (`get_parameter_state_dp_zero` and `sharded_param_state_fully_reshardable` in
`optimizer/distrib_optimizer.py`): everything behind a padded bucket is shifted. Weights are not, so that they
tell which masters are wrong, and by how much. Most bytes are there, saved as those of a neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.boxes import Box
from checkpoint.manifest import Piece
from checkpoint.readers.torch_dist_layout import BufferPlace, buffers_of
from checkpoint.readers.torch_dist_model import Model, Slot, orders
from checkpoint.readers.torch_dist_shards import Shard, ShardRun, Whole, collect
from checkpoint.readers.torch_dist_shift import Packed, Savings, Search, Start, packed_of
from checkpoint.streaming.bits import rounded
from checkpoint.streaming.panels import Files

MASTER = "master"
CAUSE = "bucket padding shifted: megatron-core before PR 5077"
_MIXED = "files of different saves mixed, or a file that was changed"
_COMPARED = 1024  # elements of each chunk: a shift moves all of them
States = Mapping[str, Savings]
"""State -> stored name of the parameter -> the state as it was saved."""


@dataclass
class Repair:
    """What became of a damaged checkpoint.

    Attributes:
        pieces: (name, state) -> all of its pieces, of tensors that are not read as they were saved. What is
            lost has none.
        repaired: names of the tensors of which parts were found elsewhere.
        lost: a line for every state that was not saved, in full or at one place; the weights are whole.
        unexplained: a line for masters that contradict weights: either may be wrong.
    """

    pieces: dict[tuple[str, str], list[Piece]] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)


def find_contradictions(weights: Mapping[str, Whole], masters: Mapping[str, Whole]) -> dict[str, list[Box]]:
    """Name -> chunks whose weights are not the rounded masters, as far as compared."""
    found: dict[str, list[Box]] = {}
    with Files(Path()) as files:
        for name, master in masters.items():
            weight = weights.get(name)
            if weight is None or weight.shape != master.shape:
                continue
            boxes = [piece.box for piece in weight.pieces]
            wrong = [box for box in boxes if _differs(weight, master, box, files)]
            if wrong:
                found[name] = wrong
    return found


def _differs(weight: Whole, master: Whole, box: Box, files: Files) -> bool:
    count = min(_COMPARED, box.numel)
    start = (box.numel - count) // 2
    held, exact = (
        ShardRun(files, Shard(whole.name, ((whole, box),))).read(start, count) for whole in (weight, master)
    )
    expected = rounded(exact, master.dtype, weight.dtype)
    return expected is not None and bool(np.any(expected != held))


def repair(
    model: Model, states: States, args: Mapping[str, Any], *, experts_apart: bool, shifts: bool
) -> Repair:
    """Find the damage, and the bytes that were saved elsewhere.

    Args:
        args: Megatron-LM's, which say how the run was split.
        shifts: whether the optimizer's states were saved in the way that may shift them.
    """
    wrong = find_contradictions(model.weights, states.get(MASTER, {}))
    done = Repair()
    if not wrong:
        return done
    places = buffers_of(args, model.num_layers, experts_apart=experts_apart) if shifts and args else None
    explained: set[tuple[str, Box]] = set()
    with Files(Path()) as files:
        for place in places or ():
            for shards in _damaged(model, place, states, wrong):
                found = _search(shards, place, states, files)
                if found is not None:
                    _take(found, states, done)
                    explained |= {(w.name, box) for shard, *_ in found for w, box in shard.parts}
    cause = CAUSE if shifts else _MIXED
    for name, boxes in wrong.items():
        left = [box for box in boxes if (name, box) not in explained]
        if left:
            done.unexplained.append(
                f"{name}: {len(left)} of {len(model.weights[name].pieces)} chunks of the master, rounded, "
                f"are not the weight, {left[0]} first; likely cause: {cause}"
            )
    return done


def _damaged(
    model: Model, place: BufferPlace, states: States, wrong: Mapping[str, Sequence[Box]]
) -> Iterator[list[Slot]]:
    """The parameters of each of a place's buffers, one a dtype, in which something is wrong."""
    by_dtype: dict[str, list[Slot]] = {}
    for slot in model.slots(place.chunk, place.place):
        if all(whole.name in held for whole, _ in slot.shard.parts for held in states.values()):
            by_dtype.setdefault(slot.shard.dtype, []).append(slot)
    for slots in by_dtype.values():
        if any(box in wrong.get(w.name, ()) for slot in slots for w, box in slot.shard.parts):
            yield slots


_Placed = tuple[Shard, Start, bool]
"""A parameter, where it begins, and whether it may as well begin elsewhere."""


def _search(slots: Sequence[Slot], place: BufferPlace, states: States, files: Files) -> list[_Placed] | None:
    listed = list(states[MASTER])
    for divisor in place.divisors:
        for shards in orders(slots, listed):
            search = Search(shards, states[MASTER], divisor, files)
            starts = search.run(eager=False)
            if starts is not None:
                others = search.run(eager=True) or starts
                reverse = shards[::-1]
                array = packed_of(reverse, starts, states[MASTER])
                return [
                    (shard, start, start.shift != other.shift and not search.proves(shard, start, array))
                    for shard, start, other in zip(reverse, starts, others, strict=True)
                ]
    return None


def _take(found: Sequence[_Placed], states: States, done: Repair) -> None:
    """Pieces of all parameters of a buffer that do not begin where they were cut out."""
    shards, starts = [shard for shard, *_ in found], [start for _, start, _ in found]
    arrays = {state: packed_of(shards, starts, held) for state, held in states.items()}
    for shard, start, doubtful in found:
        if not start.shift or shard.is_copy:
            continue
        lost = 0
        for state, array in arrays.items():
            lost = shard.numel - _replace(shard, start, array, (state, states[state]), done)
        wrong = f"{lost} of {shard.numel} elements were saved nowhere" if lost else ""
        wrong = "was saved elsewhere, and two places have values that fit" if doubtful else wrong
        if not wrong:
            done.repaired[shard.name] = done.repaired.get(shard.name, 0) + 1
            continue
        done.lost.append(
            f"{shard.name} {shard.parts[0][1]} ({', '.join(states)}): {wrong}; likely cause: {CAUSE}"
        )


def _replace(shard: Shard, start: Start, array: Packed, saved: tuple[str, Savings], done: Repair) -> int:
    """Put the pieces that a parameter has in the array in place of what was saved as it; elements found."""
    state, held = saved
    for whole, box in shard.parts:
        pieces = done.pieces.setdefault((whole.name, state), list(held[whole.name].pieces))
        pieces[:] = [piece for piece in pieces if piece.box != box]
    runs = list(array.between(start.packed, start.packed + shard.numel))
    collect(done.pieces, state, shard, start=start.packed, runs=runs)
    return sum(piece.box.numel for _, piece in runs)
