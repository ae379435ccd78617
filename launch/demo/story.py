"""What the demo says on screen, around what its runs say themselves. Fits 80 columns."""

from __future__ import annotations

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
from launch.demo.plan import Plan
from launch.terminal import count, duration
from parallel.layout import Layout

WIDTH = 80
_BARS = "▁▂▃▄▅▆▇█"
_LAYERS = 4


class Story:
    """Prints the demo's chapters."""

    def __init__(self, plan: Plan, console: Console | None = None) -> None:
        """Tell of `plan` on `console`; standard output by default."""
        self._plan = plan
        self._console = console or Console(highlight=False)
        self._chapter = 0

    def opening(self) -> None:
        """What is going to happen, and where."""
        plan = self._plan
        where = "on the CPU" if not plan.gpu else "with a GPU each"
        self._say(
            f"A small Llama learns prose, stops, and goes on with code in the mixture: another layout, a new "
            f"schedule, the same weights. {_ranks(plan.ranks)} {where}, {plan.precision}. "
            f"Everything goes to {shown(plan.folder)}."
        )
        if plan.ranks == 1:
            self._say(
                "With one rank there is one layout only; --ranks 4 shows how a model is split and split anew"
                + (", on the CPU where there are not as many GPUs." if plan.gpu else ".")
            )

    def corpora(self, corpora: Sequence[Corpus], vocabulary: int) -> None:
        """What the text came to."""
        self._heading("Text becomes tokens")
        self._say(
            "Prose is Python's own reference, code is its standard library; no download. A byte-pair "
            f"tokenizer of {vocabulary:,} tokens has been trained on both. A tenth of the documents is held "
            "out: no stage trains on them, every loss below is measured on them."
        )
        table = Table(box=SIMPLE_HEAD)
        table.add_column("corpus")
        for heading in ("documents", "tokens", "held out", "bytes a token"):
            table.add_column(heading, justify="right")
        for corpus in corpora:
            report = corpus.report
            table.add_row(
                corpus.name,
                f"{report.documents:,}",
                count(report.tokens),
                count(report.validation_tokens),
                f"{report.text_bytes / report.tokens:.2f}",
            )
        self._console.print(table)

    def stage(self, stage: int) -> None:
        """What this stage does, and the command that does it."""
        plan = self._plan
        before, layout = plan.layouts[0], plan.layouts[stage]
        name = layout.describe(plan.ranks).removesuffix(" distributed optimizer")
        if stage == 0:
            self._heading(f"Stage 1: prose, on {name}")
            self._say(_STAGE_1)
        else:
            self._heading(f"Stage 2: prose and code, on {name}")
            self._say(_STAGE_2)
            if layout != before:
                self._say(_RESHARDING)
        if plan.ranks > 1:
            self._console.print(layout_table(layout, plan.ranks))
        self._command(f"ratoon train {shown(plan.run_files[stage])} --ranks {plan.ranks}")

    def outcome(self, outcome: Outcome, checks: Sequence[Check]) -> None:
        """Losses at every turn, the curves, and what has been checked."""
        self._heading("What came of it")
        self._console.print(outcome_table(outcome))
        self._curves()
        prose = outcome.finished["prose"] - outcome.resumed["prose"]
        verb = "kept and improved its" if prose < 0 else "lost some of its"
        self._say(f"While it learned code, the model {verb} prose: {prose:+.3f} nats a token in stage 2.")
        for check in checks:
            mark = Text("PASS ", "bold green") if check.passed else Text("FAIL ", "bold red")
            self._console.print(mark + Text(check.text, "default"), width=self._width)
        self._console.print()

    def closing(self, seconds: float) -> None:
        """Where things are, and what to try next."""
        plan = self._plan
        first, second = plan.run_folders
        self._heading(f"Done in {duration(seconds)}. Look around, and go on")
        more = plan.last_steps[1] + plan.size.second_steps
        rows = [
            ("TensorBoard", f"tensorboard --logdir {shown(plan.folder)}"),
            ("metrics", f"{shown(first / 'metrics.jsonl')}\n{shown(second / 'metrics.jsonl')}"),
            ("checkpoints", f"ratoon checkpoint inspect {shown(second)}"),
            ("the run, planned", f"ratoon check {shown(plan.run_files[1])} --ranks {plan.ranks}"),
            ("train it longer", f"ratoon train {shown(plan.run_files[1])} --set train.steps={more}"),
            ("your own text", "ratoon data prepare FOLDER --output PREFIX --tokenizer TOKENIZER.json"),
        ]
        for label, command in rows:
            self._console.print(Text(label, "dim"))
            for line in command.splitlines():
                self._console.print(Text(f"  {line}"), soft_wrap=True)

    @property
    def _width(self) -> int:
        return min(WIDTH, self._console.width)

    def _heading(self, text: str) -> None:
        self._chapter += 1
        self._console.print()
        self._console.print(Text(f"{self._chapter}. {text}", "bold cyan"), width=self._width)

    def _say(self, text: str) -> None:
        self._console.print(Text(text), width=self._width)

    def _command(self, text: str) -> None:
        self._console.print(Text(f"$ {text}", "bold"), soft_wrap=True)

    def _curves(self) -> None:
        """Learning rate and training loss of both stages, where the output has the characters for it."""
        if not (self._console.encoding or "").lower().startswith("utf"):
            return
        stages = [curve(folder) for folder in self._plan.run_folders]
        for column, label in enumerate(("learning rate", "loss on prose")):
            series = [[point[column] for point in stage] for stage in stages]
            self._console.print(Text(f"{label:>15}  ", "dim") + Text(sparklines(series), "cyan"))
        self._console.print()


