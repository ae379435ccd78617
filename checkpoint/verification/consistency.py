"""What the headers of a checkpoint say about each other: names, shapes, layers, steps and groups."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from checkpoint.manifest import PARAMETER_STATES, LogicalTensor, Manifest
from checkpoint.verification import causes
from checkpoint.verification.finding import Check, Finding, Severity

Shape = tuple[int, ...]

_NAMED = 5
_LAYER = re.compile(r"(.*\blayers\.)(\d+)\.(.+)")
_EXPERT = re.compile(r"(.*\bexperts\.)(\d+)\.(.+)")
_PER_ELEMENT = ("weight", "master", "exp_avg", "exp_avg_sq")


def consistency(manifest: Manifest, expected: Mapping[str, Shape] | None = None) -> list[Finding]:
    """Check what needs no byte of a tensor.

    Args:
        expected: logical name -> shape of every parameter of the model; None where it is not known.
    """
    return [
        *_shape_findings(manifest.tensors, expected),
        *_layer_findings(manifest.tensors),
        *_fact_findings(manifest),
        *_state_findings(manifest.tensors),
        *_step_findings(manifest.state),
        *_group_findings(manifest),
    ]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _shape_findings(
    tensors: Iterable[LogicalTensor], expected: Mapping[str, Shape] | None
) -> Iterator[Finding]:
    """Against the model, or else the states of a parameter against each other."""
    shapes: dict[str, Shape] = dict(expected or {})
    names: dict[str, None] = {}
    for tensor in tensors:
        names[tensor.name] = None
        if tensor.state not in _PER_ELEMENT or (expected is not None and tensor.name not in expected):
            continue
        wanted = shapes.setdefault(tensor.name, tensor.shape)
        if wanted != tensor.shape:
            than = "the model's" if expected is not None else "that of its other states"
            what = f"the shape is {list(tensor.shape)}, {than} {list(wanted)}"
            yield Finding("error", "shapes", what, tensor.name, tensor.state)
    if expected is None:
        return
    for found, what in (
        (sorted(expected.keys() - names), "parameters of the model are missing"),
        (sorted(names.keys() - expected), "parameters are not the model's"),
    ):
        if found:
            yield Finding("error", "shapes", f"{len(found)} {what}: {_listed(found)}", tensors=tuple(found))


def _layer_findings(tensors: Iterable[LogicalTensor]) -> Iterator[Finding]:
    """Layers, and a layer's experts, count from 0 without a gap and hold what most of their siblings do."""
    names = {tensor.name for tensor in tensors}
    for pattern, kind in ((_LAYER, "layer"), (_EXPERT, "expert")):
        families: dict[str, dict[int, set[str]]] = {}
        for name in names:
            if found := pattern.fullmatch(name):
                stack, index, rest = found.groups()
                rest = _EXPERT.sub(r"\1*.\3", rest)
                families.setdefault(stack, {}).setdefault(int(index), set()).add(rest)
        for stack, members in sorted(families.items()):
            yield from _family(stack, members, kind)


def _family(stack: str, members: Mapping[int, set[str]], kind: str) -> Iterator[Finding]:
    gaps = sorted(set(range(max(members))) - members.keys())
    if gaps:
        what = f"{stack}N: the {kind}s {_listed([str(gap) for gap in gaps])} are missing"
        yield Finding("error", "shapes", what, cause=causes.LAYERS)
    kinds = Counter(frozenset(rest) for rest in members.values())
    usual, _ = kinds.most_common(1)[0]
    for index, rest in sorted(members.items()):
        count = kinds[frozenset(rest)]
        lacks = sorted(usual - rest)
        if lacks and rest < usual and count < kinds[usual]:
            what = f"{stack}{index} lacks what its siblings have: {_listed(lacks)}"
            yield Finding("error", "shapes", what, cause=causes.LAYERS)


