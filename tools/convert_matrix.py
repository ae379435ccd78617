"""Every checkpoint format becomes every other: `python -m tools.convert_matrix`.

Genuine checkpoints of one model whose every number is known are made by their own trainers (`python -m
tests.foreign`), loaded as two tensor ranks would hold them, converted to every target, opened again and
compared bit for bit: weights, masters, moments, Adam's count, and the settings of the parameter groups. What
is converted for another trainer is loaded by that trainer, which then makes one update. Exit code 1 when a
cell is wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from checkpoint.convert.run import FORMATS, convert, prepare
from checkpoint.opening import Opened, open_checkpoint
from checkpoint.writers.options import WriteOptions
from tools.matrix_checks import direct_load_faults, faults, silently_lost
from tools.matrix_loaders import OwnLoaders

EQUAL, LOST, UNSUPPORTED, WRONG = "equal", "lost", "unsupported", "WRONG"
_SHORT = {"huggingface": "HF", "deepspeed_universal": "DS univ.", "torch_dist": "torch_dist"}
_STYLES = {EQUAL: "green", LOST: "yellow", UNSUPPORTED: "dim", WRONG: "bold red"}


@dataclass(frozen=True)
class Cell:
    """What came of one source and one target.

    Attributes:
        verdict: "equal" bit for bit; "lost" the same, but for what the target cannot hold; "unsupported" is
            refused with a reason; "WRONG" differs, or failed.
        reasons: what is lost, why it is refused, or what is wrong.
    """

    verdict: str
    reasons: tuple[str, ...] = ()


@dataclass
class Row:
    """One source with all its cells."""

    source: str
    cells: dict[str, Cell] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sources", type=Path, help="made before by `python -m tests.foreign --out DIR`")
    parser.add_argument("--only", nargs="*", default=[], help="names of sources; by default all")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument("--json", action="store_true", help="print all cells as JSON")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, OwnLoaders() as loaders:
        sources = given.sources or make_sources(Path(folder) / "sources", given.only)
        listed = json.loads((sources / "sources.json").read_text())
        chosen = [entry for entry in listed if not given.only or entry["name"] in given.only]
        rows = [try_source(entry, sources, Path(folder), loaders) for entry in chosen]
    show(rows, markdown=given.markdown, as_json=given.json)
    sys.exit(any(cell.verdict == WRONG for row in rows for cell in row.cells.values()))


def make_sources(folder: Path, only: list[str]) -> Path:
    """Let the trainers write their checkpoints; tests are no module that tools import."""
    command = [sys.executable, "-m", "tests.foreign", "--out", str(folder)]
    command += ["--only", *only] if only else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return folder


def try_source(entry: dict[str, Any], sources: Path, scratch: Path, loaders: OwnLoaders) -> Row:
    """Load a source directly and convert it to every target."""
    row, target = Row(entry["name"]), scratch / "target"
    with safe_open(sources / f"oracle-{entry['oracle']}.safetensors", "pt") as oracle:
        try:
            opened = open_checkpoint(entry["path"], spec=entry["spec"], facts=entry["facts"])
        except ValueError as error:
            return Row(entry["name"], dict.fromkeys(("load", *FORMATS), Cell(WRONG, (str(error),))))
        found = faults(opened, oracle, entry["settings"]) + direct_load_faults(opened, oracle)
        row.cells["load"] = Cell(WRONG, tuple(found)) if found else Cell(EQUAL)
        for to in FORMATS:
            cell = try_target(opened, to, target, entry, oracle)
            if cell.verdict in (EQUAL, LOST) and entry["loads"]:
                found = loaders.faults(to, target, entry["oracle"], optimizer=entry["optimizer"])
                cell = Cell(WRONG, tuple(found)) if found else cell
            row.cells[to] = cell
            shutil.rmtree(target, ignore_errors=True)
    return row


def try_target(opened: Opened, to: str, target: Path, entry: dict[str, Any], oracle: Any) -> Cell:
    """Convert, open again, compare."""
    options = WriteOptions(facts=entry["facts"], carry=Path(entry["config"]), layout={"tensor": 2})
    try:
        conversion = prepare(opened, to, options)
        lost = conversion.plan.lost
        convert(conversion, target, drop=bool(lost))
    except (ValueError, ModuleNotFoundError) as error:
        return Cell(UNSUPPORTED, (str(error),))
    except Exception as error:  # a cell that fails is a cell that is wrong, and the others are to be tried
        return Cell(WRONG, (f"{type(error).__name__}: {error}",))
    try:
        again = open_checkpoint(target, facts=entry["facts"])
    except ValueError as error:
        return Cell(WRONG, (str(error),))
    with_master = "master" in {tensor.state for tensor in opened.manifest.tensors}
    found = faults(again, oracle, entry["settings"], with_master=with_master)
    if any("weight_decay" in line for line in lost):
        found = [line for line in found if not line.startswith("weight_decay")]
    found += silently_lost(opened, again, lost)
    if found:
        return Cell(WRONG, tuple(found))
    return Cell(LOST, tuple(lost)) if lost else Cell(EQUAL)


def show(rows: list[Row], *, markdown: bool, as_json: bool) -> None:
    """The table, and below it what is lost, refused or wrong, each reason once."""
    console = Console(highlight=False)
    if as_json:
        tree = {row.source: {to: vars(cell) for to, cell in row.cells.items()} for row in rows}
        console.print(json.dumps(tree, indent=2), soft_wrap=True, markup=False)
        return
    notes: dict[str, int] = {}
    columns = ["load", *FORMATS]
    lines = [[row.source, *(_mark(row.cells[to], notes) for to in columns)] for row in rows]
    heads = ["source", *(_SHORT.get(to, to) for to in columns)]
    if markdown:
        for line in (heads, ["---"] * len(heads), *lines):
            console.print(f"| {' | '.join(line)} |", soft_wrap=True, markup=False)
    else:
        table = Table(*heads, box=None, header_style="bold", padding=(0, 1, 0, 0))
        for row, line in zip(rows, lines, strict=True):
            styles = [_STYLES[row.cells[to].verdict] for to in columns]
            styled = [f"[{style}]{text}[/]" for style, text in zip(styles, line[1:], strict=True)]
            table.add_row(line[0], *styled)
        console.print(table)
    console.print("\n= bit-equal, with the notes' losses; - unsupported; ! wrong", markup=False)
    for reason, number in notes.items():
        console.print(f"{number}  {reason}", markup=False, soft_wrap=markdown)


def _mark(cell: Cell, notes: dict[str, int]) -> str:
    sign = {EQUAL: "=", LOST: "=", UNSUPPORTED: "-", WRONG: "!"}[cell.verdict]
    if not cell.reasons:
        return sign
    reason = f"{cell.verdict}: {'; '.join(cell.reasons[:6])}"
    return f"{sign} {notes.setdefault(reason, len(notes) + 1)}"


if __name__ == "__main__":
    main()
