"""What is missing, cut short or mixed up in a DeepSpeed checkpoint is named, by file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.readers.deepspeed import read, recognise
from tests.foreign.deepspeed import TAG, Run, save
from tests.foreign.oracle import Oracle

OPTIMIZER = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def zero2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("zero2"), Oracle(layers=1), Run(2))


@pytest.fixture
def copy(zero2: Path, tmp_path: Path) -> Path:
    """A copy to damage: the folder of the tag."""
    return shutil.copytree(zero2, tmp_path / "copy") / TAG


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("damage", [remove, empty, cut])
@pytest.mark.parametrize("name", [OPTIMIZER, "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_damaged_optimizer_file_is_named(name: str, damage: Callable[[Path], None], copy: Path) -> None:
    damage(copy / name)
    assert any(str(copy / name) in problem for problem in read(copy).problems)


@pytest.mark.parametrize("damage", [empty, cut])
def test_a_damaged_model_file_is_named(damage: Callable[[Path], None], copy: Path) -> None:
    damage(copy / "mp_rank_00_model_states.pt")
    assert any("mp_rank_00_model_states.pt" in problem for problem in read(copy).problems)


def test_a_missing_rank_says_how_many_files_are_expected(copy: Path) -> None:
    (copy / OPTIMIZER).unlink()
    assert any("expected 2 such files" in problem for problem in read(copy).problems)


def test_files_of_other_data_ranks_are_refused(copy: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", Oracle(layers=1), Run(2, world=3)) / TAG / OPTIMIZER
    shutil.copy(other, copy / OPTIMIZER)
    assert any("different numbers of data ranks, [2, 3]" in problem for problem in read(copy).problems)


@pytest.mark.long
def test_a_missing_rank_of_zero_3_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, Oracle(layers=1), Run(3, world=3)) / TAG
    for kind in ("optim", "model"):
        (folder / f"zero_pp_rank_2_mp_rank_00_{kind}_states.pt").unlink()
    problems = "\n".join(read(folder).problems)
    assert "zero_pp_rank_2_mp_rank_00_optim_states.pt is missing" in problems
    assert "zero_pp_rank_2_mp_rank_00_model_states.pt is missing" in problems


def test_deepspeeds_own_mixture_of_experts_is_refused_by_name(copy: Path) -> None:
    (copy / "layer_0_expert_3_mp_rank_00_model_states.pt").touch()
    assert any("layer_0_expert_3" in problem for problem in read(copy).problems)


def test_other_folders_are_not_recognised(zero2: Path, tmp_path: Path) -> None:
    assert recognise(zero2)
    assert recognise(zero2 / TAG)
    assert not recognise(tmp_path)
    assert not recognise(zero2 / "latest")
