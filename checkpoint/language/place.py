"""From a source's tensors to boxes of logical ones, by the rules of a spec."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from checkpoint.language.compose import compose
from checkpoint.language.extents import Coordinates, Extents, Held, make_global
from checkpoint.language.layout import Layouts
from checkpoint.language.matching import SHOWN, Match, Matcher, match_names
from checkpoint.language.problems import Problems
from checkpoint.language.reshape import viewed, viewed_tensor
from checkpoint.language.roles import Role, roles
from checkpoint.language.rules import AXES
from checkpoint.language.sizes import Facts
from checkpoint.language.spec import Spec, SpecError
from checkpoint.source import Part, SourceTensor

__all__ = ["Layers", "Placed", "Role", "place"]

Key = tuple[str, Coordinates]
Layers = Mapping[tuple[int, int], tuple[int, ...]]
"""(pipeline rank, virtual stage) -> global numbers of its layers."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A source tensor and the regions of it that are boxes of logical tensors.

    Attributes:
        source: as the reader gave it; under a rule with `view`, reshaped, and its pieces are boxes of that.
        parts: empty for a state that is not shaped like its parameter (scales, factored moments): whoever
            takes it on finds the parameter's parts at the same `source.name` and `source.at`.
        role: "replica" repeats what a "primary" holds; all of "average" are to be averaged. Tensors alike but
            for their data rank have the same role. A tensor comes twice if only some parts are replicas.
    """

    source: SourceTensor
    parts: tuple[Part, ...]
    role: Role


def place(
    spec: Spec,
    tensors: Sequence[SourceTensor],
    *,
    facts: Mapping[str, int] | None = None,
    degrees: Mapping[str, int] | None = None,
    layers: Layers | None = None,
) -> list[Placed]:
    """Say of every tensor which boxes of which logical tensors it holds.

    Tensors of rules with `ignore`, and such as hold only padding, are left out.

    Args:
        facts: numbers about the model; they go before the spec's own.
        degrees: of the axes in `SourceTensor.at`; each is also a fact, as in "tensor_ranks".
        layers: where names count layers within a stage; empty if they count globally.

    Raises:
        SpecError: names without a rule or with several, rules without a name, shapes that contradict each
            other or the facts, tensors held more often than their rule says: everything at once.
    """
    if spec.placement is not None:
        return _place_twice(spec, tensors, facts or {}, degrees or {}, layers or {})
    return _Placing(spec, tensors, facts or {}, degrees or {}).run(layers or {})


class _Placing:
    """One call of `place`: what is known of the tensors, and what is wrong so far."""

    def __init__(
        self,
        spec: Spec,
        tensors: Sequence[SourceTensor],
        facts: Mapping[str, int],
        degrees: Mapping[str, int],
    ) -> None:
        ranks = {f"{axis}_ranks": degrees.get(axis, 1) for axis in AXES}
        self._spec = spec
        self._tensors = tensors
        self._degrees = degrees
        self._facts = Facts(spec.facts, {**ranks, **facts})
        self._problems = Problems()
        self._keys = [(tensor.name, _coordinates(tensor)) for tensor in tensors]
        self._shapes = _parameter_shapes(tensors, self._keys)

    def run(self, layers: Layers) -> list[Placed]:
        headline = f"the spec {self._spec.name!r} does not fit this checkpoint:"
        try:
            matcher = Matcher(self._spec, self._facts)
        except ValueError as error:
            raise SpecError(headline, [str(error)]) from None
        matches, found, unmatched = match_names(matcher, dict.fromkeys(name for name, _ in self._keys))
        items = self._items(matches)
        parts = self._parts(items, layers)
        placed = [
            (tensor, key) for tensor, key in zip(self._tensors, self._keys, strict=True) if parts.get(key)
        ]
        held = [(tensor.state, items[key], parts[key]) for tensor, key in placed]
        given = roles(self._spec, held, self._problems)
        found += self._problems.sentences()
        if found:
            raise SpecError(headline, found, unmatched)
        return [
            each
            for (tensor, key), its in zip(placed, given, strict=True)
            for each in self._placed(tensor, items[key], parts[key], its)
        ]

    def _items(self, matches: Mapping[str, Match]) -> dict[Key, Held]:
        """The parameters that rules speak of, ignored ones left out."""
        items = {}
        for (name, at), shape in self._shapes.items():
            match = matches.get(name)
            if match is None or self._spec.rules[match.rule].ignore:
                continue
            try:
                seen = viewed(shape, self._spec.rules[match.rule].view, self._facts)
            except ValueError as error:
                self._problems.add(str(error), name)
                continue
            items[name, at] = Held(name, at, seen, match.rule, dict(match.values))
        return items

    def _parts(self, items: Mapping[Key, Held], layers: Layers) -> dict[Key, tuple[Part, ...]]:
        """The parts of every parameter; a logical tensor that gets two shapes is a problem."""
        every, problems = list(items.values()), self._problems
        make_global(every, self._spec.rules, layers, problems)
        extents = Extents(every, self._degrees, problems)
        layouts = Layouts(self._spec.rules, self._facts, extents, problems)
        for item in every:
            layouts.record(item)
        found = {key: layouts.parts(item) for key, item in items.items()}
        shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        for (name, _), parts in found.items():
            for part in parts:
                shape, first = shapes.setdefault(part.name, (part.shape, name))
                if shape != part.shape:
                    problems.add(
                        f"makes {part.name} {list(part.shape)}, but {first} makes it {list(shape)}", name
                    )
        return found

    def _placed(
        self, tensor: SourceTensor, item: Held, parts: tuple[Part, ...], its: list[Role]
    ) -> Iterator[Placed]:
        """The tensor with its parts, once for each role that they have."""
        shape = self._shapes[item.name, item.at]
        if tensor.shape != shape:
            yield Placed(tensor, (), its[0])
            return
        seen = viewed_tensor(tensor, item.shape) if item.shape != shape else tensor
        if its.count(its[0]) == len(its):
            yield Placed(seen, parts, its[0])
            return
        for role in dict.fromkeys(its):
            yield Placed(seen, tuple(p for p, each in zip(parts, its, strict=True) if each == role), role)


def _coordinates(tensor: SourceTensor) -> Coordinates:
    return tuple(sorted((axis, at) for axis, at in tensor.at.items() if axis != "data"))


def _parameter_shapes(tensors: Sequence[SourceTensor], keys: Sequence[Key]) -> dict[Key, tuple[int, ...]]:
    """The shape of every parameter: its weight's, or else its master's, or that of its largest state."""
    best: dict[Key, tuple[tuple[int, int], tuple[int, ...]]] = {}
    order = {"weight": 2, "master": 1}
    for tensor, key in zip(tensors, keys, strict=True):
        rank = (order.get(tensor.state, 0), math.prod(tensor.shape))
        if key not in best or rank > best[key][0]:
            best[key] = (rank, tensor.shape)
    return {key: shape for key, (_, shape) in best.items()}


def _place_twice(
    spec: Spec,
    tensors: Sequence[SourceTensor],
    facts: Mapping[str, int],
    degrees: Mapping[str, int],
    layers: Layers,
) -> list[Placed]:
    """First what the checkpoint says of the ranks, in its own names; then the names, of whole tensors."""
    assert spec.placement is not None
    first = place(spec.placement, tensors, facts=facts, degrees=degrees, layers=layers)
    whole = {part.name: part.shape for placed in first for part in placed.parts}
    names = spec.model_copy(update={"placement": None})
    second = place(names, [SourceTensor(n, "weight", shape, ()) for n, shape in whole.items()], facts=facts)
    maps = {
        placed.source.name: placed for placed in second if placed.source.shape == whole[placed.source.name]
    }
    reshaped = sorted({placed.source.name for placed in second} - set(maps))
    if reshaped:
        raise SpecError(
            f"the spec {spec.name!r} has `view` for tensors that the checkpoint itself says how to put "
            'together: use placement_from = "rules"',
            reshaped[:SHOWN],
        )
    cache: dict[tuple[Part, ...], tuple[Part, ...]] = {(): ()}
    found = []
    for placed in first:
        inner = [maps[part.name] for part in placed.parts if part.name in maps]
        if placed.parts not in cache:
            cache[placed.parts] = tuple(
                part
                for outer in placed.parts
                if outer.name in maps
                for each in maps[outer.name].parts
                for part in compose(outer, each)
            )
        role: Role = "replica" if any(each.role == "replica" for each in inner) else placed.role
        if cache[placed.parts] or not placed.parts:
            found.append(replace(placed, parts=cache[placed.parts], role=role))
    return found
