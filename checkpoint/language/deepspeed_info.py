"""A DeepSpeed checkpoint's own `universal_checkpoint_info` as a spec in the checkpoint's own names.

The keys are those of deepspeed/checkpoint/constants.py (versions 0.2 of Megatron-DeepSpeed to 0.4), and mean
what `merge_tp_slices` of deepspeed/checkpoint/ds_to_universal.py makes of them: a pattern matches the
beginning of a name, the lists are asked in a fixed order, and what is in none is concatenated along dim 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from checkpoint.language.matching import SHOWN, cut
from checkpoint.language.rules import Fused, Padded, Region, Regions, Rule, Sharded
from checkpoint.language.spec import Spec, SpecError

VERSION = 0.4
"""The newest `universal_checkpoint_version` whose keys are known."""

REPLICATED = "tp_replicated_parameter_patterns"
AVERAGE = "parameter_to_average_patterns"
TWO_PARTS = "parameter_with_2_sub_params_cat_dim_0"
PARTS = "parameter_with_sub_params"
WIDTHS = "sub_param_shard_widths"
ROWS = "parameter_with_row_parallelism_patterns"
VOCABULARY = "vocabulary_parameter_patterns"
PIPELINE = "pipeline_replicated_parameter_patterns"
EXPERTS = "expert_parameter_patterns"
UNSUPPORTED = "autotp_unsupported_parameter_patterns"
AFFINE = "affine_map"
AFFINE_VERSION = 1


class _Patterns:
    """Patterns of one list; the many that stand for one name each are looked up, not tried."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._exact: dict[str, str] = {}
        self._others: list[tuple[str, re.Pattern[str]]] = []
        self.unused: dict[str, None] = {}
        for pattern in patterns:
            self.unused[pattern] = None
            literal = re.sub(r"\\(.)", r"\1", pattern[1:-1])
            if pattern == f"^{re.escape(literal)}$":
                self._exact[literal] = pattern
            else:
                self._others.append((pattern, re.compile(pattern)))

    def match(self, name: str) -> str | None:
        """The first pattern that matches the beginning of the name."""
        found = self._exact.get(name)
        if found is None:
            found = next((pattern for pattern, each in self._others if each.match(name)), None)
        if found is not None:
            self.unused.pop(found, None)
        return found


def universal_placement(info: Mapping[str, Any], names: Sequence[str], degrees: Mapping[str, int]) -> Spec:
    """A spec under which every source name stays what it is, and is put together from its ranks.

    Args:
        info: `universal_checkpoint_info`; a SubparamShape is a mapping of its fields.
        names: of all source tensors.
        degrees: of the axes; with one tensor rank there is nothing to put together.

    Raises:
        SpecError: a newer version, parameters that DeepSpeed itself declares impossible, patterns that match
            no name: everything at once.
    """
    version = float(info.get("universal_checkpoint_version", 0.0))
    if version > VERSION:
        raise SpecError(
            f"universal_checkpoint_info has version {version:g}, known are those up to {VERSION:g}: say how "
            "the tensors lie on ranks in a spec of your own (--spec FILE)",
            [],
        )
    affine = int((info.get(AFFINE) or {}).get("version", AFFINE_VERSION))
    if affine > AFFINE_VERSION:
        raise SpecError(
            f"its affine_map has version {affine}, known is {AFFINE_VERSION}: say how the tensors lie on "
            "ranks in a spec of your own (--spec FILE)",
            [],
        )
    sorter = _Sorter(info, version)
    for name in names:
        sorter.sort(name)
    problems = sorter.problems(names if degrees.get("tensor", 1) > 1 else None)
    if problems:
        raise SpecError("universal_checkpoint_info does not fit this checkpoint:", problems)
    return Spec(
        name="the checkpoint's universal_checkpoint_info",
        strip=(),
        replicated=("pipeline",),
        rule=sorter.rules(),
    )


def _regions(entry: Mapping[str, Any]) -> Regions:
    """An affine map: pieces given by offset and strides, in the parameter and in each rank's memory.

    Raises:
        ValueError: a piece is not a box on both sides, or is scaled.
    """
    whole = tuple(entry["logical_shape"])
    ranks: dict[int, tuple[Region, ...]] = {}
    for rank, held in entry["ranks"].items():
        local = tuple(held["shard_shape"])
        pieces = [piece for piece in held["pieces"] if math.prod(piece["shape"])]
        if any(float(piece.get("scale", 1.0)) != 1.0 for piece in pieces):
            raise ValueError("a piece is scaled, which would have to change the learning rate as well")
        ranks[int(rank)] = tuple(
            Region(
                start=_corner(piece["dest"], piece["shape"], local),
                offset=_corner(piece["source"], piece["shape"], whole),
                size=tuple(piece["shape"]),
            )
            for piece in pieces
        )
    return Regions(
        over=("tensor",), shape=whole, ranks=tuple(ranks.get(i, ()) for i in range(max(ranks) + 1))
    )


