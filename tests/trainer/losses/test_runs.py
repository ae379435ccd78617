"""Whole runs with `[[losses]]`: what they start from stays the reference, on whichever layout they go on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from launch.ranks import RankError
from parallel.layout import Layout
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
from trainer.config import RunConfig, validate

KL = {"kind": "kl", "weight": 2.0, "sources": ["code"]}
Z = {"kind": "z", "weight": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("losses")
    write_corpora(path)
    return path


@pytest.fixture(scope="module")
def base(folder: Path) -> RunConfig:
    """A run that others start from."""
    config = run_config(folder, run__name="base", train__steps=3)
    run_ranks(run, 1, config)
    return config


def continued(
    base: RunConfig, folder: Path, name: str, layout: Layout | None = None, **more: Any
) -> RunConfig:
    more = {"losses": [KL, Z], **more}
    start = {"checkpoint__load": base.run.folder, "start": {"policy": "weights"}}
    return run_config(folder, layout, run__name=name, **start, **more)


@pytest.fixture(scope="module")
def whole(base: RunConfig, folder: Path) -> tuple[RunConfig, Records]:
    config = continued(base, folder, "whole")
    return config, run_ranks(run, 1, config)[0]


def test_a_tag_chooses_as_a_name_does(
    whole: tuple[RunConfig, Records], base: RunConfig, folder: Path
) -> None:
    tagged = [
        {**one.model_dump(mode="json", exclude_none=True), "tags": {"domain": one.name}}
        for one in base.data.sources
    ]
    losses = [{**KL, "sources": ["tag:domain=c*"]}, Z]
    config = continued(base, folder, "tagged", losses=losses, data__sources=tagged)
    assert auxiliary(run_ranks(run, 1, config)[0]) == auxiliary(whole[1])


def auxiliary(records: Records) -> dict[int, dict[str, float]]:
    return {record.step: dict(record.auxiliary) for record in records.steps}


def test_a_run_reports_its_auxiliary_losses(whole: tuple[RunConfig, Records]) -> None:
    found, records = auxiliary(whole[1]), whole[1]
    assert found[1]["kl"] == 0.0
    assert found[6]["kl"] > 1e-6
    assert found[1]["z"] > 1.0
    assert set(records.steps[-1].auxiliary_by_source["kl"]) == {"code"}
    assert records.info is not None
    assert any("auxiliary loss 'kl'" in note and "step-00000003" in note for note in records.info.notes)


def test_it_goes_on_bit_for_bit(whole: tuple[RunConfig, Records], base: RunConfig, folder: Path) -> None:
    config, _ = whole
    again = continued(base, folder, "again")
    cut_short(config, again, 3)
    run_ranks(run, 1, again)
    ends = [read_checkpoint(checkpoint(one, 6)) for one in (config, again)]
    assert different(*ends) == []


@pytest.mark.parametrize(
    "layout", [Layout(tensor=2), Layout(pipeline=2), Layout()], ids=["TP2", "PP2", "DP2"]
)
def test_it_goes_on_under_another_layout(
    whole: tuple[RunConfig, Records], base: RunConfig, folder: Path, layout: Layout
) -> None:
    config, records = whole
    name = f"on-{layout.tensor}-{layout.pipeline}"
    other = continued(base, folder, name, layout)
    cut_short(config, other, 3)
    expected, found = auxiliary(records), auxiliary(run_ranks(run, 2, other)[0])
    assert set(found) == {4, 5, 6}
    for step, losses in found.items():
        # fp32 knows log-probabilities of 5.6, whose differences the divergence is, to 2.4e-7
        assert losses["kl"] == pytest.approx(expected[step]["kl"], rel=1e-5, abs=2.4e-7)
        assert losses["z"] == pytest.approx(expected[step]["z"], rel=1e-5)


def test_a_run_from_nothing_has_its_initial_weights_as_reference(folder: Path) -> None:
    config = run_config(folder, run__name="fresh", losses=[KL], train__steps=4)
    whole = auxiliary(run_ranks(run, 1, config)[0])
    assert whole[1]["kl"] == 0.0
    again = run_config(folder, run__name="fresh-again", losses=[KL], train__steps=4)
    cut_short(config, again, 3)
    assert auxiliary(run_ranks(run, 1, again)[0])[4] == whole[4]


def test_the_next_stage_has_a_start_of_its_own(
    whole: tuple[RunConfig, Records], base: RunConfig, folder: Path
) -> None:
    config = continued(whole[0], folder, "next", train__steps=2)
    records = run_ranks(run, 1, config)[0]
    assert auxiliary(records)[1]["kl"] == 0.0
    assert any("kl" in note and str(whole[0].run.folder) in note for note in records.info.notes)


@pytest.mark.parametrize("before", ["fp32", "bf16"])
def test_the_divergence_begins_at_zero_in_bf16(folder: Path, before: str) -> None:
    """The reference's weights are rounded from the same numbers as the model's."""
    first = run_config(folder, run__name=f"before-{before}", train__steps=2, train__precision=before)
    run_ranks(run, 1, first)
    config = continued(first, folder, f"after-{before}", Layout(tensor=2), train__precision="bf16")
    found = auxiliary(run_ranks(run, 2, config)[0])
    assert found[1]["kl"] == 0.0
    assert found[3]["kl"] > 0.0


def test_another_reference_in_the_middle_of_a_run_is_refused(
    whole: tuple[RunConfig, Records], base: RunConfig, folder: Path
) -> None:
    other = continued(base, folder, "swapped", losses=[{**KL, "reference": str(checkpoint(whole[0], 6))}, Z])
    cut_short(whole[0], other, 3)
    with pytest.raises(RankError, match="is not the reference that this run began with"):
        run_ranks(run, 1, other)


WRONG = {
    "no such source": ({**KL, "sources": ["coed"]}, "'coed', which is no source.*prose, code"),
    "no such group": ({**KL, "sources": ["group:web"]}, "'group:web', which is no source; their groups are"),
    "no such checkpoint": ({**KL, "reference": "nowhere"}, "reference nowhere does not exist"),
    "more than the vocabulary": ({**KL, "top_k": 1000}, "top_k = 1000 of a vocabulary of"),
    "a layout that does not fit": ({**KL, "top_k": 8, "layout": {"tensor": 3}}, "does not divide 1 ranks"),
    "the same name": ({**Z}, "2 are called 'z'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_the_run(folder: Path, name: str) -> None:
    loss, message = WRONG[name]
    problems = validate(run_config(folder, losses=[Z, loss]), 1)
    assert len(problems) == 1
    assert re.search(message, problems[0])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({**Z, "temperature": 2.0}, "temperature is a key of kind kl"),
        ({**KL, "layout": {}}, "layout without top_k"),
        ({**Z, "from_step": 5, "until_step": 5}, "never on"),
        ({**Z, "sources": []}, "sources is empty"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    folder: Path, loss: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_config(folder, losses=[loss])
