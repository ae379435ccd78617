"""What the demo says around what its runs say themselves. Fits 80 columns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.check_command import place_of
from launch.demo.corpus import Corpus
from launch.demo.outcome import OLD, Check, Course, Outcome
from launch.demo.panels import Panel, panel_lines, sparklines
from launch.demo.plan import FAST, INFINITE, NUM_LAYERS, REWARM, STAGES, VOCABULARY, WAYS, Plan, Way
from launch.terminal import count, duration
from parallel.layout import Layout

WIDTH = 80
OPENING = (
    "A small Llama learns prose, then code, in two ways: one forgets more of the prose, the other less. Each "
    "way is one run file of two stages; between them the layout changes."
)
TOKENS = (
    "Prose is Python's own reference, code its standard library; nothing is downloaded. A byte-pair "
    f"tokenizer of {VOCABULARY:,} tokens has been trained on both. A tenth of the documents is held out: no "
    "run trains on them, and the losses below are theirs."
)
STORIES = {
    REWARM: (
        "On prose the learning rate warms up and falls along a cosine, to a tenth. On code it is warmed up "
        "again to the same peak and falls along a second cosine. Weights and Adam's moments stay. No prose "
        "is read again."
    ),
    INFINITE: (
        "On prose the learning rate warms up, falls to one half and stays there. On code it still stays, so "
        "that nothing is warmed up, until the last steps anneal it. One sequence in ten is prose again: "
        "code gets that much less, the steps are as many."
    ),
}
LAYOUTS = (
    "A layout says which layers a rank holds (pipeline parallelism, PP), which part of every matrix (tensor, "
    "TP), and which copy of the model, each with text of its own (data, DP). The checkpoint between the "
    "stages belongs to no layout: each rank reads the pieces that it needs."
)
CAVEAT = (
    "Two things differ, the schedule and the replay. Which of them did it, a third run tells: only replay, "
    "in the last lines. When stage 2 begins, re-warm has annealed what it knows and infinite has not; at "
    "the end both have, after as many tokens."
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
        self._say(f"{OPENING} {ranks} {device}, {plan.precision}, seed {plan.seed}.")
        if plan.ranks == 1:
            self._say("One rank has one layout only. To see a model split and split anew: --ranks 4.")
        if plan.size == FAST:
            self._say("A few steps only: enough to see that it runs, too few to learn or forget much.")
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

    def way(self, way: Way) -> None:
        """What this run does, and the command that does it."""
        plan = self._plan
        self._heading(f"Prose, then code: {way.label}")
        self._say(STORIES[way])
        if way == WAYS[0] and plan.ranks > 1:
            self._say(LAYOUTS)
            self._console.print(layout_table(plan))
        command = f"$ ratoon train {shown(plan.run_file(way))} --ranks {plan.ranks}"
        self._console.print(Text(command, "bold"), soft_wrap=True)

    def outcome(self, outcome: Outcome, checks: Sequence[Check]) -> None:
        """The curves, the losses at every turn, and what has been checked."""
        self._heading("What was forgotten, and what was learned")
        self._curves(outcome)
        self._console.print(outcome_table(outcome))
        for sentence in comparison(outcome):
            self._say(sentence)
        self._say("Too few steps to compare the two." if self._plan.size == FAST else CAVEAT)
        self._console.print()
        self._console.print(check_list(checks), width=self._width)

    def closing(self, seconds: float) -> None:
        """Where things are, and what to try next."""
        plan = self._plan
        files, folders = zip(
            *((shown(plan.run_file(way)), shown(plan.run_folder(way))) for way in WAYS), strict=True
        )

        def afresh(name: str) -> str:
            return f"--set run.dir={shown(plan.folder / name)}"

        replay = f"{afresh('replay')} --set stage.1.mixture.weights.prose=0.11"
        self._heading(f"Done in {duration(seconds)}: where things are, and how to go on")
        rows = [
            ("picture", shown(plan.picture)),
            ("what they forgot", f"ratoon report forgetting {' '.join(folders)}"),
            ("what is kept", f"ratoon plan-resume {files[0]} --ranks {plan.ranks} {afresh('again')}"),
            ("what was read", f"ratoon data ledger {folders[1]}"),
            ("learning rates", f"ratoon plot schedule {files[1]}"),
            ("look inside", f"ratoon checkpoint inspect {folders[1]}/code"),
            ("all curves", f"tensorboard --logdir {shown(plan.folder)}"),
            ("only replay", f"ratoon train {files[0]} --ranks {plan.ranks} {replay}"),
            ("other methods", "ratoon recipe"),
            ("your own text", "ratoon data prepare --help"),
        ]
        for label, text in rows:
            self._console.print(Text(f"{label:<18}", "dim") + Text(text, "default"), soft_wrap=True)

    @property
    def _width(self) -> int:
        return min(WIDTH, self._console.width)

    def _heading(self, text: str) -> None:
        self._chapter += 1
        self._console.print()
        self._console.print(Text(f"{self._chapter}. {text}", "bold cyan"), width=self._width)

    def _say(self, text: str) -> None:
        self._console.print(Text(text), width=self._width)

    def _curves(self, outcome: Outcome) -> None:
        """Both ways beside each other: the old source, the new one; under them the learning rates."""
        ascii_only = self._console.options.ascii_only
        for name in STAGES:
            kind = "old" if name == OLD else "new"
            self._console.print(
                Text(f"held-out {name} ({kind}) in stage 2, nats a token; dotted: where it began", "cyan")
            )
            panels = [Panel(f"{way.label}", one[name].curve) for way, one in outcome.courses.items()]
            for line in panel_lines(panels, self._width, ascii_only=ascii_only):
                self._console.print(Text(line), soft_wrap=True)
        if ascii_only:
            return
        self._console.print(Text("learning rate over both stages", "cyan"))
        top = max(rate for stages in outcome.rates.values() for rates in stages for rate in rates)
        for way, stages in outcome.rates.items():
            line = sparklines(stages, top=top)
            self._console.print(Text(f"{way.label:>24}  ", "dim") + Text(line, "default"), soft_wrap=True)


def shown(path: Path) -> str:
    """`path` as one would type it here: relative where it lies below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def layout_table(plan: Plan) -> Table:
    """What every rank holds in each stage, in words."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("rank", justify="right")
    for stage, name in enumerate(STAGES):
        table.add_column(f"{name}: {plan.layout_name(stage)}")
    for rank in range(plan.ranks):
        table.add_row(str(rank), *(_part(layout, rank, plan.ranks) for layout in plan.layouts))
    return table


def _part(layout: Layout, rank: int, ranks: int) -> str:
    place, share = place_of(layout, rank, ranks), NUM_LAYERS // layout.pipeline
    first, last = place["pipeline"] * share + 1, (place["pipeline"] + 1) * share
    layers = f"layers {first}-{last}" if last > first else f"layer {first}"
    return (
        f"{layers}, part {place['tensor'] + 1}/{layout.tensor}, copy {place['data'] + 1}/{layout.data(ranks)}"
    )


def outcome_table(outcome: Outcome) -> Table:
    """Losses where stage 2 began, where they were worst, and at its end, in both units."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("held-out loss\nin stage 2")
    for heading in ("nats/token\nstart", "\npeak", "\nend", "bits/byte\nstart", "\npeak", "\nend"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in STAGES:
        for way, one in outcome.courses.items():
            course = one[name]
            turns = (course.start, course.peak[1], course.end)
            cells = [f"{loss:.3f}" for loss in turns] + [f"{loss * course.bits:.3f}" for loss in turns]
            table.add_row(f"{name}, {way.short}", *cells)
    return table


def comparison(outcome: Outcome) -> list[str]:
    """What each way did better, whichever it is."""
    return [_compared(name, outcome) for name in STAGES]


def _compared(name: str, outcome: Outcome) -> str:
    better, worse = sorted(WAYS, key=lambda way: outcome.courses[way][name].end)
    low, high = (outcome.courses[way][name] for way in (better, worse))
    if name == OLD:
        how = f"{better.short} {_moved(low)}; {worse.short} {_moved(high)}"
    else:
        how = f"{low.end:.3f} against {high.end:.3f}"
    return f"{name.capitalize()} ends {high.end - low.end:.3f} nats lower with {better.label}: {how}."


def _moved(course: Course) -> str:
    step, peak = course.peak
    worst = f"{peak - course.start:+.3f} at its worst, after step {step}" if step else "never above"
    return f"{course.rise:+.3f} since stage 2 began, {worst}"


def check_list(checks: Sequence[Check]) -> Table:
    """PASS or FAIL before each check."""
    grid = Table.grid(padding=(0, 2))
    for check in checks:
        mark = Text("PASS", "bold green") if check.passed else Text("FAIL", "bold red")
        grid.add_row(mark, Text(check.text))
    return grid
