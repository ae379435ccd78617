"""Universal folders that DeepSpeed's own `ds_to_universal` made are read bit for bit."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from checkpoint.opening import open_checkpoint
from checkpoint.readers.deepspeed_universal import read, recognise
from tests.checkpoint.readers.test_deepspeed import ALL, SHARDED, assert_equal
from tests.foreign.deepspeed import TAG, Run, save
from tests.foreign.deepspeed_tensor import save_auto_tensor_parallel
from tests.foreign.oracle import LR, STEP, WEIGHT_DECAY, Oracle

UNIVERSAL = f"{TAG}_universal"


def universal_of(folder: Path) -> Path:
    """What `ds_to_universal` makes of a run's folder, in that folder."""
    from deepspeed.checkpoint.ds_to_universal import main

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    places = {"input_folder": str(folder / TAG), "output_folder": str(folder / UNIVERSAL)}
    main(Namespace(**places, **options, strict=True, inject_missing_state=True))
    return folder / UNIVERSAL


@pytest.fixture(scope="module")
def zero3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From ZeRO 3, whose tensors are flat and without a shape."""
    return universal_of(save(tmp_path_factory.mktemp("zero3"), Oracle(), Run(3)))


def test_tensors_without_shapes_are_read(zero3: Path) -> None:
    assert_equal(open_checkpoint(zero3), Oracle(), SHARDED)


def test_groups_and_counters_are_carried(zero3: Path) -> None:
    manifest = open_checkpoint(zero3).manifest
    decays = {n: group["weight_decay"] for group in manifest.state["groups"] for n in group["names"]}
    assert decays == {n: WEIGHT_DECAY if len(s) > 1 else 0.0 for n, s in Oracle().shapes().items()}
    assert (manifest.step, manifest.state["scalars"]["lr"]) == (STEP, LR)
    assert manifest.state["scalars"]["updates"] == STEP


@pytest.mark.long
def test_zero_2_with_a_tied_embedding(tmp_path: Path) -> None:
    oracle = Oracle(tied=True, precision="bf16")
    assert_equal(open_checkpoint(universal_of(save(tmp_path, oracle, Run(2)))), oracle, ALL)


@pytest.mark.long
@pytest.mark.parametrize(("stage", "world"), [(1, 2), (3, 4)])
def test_auto_tensor_parallelism(stage: int, world: int, tmp_path: Path) -> None:
    folder = save_auto_tensor_parallel(tmp_path, Oracle(), Run(stage, world=world))
    assert_equal(open_checkpoint(universal_of(folder)), Oracle(), SHARDED)


def test_a_run_goes_on_from_its_own_checkpoint(zero3: Path) -> None:
    """The run's folder has both: the universal one was made of an earlier checkpoint, perhaps."""
    assert recognise(zero3)
    assert not recognise(zero3.parent)
    assert "universal" not in open_checkpoint(zero3.parent).format


def test_a_missing_and_a_truncated_file_are_named(zero3: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(zero3, tmp_path / "copy")
    (copy / "zero" / "model.norm.weight" / "fp32.pt").unlink()
    cut = copy / "zero" / "lm_head.weight" / "exp_avg.pt"
    cut.write_bytes(cut.read_bytes()[:-100])
    problems = "\n".join(read(copy).problems)
    assert "model.norm.weight/fp32.pt is missing" in problems
    assert str(cut) in problems
