"""`[data]`."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.data.corpora import write_tokens
from trainer.data.config import DataConfig
from trainer.data.corpus import data_problems, open_corpora


def test_a_path_may_carry_its_extension() -> None:
    sources = [{"name": str(n), "path": path} for n, path in enumerate(["a/b", "a/b.bin", "a/b.idx"])]
    assert {source.path for source in DataConfig(sources=sources).sources} == {"a/b"}


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_weights_are_positive_and_finite(weight: float) -> None:
    with pytest.raises(ValidationError, match="weight"):
        DataConfig(sources=[{"name": "a", "path": "a", "weight": weight}])


def test_every_name_that_occurs_twice_is_named() -> None:
    sources = [{"name": name, "path": name} for name in "abab"]
    with pytest.raises(ValidationError, match=r"2 entries are named 'a'.*2 entries are named 'b'"):
        DataConfig(sources=sources)


def test_all_problems_with_the_files_at_once(tmp_path: Path) -> None:
    half = write_tokens(tmp_path / "half", [[1]])
    Path(half + ".idx").unlink()
    (tmp_path / "raw.jsonl").write_text("{}\n")
    config = DataConfig(
        tokenizer=str(tmp_path / "no.json"),
        sources=[
            {"name": "half", "path": half},
            {"name": "raw", "path": str(tmp_path / "raw.jsonl")},
            {"name": "gone", "path": str(tmp_path / "gone")},
        ],
        validation=[{"name": "held", "path": str(tmp_path / "held")}],
    )
    found = config.problems()
    assert len(found) == 5
    expected = ("half.idx is missing", "ratoon data prepare", "gone.bin", "held.bin", "no.json")
    for part, text in zip(expected, found, strict=True):
        assert part in text
    with pytest.raises(ValueError, match=r"(?s)half.idx is missing.*raw.*gone.bin.*held.bin.*no.json"):
        open_corpora(config, "sources")


def test_what_only_opening_shows_is_known_before_a_run(tmp_path: Path) -> None:
    cut = write_tokens(tmp_path / "cut", [[1, 2]])
    Path(cut + ".bin").write_bytes(b"\0")
    config = DataConfig(
        sources=[
            {"name": "cut", "path": cut},
            {"name": "fine", "path": write_tokens(tmp_path / "fine", [[1]])},
        ],
        validation=[{"name": "empty", "path": write_tokens(tmp_path / "empty", [])}],
    )
    assert config.problems() == []
    first, second = data_problems(config)
    assert first.startswith("data.sources 'cut': ")
    assert "1 bytes, its index says 8" in first
    assert second.startswith("data.validation 'empty': ")
    assert "holds no tokens" in second


def test_validation_on_training_data_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tokens(tmp_path / "a", [[1, 2]])
    monkeypatch.chdir(tmp_path)
    config = DataConfig(sources=[{"name": "s", "path": path}], validation=[{"name": "v", "path": "a.bin"}])
    (problem,) = config.problems()
    assert "data.validation 'v': a is also what source 's' trains on" in problem


def test_no_sources_is_a_problem() -> None:
    assert "no source to train on" in DataConfig().problems()[0]


def test_reading_a_run_file_imports_nothing_heavy() -> None:
    code = (
        "import sys, trainer.data.config, launch.data_cli;"
        "print([m for m in ('torch', 'numpy', 'tokenizers', 'megatron') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
