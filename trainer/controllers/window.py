"""Mean training losses by source over the steps since a controller was last called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

DECIMALS = 4
"""Places of a loss that a controller sees. Another layout sums in another order, which moves the last bits of
a loss; rounded to 1e-4 nats it is nearly always the same number, and so are the weights that follow."""


class Window:
    """Sums of losses and tokens, by source."""

    def __init__(self, names: Sequence[str], state: Mapping[str, Sequence[float]] | None = None) -> None:
        """Begin empty, or with what `state` returned."""
        self._names = tuple(names)
        self._sums = {name: (float(one[0]), float(one[1])) for name, one in (state or {}).items()}

    def add(self, by_source: Sequence[tuple[float, float]]) -> None:
        """Add a step: (mean loss, tokens) of every source, as in `LossReport.by_source`."""
        for name, (mean, tokens) in zip(self._names, by_source, strict=True):
            if tokens:
                total, count = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (total + mean * tokens, count + tokens)

    def means(self) -> dict[str, float]:
        """Mean losses in nats of the sources that had tokens, rounded."""
        return {name: round(total / count, DECIMALS) for name, (total, count) in self._sums.items()}

    def tokens(self) -> dict[str, float]:
        """The tokens that the means are over."""
        return {name: count for name, (_, count) in self._sums.items()}

    def clear(self) -> None:
        """Begin again."""
        self._sums = {}

    def state(self) -> dict[str, list[float]]:
        """JSON."""
        return {name: list(one) for name, one in self._sums.items()}
