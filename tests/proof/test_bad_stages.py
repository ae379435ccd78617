"""Wrong run files of stages as users meet them: one clear error, before anything runs or is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner, Result

import trainer.loop  # noqa: F401  # imported by now, the ranks of the first run are forked warm
from launch.cli import app
from tests.data.corpora import ragged, write_tokens

RUN = """
[run]
name = "story"
dir = "FOLDER/story"

[model]
num_layers = 2
hidden_size = 32
num_attention_heads = 4
max_position_embeddings = 128

[data]
sequence_length = 32

[[data.sources]]
name = "prose"
path = "FOLDER/prose"

[[data.sources]]
name = "code"
path = "FOLDER/code"

[[data.validation]]
name = "held-out"
path = "FOLDER/held-out"
source = "prose"

[optimizer]
lr = 1e-3
min_lr = 1e-5

[train]
global_batch = 4
precision = "fp32"

[metrics]
tensorboard = false
"""
FIRST = """
[[stage]]
name = "first"
steps = 2
schedule = { kind = "cosine", warmup_steps = 1 }
"""
SECOND = """
[[stage]]
name = "second"
steps = 2
start = { policy = "rewarm" }
schedule = { kind = "linear", warmup_steps = 1 }
"""
TOKENIZER = 'data = { tokenizer = "FOLDER/words.json" }\n'


def write(folder: Path, text: str) -> Path:
    """The run file of this text, in which FOLDER is the folder."""
    path = folder / "run.toml"
    path.write_text(text.replace("FOLDER", str(folder)))
    return path


def ratoon(command: str, path: Path) -> Result:
    return CliRunner().invoke(app, [command, str(path)], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})


def words_of(result: Result) -> str:
    """What it said, without the panel's borders and line breaks."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())


def write_words(path: Path) -> None:
    """A tokenizer of 257 ids, as many as bytes has."""
    vocabulary = {f"w{number}": number for number in range(256)} | {"<|endoftext|>": 256}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora, a tokenizer, and a run of the first stage alone, called old."""
    folder = tmp_path_factory.mktemp("bad")
    for seed, name in enumerate(("prose", "code", "held-out")):
        documents = [[t % 250 for t in one] for one in ragged(60, seed=seed, longest=50)]
        write_tokens(folder / name, documents)
    write_tokens(folder / "empty", [])
    write_words(folder / "words.json")
    old = write(folder, (RUN + FIRST).replace("/story", "/old"))
    assert ratoon("train", old).exit_code == 0
    return folder


def refused(folder: Path, text: str, *words: str) -> None:
    """Both commands refuse the run file with these words, as its only problem, and write nothing."""
    path = write(folder, text)
    for command in ("train", "plan-resume"):
        result = ratoon(command, path)
        found = words_of(result)
        assert result.exit_code == 2, found
        assert "Traceback" not in found
        assert f"{path}: 1 problem" in found
        for one in words:
            assert one in found, found
        assert not (folder / "story").exists(), "nothing is written"


def second(*lines: str) -> str:
    """The run file, with these lines in its second stage."""
    return RUN + FIRST + SECOND + "\n".join(lines) + "\n"


def from_old(*lines: str) -> str:
    """A stage that begins from the old run's checkpoint."""
    start = '[[stage]]\nname = "new"\nsteps = 3\nschedule = { kind = "linear" }\n'
    return "\n".join([RUN + start, *lines, ""])


OLD = 'start = { policy = "rewarm", from = "FOLDER/old/first/checkpoints" }'


def test_without_a_fault_there_is_no_error(folder: Path) -> None:
    for text in (second(), from_old(OLD)):
        path = write(folder, text)
        assert "nothing is ambiguous" in words_of(ratoon("plan-resume", path))


def test_an_unknown_source_in_a_mixture(folder: Path) -> None:
    refused(
        folder,
        second("mixture = { weights = { prse = 0.5 } }"),
        "stage second: data.mixture.weights: no source is named 'prse'; did you mean 'prose'?",
    )


