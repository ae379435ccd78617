"""What is wrong with `[controller]`, before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from trainer.controllers.config import KEYS, NEEDED, ControllerConfig
from trainer.controllers.opening import controller_problems, open_controller
from trainer.controllers.velocitune import Velocitune
from trainer.data.config import DataConfig

DATA = DataConfig.model_validate(
    {
        "sources": [{"name": name, "path": name} for name in ("prose", "code", "web")],
        "validation": [
            {"name": "prose", "path": "prose-v"},
            {"name": "held-out", "path": "code-v", "source": "code"},
        ],
    }
)
VELOCITUNE: dict[str, Any] = {
    "kind": "velocitune",
    "every": 20,
    "targets": {"prose": 2.0, "code": 1.0},
    "frozen": ["web"],
}


def problems(eval_every: int = 10, **changes: Any) -> list[str]:
    config = ControllerConfig.model_validate(changes)
    return controller_problems(config, DATA, eval_every=eval_every)


def test_a_good_section_has_no_problems() -> None:
    assert problems(**VELOCITUNE) == []
    config = ControllerConfig.model_validate(VELOCITUNE)
    assert isinstance(open_controller(config, DATA, first_step=0, last_step=10), Velocitune)


def test_without_a_kind_there_is_no_controller_and_no_key() -> None:
    assert problems() == []
    with pytest.raises(ValidationError, match=r"controller\.every needs a controller\.kind"):
        ControllerConfig.model_validate({"every": 5})


def test_every_key_that_is_needed_is_a_key_of_the_kind() -> None:
    assert all(set(NEEDED[kind]) <= set(keys) for kind, keys in KEYS.items())
    assert {key for keys in KEYS.values() for key in keys} == set(ControllerConfig.model_fields) - {"kind"}


def test_a_key_of_another_kind_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"controller\.window is not a key of kind = velocitune"):
        ControllerConfig.model_validate({**VELOCITUNE, "window": 5})


def test_what_is_missing_is_named() -> None:
    with pytest.raises(
        ValidationError, match=r"controller\.watch is missing(.|\n)*controller\.replay is miss"
    ):
        ControllerConfig.model_validate({"kind": "raise_replay", "every": 5})


def test_a_section_written_with_all_its_defaults_is_the_same() -> None:
    config = ControllerConfig.model_validate(VELOCITUNE)
    assert ControllerConfig.model_validate(config.model_dump(mode="json", exclude_none=True)) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frozen": ["wbe"]}, "controller.frozen: no source is named 'wbe'; did you mean 'web'?"),
        ({"validation": {"code": "none"}}, "controller.validation: no validation set is named 'none'"),
        ({"frozen": []}, "controller.targets: source 'web' is missing"),
        ({"targets": {"prose": 2.0, "cod": 1.0}}, "controller.targets: no source is named 'cod'"),
        ({"targets": "nowhere.json"}, "controller.targets: cannot read nowhere.json"),
        ({"frozen": ["prose", "code", "web"]}, "controller.frozen: all sources are in it"),
        ({"every": 15}, "controller.every = 15 is not a multiple of eval.every = 10"),
        (
            {"frozen": [], "targets": {"prose": 2.0, "code": 1.0, "web": 1.0}},
            "controller.validation: source 'web' has no validation set",
        ),
    ],
)
def test_what_does_not_fit_the_rest_of_the_run_file(changes: dict[str, Any], words: str) -> None:
    found = problems(**VELOCITUNE | changes)
    assert any(words in one for one in found), found


def test_held_out_losses_need_evaluations() -> None:
    assert "eval.every is 0" in problems(eval_every=0, **VELOCITUNE)[0]
    training = {**VELOCITUNE, "loss": "training"}
    assert problems(eval_every=0, **training) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"kind": "skillit", "every": 10, "graph": {"prose": {"news": 0.1}}, "frozen": ["code", "web"]},
            "controller.graph: column 'news' is no validation set",
        ),
        ({"kind": "skillit", "every": 10, "graph": {"prose": {"prose": 0.1}}}, "source 'code' is missing"),
        (
            {"kind": "raise_replay", "every": 10, "watch": ["prose"], "replay": ["prose", "code", "web"]},
            "controller.replay: has all sources",
        ),
        ({"kind": "plugin", "every": 10, "plugin": "nowhere:x"}, "controller.plugin: nowhere:x cannot be"),
        ({"kind": "replay_log", "log": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        (
            {"kind": "schedule", "points": [{"step": 0, "weights": {"prse": 1.0}}]},
            "controller.points of step 0: no source is called 'prse'",
        ),
    ],
)
def test_what_does_not_fit_of_other_kinds(changes: dict[str, Any], words: str) -> None:
    found = problems(**changes)
    assert any(words in one for one in found), found


def test_a_replay_source_needs_a_weight_to_multiply() -> None:
    data = DATA.model_copy(update={"mixture": DATA.mixture.model_copy(update={"weights": {"web": 0.0}})})
    config = ControllerConfig.model_validate(
        {"kind": "raise_replay", "every": 10, "watch": ["prose"], "replay": ["web"]}
    )
    assert "web have weight 0" in controller_problems(config, data, eval_every=10)[0]


def test_sources_with_a_number_of_their_own_are_left_alone() -> None:
    fixed = DATA.sources[2].model_copy(update={"per_batch": 2})
    data = DATA.model_copy(update={"sources": (*DATA.sources[:2], fixed)})
    config = ControllerConfig.model_validate({**VELOCITUNE, "frozen": []})
    assert controller_problems(config, data, eval_every=10) == [], "web needs no target"
    for changes in (
        {"kind": "raise_replay", "every": 10, "watch": ["prose"], "replay": ["web"]},
        {"kind": "schedule", "points": [{"step": 0, "weights": {"prose": 1.0, "web": 1.0}}]},
    ):
        (found,) = controller_problems(ControllerConfig.model_validate(changes), data, eval_every=10)
        assert "source 'web' has per_batch = 2, which no controller changes" in found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[1]", "expected a table of numbers, found list"),
        ('{"prose": "much"}', "expected finite numbers, found others for prose"),
    ],
)
def test_a_broken_file_of_targets_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "targets.json"
    path.write_text(text)
    found = problems(**VELOCITUNE | {"targets": str(path)})
    assert len(found) == 1
    assert words in found[0]
