"""Where in a stored tensor which boxes of which logical tensors lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from checkpoint.boxes import Box
from checkpoint.language.extents import Extents, Held
from checkpoint.language.problems import Problems
from checkpoint.language.rules import Regions, Rule
from checkpoint.language.runs import Cut, Run, Stretch, stretch
from checkpoint.language.sizes import Facts
from checkpoint.language.template import Value
from checkpoint.source import Part, plain_part


def stack_axes(rule: Rule, num_axes: int) -> list[int]:
    """The stored axis of every entry of `stacked`.

    Raises:
        ValueError: the tensor has fewer axes than that.
    """
    found: list[int] = []
    for each in rule.stacked:
        free = (axis for axis in range(num_axes) if axis not in found)
        axis = each.axis % num_axes if each.axis is not None and num_axes else next(free, num_axes)
        if axis >= num_axes or axis in found:
            raise ValueError(f"it has {num_axes} axes, too few for `stacked`")
        found.append(axis)
    return found


def check_dims(rule: Rule, num_dims: int) -> None:
    """Refuse a rule that speaks of a dimension that a tensor of the stack does not have.

    Raises:
        ValueError: naming it.
    """
    spoken = [("sharded", each.dim) for each in rule.sharded]
    if rule.fused:
        spoken.append(("fused", rule.fused.dim))
    if rule.padded:
        spoken.append(("padded", rule.padded.dim))
    if rule.interleaved:
        spoken.append(("interleaved", rule.interleaved.dim))
    for what, dim in spoken:
        if not -num_dims <= dim < num_dims:
            raise ValueError(f"`{what}` speaks of dim {dim}, but a tensor has {num_dims} dimensions")


class Layouts:
    """Finds the parts of parameters; what several have in common is computed once."""

    def __init__(self, rules: tuple[Rule, ...], facts: Facts, extents: Extents, problems: Problems) -> None:
        self._rules = rules
        self._facts = facts
        self._extents = extents
        self._problems = problems
        self._stretches: dict[tuple[int, int, int, Cut], Stretch | str] = {}

    def record(self, item: Held) -> None:
        """Note what the item says of how its axes are cut; all items are noted before any `parts`."""
        for axis, over in self._cut_axes(item):
            self._extents.record(item, axis, over)

    def _cut_axes(self, item: Held) -> Iterator[tuple[int, tuple[str, ...]]]:
        rule, num_axes = self._rules[item.rule], len(item.shape)
        try:
            stacked = stack_axes(rule, num_axes)
            rest = [axis for axis in range(num_axes) if axis not in stacked]
            check_dims(rule, len(rest))
        except ValueError as error:
            self._problems.add(f"of shape {list(item.shape)}: {error}", item.name)
            return
        for axis, each in zip(stacked, rule.stacked, strict=True):
            if each.over is not None:
                yield axis, (each.over,)
        for sharded in rule.sharded:
            yield rest[sharded.dim], sharded.over

    def parts(self, item: Held) -> tuple[Part, ...]:
        """Every region of the stored tensor with its logical box; none where there is a problem."""
        rule, num_axes = self._rules[item.rule], len(item.shape)
        if rule.regions is not None:
            return self._listed(item, rule, rule.regions)
        try:
            stacked = stack_axes(rule, num_axes)
            rest = [axis for axis in range(num_axes) if axis not in stacked]
            check_dims(rule, len(rest))
        except ValueError:
            return ()  # noted by `record`
        cuts = self._cuts(item, rule, stacked, rest)
        if cuts is None:
            return ()
        stretches = []
        for dim, axis in enumerate(rest):
            found = self._stretch(item.rule, dim, len(rest), cuts[axis])
            if isinstance(found, str):
                self._problems.add(found, item.name)
                return ()
            stretches.append(found)
        return tuple(_combine(rule, item.values, [(axis, cuts[axis]) for axis in stacked], rest, stretches))

    def _listed(self, item: Held, rule: Rule, regions: Regions) -> tuple[Part, ...]:
        """The parts that the rule lists for the item's rank."""
        name, rank = rule.target.fill(item.values), self._extents.index(item, regions.over)
        if rank is None:
            return (plain_part(name, item.shape),)
        if rank >= len(regions.ranks):
            self._problems.add(
                f"`regions` lists {len(regions.ranks)} ranks, and this is rank {rank}", item.name
            )
            return ()
        axes, steps = tuple(range(len(item.shape))), (1,) * len(item.shape)
        for region in regions.ranks[rank]:
            ends = [start + size for start, size in zip(region.start, region.size, strict=False)]
            if len(ends) != len(item.shape) or any(e > s for e, s in zip(ends, item.shape, strict=True)):
                self._problems.add(f"the region {region} does not fit into {list(item.shape)}", item.name)
                return ()
        return tuple(
            Part(name, regions.shape, Box(each.offset, each.size), each.start, axes, steps)
            for each in regions.ranks[rank]
        )

    def _cuts(self, item: Held, rule: Rule, stacked: list[int], rest: list[int]) -> list[Cut] | None:
        cuts: list[Cut | None] = [Cut(0, (extent,)) for extent in item.shape]
        for axis, each in zip(stacked, rule.stacked, strict=True):
            if each.over is not None:
                cuts[axis] = self._extents.cut(item, axis, (each.over,))
        for sharded in rule.sharded:
            axis = rest[sharded.dim]
            widths: tuple[int, ...] = ()
            if isinstance(sharded.widths, tuple):
                widths = tuple(self._facts.size(width) for width in sharded.widths)
            cuts[axis] = self._extents.cut(item, axis, sharded.over, widths)
        known = [cut for cut in cuts if cut is not None]
        return known if len(known) == len(cuts) else None

    def _stretch(self, number: int, dim: int, num_dims: int, cut: Cut) -> Stretch | str:
        key = (number, dim, num_dims, cut)
        if key not in self._stretches:
            try:
                self._stretches[key] = stretch(self._rules[number], dim, num_dims, cut, self._facts)
            except ValueError as error:
                self._stretches[key] = str(error)
        return self._stretches[key]


