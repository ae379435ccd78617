"""The numbers as lines of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trainer.forgetting.gap import Gap
from trainer.forgetting.matrix import Matrix
from trainer.forgetting.metrics import Summary, most_changed

WORTH_SAYING = 0.01
"""Nats per token."""
MOST_SENTENCES = 12
MOST_ROWS = 20
MOST_COLUMNS = 6


def gap_sentences(gaps: Sequence[tuple[str, str, Gap]]) -> list[str]:
    """What old sources went through, from (stage, set, gap); the largest rises first."""
    worst_first = sorted(gaps, key=lambda one: (-one[2].depth, -one[2].drop))
    said = [sentence for one in worst_first for sentence in _gap_sentence(*one)]
    rest = len(said) - MOST_SENTENCES
    if gaps and not said:
        return [f"no old source moved by {WORTH_SAYING} nats per token in any stage"]
    return [*said[:MOST_SENTENCES], f"and {rest} more in forgetting.json"] if rest > 0 else said


def _gap_sentence(stage: str, name: str, gap: Gap) -> list[str]:
    where = f"stage {stage}: {name}"
    if math.isinf(gap.depth):
        return [f"{where} has had no finite loss since step {gap.depth_step}"]
    if gap.depth >= WORTH_SAYING:
        back = (
            f"back by step {gap.recovery_step}"
            if gap.recovery_step is not None
            else f"not back at the end ({gap.change:+.3f} at step {gap.end_step})"
        )
        return [f"{where} rose by {gap.depth:.2f} at step {gap.depth_step}, {back}"]
    if gap.drop >= WORTH_SAYING:
        return [f"{where} fell by {gap.drop:.2f} by step {gap.drop_step}"]
    return []


def table_lines(matrix: Matrix) -> list[str]:
    """The matrix, a line for each set, a column for the start and each stage."""
    rows, dropped = most_changed(matrix, MOST_ROWS), len(matrix.sets) - MOST_ROWS
    stages = list(range(matrix.last + 1))
    shown = stages if len(stages) <= MOST_COLUMNS else [0, *stages[1 - MOST_COLUMNS :]]
    heads = ["", *("start" if stage == 0 else matrix.stages[stage - 1] for stage in shown)]
    cells = [heads]
    for index in rows:
        values = [
            number(matrix.loss(stage, index)) + ("*" if matrix.learned[index] == stage else " ")
            for stage in shown
        ]
        cells.append([matrix.sets[index], *values])
    widths = [min(14, max(len(row[column]) for row in cells)) for column in range(len(heads))]
    lines = ["held-out loss in nats per token after each stage (* when it was learned)"]
    for first, *others in cells:
        aligned = [_cut(text, width).rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([_cut(first, widths[0]).ljust(widths[0]), *aligned]).rstrip())
    if dropped > 0:
        lines.append(f"and {dropped} sets more in forgetting.json")
    return lines


def summary_lines(summary: Summary) -> list[str]:
    """The means, with what their signs mean."""
    lines = [f"average {number(summary.average)}"]
    if summary.forgetting is not None:
        lines[0] += f"; forgetting {summary.forgetting:+.3f} (positive: old sources have become worse)"
    if summary.forward_transfer is not None:
        lines.append(
            f"forward transfer {summary.forward_transfer:+.3f} (positive: earlier stages have helped new "
            "sources)"
        )
    return lines


def number(value: float | None) -> str:
    """Three decimals, and a dash for what is missing."""
    return "-" if value is None else f"{value:.3f}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
