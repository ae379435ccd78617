"""What a part found: rows of a table that can be pasted into a Markdown page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass
class Table:
    """Rows under a title, and sentences about what is wrong with them."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def compare(self, name: str, found: float, allowed: float, *more: str) -> None:
        """Add a row for a number that must not exceed `allowed`; NaN does."""
        passed = found <= allowed
        verdict = "ok" if passed else "TOO FAR"
        self.rows.append((name, f"{found:.1e}", f"{allowed:.0e}", verdict, *more))
        if not passed:
            self.failures.append(f"{name}: {found:.1e}, allowed {allowed:.0e}")

    def fail(self, name: str, reason: str) -> None:
        """Add a row for something that did not come to an end."""
        self.rows.append((name, "failed", *[""] * (len(self.columns) - 2)))
        self.failures.append(f"{name}: {reason}")

    def __str__(self) -> str:
        return "\n".join([f"### {self.title}", "", *_lines(self.columns, self.rows)])


def _lines(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    table = [tuple(columns), *map(tuple, rows)]
    widths = [max(len(row[index]) for row in table) for index in range(len(columns))]
    texts = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    return [texts[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *texts[1:]]
