"""What a matrix of losses comes to: average, transfer, forgetting.

R[t, i] is a loss, so lower is better; l(i) is the stage that taught set i. The two transfers keep the sign
that they have for accuracies, where positive is good; forgetting is positive where something was forgotten.

    average              mean over i of R[T, i]
    average_learned[t]   mean over l(i) <= t of R[t, i]
    backward_transfer    mean over l(i) < T of R[l(i), i] - R[T, i]
    forward_transfer     mean over l(i) > 1 of R[0, i] - R[l(i) - 1, i]
    forgetting           mean over l(i) < T of R[T, i] - R[l(i), i]
    forgetting_from_best mean over l(i) < T of R[T, i] - min over l(i) <= t < T of R[t, i]

Average and transfers: Lopez-Paz and Ranzato 2017 (arXiv 1706.08840, section 2), with losses for accuracies;
average_learned: Wang et al. 2023 (TRACE, arXiv 2310.06762); forgetting: Lin et al. 2023 (arXiv 2302.05836,
section 3); forgetting_from_best: Chaudhry et al. 2018 (arXiv 1801.10112, section 3). Those papers have one
set for each stage, l(i) = i. Here a set may be taught by no stage: then it is part of the average only; or by
the checkpoint that the run started from, l(i) = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.forgetting.matrix import Matrix, is_known


@dataclass(frozen=True)
class Summary:
    """See above. None where no set has the values that a mean needs; sets that lack them are left out."""

    average: float | None
    average_learned: tuple[float | None, ...]
    backward_transfer: float | None
    forward_transfer: float | None
    forgetting: float | None
    forgetting_from_best: float | None


def summarise(matrix: Matrix) -> Summary:
    """All of them after the last stage."""
    forgotten = forgetting_by_set(matrix)
    forgetting = mean(forgotten)
    return Summary(
        average=mean(matrix.rows[-1]),
        average_learned=tuple(_average_learned(matrix, stage) for stage in range(1, matrix.last + 1)),
        backward_transfer=None if forgetting is None else -forgetting,
        forward_transfer=mean(forward_transfer_by_set(matrix)),
        forgetting=forgetting,
        forgetting_from_best=mean(_from_best_by_set(matrix)),
    )


def forgetting_by_set(matrix: Matrix) -> list[float | None]:
    """R[T, i] - R[l(i), i]; None for sets that were learned in the last stage or never."""
    return [
        difference(matrix.loss(matrix.last, index), matrix.loss(learned, index))
        if learned is not None and learned < matrix.last
        else None
        for index, learned in enumerate(matrix.learned)
    ]


def forward_transfer_by_set(matrix: Matrix) -> list[float | None]:
    """R[0, i] - R[l(i) - 1, i]; None for sets that no stage taught, or the first."""
    return [
        difference(matrix.loss(0, index), matrix.loss(learned - 1, index))
        if learned is not None and learned > 1
        else None
        for index, learned in enumerate(matrix.learned)
    ]


def _from_best_by_set(matrix: Matrix) -> list[float | None]:
    found: list[float | None] = []
    for index, learned in enumerate(matrix.learned):
        before = [] if learned is None else [row[index] for row in matrix.rows[learned : matrix.last]]
        known = [value for value in before if value is not None and is_known(value)]
        found.append(difference(matrix.loss(matrix.last, index), min(known, default=None)))
    return found


def _average_learned(matrix: Matrix, stage: int) -> float | None:
    return mean(
        [
            matrix.loss(stage, index)
            for index, learned in enumerate(matrix.learned)
            if learned is not None and learned <= stage
        ]
    )


def most_changed(matrix: Matrix, most: int) -> list[int]:
    """Indices of at most `most` sets to show: those that changed most since they were learned."""
    forgotten = forgetting_by_set(matrix)
    changes = [abs(value) if value is not None and is_known(value) else 0.0 for value in forgotten]
    order = sorted(range(len(matrix.sets)), key=lambda index: -changes[index])
    return sorted(order[:most])


def difference(after: float | None, before: float | None) -> float | None:
    """after - before; None where one is missing."""
    return None if after is None or before is None else after - before


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None
