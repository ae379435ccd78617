"""What is said of a replay before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.plot_command import run_curves
from tests.data.corpora import ragged, write_tokens, write_words
from trainer.stages.check import check_stages
from trainer.stages.load_stages import load_stages
from trainer.stages.plan import takeover

RUN = """\
[run]
dir = "{folder}/run"
[model]
num_layers = 1
hidden_size = 8
num_attention_heads = 1
vocab_size = 10000
[data]
tokenizer = "{folder}/words.json"
sequence_length = 8
sources = [
  {{ name = "prose", path = "{folder}/prose" }},
  {{ name = "code", path = "{folder}/code" }},
  {{ name = "again", {again} }},
]
[train]
global_batch = 4
precision = "fp32"
[[stage]]
name = "general"
steps = 4
mixture = {{ weights = {{ code = 0, again = 0 }} }}
[[stage]]
name = "more"
start = {{ {start} }}
steps = 4
mixture = {{ weights = {{ prose = 0{weights} }} }}
"""
START = 'policy = "rewarm"'


def problems(folder: Path, again: str, *, start: str = START, weights: str = "") -> str:
    path = write_run(folder, again, start=start, weights=weights)
    stages = load_stages(path)
    try:
        check_stages(stages, [1] * len(stages), name="run.toml")
    except ValueError as error:
        return str(error)
    return ""


def write_run(folder: Path, again: str, *, start: str = START, weights: str = "") -> Path:
    write_words(folder)
    for n, name in enumerate(("prose", "code")):
        write_tokens(folder / name, ragged(30, first=2000 * n, seed=n))
    path = folder / "run.toml"
    path.write_text(RUN.format(folder=folder, again=again, start=start, weights=weights))
    return path


@pytest.mark.parametrize(
    "again",
    [
        'share = 0.25, replay = { of = ["prose"] }',
        'per_batch = 1, replay = { of = ["prose"], reservoir_tokens = 99 }',
        'share = 0.25, replay = { of = ["prose", "code"], reservoir_tokens = 99, refresh_every = 2 }',
    ],
)
def test_what_is_still_to_be_read_is_accepted_planned_and_drawn(tmp_path: Path, again: str) -> None:
    assert problems(tmp_path, again) == ""
    stages = load_stages(tmp_path / "run.toml")
    assert not takeover(stages[1], stages).problems
    before, after = run_curves(tmp_path / "run.toml", [])
    assert before.shares.get("again", 0) == 0
    assert after.shares["again"] == 0.25
    assert after.shares["code"] == 0.75


@pytest.mark.parametrize(
    ("again", "start", "weights", "words"),
    [
        (
            'share = 0.5, replay = { of = ["prise"] }',
            START,
            "",
            ["reads source 'prise'", "did you mean 'prose'"],
        ),
        (
            'share = 0.5, replay = { of = ["code"] }',
            START,
            "",
            ["no stage before this one reads source 'code'"],
        ),
        (
            'share = 0.5, replay = { of = ["code"], reservoir_tokens = 99, refresh_every = 2 }',
            START,
            "",
            ["no stage before this one reads source 'code'", "there are 'prose'"],
        ),
        (
            'share = 0.5, replay = { of = ["prose"] }',
            'policy = "weights"',
            "",
            ["without the ledger", "rewarm"],
        ),
        ('share = 1.0, replay = { of = ["prose"] }', START, "", ["leave nothing for code"]),
        ('per_batch = 4, replay = { of = ["prose"] }', START, "", ["global_batch = 4", "nothing for code"]),
        (
            'share = 0.5, replay = { of = ["prose"] }',
            START,
            ", code = 0",
            ["come to 0.5 of the batch, and no source with a weight"],
        ),
    ],
)
def test_what_cannot_be_replayed_is_one_clear_problem(
    tmp_path: Path, again: str, start: str, weights: str, words: list[str]
) -> None:
    found = problems(tmp_path, again, start=start, weights=weights)
    assert found.startswith("run.toml: 1 problem")
    assert "stage more: data.sources" in found
    for word in words:
        assert word in found


@pytest.mark.parametrize(
    ("again", "words"),
    [
        ("share = 0.5, replay = { of = [] }", "data.sources.2.replay.of"),
        ('share = 0.5, replay = { of = ["prose", "prose"] }', "twice"),
        (
            'share = 0.5, replay = { of = ["prose"], refresh_every = 3 }',
            "refresh_every = 3 needs reservoir_tokens",
        ),
        ('share = 0.5, path = "p", replay = { of = ["prose"] }', "'again' needs a path or replay"),
        ('share = 0.5, replay = { of = ["again"] }', "'again' replays itself"),
        ('share = 0.5, max_epochs = 2, replay = { of = ["prose"] }', "max_epochs is for sources with a path"),
    ],
)
def test_what_contradicts_itself_is_named(tmp_path: Path, again: str, words: str) -> None:
    path = write_run(tmp_path, again)
    with pytest.raises(ValueError, match=words):
        load_stages(path)


def test_a_temperature_does_not_know_the_size_of_a_replay(tmp_path: Path) -> None:
    path = write_run(tmp_path, 'replay = { of = ["prose"] }')
    path.write_text(path.read_text().replace("prose = 0 }", "prose = 0 }, temperature = 2.0"))
    stages = load_stages(path)
    with pytest.raises(
        ValueError, match=r"stage more: data\.sources 'again': a temperature goes by the sizes"
    ):
        check_stages(stages, [1, 1], name="run.toml")