_STAGE_1 = (
    "A layout says how ranks share the work. Tensor parallelism (TP) splits every matrix, pipeline "
    "parallelism (PP) splits the layers, data parallelism (DP) gives each copy of the model its own text. "
    "The learning rate warms up and decays."
)
_STAGE_2 = (
    "A stage change: 70% of the sequences are code now, and 30% prose against forgetting. The learning rate "
    "had decayed too far to learn much, so it is re-warmed: it rises from where it ended and decays again, "
    "while weights and Adam's moments stay."
)
_RESHARDING = (
    "The checkpoint knows no layout: each rank reads exactly the pieces that it needs. Before its first step "
    "the run measures the held-out losses, which must be those that stage 1 ended with."
)


def shown(path: Path) -> str:
    """`path` as one would type it here: relative where it lies below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def layout_table(layout: Layout, ranks: int) -> Table:
    """What every rank holds, in words."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("rank", justify="right")
    for heading in ("layers (PP)", "of each matrix (TP)", "copy of the model (DP)"):
        table.add_column(heading)
    share = _LAYERS // layout.pipeline
    for rank in range(ranks):
        place = place_of(layout, rank, ranks)
        first = place["pipeline"] * share + 1
        table.add_row(
            str(rank),
            f"{first} to {first + share - 1}",
            ("first half", "second half")[place["tensor"]] if layout.tensor == 2 else "all",
            f"{place['data'] + 1} of {layout.data(ranks)}",
        )
    return table


def outcome_table(outcome: Outcome) -> Table:
    """Held-out losses at every turn."""
    table = Table(box=SIMPLE_HEAD, title="held-out loss, nats a token", title_justify="left")
    table.add_column("")
    for name in outcome.unigram:
        table.add_column(name, justify="right")
    rows = {
        "a model that knows the tokens' frequencies": outcome.unigram,
        "before training": outcome.untrained,
        "after stage 1, prose": outcome.learned,
        "loaded on the second layout": outcome.resumed,
        "after stage 2, prose and code": outcome.finished,
    }
    for label, losses in rows.items():
        table.add_row(label, *(f"{losses[name]:.5f}" for name in outcome.unigram))
    return table


def sparklines(series: Sequence[Sequence[float]], width: int = 60) -> str:
    """Curves side by side on one scale, `width` characters together, each point a mean over its share."""
    points = sum(map(len, series))
    low, high = min(map(min, series)), max(map(max, series))
    drawn = []
    for values in series:
        cells = max(1, min(len(values), round(width * len(values) / points)))
        edges = [round(cell * len(values) / cells) for cell in range(cells + 1)]
        means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
        top = len(_BARS) - 1
        drawn.append("".join(_BARS[round(top * (mean - low) / (high - low or 1))] for mean in means))
    return " ".join(drawn)


def _ranks(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"
