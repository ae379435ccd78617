"""`ratoon demo`: prepare, train, stop, resume on another layout with other data, compare."""

from __future__ import annotations

import time
from pathlib import Path

import typer
from rich.console import Console

from launch.demo.corpus import Corpus, choose_code, prepare_corpus, unigram_loss, write_prose
from launch.demo.outcome import checks, read_outcome
from launch.demo.plan import FAST, FULL, VOCABULARY, Plan, choose_folder, choose_layouts, choose_ranks
from launch.demo.run_files import write_run_files
from launch.demo.story import Story
from launch.environment import read_environment
from launch.errors import FAILED
from launch.train_command import train


def demo(folder: Path, *, ranks: int | None = None, fast: bool = False) -> None:
    """Run the whole demo in `folder`, or in a new folder inside it where it holds something already.

    Raises:
        ValueError: before anything is written, when it cannot run like this.
        RankError: from the first rank that failed.
        typer.Exit: with FAILED, when what it promises did not come true.
    """
    began = time.monotonic()
    plan = make_plan(folder, ranks=ranks, fast=fast)
    story = Story(plan)
    story.opening(folder)
    corpora = prepare_text(plan)
    story.corpora(corpora)
    unigram = {corpus.name: unigram_loss(corpus.prefix, corpus.held_out, VOCABULARY) for corpus in corpora}
    write_run_files(plan)
    for stage, run_file in enumerate(plan.run_files):
        story.stage(stage)
        train(run_file, [], ranks=plan.ranks)
    outcome = read_outcome(plan, unigram)
    found = checks(plan, outcome, full=not fast)
    story.outcome(outcome, found)
    story.closing(time.monotonic() - began)
    if not all(check.passed for check in found):
        raise typer.Exit(FAILED)


def make_plan(folder: Path, *, ranks: int | None, fast: bool) -> Plan:
    """Choose ranks, layouts and size for this machine.

    Raises:
        ValueError: under a launcher that has started ranks itself, or for a number of ranks without layouts.
    """
    environment = read_environment()
    if environment.launcher != "local":
        raise ValueError(
            f"ratoon demo starts its own ranks and found those of {environment.launcher}: run it without"
        )
    ranks = choose_ranks(ranks, environment.gpus)
    return Plan(
        folder=choose_folder(folder),
        ranks=ranks,
        layouts=choose_layouts(ranks),
        gpu=environment.gpus >= ranks,
        size=FAST if fast else FULL,
        record_every=1 if fast or Console().is_terminal else 10,  # a live line, or lines that scroll by
    )


def prepare_text(plan: Plan) -> list[Corpus]:
    """Write the text, train a tokenizer on it, and prepare both corpora."""
    from trainer.data.train_tokenizer import train_bpe

    plan.data.mkdir(parents=True)
    prose = plan.data / "prose.jsonl"
    write_prose(prose)
    texts = {"prose": [str(prose)], "code": choose_code()}
    train_bpe(
        [path for paths in texts.values() for path in paths], str(plan.tokenizer), vocab_size=VOCABULARY
    )
    return [
        prepare_corpus(name, inputs, plan.data, tokenizer=str(plan.tokenizer))
        for name, inputs in texts.items()
    ]
