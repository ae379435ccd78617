"""What a run file may say under [updates] and [slow_weights], and what is refused with which words."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tests.proof.worlds import World
from trainer.data.config import DataConfig, SourceConfig, ValidationConfig
from trainer.model.parameters import logical_parameters
from trainer.updates.config import AnchorConfig, SlowWeightsConfig, UpdatesConfig
from trainer.updates.selection import anchored_names, frozen_names, update_problems

NAMES = list(logical_parameters(World().architecture))
DATA = DataConfig(
    sources=(SourceConfig(name="code", path="code"),),
    validation=(ValidationConfig(name="prose", path="prose"),),
)


def problems(**sections: Any) -> list[str]:
    config = UpdatesConfig.model_validate(sections)
    return update_problems(config, NAMES, DATA)


def test_nothing_is_frozen_or_held_by_default() -> None:
    config = UpdatesConfig()
    assert (frozen_names(config, NAMES), anchored_names(config, NAMES)) == (set(), set())
    assert update_problems(config, NAMES, DATA) == []


def test_a_pattern_matches_whole_names() -> None:
    config = UpdatesConfig(freeze=(r"model\.layers\.1\..*",))
    assert frozen_names(config, NAMES) == {name for name in NAMES if ".layers.1." in name}
    assert frozen_names(UpdatesConfig(freeze=("layers",)), NAMES) == set()


def test_an_anchor_holds_what_is_not_frozen() -> None:
    config = UpdatesConfig(
        freeze=(r".*\.1\..*",), anchor=AnchorConfig(kind="l2", strength=1, only=(".*q_proj.weight",))
    )
    assert anchored_names(config, NAMES) == {
        name for name in NAMES if "q_proj" in name and ".layers.1." not in name
    }


def test_a_pattern_without_a_match_names_the_nearest() -> None:
    (problem,) = problems(freeze=["model.embed_token.weight"])
    assert problem.startswith("updates.freeze: 'model.embed_token.weight' matches no parameter")
    assert "nearest are model.embed_tokens.weight" in problem


def test_every_problem_is_said_at_once() -> None:
    anchor = {"kind": "ewc", "strength": 1, "only": ["nothing"], "sources": ["prose", "news"]}
    found = problems(freeze=["no such"], anchor=anchor)
    assert [line.split(":")[0] for line in found] == [
        "updates.freeze",
        "updates.anchor.only",
        "updates.anchor.sources",
    ]
    assert "news: not among the run's sets code, prose" in found[2]


def test_a_model_that_is_all_frozen_is_refused() -> None:
    assert problems(freeze=[".*"]) == [
        "updates.freeze: freezes every parameter, so that there is nothing to train"
    ]


def test_an_anchor_on_frozen_parameters_alone_is_refused() -> None:
    (problem,) = problems(freeze=[".*norm.*"], anchor={"kind": "l2", "strength": 1, "only": [".*norm.*"]})
    assert problem.startswith("updates.anchor.only: all of these parameters are frozen")


@pytest.mark.parametrize(
    ("anchor", "said"),
    [
        ({"kind": "ewc", "strength": 1}, 'kind = "ewc" needs sources'),
        ({"kind": "l2", "strength": 1, "xi": 0.1}, 'xi: not read with kind = "l2"'),
        ({"kind": "si", "strength": 1, "sources": ["prose"]}, 'sources: not read with kind = "si"'),
        ({"kind": "l2", "strength": -1}, "greater than or equal to 0"),
        ({"kind": "l2"}, "Field required"),
        ({"kind": "l2", "strength": 1, "only": ["("]}, "'(' is no regular expression"),
    ],
)
def test_an_anchor_that_cannot_be_is_refused(anchor: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as error:
        AnchorConfig.model_validate(anchor)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("slow", "said"),
    [
        ({"kind": "ema"}, 'kind = "ema" needs decay'),
        ({"kind": "reptile", "epsilon": 0.3}, 'kind = "reptile" needs every'),
        ({"kind": "reptile", "every": 2, "epsilon": 0.3, "decay": 0.9}, "decay: not read"),
        ({"kind": "reptile", "every": 2, "epsilon": 0.3, "evaluate": True}, "evaluate: not read"),
        ({"decay": 0.9}, "decay: not read"),
        ({"kind": "ema", "decay": 1.0}, "less than 1"),
    ],
)
def test_slow_weights_that_cannot_be_are_refused(slow: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as error:
        SlowWeightsConfig.model_validate(slow)
    assert said in str(error.value)