def test_an_unknown_source_in_a_controller(folder: Path) -> None:
    points = "[{ step = 0, weights = { prse = 1.0 } }]"
    refused(
        folder,
        second(f'controller = {{ kind = "schedule", points = {points} }}'),
        "stage second: controller.points of step 0: no source is called 'prse'",
    )


def test_an_unknown_source_in_a_loss(folder: Path) -> None:
    refused(
        folder,
        second('losses = [{ kind = "z", weight = 1e-4, sources = ["prse"] }]'),
        "stage second: losses 'z': sources has 'prse'",
        "prose, code",
    )


def test_an_unknown_source_of_a_validation_set(folder: Path) -> None:
    refused(
        folder,
        second().replace('source = "prose"', 'source = "prse"'),
        "data.validation 'held-out': source = 'prse' is no source of the run; leave it out where the set",
        "did you mean 'prose'?",
    )


def test_a_validation_set_may_be_of_a_source_of_another_stage(folder: Path) -> None:
    others = ('[[stage.data.sources]]\nname = "web"\npath = "FOLDER/code"\n', "")
    for text in (second(*others), from_old(OLD, *others)):
        path = write(folder, text)
        assert "nothing is ambiguous" in words_of(ratoon("plan-resume", path))


def test_an_empty_corpus(folder: Path) -> None:
    refused(
        folder,
        second().replace("FOLDER/code", "FOLDER/empty"),
        "stages first, second: data.sources 'code': ",
        "holds no tokens; prepare it from files that have text",
    )


def test_weights_that_sum_to_zero(folder: Path) -> None:
    refused(
        folder,
        second("mixture = { weights = { prose = 0, code = 0 } }"),
        "stage second: data.mixture.weights: they sum to zero; give at least one source a weight above 0",
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("model = { hidden_size = 64 }", "model.hidden_size is 32 there and 64 here"),
        ("model = { num_layers = 4 }", "model.num_layers is 2 there and 4 here"),
        ("model = { num_layers = 1 }", "model.num_layers is 2 there and 1 here"),
        ("model = { vocab_size = 300 }", "model.vocab_size is 257 there and 300 here"),
    ],
)
def test_a_checkpoint_of_another_shape(folder: Path, line: str, words: str) -> None:
    remedy = "give [model] the checkpoint's, start from another checkpoint"
    refused(folder, second(line), "stage second: model: the checkpoint is of another shape", words, remedy)
    refused(folder, from_old(OLD, line), "model: the checkpoint is of another shape", words, remedy)


def test_a_checkpoint_of_another_tokenizer(folder: Path) -> None:
    expected = (
        "data.tokenizer: the checkpoint was trained with another tokenizer (bytes, fingerprint bytes-257;",
        "words.json, fingerprint",
        "Set data.tokenizer and data.eod back; or, where the ids mean the same, set start.vocabulary",
    )
    refused(folder, second(TOKENIZER), *expected)
    for policy in ("rewarm", "weights"):
        refused(folder, from_old(OLD.replace("rewarm", policy), TOKENIZER), *expected)


def test_another_tokenizer_is_taken_knowingly_and_from_the_beginning_of_the_data(folder: Path) -> None:
    knowingly = OLD.replace("start = {", 'start = { vocabulary = "change",')
    refused(folder, from_old(knowingly, TOKENIZER), 'set start.data = "reset"')
    text = from_old(knowingly.replace("start = {", 'start = { data = "reset",'), TOKENIZER)
    path = write(folder, text.replace("/story", "/words"))
    assert ratoon("train", path).exit_code == 0


def test_an_anneal_without_a_stable_checkpoint(folder: Path) -> None:
    anneal = SECOND.replace('start = { policy = "rewarm" }\n', "").replace(
        '"linear", warmup_steps = 1', '"anneal"'
    )
    refused(folder, RUN + FIRST + anneal, "stage second: schedule.kind is anneal", "stable")
    old = from_old(OLD).replace('"linear"', '"anneal"')
    refused(folder, old, "schedule.kind is anneal", "stable")
