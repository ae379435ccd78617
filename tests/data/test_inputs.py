"""Which files are read, and what is said of those that are not."""

import gzip
import json
import os
from pathlib import Path

import pytest

from trainer.data.inputs import find_inputs

RECORD = json.dumps({"text": "one"}) + "\n"


def kinds(*paths: Path | str, suffixes: tuple[str, ...] = ()) -> dict[str, bool]:
    """By file name: whether it is read as JSON lines."""
    found = find_inputs([str(path) for path in paths], suffixes)
    return {os.path.basename(file.path): file.lines for file in found.files}


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.NdJson", "a.JSONL.GZ", "a.json", "a.json.gz", "a"])
def test_json_lines_by_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = f"\n{RECORD}".encode()
    path.write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    assert kinds(path) == {name: True}


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.C.gz", "README"])
def test_text_by_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"text") if name.endswith(".gz") else b"text")
    assert kinds(path) == {name: False}


@pytest.mark.parametrize("content", ["[" + RECORD + "]", '{\n"text": "one"}\n', '{"body": "one"}\n', ""])
def test_json_that_is_no_lines_is_refused_unless_asked_for(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: .* no JSON object with the key 'text'.*--suffix \.json"):
        kinds(path)
    assert kinds(path, suffixes=(".json",)) == {"a.json": False}


def test_every_unknown_kind_is_named(tmp_path: Path) -> None:
    for name in ("a.log", "b.pdf", "c.txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=r"a\.log: unknown kind.*--suffix \.log.*b\.pdf: unknown kind"):
        kinds(*sorted(tmp_path.iterdir()))
    assert kinds(tmp_path / "a.log", suffixes=(".LOG",)) == {"a.log": False}


def test_json_in_folders_is_taken_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "lines.json").write_text(RECORD)
    (tmp_path / "other.json").write_text("[]")
    assert kinds(tmp_path, suffixes=(".json",)) == {"lines.json": True, "other.json": False}


def test_links_are_followed_once(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.txt").write_text("a")
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "up").symlink_to(tree)
    (tree / "first").symlink_to(outside)
    (tree / "second").symlink_to(outside)
    (tree / "b.txt").write_text("b")
    found = find_inputs([str(tree)])
    assert [file.path for file in found.files] == [f"{tree}/b.txt", f"{tree}/first/a.txt"]


def test_a_folder_that_cannot_be_read_is_a_bad_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its path is longer than the system allows, which even root cannot read."""
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    for _ in range(17):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    found = find_inputs([str(tmp_path)])
    assert len(found.files) == 1
    assert [(bad.reason, bad.detail) for bad in found.bad] == [("unreadable folder", "File name too long")]
    with pytest.raises(ValueError, match=r"no file to read .*unreadable folder"):
        find_inputs([str(tmp_path)], [".py"])
