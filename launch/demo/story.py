"""What the demo says around what its runs say themselves. Fits 80 columns."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.check_command import place_of
from launch.demo.corpus import Corpus
from launch.demo.outcome import Check, Outcome, curve
from launch.demo.plan import FAST, NUM_LAYERS, VOCABULARY, Plan
from launch.terminal import count, duration
from parallel.layout import Layout

WIDTH = 80
BARS = "▁▂▃▄▅▆▇█"

TOKENS = (
    "Prose is Python's own reference, code its standard library; nothing is downloaded. A byte-pair "
    f"tokenizer of {VOCABULARY:,} tokens has been trained on both. A tenth of the documents is held out: no "
    "run trains on them, and the losses below are theirs."
)
STAGE_1 = (
    "A layout says how ranks share the work. Tensor parallelism (TP) splits every matrix, pipeline "
    "parallelism (PP) splits the layers, data parallelism (DP) gives each copy of the model text of its own."
)
STAGE_2 = (
    "A stage change: from here on 70% of the sequences are code, and 30% prose against forgetting. The "
    "learning rate has decayed too far to learn much that is new, so it is re-warmed: it rises from where it "
    "ended and decays again. Weights and Adam's moments stay."
)
RESHARDING = (
    "The checkpoint belongs to no layout: each rank reads the pieces that it needs. Before the first step "
    "the run measures the held-out losses, which must be those that stage 1 ended with."
)


class Story:
    """Prints the demo's chapters."""

    def __init__(self, plan: Plan, console: Console | None = None) -> None:
        """Tell of `plan` on `console`; standard output by default."""
        self._plan = plan
        self._console = console or Console(highlight=False)
        self._chapter = 0

    def opening(self, wanted: Path) -> None:
        """What is going to happen, and where; `wanted` is the folder that was asked for."""
        plan = self._plan
        ranks = "1 rank" if plan.ranks == 1 else f"{plan.ranks} ranks"
        device = "with a GPU each" if plan.gpu else "on the CPU"
        self._say(
            "A small Llama learns prose, stops, and goes on with code in its mixture: other data, a new "
            f"schedule, another layout, the same weights. {ranks} {device}, {plan.precision}."
        )
        if plan.ranks == 1:
            self._say("One rank has one layout only. To see a model split and split anew: --ranks 4.")
        if plan.size == FAST:
            self._say("A few steps only: enough to see that it runs, too few to learn much.")
        reason = "" if plan.folder == wanted.absolute() else f", since {shown(wanted)} is not empty"
        self._say(f"Everything goes to {shown(plan.folder)}{reason}.")

    def corpora(self, corpora: Sequence[Corpus]) -> None:
        """What the text has come to."""
        self._heading("Text becomes tokens")
        self._say(TOKENS)
        table = Table(box=SIMPLE_HEAD)
        table.add_column("corpus")
        for heading in ("documents", "tokens", "of these held out", "bytes a token"):
            table.add_column(heading, justify="right")
        for corpus in corpora:
            report = corpus.report
            tokens, held_out = count(report.tokens), count(report.validation_tokens)
            size = f"{report.text_bytes / report.tokens:.2f}"
            table.add_row(corpus.name, f"{report.documents:,}", tokens, held_out, size)
        self._console.print(table)

    def stage(self, stage: int) -> None:
        """What this stage does, and the command that does it."""
        plan = self._plan
        title = ("Stage 1: prose", "Stage 2: prose and code")[stage]
        self._heading(f"{title}, on {plan.layout_name(stage)}")
        self._say((STAGE_1, STAGE_2)[stage])
        if stage == 1:
            self._say(RESHARDING)
        if plan.ranks > 1:
            self._console.print(layout_table(plan.layouts[stage], plan.ranks))
        command = f"$ ratoon train {shown(plan.run_files[stage])} --ranks {plan.ranks}"
        self._console.print(Text(command, "bold"), soft_wrap=True)

    def outcome(self, outcome: Outcome, checks: Sequence[Check]) -> None:
        """Losses at every turn, the curves, and what has been checked."""
        self._heading("What came of it")
        self._console.print(outcome_table(outcome))
        self._curves()
        guessing, learned = (math.exp(losses["prose"]) for losses in (outcome.unigram, outcome.learned))
        self._say(
            f"After stage 1 the next token of unseen prose was as uncertain as one of {learned:,.0f} equally "
            f"likely ones; {guessing:,.0f} is what frequencies alone give. Stage 2 then moved the loss on "
            f"prose by {outcome.finished['prose'] - outcome.resumed['prose']:+.3f}, while it learned code."
        )
        self._console.print()
        self._console.print(check_list(checks), width=self._width)

    def closing(self, seconds: float) -> None:
        """Where things are, and what to try next."""
        plan = self._plan
        second = shown(plan.run_files[1])
        more = plan.last_steps[1] + plan.size.second_steps
        self._heading(f"Done in {duration(seconds)}: where things are, and how to go on")
        rows = [
            ("curves", f"tensorboard --logdir {shown(plan.folder)}"),
            *(("metrics", shown(folder / "metrics.jsonl")) for folder in plan.run_folders),
            *(("checkpoints", shown(folder / "checkpoints")) for folder in plan.run_folders),
            ("look inside", f"ratoon checkpoint inspect {shown(plan.run_folders[1])}"),
            ("plan a run", f"ratoon check {second} --ranks {plan.ranks}"),
            ("train longer", f"ratoon train {second} --ranks {plan.ranks} --set train.steps={more}"),
            ("your own text", "ratoon data prepare --help"),
        ]
        for label, text in rows:
            self._console.print(Text(f"{label:<15}", "dim") + Text(text, "default"), soft_wrap=True)

    @property
    def _width(self) -> int:
        return min(WIDTH, self._console.width)

    def _heading(self, text: str) -> None:
        self._chapter += 1
        self._console.print()
        self._console.print(Text(f"{self._chapter}. {text}", "bold cyan"), width=self._width)

    def _say(self, text: str) -> None:
        self._console.print(Text(text), width=self._width)

    def _curves(self) -> None:
        """Learning rate and training loss of both stages, where the output has the characters for it."""
        if not self._console.encoding.startswith("utf"):
            return
        stages = [curve(folder) for folder in self._plan.run_folders]
        for column, label in enumerate(("learning rate", "loss on prose")):
            line = sparklines([[point[column] for point in stage] for stage in stages])
            self._console.print(Text(f"  {label}  ", "dim") + Text(line, "cyan"))
        self._console.print()


