"""`ratoon checkpoint diff`: two checkpoints of any formats and layouts, tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.errors import FAILED
from launch.progress import byte_progress
from launch.source_options import FactsOption, JSONOption, SpecOption, WorkersOption, parse_facts

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from checkpoint.verification.diff import TensorDifference

_SHOWN = 40


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint of any format.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    spec: SpecOption = None,
    fact: FactsOption = None,
    workers: WorkersOption = None,
    everything: Annotated[bool, typer.Option("--all", help="List equal tensors too.")] = False,
    as_json: JSONOption = False,
) -> None:
    """Compare two checkpoints of any trainers and layouts, tensor by tensor; exit 1 where they differ.

    --spec and --fact are for A where it is not Ratoon's own, otherwise for B.
    """
    from rich.console import Console

    from checkpoint.folder import is_ratoon
    from checkpoint.opening import open_checkpoint
    from checkpoint.verification.diff import diff_checkpoints

    facts = parse_facts(fact)
    of_a = not is_ratoon(a)
    ours = open_checkpoint(a, spec=spec if of_a else None, facts=facts)
    theirs = open_checkpoint(b, spec=None if of_a else spec, facts=facts)
    more = {} if workers is None else {"workers": workers}
    with byte_progress("comparing") as advance:
        found = diff_checkpoints(ours, theirs, progress=advance, **more)
    console = Console(highlight=False)
    if as_json:
        tree = [dataclasses.asdict(one) for one in found]
        console.print(json.dumps(tree, indent=2), soft_wrap=True, markup=False)
    else:
        for side, opened in (("A", ours), ("B", theirs)):
            console.print(f"{side}: {opened.format}: {opened.folder}", markup=False, soft_wrap=True)
        show(console, found, everything=everything)
    if not all(one.is_equal for one in found):
        raise typer.Exit(FAILED)


def show(console: Console, found: list[TensorDifference], *, everything: bool) -> None:
    """How many tensors have which verdict, and those that are not equal one by one."""
    from rich.text import Text

    listed = [one for one in found if everything or not one.is_equal]
    shown = listed if everything else listed[:_SHOWN]
    for name, states in groupby(shown, key=lambda one: one.name):
        console.print(Text(name), soft_wrap=True)
        for one in states:
            console.print(Text(f"  {one.state:<12}") + _verdict(one), soft_wrap=True)
    if len(listed) > len(shown):
        console.print(f"... and {len(listed) - len(shown)} more; --all lists them")
    counts = Counter(one.verdict for one in found)
    console.print(", ".join(f"{count:,} {verdict}" for verdict, count in counts.most_common()))


def _verdict(one: TensorDifference) -> Text:
    """In a word, and where both sides have numbers how many differ, how far, and the angle between them."""
    from rich.text import Text

    word = f"{one.verdict} ({one.note})" if one.note else one.verdict
    if one.verdict == "shape":
        word = f"shape {list(one.shapes[0] or ())} and {list(one.shapes[1] or ())}"
    facts = []
    if one.verdict != "equal":  # bit for bit leaves nothing to say
        facts += [f"{one.count:,} of {one.numel:,}"] if one.numel else []
        facts += [] if one.max_abs is None else [f"max abs {one.max_abs:.3g}"]
        facts += [] if one.cosine is None else [f"cosine {one.cosine:.6f}"]
    numbers = [Text(", ".join(facts))] if facts else []
    return Text("  ").join([Text(word, style="green" if one.is_equal else "red"), *numbers])
