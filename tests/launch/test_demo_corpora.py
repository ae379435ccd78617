"""`ratoon data demo`: what it writes, and that it writes the same again."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from launch import cli
from launch.demo.corpora import ALL_TRAINED, CORPORA, demo_corpora
from launch.demo.corpus import held_out
from launch.demo.texts import best_code, code, cpp, docstring_share, pieces
from trainer.data.indexed import IndexedReader
from trainer.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All demo corpora, made by the command."""
    folder = tmp_path_factory.mktemp("demo") / "demo-data"
    result = CliRunner().invoke(cli.app, ["data", "demo", str(folder)], env={"TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in CORPORA)
    return folder


def documents(prefix: Path) -> set[bytes]:
    reader = IndexedReader(str(prefix))
    return {reader[number].tobytes() for number in range(len(reader))}


@pytest.mark.parametrize("name", [name for name in CORPORA if name not in ALL_TRAINED])
def test_a_tenth_is_held_out_and_nobody_trains_on_it(folder: Path, name: str) -> None:
    train, held_out = documents(folder / name), documents(folder / f"{name}-validation")
    assert len(train) > 4 * len(held_out) > 0
    assert not train & held_out


def test_the_best_code_has_nothing_that_code_holds_out(folder: Path) -> None:
    best = documents(folder / "code-best")
    assert best < documents(folder / "code")


def test_the_task_is_not_in_the_code(folder: Path) -> None:
    assert not any("asyncio/" in record["url"] for record in code())
    task, domain = (IndexedReader(str(folder / name)).tokens.size for name in ("task", "code"))
    assert 10_000 < task < domain / 10


def test_the_code_is_what_people_wrote() -> None:
    assert not any("_sysconfigdata" in record["url"] for record in code())


@pytest.mark.parametrize("name", CORPORA)
def test_every_document_has_the_metadata_of_where_it_is_from(folder: Path, name: str) -> None:
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"), None)
    corpus, metadata = IndexedReader(str(folder / name)), IndexedReader(str(folder / f"{name}.meta"))
    assert len(metadata) == len(corpus)
    for number in (0, len(metadata) // 2, len(metadata) - 1):
        text = tokenizer.decode(metadata[number].tolist())
        assert re.match(r"URL: (docs|github)\.\S+\n\n", text)


def test_all_share_one_tokenizer(folder: Path) -> None:
    assert load_tokenizer(str(folder / "tokenizer.json"), None).vocab_size == 1024
    for name in CORPORA:
        sidecar = json.loads((folder / f"{name}.json").read_text())
        assert sidecar["tokenizer"] == str(folder / "tokenizer.json")


def test_the_bytes_are_the_same_again_whatever_is_asked_for(folder: Path, tmp_path: Path) -> None:
    again = demo_corpora(tmp_path, ["task"])
    assert list(again) == ["task"]
    assert (tmp_path / "task.bin").read_bytes() == (folder / "task.bin").read_bytes()
    assert np.array_equal(
        IndexedReader(str(again["task"].held_out)).tokens,
        IndexedReader(str(folder / "task-validation")).tokens,
    )


def test_what_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    demo_corpora(tmp_path, ["task"])
    with pytest.raises(ValueError, match=r"demo corpora already; .*--overwrite"):
        demo_corpora(tmp_path, ["task"])
    demo_corpora(tmp_path, ["task"], overwrite=True)


def test_an_unknown_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no demo corpus is called news; there are prose, code, cpp"):
        demo_corpora(tmp_path, ["news"])


def test_a_torch_without_headers_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no C\+\+ header in .*c10"):
        list(cpp(tmp_path))


def test_the_best_code_explains_itself_more_than_the_rest() -> None:
    best = {record["url"] for record in best_code()}
    trained = [record for record in code() if not held_out(record["text"])]
    shares = {record["url"]: docstring_share(record["text"]) for record in trained}
    assert min(shares[url] for url in best) >= max(shares[url] for url in shares.keys() - best)


def test_pieces_end_at_line_breaks_and_lose_nothing() -> None:
    text = "".join(f"line {number}\n" for number in range(100))
    cut = list(pieces(text, 50))
    assert "".join(cut) == text
    assert all(50 <= len(piece) < 60 and piece.endswith("\n") for piece in cut[:-1])
