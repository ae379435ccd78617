"""`ratoon demo`: prepare, train two ways to go on with other data on another layout, compare."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import typer
from rich.console import Console

from launch.demo import texts
from launch.demo.corpus import (
    DOCUMENT_CHARACTERS,
    Corpus,
    prepare_corpus,
    unigram_loss,
    write_prose,
)
from launch.demo.outcome import checks, read_outcome, read_reports, second_stages
from launch.demo.plan import (
    FAST,
    FULL,
    STAGES,
    VOCABULARY,
    WAYS,
    Plan,
    choose_folder,
    choose_layouts,
    choose_ranks,
)
from launch.demo.run_files import write_run_files
from launch.demo.story import Story
from launch.environment import read_environment
from launch.errors import FAILED
from launch.train_command import train
from trainer.forgetting.picture import write_comparison


def demo(folder: Path, *, ranks: int | None = None, fast: bool = False, seed: int = 1234) -> None:
    """Run the whole demo in `folder`, or in a new folder inside it where it holds something already.

    Raises:
        ValueError: before anything is written, when it cannot run like this.
        RankError: from the first rank that failed.
        typer.Exit: with FAILED, when what it promises did not come true.
    """
    began = time.monotonic()
    plan = make_plan(folder, ranks=ranks, fast=fast, seed=seed)
    story = Story(plan)
    story.opening(folder)
    corpora = prepare_text(plan)
    story.corpora(corpora)
    unigram = {corpus.name: unigram_loss(corpus.prefix, corpus.held_out, VOCABULARY) for corpus in corpora}
    write_run_files(plan)
    for way in WAYS:
        story.way(way)
        train(plan.run_file(way), [], ranks=plan.ranks)
    passed = conclude(plan, story, unigram, full=not fast)
    story.closing(time.monotonic() - began)
    if not passed:
        raise typer.Exit(FAILED)


def conclude(plan: Plan, story: Story, unigram: Mapping[str, float], *, full: bool) -> bool:
    """Compare the two runs, draw and tell it; whether all that the demo promises came true."""
    reports = read_reports(plan)
    outcome = read_outcome(reports, unigram)
    write_comparison(second_stages(reports), plan.picture)
    found = checks(plan, outcome, full=full)
    story.outcome(outcome, found)
    return all(check.passed for check in found)


def make_plan(folder: Path, *, ranks: int | None, fast: bool, seed: int) -> Plan:
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
        seed=seed,
    )


def prepare_text(plan: Plan) -> list[Corpus]:
    """Write the text, train a tokenizer on it, and prepare both corpora.

    Modules are cut into pieces of the size of the prose's: whole ones would fill twenty batches in a row.
    """
    from trainer.data.train_tokenizer import train_bpe

    plan.data.mkdir(parents=True)
    paths = {name: plan.data / f"{name}.jsonl" for name in STAGES}
    write_prose(paths["prose"])
    texts.write_records(
        paths["code"],
        (
            {"url": record["url"], "text": piece}
            for record in texts.code()
            for piece in texts.pieces(record["text"], DOCUMENT_CHARACTERS)
        ),
    )
    train_bpe([str(path) for path in paths.values()], str(plan.tokenizer), vocab_size=VOCABULARY)
    return [
        prepare_corpus(name, [str(path)], plan.data, tokenizer=str(plan.tokenizer))
        for name, path in paths.items()
    ]
