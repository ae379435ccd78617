"""Where a run starts from, and what it says about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.folder import read_manifest
from launch.ranks import RankError
from parallel.layout import Layout
from tests.proof.gather import different, whole_tensors
from tests.proof.runs import (
    Resumed,
    checkpoint,
    cut_short,
    look_and_run,
    read_checkpoint,
    run,
    run_config,
    write_corpora,
)
from tests.ranks import run_ranks
from trainer.config import RunConfig

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_corpora(folder)
    return folder


@pytest.fixture(scope="module")
def first(folder: Path) -> RunConfig:
    """A run of four steps on two tensor ranks, with checkpoints of steps 2 and 4."""
    changes = {"train__steps": STEPS, "checkpoint__every": 2}
    config = run_config(folder, Layout(tensor=2), run__name="first", **changes)
    run_ranks(run, 2, config)
    return config


def start(folder: Path, name: str, **changes: Any) -> Resumed:
    """One rank of a run of six steps."""
    return run_ranks(look_and_run, 1, run_config(folder, run__name=name, **changes))[0]


def test_a_new_run_starts_at_step_zero(folder: Path) -> None:
    found = start(folder, "new", train__steps=1)
    assert (found.step, found.updates, found.anchor) == (0, 0, (0, 0.0))
    assert len(found.notes) == 1
    assert found.notes[0].startswith("portable modules: torch sees no CUDA device; optimizer torch.AdamW")


@pytest.mark.parametrize("place", ["step folder", "folder of checkpoints", "run's folder"])
def test_a_checkpoint_can_be_named_in_three_ways(folder: Path, first: RunConfig, place: str) -> None:
    path = {
        "step folder": checkpoint(first, STEPS),
        "folder of checkpoints": first.run.checkpoints,
        "run's folder": first.run.folder,
    }[place]
    found = start(folder, place.replace(" ", "-"), checkpoint__load=path)
    assert found.step == STEPS
    assert not different(whole_tensors([found.slices]), read_checkpoint(checkpoint(first, STEPS)))


def test_it_says_what_it_loaded_and_from_which_layout(folder: Path, first: RunConfig) -> None:
    found = start(folder, "says", checkpoint__load=checkpoint(first, 2))
    text = " ".join(found.notes)
    assert f"loaded {checkpoint(first, 2)}" in text
    assert "TP2 PP1 DP1 distributed optimizer" in text
    assert "step 2" in text


def test_its_own_checkpoint_comes_before_another(folder: Path, first: RunConfig) -> None:
    own = run_config(folder, run__name="own", checkpoint__load=checkpoint(first, 2))
    cut_short(first, own, STEPS)
    assert run_ranks(look_and_run, 1, own)[0].step == STEPS


def test_resume_off_ignores_its_own(folder: Path, first: RunConfig) -> None:
    changes = {"checkpoint__load": checkpoint(first, 2), "checkpoint__resume": False}
    own = run_config(folder, run__name="ignored", **changes)
    cut_short(first, own, STEPS)
    assert run_ranks(look_and_run, 1, own)[0].step == 2


def test_weights_alone_start_everything_else_anew(folder: Path, first: RunConfig) -> None:
    path = checkpoint(first, STEPS)
    found = start(folder, "weights", checkpoint__load=path, start__policy="weights")
    assert (found.step, found.updates, found.anchor) == (0, 0, (0, 0.0))
    wholes, saved = whole_tensors([found.slices]), read_checkpoint(path)
    weights = {key for key in saved if key[1] == "weight"}
    assert not {key for key in different(wholes, saved) if key in weights}
    assert not any(whole.any() for key, whole in wholes.items() if key not in weights)
    assert "start fresh" in " ".join(found.notes)
    assert sorted(found.records.losses) == [1, 2, 3, 4, 5, 6]


def test_a_run_from_weights_alone_resumes_as_itself(folder: Path, first: RunConfig) -> None:
    """The policy is about `load`; its own checkpoints bring moments and step."""
    changes = {"checkpoint__load": checkpoint(first, STEPS), "start__policy": "weights"}
    whole = run_config(folder, run__name="fresh", **changes)
    losses = run_ranks(run, 1, whole)[0].losses
    again = run_config(folder, run__name="fresh-again", **changes)
    cut_short(whole, again, 3)
    found = run_ranks(look_and_run, 1, again)[0]
    assert found.step == 3
    assert found.records.losses == {step: loss for step, loss in losses.items() if step > 3}


def test_what_has_changed_in_the_model_is_said(folder: Path, first: RunConfig) -> None:
    changes = {"model__rope_theta": 50000.0, "model__hidden_dropout": 0.1}
    text = " ".join(start(folder, "changed", checkpoint__load=first.run.folder, **changes).notes)
    assert "changed since: model.rope_theta 10000.0 -> 50000.0" in text
    assert "model.hidden_dropout 0.0 -> 0.1" in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model__num_layers": 2}, "model.layers.3.mlp.down_proj.weight: in the checkpoint"),
        ({"model__num_layers": 8}, "model.layers.4.mlp.down_proj.weight: in the model"),
        ({"model__ffn_hidden_size": 64}, r"\[64, 128\] in the checkpoint, \[64, 64\] in the model"),
        ({"model__tie_word_embeddings": False}, "lm_head.weight: in the model"),
        ({"model__qk_norm": True}, "q_norm.weight: in the model"),
    ],
)
def test_another_model_is_refused(
    folder: Path, first: RunConfig, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RankError, match=reason) as error:
        start(folder, "refused", checkpoint__load=first.run.folder, **changes)
    assert error.value.message is not None, "said to the user, without a traceback"
    assert "has not been touched" in error.value.message


def test_lineage_lists_where_a_run_comes_from(folder: Path, first: RunConfig) -> None:
    config = run_config(folder, run__name="descendant", checkpoint__load=checkpoint(first, 2))
    run_ranks(run, 1, config)
    _, manifest = read_manifest(config.run.folder)
    assert manifest.state["lineage"] == [{"path": str(checkpoint(first, 2)), "step": 2, "run": "first"}]


def test_deterministic_asks_torch_for_it(folder: Path) -> None:
    config = run_config(folder, run__name="deterministic", run__deterministic=True, train__steps=1)
    assert run_ranks(run_and_ask, 1, config) == [True]


def run_and_ask(config: RunConfig) -> bool:
    run(config)
    return torch.are_deterministic_algorithms_enabled()