def _combine(
    rule: Rule,
    values: dict[str, Value],
    stacked: list[tuple[int, Cut]],
    rest: list[int],
    stretches: list[Stretch],
) -> Iterator[Part]:
    """Every index of the stack with every run of every dimension."""
    num_axes = len(stacked) + len(rest)
    order = range(len(rest) - 1, -1, -1) if rule.transposed else range(len(rest))
    axes = tuple(rest[dim] for dim in order)
    stack = [[(axis, i, cut.offset + i) for i in range(cut.length)] for axis, cut in stacked]
    indices = [each.index for each in rule.stacked]
    boxes = [_box(runs, stretches, order) for runs in itertools.product(*(each.runs for each in stretches))]
    for places in itertools.product(*stack):
        named = {**values, **{index: place[2] for index, place in zip(indices, places, strict=True)}}
        for runs, part, shape, box in boxes:
            start, steps = [0] * num_axes, [1] * num_axes
            for axis, local, _ in places:
                start[axis] = local
            for axis, run in zip(rest, runs, strict=True):
                start[axis], steps[axis] = run.local, run.step
            name = rule.target.fill({**named, "part": part} if part is not None else named)
            yield Part(name, shape, box, tuple(start), axes, tuple(steps))


def _box(
    runs: tuple[Run, ...], stretches: list[Stretch], order: range
) -> tuple[tuple[Run, ...], str | None, tuple[int, ...], Box]:
    """The runs, the fused part they belong to, and the shape and the box in logical order."""
    part = next((run.part for run in runs if run.part is not None), None)
    shape = tuple(stretches[dim].sizes[runs[dim].part] for dim in order)
    box = Box(tuple(runs[dim].start for dim in order), tuple(runs[dim].length for dim in order))
    return runs, part, shape, box


def whole_parts(
    rule: Rule, values: dict[str, Value], shape: tuple[int, ...], facts: Facts
) -> tuple[Part, ...]:
    """The parts of a tensor that is stored whole.

    Raises:
        ValueError: sizes that contradict each other.
    """
    stacked = stack_axes(rule, len(shape))
    rest = [axis for axis in range(len(shape)) if axis not in stacked]
    check_dims(rule, len(rest))
    cuts = [Cut(0, (extent,)) for extent in shape]
    stretches = [stretch(rule, dim, len(rest), cuts[axis], facts) for dim, axis in enumerate(rest)]
    return tuple(_combine(rule, values, [(axis, cuts[axis]) for axis in stacked], rest, stretches))