def _fact_findings(manifest: Manifest) -> Iterator[Finding]:
    """Sizes that the names and shapes show, against the numbers about the model that lie beside."""
    facts = _facts(manifest.state)
    layers = {int(found[2]) for t in manifest.tensors if (found := _LAYER.fullmatch(t.name))}
    seen: dict[str, tuple[int, str]] = {}
    if layers:
        seen["num_layers"] = (1 + max(layers), "layers")
    named = (tensor for tensor in manifest.tensors if tensor.name == "model.embed_tokens.weight")
    embedding = next((tensor for tensor in named if tensor.state in _PER_ELEMENT), None)
    if embedding is not None and len(embedding.shape) == 2:
        seen["vocab_size"] = (embedding.shape[0], "rows of the embedding")
        seen["hidden_size"] = (embedding.shape[1], "columns of the embedding")
    for fact, (count, what) in seen.items():
        if fact in facts and facts[fact] != count:
            yield Finding("error", "shapes", f"{count} {what}, the model has {fact} = {facts[fact]}")


def _facts(state: Mapping[str, Any]) -> dict[str, int]:
    """Of Ratoon's own model section, of a Hugging Face config, or as the reader found them."""
    config = state.get("model_config") or {}
    known = dict(state.get("facts") or {})
    for fact, key in (
        ("num_layers", "num_hidden_layers"),
        ("vocab_size", "vocab_size"),
        ("hidden_size", "hidden_size"),
    ):
        if key in config:
            known.setdefault(fact, config[key])
    model = state.get("model")
    return known | (dict(model) if isinstance(model, Mapping) else {})


def _state_findings(tensors: Iterable[LogicalTensor]) -> Iterator[Finding]:
    """A state that most parameters have and some lack."""
    holders: dict[str, set[str]] = {}
    for tensor in tensors:
        holders.setdefault(tensor.state, set()).add(tensor.name)
    names = set().union(*holders.values()) if holders else set()
    for state, held in sorted(holders.items()):
        lacking = sorted(names - held)
        if lacking and len(held) > len(lacking):
            severity: Severity = "error" if state == "weight" else "warning"
            what = f"{len(lacking)} of {len(names)} parameters have no {state}: {_listed(lacking)}"
            cause = causes.LAYERS if state == "weight" else causes.FROZEN
            yield Finding(severity, "shapes", what, state=None, cause=cause, tensors=tuple(lacking))


def _step_findings(state: Mapping[str, Any]) -> Iterator[Finding]:
    steps = (state.get("per_parameter") or {}).get("step", {})
    counts = Counter(steps.values())
    if len(counts) < 2:
        return
    usual, _ = counts.most_common(1)[0]
    others = sorted(name for name, step in steps.items() if step != usual)
    what = f"{len(steps) - len(others)} parameters are at step {usual}, {len(others)} are not: " + _listed(
        [f"{name} at {steps[name]}" for name in others]
    )
    yield Finding("warning", "steps", what, cause=causes.STEPS, tensors=tuple(others))


def _group_findings(manifest: Manifest) -> Iterator[Finding]:
    """Every parameter with a moment has the settings of one group."""
    groups: Sequence[Mapping[str, Any]] = manifest.state.get("groups") or []
    if not groups:
        return
    check: Check = "groups"
    member: dict[str, int] = {}
    for number, group in enumerate(groups):
        for name in group["names"]:
            other = groups[member.setdefault(name, number)]
            if other is not group:
                what = f"is in two parameter groups, which differ in {_differing(group, other)}"
                yield Finding("error", check, what, name, cause=causes.GROUPS)
    trained = {t.name for t in manifest.tensors if t.state not in PARAMETER_STATES}
    outside = sorted(trained - member.keys())
    if outside:
        what = f"{len(outside)} parameters with optimizer state are in no group: {_listed(outside)}"
        yield Finding("warning", check, what, tensors=tuple(outside))


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    keys = [key for key in one.keys() | other.keys() if key != "names"]
    texts = {key: (json.dumps(one.get(key)), json.dumps(other.get(key))) for key in sorted(keys)}
    return ", ".join(f"{key} ({a}, {b})" for key, (a, b) in texts.items() if a != b)
