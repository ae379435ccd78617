"""Indices: the original files seen through a manifest, as long as they stay what they are."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from checkpoint.boxes import Box
from checkpoint.convert.run import convert, prepare
from checkpoint.folder import read_manifest
from checkpoint.load import load
from checkpoint.manifest import LogicalTensor, Manifest, Piece
from checkpoint.opening import Opened, open_checkpoint
from checkpoint.source import Source
from checkpoint.verification.report import verify_checkpoint
from checkpoint.whole import read_whole
from checkpoint.writers.options import WriteOptions
from tests.checkpoint.models import Grid, assert_equal, empty_slices, make_tensors, save_all_ranks, slices_of
from tests.foreign.deepspeed import Run
from tests.foreign.deepspeed import save as save_deepspeed
from tests.foreign.oracle import Oracle

ORACLE = Oracle(hidden=64, vocab=263, precision="bf16")
TENSORS = 10_000


def index(source: Path | Opened, target: Path) -> Path:
    convert(prepare(source, "index", WriteOptions()), target, verify=False)
    return target


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_deepspeed(tmp_path_factory.mktemp("deepspeed"), ORACLE, Run(stage=2))


def test_it_loads_what_the_source_holds(tmp_path: Path) -> None:
    native, grid = save_all_ranks(tmp_path / "run", make_tensors(0), Grid(2, 1, 2))[0], Grid(3, 1, 1)
    target = index(native, tmp_path / "index")
    for rank in range(grid.world_size):
        slices = empty_slices(make_tensors(0), grid, rank)
        load(target, slices, rank=rank, verify="full")
        assert_equal(slices, slices_of(make_tensors(0), grid, rank))


def test_foreign_files_are_read_in_place(deepspeed: Path, tmp_path: Path) -> None:
    target = index(deepspeed, tmp_path / "index")
    assert verify_checkpoint(target).is_sound
    folder, manifest = read_manifest(target)
    for tensor in manifest.tensors:
        assert torch.equal(read_whole(folder, tensor), ORACLE.value(tensor.name, tensor.state))
    assert sum(path.stat().st_size for path in target.iterdir()) < 300_000


def test_an_index_of_an_index_points_into_the_original(deepspeed: Path, tmp_path: Path) -> None:
    first = index(deepspeed, tmp_path / "first")
    second = index(first, tmp_path / "second")
    for path in first.iterdir():
        path.unlink()
    assert verify_checkpoint(second).is_sound


@pytest.mark.parametrize("change", ["written to", "shorter", "gone"])
def test_a_source_that_changed_since_is_not_loaded(tmp_path: Path, change: str) -> None:
    native, grid = save_all_ranks(tmp_path / "run", make_tensors(0), Grid())[0], Grid()
    target = index(native, tmp_path / "index")
    file = native / "rank-00000.safetensors"
    if change == "written to":
        os.utime(file)
    elif change == "shorter":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        file.unlink()
    with pytest.raises(ValueError, match=r"rank-00000\.safetensors"):
        load(target, empty_slices(make_tensors(0), grid, 0), rank=0)
    report = verify_checkpoint(target)
    assert any("rank-00000.safetensors" in str(finding) for finding in report.errors)


def test_a_copy_of_an_index_needs_the_original_no_more(deepspeed: Path, tmp_path: Path) -> None:
    target = index(deepspeed, tmp_path / "index")
    convert(prepare(target, "universal", WriteOptions()), tmp_path / "universal")
    assert not open_checkpoint(tmp_path / "universal").problems
    for tensor in read_manifest(tmp_path / "universal")[1].tensors:
        assert {Path(piece.file).name for piece in tensor.pieces} == {piece.file for piece in tensor.pieces}


def test_ten_thousand_tensors_take_less_than_a_second(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "data.bin").write_bytes(bytes(TENSORS * 4))
    pieces = [Piece("data.bin", 4 * n, "float32", Box((0,), (1,))) for n in range(TENSORS)]
    tensors = tuple(LogicalTensor(f"w{n}", "weight", (1,), "float32", (p,)) for n, p in enumerate(pieces))
    opened = Opened(source, "test", Manifest(1, 1, tensors), source=Source("test", source))
    begin = time.process_time()
    target = index(opened, tmp_path / "index")
    assert time.process_time() - begin < 1
    assert len(read_manifest(target)[1].tensors) == TENSORS


def test_another_dtype_is_refused(deepspeed: Path) -> None:
    with pytest.raises(ValueError, match="do not become float32: convert to universal"):
        prepare(deepspeed, "index", WriteOptions(dtype="float32"))
