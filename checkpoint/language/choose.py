"""Which spec fits a checkpoint."""

from __future__ import annotations

from checkpoint.language.deepspeed_info import universal_placement
from checkpoint.language.matching import Matcher
from checkpoint.language.place import place
from checkpoint.language.rules import AXES
from checkpoint.language.sizes import Facts
from checkpoint.language.spec import Spec, SpecError, load_spec, shipped_specs
from checkpoint.source import Source


def choose_spec(source: Source) -> Spec:
    """The spec that maps every tensor.

    Those that the reader suggests are tried in its order; without any, all shipped ones, short ones first.

    Raises:
        SpecError: none does; what is wrong with the one that comes nearest, and how to give another.
    """
    if source.specs:
        candidates = [load_spec(name) for name in source.specs]
    else:
        candidates = [spec for spec in map(load_spec, shipped_specs()) if spec.automatic]
        candidates.sort(key=lambda spec: len(spec.rules))
    best: tuple[tuple[int, int], SpecError] | None = None
    for spec in sorted(candidates, key=lambda spec: _unmatched(spec, source) > 0):
        fitted = fit_spec(spec, source)
        try:
            place(fitted, source.tensors, facts=source.facts, degrees=source.degrees, layers=source.layers)
        except SpecError as error:
            rank = (error.unmatched, len(error.problems))
            if best is None or rank < best[0]:
                best = (rank, error)
        else:
            return fitted
    tried = ", ".join(spec.name for spec in candidates)
    raise SpecError(
        f"no spec fits this checkpoint ({source.format}); tried {tried}. Give your own with --spec FILE "
        "(docs/checkpoint-language.md). The nearest: " + (str(best[1]) if best else "none"),
        [],
    )


def fit_spec(spec: Spec, source: Source) -> Spec:
    """The spec with the checkpoint's own word on how tensors lie on ranks, if it has one and the spec asks.

    Raises:
        SpecError: the checkpoint's word cannot be followed.
    """
    if spec.placement_from == "rules" or not source.universal_info:
        return spec
    names = list(dict.fromkeys(tensor.name for tensor in source.tensors))
    placement = universal_placement(source.universal_info, names, source.degrees)
    return spec.model_copy(update={"placement": placement})


def _unmatched(spec: Spec, source: Source) -> int:
    """How many names no rule matches."""
    ranks = {f"{axis}_ranks": source.degrees.get(axis, 1) for axis in AXES}
    try:
        matcher = Matcher(spec, Facts(spec.facts, {**ranks, **source.facts}))
    except ValueError:
        return len(source.tensors)
    return sum(not matcher.matches(name) for name in dict.fromkeys(tensor.name for tensor in source.tensors))
