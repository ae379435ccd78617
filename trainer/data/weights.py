"""From what a run file says about its sources to weights that sum to 1, exactly."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction

from trainer.data.mixture_config import (
    MixedSource,
    MixtureConfig,
    batch_problems,
    by_weight,
    mixture_problems,
    nearest,
    own_count,
    own_share,
    own_weight,
)

WHOLE = 2**32
"""Units in a weight of 1. Weights are whole numbers of units, so what a source is owed is counted exactly."""


def resolve_weights(
    mixture: MixtureConfig, sources: Sequence[MixedSource], sizes: Mapping[str, int], *, global_batch: int = 1
) -> dict[str, float]:
    """The share of the sequences that each source is to have, in the order of `sources`; they sum to 1.

    With w_i the weight of source i (of the mixture, or else its own), n_i its tokens, T the temperature and
    S_g the share of its group: p_i = S_g / sum S x r_i / (sum of r over the group), r_i = w_i x n_i^(1/T).
    Without groups all sources are one; without a temperature r_i = w_i. A source with a share of its own has
    that, one with a number of sequences per batch has that number / `global_batch`, and the others' p_i are
    multiplied by what both leave.

    Raises:
        ValueError: lists every source or group that is unknown, empty or without a group where there are
            groups, weights or shares that sum to zero, and shares that sum to more than 1.
    """
    problems = mixture_problems(mixture, sources) or batch_problems(mixture, sources, global_batch)
    problems += [
        f"data.sources {source.name!r}: holds no tokens; prepare it from files that have text"
        for source in sources
        if sizes[source.name] <= 0
    ]
    if problems:
        raise ValueError("the mixture cannot be dealt:\n" + "\n".join(f"- {text}" for text in problems))
    weighted = [source for source in sources if by_weight(mixture, source)]
    weights = {
        source.name: own_share(mixture, source) or (own_count(mixture, source) or 0) / global_batch
        for source in sources
        if not by_weight(mixture, source)
    }
    rest = 1.0 - math.fsum(weights.values())
    if not mixture.groups:
        weights |= _shared_out(rest, mixture, weighted, sizes, mixture.temperature)
        return {source.name: weights[source.name] for source in sources}
    total = math.fsum(group.share for group in mixture.groups.values())
    for name, group in mixture.groups.items():
        members = [source for source in weighted if source.group == name]
        temperature = group.temperature or mixture.temperature
        weights |= _shared_out(rest * group.share / total, mixture, members, sizes, temperature)
    return {source.name: weights[source.name] for source in sources}


def _shared_out(
    share: float,
    mixture: MixtureConfig,
    members: Sequence[MixedSource],
    sizes: Mapping[str, int],
    temperature: float | None,
) -> dict[str, float]:
    """Share out `share` among the sources of one group."""
    raw = {source.name: own_weight(mixture, source) for source in members}
    largest = max((sizes[source.name] for source in members), default=1)
    if temperature is not None:
        raw = {name: one * (sizes[name] / largest) ** (1 / temperature) for name, one in raw.items()}
    total = math.fsum(raw.values())
    return {name: share * one / total if total else 0.0 for name, one in raw.items()}


def quantise(weights: Mapping[str, float]) -> dict[str, int]:
    """Weights as whole units that sum to WHOLE; every positive weight has at least one unit.

    The remainders of rounding down go to the largest of them, so a unit is off by less than one (Hamilton's
    method of apportionment).

    Raises:
        ValueError: a weight is negative or not finite, or all are zero.
    """
    bad = {name: one for name, one in weights.items() if not math.isfinite(one) or one < 0}
    if bad:
        raise ValueError(f"weights are finite and not negative, found {bad}")
    exact = {name: Fraction(one) for name, one in weights.items()}
    total = sum(exact.values())
    if total == 0:
        raise ValueError(f"the weights of {', '.join(weights) or 'no source'} sum to zero")
    return _round({name: one * WHOLE / total for name, one in exact.items()})


def _round(wanted: Mapping[str, Fraction]) -> dict[str, int]:
    """Whole numbers that sum to WHOLE, as the exact ones do; what is above 0 stays above 0."""
    units = {name: max(math.floor(one), int(one > 0)) for name, one in wanted.items()}
    missing = WHOLE - sum(units.values())
    if missing >= 0:
        by_remainder = sorted(wanted, key=lambda name: units[name] - wanted[name])  # stable: ties in order
        for name in by_remainder[:missing]:
            units[name] += 1
    else:  # many weights below one unit were rounded up
        units[max(units, key=lambda name: units[name])] += missing
    return units


def pass_on(
    units: Mapping[str, int], leaving: Collection[str], groups: Mapping[str, str | None]
) -> dict[str, int]:
    """Weights without the sources that leave: what they had goes to the others of their group.

    Inside a group, and among the rest where a whole group has left, it is shared out in proportion to the
    weights.

    Args:
        units: weights that sum to WHOLE.
        leaving: sources whose weight becomes 0.
        groups: by source, its group.

    Raises:
        ValueError: no other source has a weight.
    """
    if not any(units[name] for name in leaving):
        return dict(units)
    staying = {name: one for name, one in units.items() if one and name not in leaving}
    if not staying:
        raise ValueError(f"no source is left to deal: {', '.join(units)} have weight 0 or have left")
    total: dict[str | None, int] = {}
    kept: dict[str | None, int] = {}
    for name, one in units.items():
        total[groups[name]] = total.get(groups[name], 0) + one
        kept[groups[name]] = kept.get(groups[name], 0) + staying.get(name, 0)
    reached = sum(one for group, one in total.items() if kept[group])
    wanted = {
        name: Fraction(one * total[groups[name]] * WHOLE, kept[groups[name]] * reached)
        for name, one in staying.items()
    }
    return dict.fromkeys(units, 0) | _round(wanted)


def check_names(weights: Mapping[str, float], names: Collection[str]) -> None:
    """Raise ValueError unless `weights` has exactly these sources."""
    problems = [f"no source is named {name!r}{nearest(name, names)}" for name in weights if name not in names]
    problems += [f"source {name!r} has no weight; 0 leaves it out" for name in names if name not in weights]
    if problems:
        raise ValueError("weights: " + "; ".join(problems))
