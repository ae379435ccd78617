"""The tables as Markdown, and their place in a document."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from tools.continual_table.arm import NEW, OLD
from tools.continual_table.claims import Found, forgotten, new_loss
from tools.continual_table.outcome import Seed

BEGIN, END = "<!-- continual_table: begin -->", "<!-- continual_table: end -->"
CLAIM_HEADS = ("method", "expected", "measured", "median (each seed)", "holds")
RUN_HEADS = ("run", "forgetting of prose", "loss on code", "CPU s")


def replaced(document: str, table: str) -> str:
    """The document with `table` between its two markers, which stay.

    Raises:
        ValueError: it does not have each marker once, in their order.
    """
    begin, end = document.find(BEGIN), document.find(END)
    if document.count(BEGIN) != 1 or document.count(END) != 1 or end < begin:
        raise ValueError(f"expected {BEGIN} and after it {END}, each once: put them where the table goes")
    return f"{document[: begin + len(BEGIN)]}\n{table.strip()}\n{document[end:]}"


def claim_table(found: Sequence[Found]) -> str:
    """A row a claim; a method is named in its first row only."""
    rows = []
    before = ""
    for one in found:
        claim = one.claim
        name = "" if claim.method == before else claim.method
        before = claim.method
        rows.append((name, claim.says, claim.number, numbers(one.values), one.verdict))
    return _table(CLAIM_HEADS, rows)


def run_table(seeds: Sequence[Seed]) -> str:
    """A row an arm that has prose and code among its sets."""
    rows = []
    for name, first in seeds[0].items():
        for of in ("", " (average)"):
            if {OLD + of, NEW + of} <= first.end.keys():
                cpu = "" if of else f"{statistics.median(seed[name].cpu for seed in seeds):.0f}"
                lost = numbers([forgotten(seed, name, of=of) for seed in seeds])
                learned = numbers([new_loss(seed, name, of=of) for seed in seeds], signed=False)
                rows.append((f"`{name}`{of}", lost, learned, cpu))
    return _table(RUN_HEADS, rows)


def numbers(values: Sequence[float], *, signed: bool = True) -> str:
    """The median, and in brackets each value."""
    form = "{:+.3f}" if signed else "{:.3f}"
    each = ", ".join(form.format(value) for value in values)
    return f"{form.format(statistics.median(values))} ({each})"


def summary(found: Sequence[Found], noise: Mapping[str, float]) -> str:
    """How many hold, which do not, and what the noise is."""
    failed = [one for one in found if not one.verdict.startswith("yes")]
    weak = sum(one.verdict == "yes, within noise" for one in found)
    held = f"{len(found) - len(failed)} of {len(found)} expectations hold for every seed"
    held += f", {weak} of them by no more than the noise." if weak else "."
    said = "; ".join(f"{one.claim.method}: {one.claim.number} ({one.verdict})" for one in failed)
    missed = f" Not for every seed: {said}." if failed else ""
    return (
        f"{held}{missed}\n\nNoise, the largest difference between two runs with 25 % replay that read other "
        f"documents: {noise['forgetting']:.3f} in the loss on prose, {noise['new']:.3f} in that on code."
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (heads, ["---"] * len(heads), *rows)
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
