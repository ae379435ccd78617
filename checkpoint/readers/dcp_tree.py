"""Which tensors of a DCP checkpoint are the model's and which the optimizer's, found without the model.

DCP stores a nested dict that its user made. Optimizers are known by torch's own keys, "state" and
"param_groups"; the model is the dict whose names the optimizer speaks of.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from checkpoint.readers.dcp_metadata import DcpMetadata

Path = tuple[str | int, ...]
"""Keys of nested dicts, outermost first."""

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
_GROUPS = re.compile(r"(?:(.+?)\.)?param_groups\.")
_UNGROUPED = re.compile(r"((?:.+\.)?optim[^.]*)\.state\.")
_USUAL = ("model", "module", "state_dict", "net", "network")
_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_FLAT = re.compile(r"(?:^|\.)_?flat_param(?:_\d+)?(?:\.|$)")


class StateName(NamedTuple):
    """A stored name that is an optimizer's: of which parameter, and which word the optimizer has for it."""

    stored: str
    parameter: str
    word: str


@dataclass
class Tree:
    """What the stored names are.

    Attributes:
        model: parameter and buffer -> stored name.
        copies: further sets of the model's parameters (averages) under their user's word.
        states: of optimizers; their parameters as the model calls them.
        others: tensors that are neither.
        flat: FSDP1's flat parameters.
    """

    model: dict[str, str] = field(default_factory=dict)
    copies: dict[str, dict[str, str]] = field(default_factory=dict)
    states: list[StateName] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    flat: list[str] = field(default_factory=list)


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put in."""
    return _WRAPPERS.sub("", name)


def optimizer_roots(metadata: DcpMetadata) -> list[str]:
    """What stands before "state." and "param_groups." of each optimizer, with its dot."""
    roots: dict[str, None] = {}
    for name in (*metadata.items, *metadata.tensors):
        match = _GROUPS.match(name) or _UNGROUPED.match(name)
        if match:
            roots[f"{match[1]}." if match[1] else ""] = None
    return list(roots)


def below(names: Iterable[str], roots: Iterable[str], key: str) -> list[str]:
    """Those of the names that are `key` of an optimizer: "state" or "param_groups"."""
    prefixes = tuple(f"{root}{key}." for root in roots)
    return [name for name in names if name.startswith(prefixes)]


def sort_names(metadata: DcpMetadata, roots: list[str], known: Iterable[str]) -> Tree:
    """Say of every tensor what it is.

    Args:
        known: names of parameters that the optimizers' groups list.
    """
    tree = Tree()
    settings = set(below(metadata.tensors, roots, "param_groups"))
    states = dict.fromkeys(below(metadata.tensors, roots, "state"))
    rest = [name for name in metadata.tensors if name not in states and name not in settings]
    tree.flat = [name for name in rest if _FLAT.search(name)]
    wanted = {plain_name(name) for name in known}
    parents = _dicts(metadata, rest)
    chosen = _model_dict(metadata, parents, wanted)
    tree.model = _parameters(metadata, chosen, rest, wanted)
    names = {plain_name(name): name for name in tree.model}
    taken = set(tree.model.values())
    for parent, inside in parents.items():
        if parent != chosen and _is_copy(metadata, inside, tree.model, names):
            word = str(parent[-1]) if parent else "copy"
            tree.copies[word] = {names[plain_name(name)]: stored for name, stored in inside.items()}
            taken |= set(inside.values())
    tree.others = [name for name in rest if name not in taken]
    spelled = {**{name: name for name in wanted}, **names}
    items = below(metadata.items, roots, "state")
    tree.states = [_state(name, roots, spelled) for name in (*states, *items)]
    return tree


def _path(metadata: DcpMetadata, name: str) -> Path:
    return metadata.paths.get(name) or (name,)


def _dicts(metadata: DcpMetadata, names: list[str]) -> dict[Path, dict[str, str]]:
    """Every dict that holds tensors directly: keys before it -> key -> stored name."""
    found: dict[Path, dict[str, str]] = {}
    for name in names:
        *parent, key = _path(metadata, name)
        found.setdefault(tuple(parent), {})[str(key)] = name
    return found


def _model_dict(metadata: DcpMetadata, parents: Mapping[Path, dict[str, str]], wanted: set[str]) -> Path:
    """The keys before the model's: where most of the optimizer's names are, else most of the numbers."""
    starts = {path[:depth]: None for path in parents for depth in range(len(path) + 1)}

    def likeness(start: Path) -> tuple[int, int, bool]:
        inside = [
            (".".join([*map(str, path[len(start) :]), key]), name)
            for path, held in parents.items()
            if path[: len(start)] == start
            for key, name in held.items()
        ]
        hits = sum(plain_name(name) in wanted for name, _ in inside)
        size = (
            0
            if wanted
            else sum(math.prod(metadata.tensors[name].shape) for name in parents.get(start, {}).values())
        )
        return hits, size, bool(start) and start[-1] in _USUAL

    return max(starts, key=likeness, default=())


def _parameters(metadata: DcpMetadata, start: Path, names: list[str], wanted: set[str]) -> dict[str, str]:
    """The model's parameters and buffers -> stored names; not a counter or random state that lies beside."""
    found = {}
    for stored in names:
        path = _path(metadata, stored)
        if path[: len(start)] != start:
            continue
        name = ".".join(map(str, path[len(start) :]))
        tensor = metadata.tensors[stored]
        weight = tensor.dtype in _FLOATS and tensor.shape != () and len(path) == len(start) + 1
        if weight or plain_name(name) in wanted:
            found[name] = stored
    return found


def _is_copy(
    metadata: DcpMetadata, inside: Mapping[str, str], model: Mapping[str, str], names: Mapping[str, str]
) -> bool:
    """Whether a dict has nothing but tensors with names and shapes of the model's."""
    return all(
        plain_name(name) in names
        and metadata.tensors[stored].shape == metadata.tensors[model[names[plain_name(name)]]].shape
        for name, stored in inside.items()
    )


def _state(stored: str, roots: list[str], spelled: Mapping[str, str]) -> StateName:
    """Of which parameter it is: the longest name that is known, else all but the last word."""
    prefix = next(f"{root}state." for root in roots if stored.startswith(f"{root}state."))
    parts = stored[len(prefix) :].split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = plain_name(".".join(parts[:end]))
        if name in spelled:
            return StateName(stored, spelled[name], ".".join(parts[end:]))
    return StateName(stored, ".".join(parts[:-1]), parts[-1])
