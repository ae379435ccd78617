"""Which reader is asked, and what is said when none knows a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint.readers import FORMATS, recognise


def test_a_folder_of_safetensors_is_hugging_faces(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    name, read = recognise(tmp_path)
    assert name == "huggingface"
    assert [tensor.name for tensor in read(tmp_path).tensors] == ["a"]


def test_an_unknown_folder_is_answered_with_what_it_holds_and_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "logs").mkdir()
    with pytest.raises(ValueError, match="no checkpoint is recognised") as caught:
        recognise(tmp_path)
    text = str(caught.value)
    assert f"{tmp_path}: no checkpoint is recognised. It holds logs/, notes.txt. Looked for:" in text
    assert text.count("\n  ") == len(FORMATS) + 1
    assert "Ratoon: manifest.json" in text


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="It holds nothing"):
        recognise(tmp_path)


def test_long_folders_are_cut_short(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:02d}").touch()
    with pytest.raises(ValueError, match="10, 11 and 28 more"):
        recognise(tmp_path)


def test_a_checkpoint_one_level_deeper_is_pointed_to(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=f"One level deeper there is a checkpoint: give {tmp_path}/model"):
        recognise(tmp_path)


def test_nothing_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gone: there is nothing; give the folder"):
        recognise(tmp_path / "gone")


def test_another_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.txt").touch()
    with pytest.raises(ValueError, match=r"x\.txt: this file is no checkpoint that is known"):
        recognise(tmp_path / "x.txt")


def test_every_format_has_its_module() -> None:
    folder = Path(sys.modules["checkpoint.readers"].__path__[0])
    assert {name for name in FORMATS if not (folder / f"{name}.py").is_file()} == set()


def test_recognising_imports_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom checkpoint.readers import recognise\n"
        f"try:\n    recognise(Path({str(tmp_path)!r}))\nexcept ValueError:\n    pass\n"
        "assert not {'torch', 'megatron', 'deepspeed', 'transformers'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
