"""Checkpoints that other trainers wrote, loaded directly: the oracle's bits on any layout, and no damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoint.boxes import Box
from checkpoint.load import LoadedState, load
from checkpoint.manifest import LogicalTensor, Manifest, Piece
from checkpoint.opening import Opened, open_checkpoint
from checkpoint.source import Source
from checkpoint.verification.report import verify_checkpoint
from parallel.slices import TensorSlice
from tests.checkpoint.models import Grid, Key, assert_equal, slices_of
from tests.foreign import dcp, deepspeed, huggingface
from tests.foreign.oracle import STATES, STEP, Oracle
from tests.ranks import run_ranks

BF16 = Oracle(hidden=96, layers=2, vocab=131, precision="bf16")
FP32 = replace(BF16, precision="fp32")
SOURCES: dict[str, tuple[Oracle, Callable[[Path], Path]]] = {
    "zero2": (BF16, lambda folder: deepspeed.save(folder, BF16, deepspeed.Run(stage=2))),
    "zero3": (BF16, lambda folder: deepspeed.save(folder, BF16, deepspeed.Run(stage=3, world=3))),
    "fsdp": (FP32, lambda folder: dcp.save(folder, FP32, dcp.Run(mesh=(3,)))),
}
GRIDS = [Grid(), Grid(2, 1, 2), Grid(3, 1, 1), Grid(1, 1, 5)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a source, made when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(source: str) -> Path:
        if source not in made:
            made[source] = SOURCES[source][1](tmp_path_factory.mktemp(source))
        return made[source]

    return folder


def tensors_of(oracle: Oracle) -> dict[Key, torch.Tensor]:
    states = STATES if oracle.precision == "bf16" else ("weight", "exp_avg", "exp_avg_sq")
    return {(name, state): oracle.value(name, state) for name in oracle.shapes() for state in states}


def untouched(oracle: Oracle, grid: Grid, rank: int = 0) -> list[TensorSlice]:
    slices = slices_of(tensors_of(oracle), grid, rank)
    for piece in slices:
        piece.data.fill_(7)
    return slices


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_every_rank_of_any_layout_has_the_oracles_bits(
    source: str, grid: Grid, saved: Callable[[str], Path]
) -> None:
    oracle, folder = SOURCES[source][0], saved(source)
    for rank in range(grid.world_size):
        slices = untouched(oracle, grid, rank)
        state = load(folder, slices, rank=rank)
        assert_equal(slices, slices_of(tensors_of(oracle), grid, rank))
        assert (state.step, state.state["scalars"]["updates"]) == (STEP, STEP)
        assert not state.is_native
        assert state.run_id is None
        assert state.notes[0] == f"recognised {state.format}: {state.path}"


def load_together(folder: str, oracle: Oracle, grid: Grid) -> LoadedState:
    rank = dist.get_rank()
    slices = untouched(oracle, grid, rank)
    state = load(folder, slices, verify="full")
    assert_equal(slices, slices_of(tensors_of(oracle), grid, rank))
    return state


def test_ranks_load_together(saved: Callable[[str], Path]) -> None:
    grid = Grid(2, 1, 2)
    states = run_ranks(load_together, grid.world_size, str(saved("zero3")), BF16, grid)
    assert len({state.path for state in states}) == 1
    assert {dict(state.derived)["weight"] for state in states} == {"master"}, "ZeRO 3 keeps no weights"


def test_a_rank_reads_its_own_bytes(saved: Callable[[str], Path]) -> None:
    """Of what is cut by rows; of columns as narrow as these what lies between is read too."""
    for source in ("zero2", "zero3"):
        for rank in range(4):
            slices = [piece for piece in untouched(BF16, Grid(2, 1, 2), rank) if "_proj" not in piece.name]
            state = load(reduced(saved(source)), slices, rank=rank)
            assert state.bytes_needed <= sum(2 * piece.data.nbytes for piece in slices)
            assert state.bytes_read == state.bytes_needed


def reduced(folder: Path) -> Opened:
    """Without the matrices of layers."""
    found = open_checkpoint(folder)
    kept = tuple(tensor for tensor in found.manifest.tensors if "_proj" not in tensor.name)
    return replace(found, manifest=replace(found.manifest, tensors=kept))


def load_one_of_two(folders: tuple[str, str]) -> str:
    slices = untouched(BF16, Grid(1, 1, 2), dist.get_rank())
    with pytest.raises(ValueError, match="The model has not been touched") as caught:
        load(folders[dist.get_rank()], slices)
    return str(caught.value)


def test_ranks_must_mean_the_same_checkpoint(saved: Callable[[str], Path]) -> None:
    first, second = run_ranks(load_one_of_two, 2, (str(saved("zero2")), str(saved("zero3"))))
    assert first == second
    assert "different checkpoints" in first


def test_weights_of_transformers_are_loaded_as_weights_only(tmp_path: Path) -> None:
    folder = huggingface.save(tmp_path, BF16)
    slices = untouched(BF16, Grid(2))
    with pytest.raises(ValueError, match=r"set moments = .reset. under") as caught:
        load(folder, slices)
    assert "no optimizer state (exp_avg, exp_avg_sq, master)" in str(caught.value)
    state = load(folder, slices, weights_only=True)
    assert state.derived == {"master": "weight"}
    expected = tensors_of(BF16)
    for name in BF16.shapes():
        expected[name, "master"] = expected[name, "weight"].float()
    loaded = [piece for piece in slices if piece.state in ("weight", "master")]
    assert_equal(loaded, [p for p in slices_of(expected, Grid(2), 0) if p.state in ("weight", "master")])


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "flipped"])
@pytest.mark.parametrize("source", SOURCES)
def test_damage_is_named_and_nothing_is_loaded(
    how: str, source: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    oracle = SOURCES[source][0]
    folder = shutil.copytree(saved(source), tmp_path / "copy")
    manifest = open_checkpoint(folder).manifest
    # only ZeRO 2 keeps weights that tell of a master's sign; that of a mean of squares tells of itself
    key = ("lm_head.weight", "master" if source == "zero2" else "exp_avg_sq")
    name = spoil(how, manifest.by_key()[key].pieces[-1])
    report = verify_checkpoint(folder)
    assert not report.is_sound
    assert name in "\n".join(map(str, report.errors))
    slices = untouched(oracle, Grid())
    with pytest.raises(ValueError, match="The model has not been touched") as caught:
        load(folder, slices, verify="full")
    assert name in str(caught.value)
    assert all(bool((piece.data == 7).all()) for piece in slices)


def spoil(how: str, piece: Piece) -> str:
    """Damage the file of a piece; returns what must be named."""
    path = Path(piece.file)
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        with open(path, "r+b") as file:
            file.truncate(piece.start + piece.num_bytes // 2)
    else:
        with open(path, "r+b") as file:  # the sign and the top of the exponent of its last number
            file.seek(piece.start + piece.num_bytes - 1)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 0x80]))
        return "lm_head.weight"
    return path.name.removeprefix("bf16_")  # of a missing file only its rank is known


def write_numbers(path: Path, values: torch.Tensor) -> Piece:
    path.write_bytes(values.numpy().tobytes())
    return Piece(str(path), 0, "float32", Box((0,) * values.dim(), tuple(values.shape)))


def opened(folder: Path, *tensors: LogicalTensor) -> Opened:
    return Opened(folder, "hand-made", Manifest(1, 1, tensors), source=Source("hand-made", folder))


def slice_of(
    name: str, shape: tuple[int, ...], offset: tuple[int, ...], size: tuple[int, ...]
) -> TensorSlice:
    data = torch.full((int(torch.tensor(size).prod()),), 7.0)
    return TensorSlice(name, "weight", shape, offset, size, data, replicas=(0,))


def test_the_mean_of_copies_is_loaded(tmp_path: Path) -> None:
    copies = [torch.randn(6, 5) for _ in range(3)]
    first, *others = (write_numbers(tmp_path / str(n), copy) for n, copy in enumerate(copies))
    halves = tuple(replace(first, start=60 * half, box=Box((3 * half, 0), (3, 5))) for half in range(2))
    mean = LogicalTensor(
        "n", "weight", (6, 5), "float32", halves, tuple((other,) for other in others), average=True
    )
    wanted = slice_of("n", (6, 5), (2, 1), (3, 4))
    load(opened(tmp_path, mean), [wanted])
    expected = ((copies[0] + copies[1]) + copies[2]) / 3
    assert torch.equal(wanted.data, expected[2:5, 1:5].reshape(-1))


def test_a_mean_with_a_gap_in_one_copy_is_refused(tmp_path: Path) -> None:
    whole = write_numbers(tmp_path / "a", torch.randn(6, 5))
    mean = LogicalTensor(
        "n",
        "weight",
        (6, 5),
        "float32",
        (whole,),
        ((replace(whole, box=Box((0, 0), (5, 5))),),),
        average=True,
    )
    wanted = slice_of("n", (6, 5), (0, 0), (6, 5))
    with pytest.raises(ValueError, match=r"n \(weight\): gap: no piece holds element \[5, 0\]"):
        load(opened(tmp_path, mean), [wanted])
    assert bool((wanted.data == 7).all())


def test_replicas_are_compared_only_on_full_verification(tmp_path: Path) -> None:
    values = torch.randn(6, 5)
    one, other = write_numbers(tmp_path / "a", values), write_numbers(tmp_path / "b", values + 1)
    tensor = LogicalTensor("n", "weight", (6, 5), "float32", (one,), ((other,),))
    wanted = slice_of("n", (6, 5), (0, 0), (6, 5))
    with pytest.raises(ValueError, match=r"replica 1 of 1 differs in 30 of 30 numbers"):
        load(opened(tmp_path, tensor), [wanted], verify="full")
    assert bool((wanted.data == 7).all())
    load(opened(tmp_path, tensor), [wanted])
    assert torch.equal(wanted.data, values.reshape(-1))


def test_columns_of_a_transposed_weight(tmp_path: Path) -> None:
    stored = torch.randn(5, 6)
    piece = replace(write_numbers(tmp_path / "a", stored), box=Box((0, 0), (6, 5)), strides=(1, 6))
    tensor = LogicalTensor("n", "weight", (6, 5), "float32", (piece,))
    wanted = slice_of("n", (6, 5), (1, 2), (4, 3))
    load(opened(tmp_path, tensor), [wanted])
    assert torch.equal(wanted.data, stored.T[1:5, 2:5].reshape(-1))