def _corner(view: Sequence[Any], size: Sequence[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Where in a row-major tensor a box of `size` begins that is given by offset and strides."""
    offset, strides = view
    own = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if len(size) != len(shape) or any(n > 1 and a != b for n, a, b in zip(size, strides, own, strict=True)):
        raise ValueError(
            f"a piece of {list(size)} with the strides {list(strides)} is no box of {list(shape)}"
        )
    return tuple(offset // stride % length for stride, length in zip(own, shape, strict=True))


class _Sorter:
    """Sorts names by how they lie on the ranks: one rule for all that are alike."""

    def __init__(self, info: Mapping[str, Any], version: float) -> None:
        self._info = info
        self._lists = {key: _Patterns(info.get(key) or ()) for key in (REPLICATED, AVERAGE, TWO_PARTS, ROWS)}
        self._vocabulary = _Patterns(info.get(VOCABULARY) or ())
        self._shapes = {pattern: shape for shape in info.get(PARTS) or () for pattern in shape["patterns"]}
        self._parts = _Patterns(self._shapes)
        self._experts = [re.compile(pattern) for pattern in info.get(EXPERTS) or ()]
        self._unsupported = {re.compile(p): why for p, why in (info.get(UNSUPPORTED) or {}).items()}
        self._maps: dict[str, Any] = (info.get(AFFINE) or {}).get("params") or {}
        self._affine = _Patterns(self._maps)
        self._version = version
        self._names: dict[tuple[str, str, bool], list[str]] = {}
        self._refused: list[str] = []

    def sort(self, name: str) -> None:
        """Put a name to those that lie on ranks as it does."""
        refused = next((why for pattern, why in self._unsupported.items() if pattern.match(name)), None)
        if refused is not None:
            self._refused.append(f"{name}: DeepSpeed says that its pieces cannot be put together: {refused}")
        kind, pattern = self._kind(name)
        if kind == AFFINE:
            try:
                _regions(self._maps[pattern])
            except ValueError as error:
                self._refused.append(f"{name}: {error}; say how it lies in a spec of your own (--spec FILE)")
        padded = self._vocabulary.match(name) is not None
        self._names.setdefault((kind, pattern, padded), []).append(name)

    def _kind(self, name: str) -> tuple[str, str]:
        """The list that decides, and the pattern where it says more.

        Lists that an affine map makes superfluous are asked as well, or their patterns would seem unused.
        """
        asked = self._listed_kind(name)
        affine = self._affine.match(name)
        return (AFFINE, affine) if affine is not None else asked

    def _listed_kind(self, name: str) -> tuple[str, str]:
        if any(pattern.search(name) for pattern in self._experts):
            return EXPERTS, ""
        for key in (REPLICATED, AVERAGE, TWO_PARTS):
            if self._lists[key].match(name) is not None:
                return key, ""
        pattern = self._parts.match(name)
        if pattern is not None:
            return PARTS, pattern
        return (ROWS, "") if self._lists[ROWS].match(name) is not None else ("", "")

    def problems(self, names: Sequence[str] | None) -> list[str]:
        """What is wrong; unused patterns count only where they would have mattered (`names` is given)."""
        found = self._refused[:SHOWN]
        if names is None:
            return found
        lists = [*self._lists.items(), (VOCABULARY, self._vocabulary), (PARTS, self._parts)]
        unused = [f"{pattern} in {key}" for key, patterns in lists for pattern in patterns.unused]
        if unused:
            found.append(cut("patterns that match no name:", unused[:SHOWN], len(unused)))
        if not any(self._info.get(key) for key in (AFFINE, REPLICATED, AVERAGE, TWO_PARTS, PARTS, ROWS)):
            found.append(
                "there are several tensor ranks, but the lists of patterns are empty (as "
                "--inject_missing_state leaves them): say how the tensors lie on ranks in a spec of your own "
                "(--spec FILE)"
            )
        return found

    def rules(self) -> tuple[Rule, ...]:
        """One rule for all names that lie alike."""
        return tuple(
            Rule(names=tuple(names), **self._placement(kind, pattern, padded))
            for (kind, pattern, padded), names in self._names.items()
        )

    def _placement(self, kind: str, pattern: str, padded: bool) -> dict[str, Any]:
        placement: dict[str, Any] = {}
        if padded:
            placement["padded"] = Padded(size=int(self._info["original_vocab_size"]))
        if kind == EXPERTS:
            return {**placement, "sharded": Sharded(over=("expert",))}
        if kind == REPLICATED:
            return {**placement, "replicated": ("tensor",)}
        if kind == AVERAGE:
            return {**placement, "average": ("tensor",)}
        if kind == TWO_PARTS:
            each = Sharded(over=("tensor",), split="each")
            return {"fused": Fused(parts=("first", "second")), "sharded": each}
        if kind == PARTS:
            return self._fused(pattern)
        if kind == AFFINE:
            return {"regions": _regions(self._maps[pattern])}
        return {**placement, "sharded": Sharded(over=("tensor",), dim=1 if kind == ROWS else 0)}

    def _fused(self, pattern: str) -> dict[str, Any]:
        """A SubparamShape. Before 0.4, a number along its dimension counts equal parts."""
        shape = self._shapes[pattern]
        dim = int(shape["partition_dim"])
        sizes = shape["shape"][dim]
        if isinstance(sizes, int):
            equal = tuple(str(number) for number in range(sizes)) if self._version < VERSION else None
            parts: Any = equal or {"0": sizes}
        else:
            parts = {str(number): int(size) for number, size in enumerate(sizes)}
        widths = (self._info.get(WIDTHS) or {}).get(pattern)
        named: Any = {str(n): tuple(map(int, each)) for n, each in enumerate(widths)} if widths else None
        sharded = Sharded(over=("tensor",), dim=dim, split="each", widths=named)
        return {"fused": Fused(dim=dim, parts=parts), "sharded": sharded}
