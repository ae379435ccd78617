"""What a controller sets of a stream, and what it cannot change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.corpora import ragged, write_tokens, write_words
from tests.ranks import run_ranks
from trainer.controllers.config import ControllerConfig
from trainer.controllers.driver import Driver
from trainer.data.config import DataConfig
from trainer.data.stream import TokenStream

TARGETS = {"prose": 1.0, "code": 1.0, "again": 1.0}
KINDS: dict[str, dict[str, Any]] = {
    "velocitune": {"targets": TARGETS, "smoothing": 0.1, "validation": {"again": "prose"}},
    "skillit": {"graph": {name: {"prose": 1.0, "code": 1.0} for name in TARGETS}},
    "schedule": {"every": None, "points": [{"step": 0, "weights": {"prose": 1.0, "code": 1.0}}]},
}
LATER = {"step": 8, "weights": {"prose": 1.0, "again": 0.5}}


def opened(folder: Path, options: dict[str, Any]) -> tuple[TokenStream, Driver]:
    """A first stage, whose replay has nothing to replay."""
    sources = [{"name": name, "path": str(folder / name)} for name in ("prose", "code")]
    data = DataConfig.model_validate(
        {
            "tokenizer": str(folder / "words.json"),
            "sequence_length": 8,
            "sources": [*sources, {"name": "again", "replay": {"of": ["prose"]}}],
            "mixture": {"weights": {"again": 0}},
            "validation": [{"name": one["name"], "path": f"{one['path']}-v"} for one in sources],
        }
    )
    config = ControllerConfig.model_validate({"every": 2, **options})
    stream = TokenStream(data, seed=1, global_batch=4)
    return stream, Driver(config, data, stream, steps=range(10), log=folder / config.kind / "log.jsonl")


def reweighed(folder: Path, kind: str) -> dict[str, float]:
    """The weights that a controller sets before the first step."""
    stream, driver = opened(folder, {"kind": kind, **KINDS[kind]})
    driver.add_evaluation(0, {"prose": 2.0, "code": 2.5})
    assert driver.reweigh(0) is None
    return stream.weights


def refused(folder: Path) -> None:
    """A later point that gives weight to it."""
    options = KINDS["schedule"]
    words = r"points\[1\] gives weight to 'again', which had nothing to replay"
    with pytest.raises(ValueError, match=words):
        opened(folder, {"kind": "schedule", **options, "points": [*options["points"], LATER]})


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    write_words(tmp_path)
    for n, name in enumerate(("prose", "code", "prose-v", "code-v")):
        write_tokens(tmp_path / name, ragged(20, first=1000 * n, seed=n))
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_nothing_to_replay_is_given_no_weight(corpora: Path, kind: str) -> None:
    (weights,) = run_ranks(reweighed, 1, corpora, kind)
    assert weights["again"] == 0
    assert weights["prose"] > 0 < weights["code"]


def test_a_later_point_that_gives_it_weight_is_refused_at_the_start(corpora: Path) -> None:
    run_ranks(refused, 1, corpora)
