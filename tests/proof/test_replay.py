"""A run that replays what it has read: on disk, refreshed, gone on with on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoint.folder import read_manifest
from launch.data_ledger import show_ledger
from tests.data.corpora import ragged, write_tokens
from tests.proof.gather import different
from tests.proof.runs import (
    Records,
    checkpoint,
    cut_short,
    read_checkpoint,
    run,
    run_config,
    write_corpora,
)
from tests.ranks import run_ranks
from trainer.config import RunConfig
from trainer.data.ledger import Ledger

FIRST, STEPS, STOP = 4, 13, 9
"""the stop is one step after a new sample is read, and one before that of the next is taken"""
RESERVOIR = {"of": ["prose", "code"], "reservoir_tokens": 400, "refresh_every": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay-runs")
    write_corpora(path)
    write_tokens(path / "prose-v", [[t % 250 for t in one] for one in ragged(20, seed=10, longest=50)])
    before = run_config(
        path,
        run__name="before",
        data__sources=[{"name": "prose", "path": str(path / "prose")}],
        train__steps=FIRST,
        checkpoint__every=FIRST,
    )
    run_ranks(run, 1, before)
    return path


def second(folder: Path, name: str, replay: dict[str, Any], **more: Any) -> RunConfig:
    sources = [
        {"name": "code", "path": str(folder / "code")},
        {"name": "again", "replay": replay, "per_batch": 2},
    ]
    settings: dict[str, Any] = {
        "data__sources": sources,
        "data__validation": [{"name": "prose", "path": str(folder / "prose-v")}],
        "checkpoint__load": str(folder / "before" / "checkpoints"),
        "checkpoint__every": 1,
        "checkpoint__keep": 20,
        "start__policy": "rewarm",
        "train__steps": STEPS,
        "eval__batches": 1,
        "eval__dense": False,
    }
    return run_config(folder, run__name=name, **settings | more)


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[RunConfig, Records]:
    config = second(folder, "whole", RESERVOIR)
    return config, run_ranks(run, 2, config)[0]


def data(config: RunConfig, step: int) -> dict[str, Any]:
    found: dict[str, Any] = read_manifest(checkpoint(config, step))[1].state["data"]
    return found


def test_it_goes_on_bit_for_bit(whole: tuple[RunConfig, Records], folder: Path) -> None:
    config, records = whole
    again = second(folder, "again", RESERVOIR)
    cut_short(config, again, STOP)
    for rank in run_ranks(run, 2, again):
        assert rank.losses == {step: loss for step, loss in records.losses.items() if step > STOP}
    assert data(again, STEPS) == data(config, STEPS)
    assert not different(
        read_checkpoint(checkpoint(again, STEPS)), read_checkpoint(checkpoint(config, STEPS))
    )


def test_on_another_number_of_ranks_it_replays_the_same(
    whole: tuple[RunConfig, Records], folder: Path
) -> None:
    config, records = whole
    again = second(folder, "on-3", RESERVOIR)
    cut_short(config, again, STOP)
    found = run_ranks(run, 3, again)[0]
    assert data(again, STEPS) == data(config, STEPS)
    assert found.losses[STEPS] == pytest.approx(records.losses[STEPS], rel=1e-5)
    written = samples(again)
    assert written == {name: samples(config)[name] for name in written}
    assert max(written) == max(samples(config))


def samples(config: RunConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (config.run.folder / "replay").glob("*.bin")}


def test_the_samples_change_and_old_ones_go(whole: tuple[RunConfig, Records]) -> None:
    found = samples(whole[0])
    assert sorted(int(name.split("-")[1]) for name in found) == [4, 8, 12]
    assert len(set(found.values())) == 3


def test_its_share_is_realised_in_every_step(whole: tuple[RunConfig, Records]) -> None:
    for step in (FIRST + 1, STOP, STEPS):
        entry = Ledger.of(data(whole[0], step)).source("again")
        assert entry.tokens == (step - FIRST) * 2 * 32


def test_a_set_whose_source_is_only_replayed_is_old(whole: tuple[RunConfig, Records]) -> None:
    assert {role for one in whole[1].evaluations for role in one.roles.values()} == {"old"}


def test_the_ledger_shows_it_beside_the_others(
    whole: tuple[RunConfig, Records], capsys: pytest.CaptureFixture[str]
) -> None:
    show_ledger(whole[0].run.folder, as_json=True, segments=False)
    rows = {one["source"]: one for one in json.loads(capsys.readouterr().out)["sources"]}
    row = rows["again"]
    assert row["replays"] == ["prose", "code"]
    assert row["tokens"] == (STEPS - FIRST) * 2 * 32
    assert 0 < row["documents"] <= row["documents_in_source"]
    tokens = {"again": 2 * 9, "code": 4 * 9, "prose": 6 * 4}
    assert row["share_realised"] == pytest.approx(tokens["again"] / sum(tokens.values()))
    assert rows["prose"]["tokens"] == FIRST * 6 * 32


def test_everything_read_before_is_replayed_without_a_file(folder: Path) -> None:
    config = second(folder, "pool", {"of": ["prose"]}, train__steps=FIRST + 2)
    records = run_ranks(run, 1, config)[0]
    assert len(records.losses) == 2
    assert not (config.run.folder / "replay").exists()
    assert Ledger.of(data(config, FIRST + 2)).documents_replayed("again").documents["prose"].size
