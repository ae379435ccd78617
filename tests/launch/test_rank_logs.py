"""Which log records reach the terminal, and that every one reaches the rank's file."""

import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from launch.rank_logs import FAILURE, log_path, start_logging


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    for handler in handlers:
        if handler not in root.handlers:
            root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(False)


def say(folder: Path, rank: int) -> tuple[list[str], str]:
    """(terminal lines, text of the file) after a little of everything was logged."""
    stream = io.StringIO()
    start_logging(folder, rank=rank, console=Console(file=stream, width=80))
    logging.getLogger("trainer.loop").info("ours, good to know")
    logging.getLogger("checkpoint.save").warning("ours, look here [not markup]")
    logging.getLogger("megatron.core").info("theirs, chatter")
    logging.getLogger("megatron.core").error("theirs, serious")
    warnings.warn("theirs, deprecated", DeprecationWarning, stacklevel=1)
    logging.getLogger(FAILURE).error("last words")
    for handler in logging.getLogger().handlers:
        handler.flush()
    return stream.getvalue().splitlines(), log_path(folder, rank).read_text()


def test_the_first_rank_shows_our_news_and_all_warnings(tmp_path: Path) -> None:
    lines, _ = say(tmp_path, 0)
    assert lines == ["ours, good to know", "ours, look here [not markup]", "theirs, serious"]


def test_other_ranks_show_warnings_with_their_number(tmp_path: Path) -> None:
    lines, _ = say(tmp_path, 3)
    assert lines == ["rank 3: ours, look here [not markup]", "rank 3: theirs, serious"]


@pytest.mark.filterwarnings("always::DeprecationWarning")
def test_the_file_has_everything(tmp_path: Path) -> None:
    _, text = say(tmp_path, 3)
    said = ("good to know", "look here", "chatter", "serious", "deprecated", "last words")
    assert [part for part in said if part in text] == list(said)


def test_a_second_start_goes_on_in_the_same_file(tmp_path: Path) -> None:
    say(tmp_path, 0)
    _, text = say(tmp_path, 0)
    assert text.count("last words") == 2