def shown(path: Path) -> str:
    """`path` as one would type it here: relative where it lies below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def layout_table(layout: Layout, ranks: int) -> Table:
    """What every rank holds, in words."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("rank", justify="right")
    for heading in ("layers (PP)", "of every matrix (TP)", "copy of the model (DP)"):
        table.add_column(heading)
    share = NUM_LAYERS // layout.pipeline
    for rank in range(ranks):
        place = place_of(layout, rank, ranks)
        first = place["pipeline"] * share + 1
        table.add_row(
            str(rank),
            f"{first} to {first + share - 1}",
            "all" if layout.tensor == 1 else f"part {place['tensor'] + 1} of {layout.tensor}",
            f"{place['data'] + 1} of {layout.data(ranks)}",
        )
    return table


def outcome_table(outcome: Outcome) -> Table:
    """Held-out losses at every turn."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("held-out loss, nats a token")
    for name in outcome.unigram:
        table.add_column(name, justify="right")
    rows = {
        "knowing the tokens' frequencies alone": outcome.unigram,
        "before training": outcome.untrained,
        "after stage 1, prose": outcome.learned,
        "loaded for stage 2": outcome.resumed,
        "after stage 2, prose and code": outcome.finished,
    }
    for label, losses in rows.items():
        table.add_row(label, *(f"{losses[name]:.5f}" for name in outcome.unigram))
    return table


def check_list(checks: Sequence[Check]) -> Table:
    """PASS or FAIL before each check."""
    grid = Table.grid(padding=(0, 2))
    for check in checks:
        mark = Text("PASS", "bold green") if check.passed else Text("FAIL", "bold red")
        grid.add_row(mark, Text(check.text))
    return grid


def sparklines(series: Sequence[Sequence[float]], width: int = 60) -> str:
    """Curves side by side on one scale, `width` characters together; each is a mean over its points."""
    points = sum(map(len, series))
    low, high = min(map(min, series)), max(map(max, series))
    top = len(BARS) - 1
    drawn = []
    for values in series:
        cells = max(1, min(len(values), width * len(values) // points))
        edges = [cell * len(values) // cells for cell in range(cells + 1)]
        means = [sum(values[begin:end]) / (end - begin) for begin, end in pairwise(edges)]
        drawn.append("".join(BARS[round(top * (mean - low) / ((high - low) or 1))] for mean in means))
    return " ".join(drawn)
