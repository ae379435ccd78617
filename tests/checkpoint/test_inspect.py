"""`ratoon checkpoint inspect`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.checkpoint_cli import app
from tests.checkpoint.models import Grid, make_tensors, rewrite, save_all_ranks

STATE = {
    "schedule": {"kind": "wsd", "phase": "stable"},
    "data": {"position": 4096},
    "lineage": {"parent": None, "stage": "prose"},
    "versions": {"ratoon": "0.1.0", "torch": "2.13.0"},
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path, manifest = save_all_ranks(tmp_path, make_tensors(0), Grid(2, 1, 2))
    rewrite(path, replace(manifest, state={**manifest.state, **STATE}))
    return path


def inspect(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, ["inspect", *arguments], env={"COLUMNS": "80"})
    assert result.exit_code == exit_code, result.output
    return result.output


def test_what_is_shown(saved: Path) -> None:
    shown = inspect(str(saved.parent))
    for fact in ("complete", "100", "5,124", "4 ranks, tensor 2, pipeline 1, data 2", "rng", "position 4096"):
        assert fact in shown
    for fact in ("kind wsd, phase stable", "parent null, stage prose", "torch 2.13.0"):
        assert fact in shown
    for row in ("exp_avg_sq  float32         9      36   20.5 kB", "weight      bfloat16        9"):
        assert row in shown


def test_it_fits_80_columns(saved: Path) -> None:
    shown = inspect(str(saved), "--tensors")
    assert "model.layers.0.input_layernorm.weight" in shown
    assert "3 x 10 x 14" in shown
    assert all(len(line) <= 80 for line in shown.splitlines()[1:]), "all but the path"


def test_json_for_programs(saved: Path) -> None:
    shown = json.loads(inspect(str(saved), "--json", "--tensors"))
    assert (shown["step"], shown["complete"], shown["parameters"]) == (100, True, 5124)
    assert shown["states"]["weight"] == {
        "dtypes": ["bfloat16"],
        "tensors": 9,
        "pieces": shown["states"]["weight"]["pieces"],
        "elements": 5124,
        "bytes": 10248,
    }
    assert len(shown["tensors"]) == 36
    assert shown["layout"] == {"tensor": 2, "pipeline": 1, "data": 2, "zero": True}


def test_a_missing_file_and_what_lies_beside_it(saved: Path) -> None:
    (saved / "rank-00002.safetensors").unlink()
    (saved.parent / "step-00000150.partial-dead-1").mkdir()
    shown = inspect(str(saved))
    assert "1 file missing" in shown
    assert "rank-00002.safetensors" in shown
    assert "step-00000150.partial-dead-1" in shown


def test_a_path_that_holds_none(tmp_path: Path) -> None:
    words = inspect(str(tmp_path), exit_code=2).replace("│", " ").split()
    assert "no checkpoint is recognised. It holds nothing." in " ".join(words)


def test_it_imports_neither_torch_nor_megatron(saved: Path) -> None:
    program = (
        "import sys; from launch.checkpoint_cli import app\n"
        f"app(['inspect', {str(saved)!r}, '--tensors'], standalone_mode=False)\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
