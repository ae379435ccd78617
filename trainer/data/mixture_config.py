"""`[data.mixture]`: the shares of the sources, beyond a weight beside each of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Annotated, Any, Protocol

from pydantic import BeforeValidator, Field

from parallel.settings import Settings

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class GroupConfig(Settings):
    """One of `[data.mixture.groups]`: a share that does not depend on how many sources are in the group."""

    share: Weight
    """Of all sequences, relative to the other groups' shares."""
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Of the sources inside this group; None takes that of the mixture."""


def _bare_share(value: Any) -> Any:
    """`groups.web = 0.6` is a group with nothing but a share."""
    return {"share": value} if isinstance(value, int | float) else value


class MixtureConfig(Settings):
    """`[data.mixture]`: in what proportion the sources are dealt.

    Attributes:
        weights: by source, instead of the source's own weight. 0 leaves a source out; it keeps its place in
            its documents for the day it comes back.
        temperature: T of p_i ~ weight_i x n_i^(1/T), n_i being the tokens of source i (Conneau and Lample
            2019, arXiv 1901.07291, section 3.1, with alpha = 1/T). 1 draws in proportion to size, a large T
            evenly. None leaves sizes out.
        groups: shares of groups; then every source says its group, and weights and temperature act inside.
        shares: by source, instead of the source's own `share` or weight.

    Sources with a share or a number of sequences of their own stand beside all of this: the others divide
    what those leave.
    """

    weights: dict[str, Weight] = Field(default_factory=dict)
    shares: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    groups: dict[str, Annotated[GroupConfig, BeforeValidator(_bare_share)]] = Field(default_factory=dict)


class MixedSource(Protocol):
    """What a mixture has to know of a source."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def group(self) -> str | None: ...
    @property
    def share(self) -> float | None: ...
    @property
    def per_batch(self) -> int | None: ...


def own_weight(mixture: MixtureConfig, source: MixedSource) -> float:
    """The weight of a source among the others of its group, before sizes come in."""
    return mixture.weights.get(source.name, source.weight)


def own_share(mixture: MixtureConfig, source: MixedSource) -> float | None:
    """The share of all sequences that a source is to have, whatever the others' weights; None without."""
    return None if _left_out(mixture, source) else mixture.shares.get(source.name, source.share)


def own_count(mixture: MixtureConfig, source: MixedSource) -> int | None:
    """The sequences of every global batch that a source is to have; None without such a number."""
    return None if _left_out(mixture, source) else source.per_batch


def by_weight(mixture: MixtureConfig, source: MixedSource) -> bool:
    """Whether a source divides with others what shares and fixed numbers leave."""
    return source.share is None and source.per_batch is None and source.name not in mixture.shares


def takes_part(mixture: MixtureConfig, source: MixedSource) -> bool:
    """Whether any sequence can come from a source."""
    if not by_weight(mixture, source):
        return not _left_out(mixture, source)
    group = mixture.groups.get(source.group) if source.group is not None else None
    return own_weight(mixture, source) > 0 and not (mixture.groups and group is not None and not group.share)


def _left_out(mixture: MixtureConfig, source: MixedSource) -> bool:
    return mixture.weights.get(source.name) == 0


def mixture_problems(mixture: MixtureConfig, sources: Sequence[MixedSource]) -> list[str]:
    """What is wrong with a mixture of these sources, whatever their sizes; empty when nothing is."""
    names = [source.name for source in sources]
    found = [
        f"data.mixture.{key}: no source is named {name!r}{nearest(name, names)}"
        for key, chosen in (("weights", mixture.weights), ("shares", mixture.shares))
        for name in chosen
        if name not in names
    ]
    found += _share_problems(mixture, sources)
    weighted = [source for source in sources if by_weight(mixture, source)]
    if mixture.groups:
        return found + _group_problems(mixture, weighted)
    if weighted and len(weighted) == len(sources) and not any(own_weight(mixture, one) for one in weighted):
        found.append("data.mixture.weights: they sum to zero; give at least one source a weight above 0")
    return found


