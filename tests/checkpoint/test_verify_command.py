"""`ratoon checkpoint verify` on checkpoints of our own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from checkpoint.folder import read_manifest
from launch.checkpoint_cli import app
from tests.checkpoint.models import Grid, make_tensors, rewrite, save_all_ranks


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_all_ranks(tmp_path, make_tensors(0), Grid(2, 1, 2))[0]


def verify(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, ["verify", *arguments], env={"COLUMNS": "300"})
    assert result.exit_code == exit_code, result.output
    return result.output


def test_a_sound_one(saved: Path) -> None:
    assert f"{saved}  sound" in verify(str(saved))
    report = json.loads(verify(str(saved), "--json"))
    assert (report["sound"], report["findings"]) == (True, [])
    assert set(report["checks"]) >= {"coverage", "hash", "finite", "replicas", "rounding"}


@pytest.mark.parametrize("key", [("model.norm.weight", "master"), ("model.embed_tokens.weight", "exp_avg")])
def test_a_flipped_bit_is_named_with_its_tensor_and_file(key: tuple[str, str], saved: Path) -> None:
    piece = read_manifest(saved)[1].by_key()[key].pieces[-1]
    content = bytearray((saved / piece.file).read_bytes())
    content[piece.start + piece.num_bytes - 1] ^= 1
    (saved / piece.file).write_bytes(content)
    found = json.loads(verify(str(saved), "--json", exit_code=1))["findings"]
    hashes = [finding for finding in found if finding["check"] == "hash"]
    assert [(f["tensor"], f["state"], f["file"]) for f in hashes] == [(*key, piece.file)]
    assert f"error {key[0]} ({key[1]}): {piece.file}: bytes" in verify(str(saved), exit_code=1)


def test_a_damaged_random_state_a_short_and_a_missing_file(saved: Path) -> None:
    manifest = read_manifest(saved)[1]
    blob = next(blob for blob in manifest.rank_blobs if blob.rank == 1)
    with open(saved / blob.file, "r+b") as file:
        file.seek(blob.start)
        file.write(b"x")
    with open(saved / "rank-00002.safetensors", "r+b") as file:
        file.truncate(9000)
    (saved / "rank-00003.safetensors").unlink()
    shown = verify(str(saved), exit_code=1)
    assert f"the rng of rank 1: {blob.file}: bytes" in shown
    assert "rank-00002.safetensors: has 9000 bytes" in shown
    assert "rank-00003.safetensors: is missing" in shown


def test_a_tensor_that_is_not_covered_exactly_once(saved: Path) -> None:
    manifest = read_manifest(saved)[1]
    first = manifest.tensors[0]
    doubled = replace(first, pieces=(*first.pieces, first.pieces[0]))
    rewrite(saved, replace(manifest, tensors=(doubled, *manifest.tensors[1:])))
    assert f"{first.name} ({first.state}): overlap: 2 pieces hold element" in verify(str(saved), exit_code=1)


def test_a_path_that_holds_none(tmp_path: Path) -> None:
    verify(str(tmp_path), exit_code=2)


def test_it_imports_neither_torch_nor_megatron(saved: Path) -> None:
    program = (
        "import sys; from launch.checkpoint_cli import app\n"
        f"app(['verify', {str(saved)!r}], standalone_mode=False)\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
