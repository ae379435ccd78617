"""Dense evaluation where a stage begins: which steps, how much of each set; training does not notice."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from parallel.layout import Layout
from tests.proof.runs import Records, cut_short, run, run_config, write_corpora
from tests.ranks import run_ranks
from trainer.config import RunConfig
from trainer.evaluation import is_dense_step, spread
from trainer.metrics.sink import EvaluationRecord


def test_steps_double() -> None:
    assert [step for step in range(-1, 70) if is_dense_step(step, None)] == [1, 2, 4, 8, 16, 32, 64]


def test_steps_are_evenly_spaced_in_their_logarithm() -> None:
    assert [step for step in range(1, 1001) if is_dense_step(step, 1)] == [1, 10, 100, 1000]
    found = [step for step in range(1, 101) if is_dense_step(step, 3)]
    assert found == [1, 2, 5, 10, 22, 46, 100]  # 10^(1/3) = 2.15, 10^(2/3) = 4.64


@pytest.mark.parametrize("per_decade", [2, 5, 10, 50, 100])
def test_no_point_of_a_decade_is_missed(per_decade: int) -> None:
    wanted = {round(10 ** (place / per_decade)) for place in range(3 * per_decade + 1)}
    assert {step for step in range(1, 1001) if is_dense_step(step, per_decade)} == wanted


def test_a_sample_is_spread_over_the_set() -> None:
    assert list(spread(10, 4)) == [0, 2, 5, 7]
    assert list(spread(3, 4)) == list(spread(3, 3)) == [0, 1, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_corpora(folder)
    run_ranks(run, 1, config_of(folder, "base", train__steps=3))
    return folder


def config_of(folder: Path, name: str, layout: Layout | None = None, **changes: Any) -> RunConfig:
    sets = [
        {"name": "held-out", "path": str(folder / "held-out"), "source": "prose"},
        {"name": "old", "path": str(folder / "code")},
    ]
    data = {
        "sequence_length": 32,
        "sources": [{"name": "prose", "path": str(folder / "prose")}],
        "validation": sets,
    }
    return run_config(folder, layout, run__name=name, data=data, **changes)


def continued(folder: Path, name: str, layout: Layout | None = None, **changes: Any) -> RunConfig:
    """Seven steps from step 3 on."""
    checkpoint = {"load": folder / "base", "every": 4, "keep": 9}
    return config_of(folder, name, layout, train__steps=10, checkpoint=checkpoint, **changes)


@pytest.fixture(scope="module")
def dense(folder: Path) -> Records:
    return run_ranks(run, 1, continued(folder, "dense", eval__dense_batches=1, eval__every=5))[0]


def test_a_stage_from_a_checkpoint_is_evaluated_densely(dense: Records) -> None:
    found = [(one.step, one.dense) for one in dense.evaluations]
    assert found == [(3, False), (4, True), (5, False), (7, True), (10, False)]


def test_a_new_run_is_not(folder: Path) -> None:
    records = run_ranks(run, 1, config_of(folder, "new", train__steps=3))[0]
    assert [(one.step, one.dense) for one in records.evaluations] == [(3, False)]
    assert records.evaluations[0].dense_losses == {}
    assert records.evaluations[0].roles == {"held-out": "trained", "old": "unseen"}


def test_every_evaluation_says_what_a_dense_one_would_have(dense: Records) -> None:
    for one in dense.evaluations:
        assert one.dense_losses.keys() == {"held-out", "old"}
        assert one.losses.keys() == (set() if one.dense else {"held-out", "old"})
        assert len(set(map(tuple, [sorted(one.dense_tokens.items()) for one in dense.evaluations]))) == 1
    start = dense.evaluations[0]
    assert start.dense_tokens["old"] < start.tokens["old"]


def test_sets_belong_to_sources(dense: Records) -> None:
    for one in dense.evaluations:
        assert one.sources == {"held-out": "prose", "old": "old"}
        assert one.roles == {"held-out": "trained", "old": "old"}


def test_bits_per_byte_are_those_of_a_tokenizer_of_bytes(dense: Records) -> None:
    """Its tokens are bytes, so bits per byte are nats per token over ln 2."""
    for one in dense.evaluations:
        for name, loss in one.losses.items():
            assert (
                one.text_bytes[name] == one.tokens[name]
            )  # the corpora have no markers of their documents' ends
            assert one.bits_per_byte[name] == pytest.approx(loss / math.log(2))


def test_training_does_not_notice(folder: Path, dense: Records) -> None:
    bare = run_ranks(run, 1, continued(folder, "bare", eval__dense=False, eval__at_start=False))[0]
    assert bare.losses == dense.losses
    assert [one.step for one in bare.evaluations] == [10]


def test_a_run_that_goes_on_counts_from_where_its_stage_began(folder: Path, dense: Records) -> None:
    config = continued(folder, "goes-on", eval__dense_batches=1, eval__every=5)
    cut_short(continued(folder, "dense"), config, 8)
    records = run_ranks(run, 1, config)[0]
    assert [(one.step, one.dense) for one in records.evaluations] == [(10, False)]
    early = continued(folder, "goes-on-early", eval__dense_batches=1, eval__every=5)
    cut_short(continued(folder, "dense"), early, 4)
    records = run_ranks(run, 1, early)[0]
    assert steps_of(records.evaluations) == steps_of(dense.evaluations)[2:]


def steps_of(evaluations: list[EvaluationRecord]) -> list[tuple[int, bool]]:
    return [(one.step, one.dense) for one in evaluations]


def test_bytes_and_losses_do_not_depend_on_the_layout(folder: Path, dense: Records) -> None:
    config = continued(folder, "other", Layout(tensor=2), eval__dense_batches=1, eval__every=5)
    found = run_ranks(run, 4, config)[0].evaluations
    for one, other in zip(dense.evaluations, found, strict=True):
        assert (other.text_bytes, other.dense_tokens) == (one.text_bytes, one.dense_tokens)
        assert other.dense_losses == pytest.approx(one.dense_losses, rel=1e-5)  # fp32 adds in another order
        assert other.bits_per_byte == pytest.approx(one.bits_per_byte, rel=1e-5)
