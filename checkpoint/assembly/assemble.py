"""From what a reader found and what the language says of it to a manifest of logical tensors.

The state of such a manifest:
    format: what was recognised, in words.
    scalars: "updates" where all parameters have made as many; "lr", the largest of the groups'.
    groups: [{"names": [logical names], **settings}], groups with the same settings as one.
    per_parameter: {state: {logical name: number}}, every number but an agreed number of updates.
    facts, degrees, model_config: of the model and of the layout, as far as known.
    source: what else the checkpoint holds, under its own words.
    left_out: what it holds that is not carried, a line each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from checkpoint.assembly.compose import compose_all
from checkpoint.assembly.joining import Copies, Joined, coordinates
from checkpoint.assembly.renaming import Renamed
from checkpoint.manifest import Manifest, no_collection
from checkpoint.source import Source, plain_part

if TYPE_CHECKING:
    from checkpoint.language.place import Placed
    from checkpoint.language.spec import Spec


def assemble(source: Source, spec: Spec, *, facts: Mapping[str, int] | None = None) -> Manifest:
    """The checkpoint that a reader found, in logical tensors.

    Args:
        spec: what the source's names mean.
        facts: numbers about the model that count more than the source's own.

    Raises:
        SpecError: the spec does not map every name to exactly one meaning; all such names are listed.
        ValueError: ranks disagree about the shape of a logical tensor.
    """
    from checkpoint.language.place import place

    known = {**source.facts, **(facts or {})}
    with no_collection():
        placed = place(spec, source.tensors, facts=known, degrees=source.degrees, layers=source.layers)
        return from_placed(source, placed, facts=known)


def from_placed(source: Source, placed: Sequence[Placed], *, facts: Mapping[str, int]) -> Manifest:
    """The same, of tensors whose places in logical ones are known."""
    whole, left_out = _place_odd(placed)
    tensors = _join([*placed, *whole])
    renamed = Renamed(source, _logical_names(placed))
    state: dict[str, Any] = {
        "format": source.format,
        "scalars": renamed.scalars,
        "groups": renamed.groups,
        "per_parameter": renamed.per_parameter,
        "facts": dict(facts),
        "degrees": dict(source.degrees),
        "source": source.state,
        "left_out": [*source.left_out, *left_out, *renamed.left_out],
    }
    if source.model_config is not None:
        state["model_config"] = source.model_config
    found = tuple(tensors[key].tensor() for key in sorted(tensors))
    return Manifest(source.step, source.num_ranks, found, state)


def _place_odd(placed: Sequence[Placed]) -> tuple[list[Placed], list[str]]:
    """States without their parameter's shape: scales of blocks, factored moments.

    Returns:
        Those of parameters that one rank held whole, whole; and a line for each other one.
    """
    odd = [entry.source for entry in placed if not entry.parts]
    if not odd:
        return [], []
    parameters = {(entry.source.name, coordinates(entry.source)): entry for entry in placed if entry.parts}
    shapes: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    for tensor in odd:
        shapes.setdefault((tensor.name, tensor.state), set()).add(tensor.shape)
    found: list[Placed] = []
    left_out: dict[str, None] = {}
    for tensor in odd:
        parameter = parameters[tensor.name, coordinates(tensor)]
        name = parameter.parts[0].name
        is_whole = parameter.parts == (plain_part(name, parameter.source.shape),)
        if is_whole and len(shapes[tensor.name, tensor.state]) == 1:
            found.append(replace(parameter, source=tensor, parts=(plain_part(name, tensor.shape),)))
            continue
        line = (
            f"{tensor.name} ({tensor.state}): its shape {list(tensor.shape)} is not the parameter's "
            f"{list(parameter.source.shape)}, and no rank held all of one logical tensor: where its elements "
            "belong is not known"
        )
        left_out[line] = None
    return found, list(left_out)


def _join(placed: Iterable[Placed]) -> dict[tuple[str, str], Joined]:
    joined: dict[tuple[str, str], Joined] = {}
    problems: dict[str, None] = {}
    for entry in sorted(placed, key=lambda entry: entry.source.at.get("data", 0)):
        tensor = entry.source
        data, at = tensor.at.get("data"), coordinates(tensor)
        for part, pieces in compose_all(tensor.pieces, entry.parts):
            into = joined.get((part.name, tensor.state))
            if into is None:
                into = joined[part.name, tensor.state] = Joined(part.name, tensor.state, part.shape)
            if into.shape != part.shape:
                line = (
                    f"{part.name} ({tensor.state}): {list(into.shape)} on one rank, {list(part.shape)} on "
                    f"another, by {tensor.name} at {dict(tensor.at)}"
                )
                problems[line] = None
                continue
            into.average |= entry.role == "average"
            copies = into.primary if entry.role == "primary" else into.others.setdefault(at, Copies())
            copies.add(pieces, data)
    if problems:
        raise ValueError("ranks disagree about logical tensors:\n  " + "\n  ".join(problems))
    return joined


def _logical_names(placed: Iterable[Placed]) -> dict[str, dict[str, None]]:
    """Source name -> logical names it stands for, on any rank, in order."""
    names: dict[str, dict[str, None]] = {}
    for entry in placed:
        names.setdefault(entry.source.name, {}).update(dict.fromkeys(part.name for part in entry.parts))
    return names
