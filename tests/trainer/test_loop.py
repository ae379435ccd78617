"""The loop: what it does in which order, and what comes out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoint.folder import list_complete
from launch.ranks import RankError
from parallel.layout import Layout
from tests.proof.runs import (
    GLOBAL_BATCH,
    SEQUENCE,
    Records,
    cut_short,
    run,
    run_config,
    write_corpora,
)
from tests.ranks import run_ranks
from trainer.config import RunConfig, schedule
from trainer.loop import train
from trainer.metrics.sink import StepRecord
from trainer.schedule import Anchor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_corpora(folder)
    return folder


def config_of(folder: Path, name: str, layout: Layout | None = None, **changes: Any) -> RunConfig:
    held_out = [{"name": "held-out", "path": str(folder / "held-out")}]
    return run_config(folder, layout, run__name=name, data__validation=held_out, **changes)


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[RunConfig, list[Records]]:
    """Six steps on two data ranks."""
    config = config_of(folder, "whole", eval__every=2, eval__batches=1, optimizer__clip=0.5)
    return config, run_ranks(run, 2, config)


Whole = tuple[RunConfig, list[Records]]


def test_every_step_has_one_record_in_order(whole: Whole) -> None:
    for records in whole[1]:
        assert [record.step for record in records.steps] == [1, 2, 3, 4, 5, 6]


def test_learning_rates_are_the_schedules(whole: Whole) -> None:
    config, ranks = whole
    plan = schedule(config)
    assert [record.lr for record in ranks[0].steps] == [plan.lr(step, Anchor()) for step in range(6)]


def test_all_ranks_report_the_same_numbers(whole: Whole) -> None:
    first, second = whole[1]
    for one, other in zip(first.steps, second.steps, strict=True):
        assert (one.loss, one.grad_norm, one.source_losses) == (
            other.loss,
            other.grad_norm,
            other.source_losses,
        )


def test_a_record_adds_up(whole: Whole) -> None:
    for record in whole[1][0].steps:
        assert record.source_losses.keys() == record.source_tokens.keys() == {"prose", "code"}
        assert sum(record.source_tokens.values()) == record.tokens <= GLOBAL_BATCH * SEQUENCE
        mean = sum(record.source_losses[name] * n for name, n in record.source_tokens.items()) / record.tokens
        assert record.loss == pytest.approx(mean)
        assert (record.tokens_per_second or 0) > 0 or record.step == 1  # the first step warms up
        assert 0 < record.mfu["packed"] <= record.mfu["full"]
        assert record.mfu["causal"] <= record.mfu["full"]
        assert record.step_seconds > 0
        assert record.grad_norm > 0
    assert whole[1][0].steps[-1].eta_seconds == 0


def test_the_loss_falls(whole: Whole) -> None:
    losses = whole[1][0].losses
    assert losses[6] < losses[1]


def test_the_start_says_what_runs(whole: Whole) -> None:
    info = whole[1][0].info
    assert (info.name, info.first_step, info.total_steps) == ("whole", 0, 6)
    assert info.tokens_per_step == GLOBAL_BATCH * SEQUENCE
    assert info.layout == "TP1 PP1 DP2 distributed optimizer"
    text = "\n".join(info.notes)
    for part in ("portable modules", "MFU", "2 ranks", "GFLOP/s"):
        assert part in text


def test_evaluations_come_when_they_are_due_and_at_the_end(whole: Whole) -> None:
    evaluations = whole[1][0].evaluations
    assert [evaluation.step for evaluation in evaluations] == [2, 4, 6]
    assert all(evaluation.losses.keys() == {"held-out"} for evaluation in evaluations)
    assert evaluations[-1].losses["held-out"] < evaluations[0].losses["held-out"]


def test_evaluations_do_not_change_the_training(folder: Path, whole: Whole) -> None:
    config = run_config(folder, run__name="not-evaluated", optimizer__clip=0.5)
    assert run_ranks(run, 2, config)[0].losses == whole[1][0].losses


def test_an_evaluation_is_the_same_in_every_layout(folder: Path, whole: Whole) -> None:
    layout = Layout(tensor=2, pipeline=2)
    config = config_of(folder, "other", layout, eval__every=2, eval__batches=1, optimizer__clip=0.5)
    found = run_ranks(run, 4, config)[0].evaluations
    for one, other in zip(whole[1][0].evaluations, found, strict=True):
        assert other.losses == pytest.approx(one.losses, rel=1e-6)  # fp32 adds in another order
        assert other.tokens == one.tokens


def test_checkpoints_are_saved_when_they_are_due_and_at_the_end(folder: Path) -> None:
    config = config_of(folder, "saves", checkpoint__every=4)
    records = run_ranks(run, 1, config)[0]
    assert [entry.step for entry in list_complete(config.run.checkpoints)] == [4, 6]
    assert len([event for event in records.events if event.startswith("saved step-")]) == 2


def test_old_checkpoints_go(folder: Path) -> None:
    config = config_of(folder, "keeps", checkpoint__every=1, checkpoint__keep=2, checkpoint__keep_every=3)
    run_ranks(run, 1, config)
    assert sorted(entry.step for entry in list_complete(config.run.checkpoints)) == [3, 5, 6]


def test_records_can_be_rare(folder: Path) -> None:
    records = run_ranks(run, 1, config_of(folder, "rare", metrics__every=4))[0]
    assert [record.step for record in records.steps] == [4, 6]


def test_a_run_that_is_done_does_nothing_more(folder: Path, whole: Whole) -> None:
    config = config_of(folder, "done")
    cut_short(whole[0], config, 6)
    records = run_ranks(run, 2, config)[0]
    assert records.steps == []
    assert records.info.first_step == 6
    assert [entry.step for entry in list_complete(config.run.checkpoints)] == [6]


def test_a_run_can_be_evaluated_before_its_first_step(folder: Path, whole: Whole) -> None:
    config = config_of(folder, "at-start", eval__at_start=True, eval__batches=1, train__steps=3)
    assert [e.step for e in run_ranks(run, 2, config)[0].evaluations] == [0, 3]
    goes_on = config_of(folder, "at-start", eval__at_start=True, eval__batches=1, train__steps=4)
    assert [e.step for e in run_ranks(run, 2, goes_on)[0].evaluations] == [4]


def run_without_a_disk(config: RunConfig) -> Records:
    """A file stands where the folder of checkpoints should be."""
    config.run.checkpoints.parent.mkdir(parents=True, exist_ok=True)
    config.run.checkpoints.write_text("not a folder")
    return run(config)


@pytest.mark.parametrize("every", [1, 100])
def test_a_save_that_fails_in_the_background_ends_the_run(folder: Path, every: int) -> None:
    """At the next step, or, where there is none, at the end."""
    config = config_of(folder, f"full-disk-{every}", checkpoint__every=every)
    with pytest.raises(RankError, match=r"saving step \d failed on rank 0") as error:
        run_ranks(run_without_a_disk, 1, config)
    assert error.value.message is not None
    shutil.rmtree(config.run.folder)


class Closing(Records):
    """Fails at the second record."""

    def step(self, record: StepRecord) -> None:
        if record.step == 2:
            raise KeyError("full disk")

    def close(self) -> None:
        self.events.append("closed")


def run_with_a_failing_sink(config: RunConfig) -> list[str]:
    sink = Closing()
    with pytest.raises(KeyError, match="full disk"):
        train(config, sink=sink)
    return sink.events


def test_the_sink_is_closed_when_the_run_fails(folder: Path) -> None:
    assert run_ranks(run_with_a_failing_sink, 1, config_of(folder, "failing"))[0] == ["closed"]
