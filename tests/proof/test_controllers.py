"""Runs whose mixture a controller changes: they go on bit for bit, and their logs can be played again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoint.folder import read_manifest
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
from tests.trainer.controllers.plugins import RELEASE
from trainer.config import RunConfig
from trainer.data.weights import quantise

STEPS, STOP = 9, 5  # the stop lies inside a window of losses: calls are after 0, 3, 6 and 9 steps
PLUGIN = "tests.trainer.controllers.plugins:Counting"
VELOCITUNE = {
    "kind": "velocitune",
    "every": 3,
    "targets": {"prose": 3.0, "code": 5.4},
    "eta": 3.0,
    "loss": "training",
}
SKILLIT = {
    "kind": "skillit",
    "every": 3,
    "graph": {"prose": {"prose": 0.5}, "code": {"prose": 0.1, "code": 0.4}},
}
RAISE = {"kind": "raise_replay", "every": 3, "watch": ["code"], "replay": ["code"], "tolerance": 0.0}
HELD_OUT = {
    "eval__every": 3,
    "eval__at_start": True,
    "eval__batches": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("controllers")
    write_corpora(path)
    for seed, name in enumerate(("prose-v", "code-v")):
        write_tokens(path / name, [[t % 250 for t in one] for one in ragged(20, seed=10 + seed, longest=50)])
    return path


def settings(folder: Path, name: str, controller: dict[str, Any] | None, **more: Any) -> RunConfig:
    if controller is not None:
        more["controller"] = controller
    more.setdefault(
        "data__validation",
        [{"name": name, "path": str(folder / f"{name}-v")} for name in ("prose", "code")],
    )
    steps = {"train__steps": STEPS, "checkpoint__every": 1}
    return run_config(folder, run__name=name, **steps | HELD_OUT | more)


def calls(config: RunConfig) -> dict[int, dict[str, Any]]:
    lines = (config.run.folder / "controller.jsonl").read_text().splitlines()
    found = {line["step"]: line for line in map(json.loads, lines)}
    assert len(found) == len(lines), "a call stands in the log once"
    return found


def weights(config: RunConfig) -> dict[int, dict[str, float]]:
    return {step: call["weights"] for step, call in calls(config).items()}


def state(config: RunConfig, step: int) -> dict[str, Any]:
    return read_manifest(checkpoint(config, step))[1].state


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[RunConfig, Records]:
    config = settings(folder, "whole", VELOCITUNE)
    return config, run_ranks(run, 2, config)[0]


def resumed(whole: RunConfig, folder: Path, name: str, controller: dict[str, Any]) -> RunConfig:
    config = settings(folder, name, controller)
    cut_short(whole, config, STOP)
    shutil.copy(whole.run.folder / "controller.jsonl", config.run.folder)
    return config


def test_the_weights_change_and_sum_to_one(whole: tuple[RunConfig, Records]) -> None:
    found = weights(whole[0])
    assert list(found) == [0, 3, 6, 9]
    assert len({tuple(one.values()) for one in found.values()}) >= 3
    assert all(abs(sum(one.values()) - 1.0) < 1e-12 for one in found.values())
    assert calls(whole[0])[0]["kept"] == "no source has a loss yet"


def test_the_sources_are_dealt_as_asked(whole: tuple[RunConfig, Records]) -> None:
    config, data = whole[0], state(whole[0], STEPS)["data"]
    (segment,) = data["segments"]
    asked = [0.0, 0.0]
    for step, one in weights(config).items():
        for source, weight in enumerate(one.values()):
            asked[source] += weight * 18 * (step < STEPS)
    assert [units / 2**32 for units in segment["asked"]] == pytest.approx(asked, abs=1e-6)
    assert all(abs(dealt - wanted) < 1 for dealt, wanted in zip(segment["dealt"], asked, strict=True))


def test_it_goes_on_bit_for_bit(whole: tuple[RunConfig, Records], folder: Path) -> None:
    config, records = whole
    again = resumed(config, folder, "again", VELOCITUNE)
    found = run_ranks(run, 2, again)
    for rank in found:
        assert rank.losses == {step: loss for step, loss in records.losses.items() if step > STOP}
    assert weights(again) == weights(config)
    for part in ("hooks", "data"):
        assert state(again, STEPS)[part] == state(config, STEPS)[part]
    assert not different(
        read_checkpoint(checkpoint(again, STEPS)), read_checkpoint(checkpoint(config, STEPS))
    )


@pytest.mark.parametrize("ranks", [1, 3])
def test_on_other_ranks_it_sets_the_same_weights_and_deals_the_same_data(
    whole: tuple[RunConfig, Records], folder: Path, ranks: int
) -> None:
    config, records = whole
    again = resumed(config, folder, f"on-{ranks}", VELOCITUNE)
    found = run_ranks(run, ranks, again)[0]
    assert weights(again) == weights(config)
    assert state(again, STEPS)["data"] == state(config, STEPS)["data"]
    assert found.losses[STEPS] == pytest.approx(records.losses[STEPS], rel=1e-5)


def test_the_log_played_again_is_the_same_run(whole: tuple[RunConfig, Records], folder: Path) -> None:
    config, records = whole
    log = {"kind": "replay_log", "log": str(config.run.folder / "controller.jsonl")}
    again = settings(folder, "played", log)
    assert run_ranks(run, 2, again)[0].losses == records.losses
    assert weights(again) == weights(config)


def test_a_controller_that_keeps_the_weights_changes_no_bit(folder: Path) -> None:
    plain = settings(folder, "plain", None)
    keeps = settings(folder, "keeps", {"kind": "schedule", "points": [{"step": 50, "weights": {"code": 1}}]})
    losses = [run_ranks(run, 1, config)[0].losses for config in (plain, keeps)]
    assert losses[0] == losses[1]


def test_replay_in_the_first_third_only(folder: Path) -> None:
    table = [
        {"step": 0, "weights": {"prose": 1, "code": 2}},
        {"share": 1 / 3, "weights": {"prose": 1}},
    ]
    config = settings(folder, "early", {"kind": "schedule", "points": table})
    records = run_ranks(run, 1, config)[0]
    assert [record.source_tokens.get("code", 0) > 0 for record in records.steps] == [True] * 3 + [False] * 6
    assert list(weights(config)) == [0, 3]


@pytest.mark.parametrize("controller", [SKILLIT, RAISE], ids=["skillit", "raise_replay"])
def test_controllers_of_held_out_losses_go_on_bit_for_bit(folder: Path, controller: dict[str, Any]) -> None:
    name = controller["kind"]
    config = settings(folder, name, controller)
    records = run_ranks(run, 2, config)[0]
    found = calls(config)
    assert [call["evaluation"]["step"] for call in found.values()] == [0, 3, 6, 9]
    assert all(call["kept"] is None for call in found.values())
    again = resumed(config, folder, f"{name}-again", controller)
    assert run_ranks(run, 2, again)[0].losses == {s: one for s, one in records.losses.items() if s > STOP}
    assert weights(again) == weights(config)


def test_a_plugin_that_hangs_or_raises_stops_nothing(folder: Path) -> None:
    RELEASE.clear()  # in this process, which the ranks are forked from
    options = {"3": "raise", "6": "hang"}
    plugin = {"kind": "plugin", "every": 3, "plugin": PLUGIN, "timeout": 0.3, "options": options}
    config = settings(folder, "plugin", plugin)
    records = run_ranks(run, 2, config)
    assert [sorted(rank.losses) for rank in records] == [list(range(1, STEPS + 1))] * 2
    found = calls(config)
    assert (
        found[0]["weights"] == found[3]["weights"] == found[6]["weights"] == {"prose": 2 / 3, "code": 1 / 3}
    )
    assert "no idea" in found[3]["kept"]
    assert "not answered within 0.3 s" in found[6]["kept"]
    assert "still busy" in found[9]["kept"]
    events = [one for one in records[0].events if "the weights stay as they are" in one]
    assert len(events) == 3


def test_another_kind_begins_anew(whole: tuple[RunConfig, Records], folder: Path) -> None:
    plugin = {"kind": "plugin", "every": 3, "plugin": PLUGIN}
    config = resumed(whole[0], folder, "other", plugin)
    records = run_ranks(run, 2, config)[0]
    assert records.info is not None
    assert any("begins anew" in note for note in records.info.notes)
    assert weights(config)[STOP] == {"prose": 2 / 3, "code": 1 / 3}


def test_a_restart_with_another_batch_keeps_the_controllers_weights(
    whole: tuple[RunConfig, Records], folder: Path
) -> None:
    """The dealing begins anew there, with what the run file says, were it not for the controller."""
    config = settings(folder, "batch", VELOCITUNE, train__global_batch=12, train__steps=STOP)
    cut_short(whole[0], config, STOP - 1)
    records = run_ranks(run, 2, config)[0]
    assert state(config, STOP)["data"]["mixture_step"] == STOP - 1
    assert state(config, STOP)["data"]["weights"] == list(quantise(weights(whole[0])[3]).values())
    assert records.info is not None
    assert any("the controller's weights stay" in note for note in records.info.notes)


def test_a_fixed_number_of_sequences_is_left_alone(folder: Path) -> None:
    sources = [
        {"name": "prose", "path": str(folder / "prose")},
        {"name": "web", "path": str(folder / "held-out")},
        {"name": "code", "path": str(folder / "code"), "per_batch": 2},
    ]
    table = [{"step": 0, "weights": {"prose": 1, "web": 3}}, {"step": 3, "weights": {"prose": 1}}]
    config = settings(
        folder, "fixed", {"kind": "schedule", "points": table}, data__sources=sources, train__steps=6
    )
    run_ranks(run, 1, config)
    assert weights(config)[0] == pytest.approx({"prose": 1 / 6, "web": 1 / 2, "code": 1 / 3})
    assert weights(config)[3] == pytest.approx({"prose": 2 / 3, "web": 0.0, "code": 1 / 3})
    (segment,) = state(config, 6)["data"]["segments"]
    assert segment["dealt"] == [3 + 12, 9, 12]
