"""`[data.mixture]`: the shares of the sources, beyond a weight beside each of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
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
    """

    weights: dict[str, Weight] = Field(default_factory=dict)
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


def own_weight(mixture: MixtureConfig, source: MixedSource) -> float:
    """The weight of a source among the others of its group, before sizes come in."""
    return mixture.weights.get(source.name, source.weight)


def mixture_problems(mixture: MixtureConfig, sources: Sequence[MixedSource]) -> list[str]:
    """What is wrong with a mixture of these sources, whatever their sizes; empty when nothing is."""
    names = [source.name for source in sources]
    found = [
        f"data.mixture.weights: no source is named {name!r}{nearest(name, names)}"
        for name in mixture.weights
        if name not in names
    ]
    if mixture.groups:
        return found + _group_problems(mixture, sources)
    if sources and not any(own_weight(mixture, source) for source in sources):
        found.append("data.mixture.weights: they sum to zero; give at least one source a weight above 0")
    return found


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
