"""A checkpoint that was converted goes on as the checkpoint itself: step, schedule, data, groups, lineage."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from checkpoint.convert.run import convert, prepare
from checkpoint.folder import read_manifest
from checkpoint.writers.options import WriteOptions
from parallel.layout import Layout
from tests.checkpoint.models import rewrite
from tests.proof.runs import Records, Resumed, checkpoint, look_and_run, run, run_config, write_corpora
from tests.ranks import run_ranks
from trainer.config import RunConfig, validate

STOP = 3
ANOTHER = Layout(pipeline=2)
FORMATS = {
    "universal": WriteOptions(),
    "index": WriteOptions(),
    "ranks": WriteOptions(layout={"tensor": 2, "pipeline": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    write_corpora(folder)
    return folder


@pytest.fixture(scope="module")
def first(folder: Path) -> RunConfig:
    config = run_config(folder, Layout(tensor=2), run__name="first", train__steps=STOP)
    run_ranks(run, 2, config)
    return config


@pytest.fixture(scope="module")
def direct(folder: Path, first: RunConfig) -> Records:
    """The same checkpoint, not converted, on the other layout."""
    return go_on(folder, checkpoint(first, STOP), "direct").records


def go_on(folder: Path, path: Path, name: str, layout: Layout = ANOTHER, **changes: Any) -> Resumed:
    ranks = layout.tensor * layout.pipeline
    config = run_config(folder, layout, run__name=name, checkpoint__load=path, **changes)
    found: Resumed = run_ranks(look_and_run, ranks, config)[0]
    return found


def converted(first: RunConfig, folder: Path, to: str) -> Path:
    target = folder / to
    if not target.exists():
        convert(prepare(checkpoint(first, STOP), to, FORMATS[to]), target)
    return target


@pytest.mark.parametrize("to", FORMATS)
def test_it_goes_on_as_if_it_had_not_been_converted(
    folder: Path, first: RunConfig, direct: Records, to: str
) -> None:
    path = converted(first, folder, to)
    found = go_on(folder, path, f"from-{to}")
    assert found.records.losses == direct.losses
    assert list(found.records.losses) == [4, 5, 6]
    assert [one.lr for one in found.records.steps] == [one.lr for one in direct.steps]
    assert (found.step, found.updates, found.anchor) == (STOP, STOP, (0, 0.0))
    _, manifest = read_manifest(folder / f"from-{to}")
    assert manifest.state["lineage"] == [{"path": str(path), "step": STOP, "run": "first"}]
    _, before = read_manifest(checkpoint(first, STOP))
    _, after = read_manifest(path)
    assert after.state["groups"] == before.state["groups"]


def foreign(first: RunConfig, folder: Path, name: str, **changes: Any) -> Path:
    """A universal checkpoint whose state is what another trainer's would say."""
    path = folder / name
    convert(prepare(checkpoint(first, STOP), "universal", WriteOptions()), path)
    _, manifest = read_manifest(path)
    kept = {key: value for key, value in manifest.state.items() if key not in ("schedule", "data", "config")}
    rewrite(path, dataclasses.replace(manifest, state={**kept, "format": "another trainer's", **changes}))
    return path


def test_a_schedule_from_the_resume_warms_up_from_the_other_trainers_rate(
    folder: Path, first: RunConfig
) -> None:
    path = foreign(first, folder, "with-lr", scalars={"updates": STOP, "lr": 5e-4})
    found = go_on(folder, path, "rewarmed", Layout(), start__policy="rewarm")
    assert found.anchor == (STOP, 5e-4)
    assert found.records.steps[0].lr == 5e-4
    assert "data (the checkpoint (" in " ".join(found.notes)


def test_parameters_of_different_ages_are_said(folder: Path, first: RunConfig) -> None:
    found = go_on(folder, foreign(first, folder, "ages", scalars={"lr": 5e-4}), "of-ages", Layout())
    assert found.updates == STOP
    assert "different numbers of updates" in " ".join(found.notes)


def test_weights_alone_of_another_trainer(folder: Path, first: RunConfig) -> None:
    path = foreign(first, folder, "weights-alone")
    found = go_on(folder, path, "from-weights", Layout(), start__policy="weights")
    assert (found.step, found.updates) == (0, 0)
    assert list(found.records.losses) == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_beyond_the_last_step_is_refused(folder: Path, first: RunConfig) -> None:
    path = converted(first, folder, "universal")
    config = run_config(folder, run__name="beyond", checkpoint__load=path, train__steps=2)
    assert any(f"{path} is at step {STOP} already" in problem for problem in validate(config, 1))


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_the_precision_may_change(folder: Path, before: str, after: str) -> None:
    start = run_config(folder, run__name=f"in-{before}", train__steps=STOP, train__precision=before)
    run_ranks(run, 1, start)
    path = folder / f"universal-{before}"
    convert(prepare(checkpoint(start, STOP), "universal", WriteOptions()), path)
    same = go_on(folder, path, f"{before}-stays", Layout(), train__precision=before).records.losses
    other = go_on(folder, path, f"{before}-to-{after}", Layout(), train__precision=after).records.losses
    assert list(other.values()) == pytest.approx(list(same.values()), rel=1e-2)


def test_a_missing_spec_is_one_clear_problem(folder: Path, first: RunConfig) -> None:
    changes: dict[str, Any] = {
        "checkpoint__load": converted(first, folder, "universal"),
        "checkpoint__spec": "mine.toml",
    }
    problems = validate(run_config(folder, run__name="spec", **changes), 1)
    assert len(problems) == 1
    assert problems[0].startswith("checkpoint.spec: there is no spec 'mine.toml'")


def test_a_spec_of_nothing_is_refused(folder: Path) -> None:
    problems = validate(run_config(folder, run__name="spec", checkpoint__spec="llama"), 1)
    assert problems == [
        "checkpoint.spec = llama says what names of checkpoint.load mean, and there is no load"
    ]
