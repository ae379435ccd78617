"""Whole runs with [updates] and [slow_weights]: from the run file to the checkpoint and on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.layout import Layout
from tests.proof.gather import Wholes, different
from tests.proof.runs import Records, checkpoint, cut_short, read_checkpoint, run, run_config, write_corpora
from tests.ranks import run_ranks
from trainer.config import RunConfig, config_toml, parse_config, validate
from trainer.run_file import read_run_file

SECTIONS: dict[str, Any] = {
    "updates": {
        "freeze": [r"model\.embed_tokens\.weight"],
        "anchor": {"kind": "ewc", "strength": 20.0, "sources": ["prose", "held-out"], "batches": 2},
    },
    "slow_weights": {"kind": "ema", "decay": 0.9, "every": 2, "evaluate": True},
    "eval": {"every": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_corpora(folder)
    return folder


def config(folder: Path, name: str, layout: Layout | None = None, **changes: Any) -> RunConfig:
    held_out = [{"name": "held-out", "path": str(folder / "held-out")}]
    return run_config(folder, layout, run__name=name, data__validation=held_out, **changes)


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[RunConfig, Records]:
    """Six steps on two ranks with checkpoints after three and six: in the middle of a window of two."""
    made = config(folder, "whole", **SECTIONS)
    return made, run_ranks(run, 2, made)[0]


def tensors(made: RunConfig, step: int) -> Wholes:
    return read_checkpoint(checkpoint(made, step))


def test_the_run_file_comes_back_as_it_was(folder: Path, tmp_path: Path) -> None:
    made = config(folder, "file", **SECTIONS)
    (tmp_path / "config.toml").write_text(config_toml(made))
    assert parse_config(read_run_file(tmp_path / "config.toml")) == made


def test_problems_are_found_before_the_run(folder: Path) -> None:
    found = validate(config(folder, "wrong", updates={"freeze": ["model.embed"]}), 1)
    assert [line[:37] for line in found] == ["updates.freeze: 'model.embed' matches"]


def test_what_is_done_is_said_at_the_start(whole: tuple[RunConfig, Records]) -> None:
    info = whole[1].info
    assert info is not None
    said = {"frozen: 1 parameters", "measured the Fisher matrix on 2 gradients of prose, held-out"}
    assert said <= set(info.notes)


def test_frozen_and_held_weights_are_in_the_checkpoint(whole: tuple[RunConfig, Records]) -> None:
    made = whole[0]
    first, last = tensors(made, 3), tensors(made, 6)
    embedding = "model.embed_tokens.weight"
    assert torch.equal(first[embedding, "weight"], last[embedding, "weight"])
    assert (embedding, "anchor") not in last
    held = [name for name, state in last if state == "anchor"]
    assert held
    for name in held:
        assert torch.equal(first[name, "anchor"], last[name, "anchor"])
        assert torch.equal(first[name, "importance"], last[name, "importance"])


def test_evaluations_report_the_average_as_well(whole: tuple[RunConfig, Records]) -> None:
    first, last = whole[1].evaluations
    for record in (first, last):
        assert list(record.losses) == ["held-out", "held-out (average)"]
        assert record.losses["held-out"] < record.losses["held-out (average)"]


def test_a_run_goes_on_bit_for_bit(folder: Path, whole: tuple[RunConfig, Records]) -> None:
    made = config(folder, "resumed", **SECTIONS)
    cut_short(whole[0], made, 3)
    records = run_ranks(run, 2, made)[0]
    assert {step: whole[1].losses[step] for step in (4, 5, 6)} == records.losses
    assert different(tensors(whole[0], 6), tensors(made, 6)) == []
    assert not any("Fisher" in note for note in records.info.notes)


def test_a_run_goes_on_in_another_layout(folder: Path, whole: tuple[RunConfig, Records]) -> None:
    made = config(folder, "tensor", Layout(tensor=2), **SECTIONS)
    cut_short(whole[0], made, 3)
    records = run_ranks(run, 2, made)[0]
    assert [records.losses[step] for step in (4, 5, 6)] == pytest.approx(
        [whole[1].losses[step] for step in (4, 5, 6)], rel=1e-5
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    ours, theirs = tensors(made, 6), tensors(whole[0], 6)
    torch.testing.assert_close(ours[name, "ema"], theirs[name, "ema"], rtol=1e-4, atol=1e-6)


def test_another_run_starts_with_sections_that_the_first_had_not(folder: Path) -> None:
    plain = config(folder, "plain", train__steps=3)
    run_ranks(run, 1, plain)
    made = config(folder, "next", checkpoint__load=checkpoint(plain, 3), **SECTIONS)
    run_ranks(run, 1, made)
    first, last = tensors(plain, 3), tensors(made, 6)
    for name, state in last:
        if state == "anchor":
            assert torch.equal(last[name, "anchor"], first[name, "weight"])
