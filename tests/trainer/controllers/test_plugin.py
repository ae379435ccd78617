"""A plug-in that works, hangs, raises, or answers nonsense."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.controllers.plugins import RELEASE
from trainer.controllers import plugin as module
from trainer.controllers.plugin import Plugin, find_factory
from trainer.controllers.protocol import History, KeepWeightsError

HERE = "tests.trainer.controllers.plugins:"
SOURCES = ("prose", "code")


def counting(options: dict[str, Any] | None = None, state: dict[str, Any] | None = None) -> Plugin:
    return Plugin(HERE + "Counting", options or {}, SOURCES, timeout=10.0, state=state)


def history(step: int = 0) -> History:
    return History(step, 0, 100, {"prose": 0.5, "code": 0.5})


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    RELEASE.clear()
    yield
    RELEASE.set()
    for thread in threading.enumerate():
        if thread.name == "controller":
            thread.join(10)


def test_a_plugin_is_asked_with_its_own_state() -> None:
    one = counting()
    assert one.weights(history()) == {"prose": 2 / 3, "code": 1 / 3}
    assert one.weights(history()) == {"prose": 0.75, "code": 0.25}
    again = counting(state=one.state()["plugin"])
    assert again.weights(history()) == one.weights(history()) == {"prose": 0.8, "code": 0.2}


@pytest.mark.parametrize(("how", "words"), [("raise", "RuntimeError: no idea"), ("exit", "SystemExit: 3")])
def test_one_that_raises_goes_on_from_its_last_good_state(how: str, words: str) -> None:
    one = counting({"1": how})
    one.weights(history(0))
    with pytest.raises(KeepWeightsError, match=words):
        one.weights(history(1))
    assert one.state() == {"plugin": {"calls": 1}}
    assert one.weights(history(2)) == {"prose": 0.75, "code": 0.25}, "as if it had not been asked"


def test_one_that_hangs_is_left_alone_until_it_is_done() -> None:
    one = Plugin(HERE + "Counting", {"1": "hang"}, SOURCES, timeout=0.2)
    one.weights(history(0))
    began = time.monotonic()
    with pytest.raises(KeepWeightsError, match=r"not answered within 0\.2 s"):
        one.weights(history(1))
    with pytest.raises(KeepWeightsError, match="still busy"):
        one.weights(history(2))
    assert time.monotonic() - began < 5.0
    RELEASE.set()
    assert one._asking is not None
    one._asking.join(10)
    assert one.state() == {"plugin": {"calls": 1}}, "a late answer counts for nothing"
    assert one.weights(history(3)) == {"prose": 0.75, "code": 0.25}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": None}, "expected a weight for each source"),
        ({"weights": {"prose": 1.0}}, "'code' is nothing"),
        ({"weights": {"prose": 1.0, "code": 1.0}, "state": [1]}, "state\\(\\) is to return a dictionary"),
        ({"weights": {"prose": 1.0, "code": 1.0}, "state": {"one": {1}}}, "what JSON can hold"),
        ({"weights": {"prose": 1.0, "code": 1.0}, "state": {"one": float("nan")}}, "what JSON can hold"),
    ],
)
def test_nonsense_changes_nothing(options: dict[str, Any], words: str) -> None:
    one = Plugin(HERE + "Answers", options, SOURCES, timeout=10.0, state={"kept": 1})
    with pytest.raises(KeepWeightsError, match=words):
        one.weights(history())
    assert one.state() == {"plugin": {"kept": 1}}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tests.nowhere:Thing", "cannot be loaded: No module named 'tests.nowhere'"),
        (HERE + "Missing", "cannot be loaded: .* has no attribute 'Missing'"),
        (HERE + "NOT_CALLABLE", "is no callable"),
        ("agent", "no entry point of the group 'ratoon.controllers' is called 'agent'"),
    ],
)
def test_what_cannot_be_found_is_named(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_factory(name)


def test_an_entry_point_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("agent", HERE + "Counting", module.GROUP)
    known = EntryPoints([entry])
    monkeypatch.setattr("trainer.entry_points.entry_points", lambda **wanted: known.select(**wanted))
    assert find_factory("agent").__name__ == "Counting"


def test_the_example_of_the_documentation_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[3] / "docs" / "continual.md").read_text(encoding="utf-8")
    code = text.partition("### Your own controller\n```python\n")[2].partition("```")[0]
    (tmp_path / "my_weights.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    one = Plugin("my_weights:TowardsLoss", {"decay": 0.5}, SOURCES, timeout=10.0)
    assert one.weights(history()) == {"prose": 0.5, "code": 0.5}
    seen = History(1, 0, 100, {"prose": 0.5, "code": 0.5}, losses={"prose": 3.0, "code": 1.0})
    assert one.weights(seen) == {"prose": 0.75, "code": 0.25}
    assert one.state() == {"plugin": {"prose": 3.0, "code": 1.0}}