def _share_problems(mixture: MixtureConfig, sources: Sequence[MixedSource]) -> list[str]:
    """Of the sources that do not go by weight, as far as the size of a batch does not come in."""
    found = []
    for source in sources:
        key = "per_batch" if source.per_batch is not None else "share"
        if not by_weight(mixture, source) and mixture.weights.get(source.name, 0) > 0:
            found.append(
                f"data.mixture.weights: source {source.name!r} has a {key}, so a weight means nothing; "
                "take it out of data.mixture.weights, or give 0 to leave the source out"
            )
        if source.per_batch is not None and source.name in mixture.shares:
            found.append(
                f"data.mixture.shares: source {source.name!r} has per_batch = {source.per_batch} already; "
                "keep one of the two"
            )
    shares = _shares(mixture, sources)
    if sum(shares.values()) > 1:
        listed = ", ".join(f"{name} {float(share):g}" for name, share in shares.items())
        found.append(
            f"data.sources: the shares sum to {float(sum(shares.values())):g}, more than the whole "
            f"({listed}); lower them"
        )
    return found


def _shares(mixture: MixtureConfig, sources: Sequence[MixedSource]) -> dict[str, Fraction]:
    """By source that has one, its share as it is written: 0.1 is a tenth."""
    found = {source.name: own_share(mixture, source) for source in sources}
    return {name: Fraction(str(share)) for name, share in found.items() if share is not None}


def batch_problems(mixture: MixtureConfig, sources: Sequence[MixedSource], global_batch: int) -> list[str]:
    """What is wrong with shares and fixed numbers in batches of this size; empty when nothing is."""
    counts = {source.name: own_count(mixture, source) for source in sources}
    fixed = {name: count for name, count in counts.items() if count is not None}
    shares = _shares(mixture, sources)
    if not fixed and not shares:
        return []
    total = sum(shares.values(), start=Fraction(sum(fixed.values()), global_batch))
    others = [one.name for one in sources if by_weight(mixture, one) and takes_part(mixture, one)]
    parts = [f"{name} share {float(share):g}" for name, share in shares.items()]
    parts += [f"{name} per_batch {count}" for name, count in fixed.items()]
    where = f"data.sources: {', '.join(parts)}, of train.global_batch = {global_batch} sequences,"
    if total > 1 or (total == 1 and others):
        return [
            f"{where} come to {float(total):.4g} of the batch and leave nothing for "
            f"{', '.join(others) or 'so many'}; lower them, or give weight 0 to what is to be left out"
        ]
    if total < 1 and not others:
        return [
            f"{where} come to {float(total):.4g} of the batch, and no source with a weight takes the rest; "
            "add one, or raise them"
        ]
    return []


def _group_problems(mixture: MixtureConfig, sources: Sequence[MixedSource]) -> list[str]:
    groups, found = mixture.groups, []
    for source in sources:
        if source.group is None:
            found.append(
                f"data.sources {source.name!r}: has no group, and data.mixture.groups shares the sequences "
                f"out by group; add group = one of {sorted(groups)}"
            )
        elif source.group not in groups:
            found.append(
                f"data.sources {source.name!r}: group {source.group!r} is not in data.mixture.groups"
                f"{nearest(source.group, groups)}"
            )
    if not any(group.share for group in groups.values()):
        found.append("data.mixture.groups: the shares sum to zero; give at least one group a share above 0")
    for name, group in groups.items():
        members = [source for source in sources if source.group == name]
        if group.share and not any(own_weight(mixture, source) for source in members):
            what = "its sources' weights sum to zero" if members else "no source is in it"
            found.append(
                f"data.mixture.groups.{name}: share {group.share:g}, but {what}{_of(name, sources, members)}"
                "; set share = 0 or mend it"
            )
    return found


def _of(name: str, sources: Sequence[MixedSource], members: Sequence[MixedSource]) -> str:
    return "" if members else nearest(name, {source.group for source in sources if source.group is not None})


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or what there is."""
    known = sorted(known)
    if near := difflib.get_close_matches(name, known, n=1):
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(map(repr, known[:8]))}{' ...' if len(known) > 8 else ''}" if known else ""


def cap_tokens(max_epochs: float | None, epoch_tokens: int) -> int | None:
    """The most tokens of a source that may be read; None without a cap. Exact."""
    if max_epochs is None:
        return None
    numerator, denominator = max_epochs.as_integer_ratio()
    return epoch_tokens * numerator // denominator
