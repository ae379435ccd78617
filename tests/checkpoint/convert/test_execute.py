"""Regions of output files are filled bit for bit, whatever they ask for and however the source is cut."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
import xxhash

from checkpoint.boxes import Box
from checkpoint.convert import execute as execution
from checkpoint.convert.execute import Written, execute
from checkpoint.convert.journal import Journal
from checkpoint.convert.output import OutputFile, Region, WritePlan
from checkpoint.manifest import LogicalTensor, Piece
from checkpoint.source import Part, plain_part
from tests.checkpoint.convert.sources import content, one_region, read_back, write_columns, write_whole

ROWS, COLUMNS = 37, 26
PANEL = 256
"""Bytes: small, so that every region takes many panels."""


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "PANEL_BYTES", PANEL)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(folder: Path, files: list[OutputFile], *tensors: LogicalTensor) -> Written:
    target = folder / "target"
    by_key = {(tensor.name, tensor.state): tensor for tensor in tensors}
    return execute(WritePlan("test", files), folder, by_key, target, journal=Journal(target, "key"))


def fill(folder: Path, region: Region, dtype: torch.dtype, *tensors: LogicalTensor) -> torch.Tensor:
    run(folder, [one_region(region)], *tensors)
    return read_back(folder / "target" / "out.bin", region, dtype)


def test_a_whole_tensor_from_column_shards(tmp_path: Path) -> None:
    whole = draw(ROWS, COLUMNS)
    tensor = write_columns(tmp_path, "w", whole, [7, 16])
    region = Region("w", 13, "float32", (ROWS, COLUMNS), "weight", (plain_part("w", (ROWS, COLUMNS)),))
    assert torch.equal(fill(tmp_path, region, torch.float32, tensor), whole)


def test_a_box_of_a_tensor(tmp_path: Path) -> None:
    whole = draw(ROWS, COLUMNS)
    tensor = write_columns(tmp_path, "w", whole, [7, 16])
    part = Part("w", (ROWS, COLUMNS), Box((3, 5), (20, 15)), (0, 0), (0, 1), (1, 1))
    region = Region("w", 0, "float32", (20, 15), "weight", (part,))
    assert torch.equal(fill(tmp_path, region, torch.float32, tensor), whole[3:23, 5:20])


def test_a_transposed_tensor(tmp_path: Path) -> None:
    whole = draw(ROWS, COLUMNS)
    tensor = write_columns(tmp_path, "w", whole, [9])
    part = Part("w", (ROWS, COLUMNS), Box((0, 0), (ROWS, COLUMNS)), (0, 0), (1, 0), (1, 1))
    region = Region("w", 0, "float32", (COLUMNS, ROWS), "weight", (part,))
    assert torch.equal(fill(tmp_path, region, torch.float32, tensor), whole.T)


def wide(folder: Path, dtype: torch.dtype) -> tuple[torch.Tensor, LogicalTensor, Part]:
    """A matrix of long rows, and a few of its columns, transposed: short runs, far apart."""
    whole = draw(64, 2000, dtype=dtype)
    part = Part("w", (64, 2000), Box((0, 700), (64, 9)), (0, 0), (1, 0), (1, 1))
    return whole[:, 700:709].T, write_columns(folder, "w", whole, [705]), part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_runs_that_lie_far_apart(tmp_path: Path, dtype: torch.dtype) -> None:
    wanted, tensor, part = wide(tmp_path, dtype)
    region = Region("w", 0, tensor.dtype, (9, 64), "weight", (part,))
    assert torch.equal(fill(tmp_path, region, dtype, tensor), wanted)


def test_a_file_that_ends_before_its_short_runs_is_named(tmp_path: Path) -> None:
    _, tensor, part = wide(tmp_path, torch.float32)
    file = tmp_path / "w-1.bin"
    file.write_bytes(file.read_bytes()[:-8000])
    region = Region("w", 0, "float32", (9, 64), "weight", (part,))
    with pytest.raises(OSError, match="ends at byte"):
        run(tmp_path, [one_region(region)], tensor)


def test_two_tensors_interleaved_row_by_row(tmp_path: Path) -> None:
    one, other = draw(ROWS, COLUMNS), draw(ROWS, COLUMNS, seed=1)
    box = Box((0, 0), (ROWS, COLUMNS))
    parts = tuple(
        Part(name, (ROWS, COLUMNS), box, (first, 0), (0, 1), (2, 1)) for first, name in enumerate("ab")
    )
    region = Region("ab", 0, "float32", (2 * ROWS, COLUMNS), "weight", parts)
    tensors = [write_columns(tmp_path, "a", one, [4]), write_whole(tmp_path, "b", other)]
    found = fill(tmp_path, region, torch.float32, *tensors)
    assert torch.equal(found, torch.stack([one, other], 1).reshape(2 * ROWS, COLUMNS))


def test_a_stack_of_tensors(tmp_path: Path) -> None:
    wholes = [draw(ROWS, COLUMNS, seed=seed) for seed in range(3)]
    box = Box((0, 0), (ROWS, COLUMNS))
    parts = tuple(
        Part(f"w{n}", (ROWS, COLUMNS), box, (0, n, 0), (0, 2), (1, 1, 1)) for n in range(len(wholes))
    )
    region = Region("w", 0, "float32", (ROWS, 3, COLUMNS), "weight", parts)
    tensors = [write_whole(tmp_path, f"w{n}", whole) for n, whole in enumerate(wholes)]
    assert torch.equal(fill(tmp_path, region, torch.float32, *tensors), torch.stack(wholes, 1))


def test_what_no_part_fills_is_zero(tmp_path: Path) -> None:
    whole = draw(ROWS, COLUMNS)
    region = Region("w", 0, "float32", (ROWS + 9, COLUMNS), "weight", (plain_part("w", (ROWS, COLUMNS)),))
    found = fill(tmp_path, region, torch.float32, write_columns(tmp_path, "w", whole, [7]))
    assert torch.equal(found[:ROWS], whole)
    assert not found[ROWS:].any()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_scalars_and_tensors_without_elements(tmp_path: Path, shape: tuple[int, ...]) -> None:
    whole = draw(*shape)
    region = Region("w", 0, "float32", shape, "weight", (plain_part("w", shape),))
    assert torch.equal(fill(tmp_path, region, torch.float32, write_whole(tmp_path, "w", whole)), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_rounded_as_torch_rounds_them(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = torch.cat(
        [draw(ROWS, COLUMNS), torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, -0.0, 3e38] + [1.0] * 22])]
    )
    shape = tuple(whole.shape)
    name = str(dtype).removeprefix("torch.")
    region = Region("w", 0, name, shape, "weight", (plain_part("w", shape),))
    found = fill(tmp_path, region, dtype, write_columns(tmp_path, "w", whole, [7]))
    assert torch.equal(found.view(torch.int16), whole.to(dtype).view(torch.int16))


def test_low_precision_becomes_fp32_exactly(tmp_path: Path) -> None:
    whole = draw(ROWS, COLUMNS, dtype=torch.bfloat16)
    region = Region("w", 0, "float32", (ROWS, COLUMNS), "weight", (plain_part("w", (ROWS, COLUMNS)),))
    found = fill(tmp_path, region, torch.float32, write_columns(tmp_path, "w", whole, [7]))
    assert torch.equal(found, whole.float())


def test_the_mean_of_copies_is_taken_in_fp32(tmp_path: Path) -> None:
    copies = [draw(ROWS, dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    pieces: list[tuple[Piece, ...]] = []
    for number, copy in enumerate(copies):
        (tmp_path / f"{number}.bin").write_bytes(content(copy))
        pieces.append((Piece(f"{number}.bin", 0, "bfloat16", Box((0,), (ROWS,))),))
    tensor = LogicalTensor("w", "weight", (ROWS,), "bfloat16", pieces[0], tuple(pieces[1:]), average=True)
    region = Region("w", 0, "float32", (ROWS,), "weight", (plain_part("w", (ROWS,)),))
    mean = (copies[0].float() + copies[1].float() + copies[2].float()) / 3
    assert torch.equal(fill(tmp_path, region, torch.float32, tensor), mean)


def test_hashes_and_checksums_are_those_of_the_regions_bytes(tmp_path: Path) -> None:
    whole = draw(ROWS, COLUMNS)
    tensor = write_columns(tmp_path, "w", whole, [7])
    shape = (ROWS, COLUMNS)
    region = Region("w", 4, "float32", shape, "weight", (plain_part("w", shape),))
    end = region.start + region.num_bytes
    file = OutputFile(
        "deep/out.bin",
        end + 4,
        (region,),
        early=((0, b"head"),),
        late=lambda crcs: ((end, crcs["w"].to_bytes(4, "little")),),
    )
    written = run(tmp_path, [file], tensor)
    wanted = content(whole)
    assert written.hashes == {"deep/out.bin": {"w": xxhash.xxh3_64_hexdigest(wanted)}}
    found = (tmp_path / "target/deep/out.bin").read_bytes()
    assert found == b"head" + wanted + zlib.crc32(wanted).to_bytes(4, "little")


def test_a_file_without_regions_is_written(tmp_path: Path) -> None:
    run(tmp_path, [OutputFile("head.bin", 6, (), early=((0, b"head"),))])
    assert (tmp_path / "target/head.bin").read_bytes() == b"head\0\0"


def test_progress_ends_with_everything(tmp_path: Path) -> None:
    whole = draw(ROWS, COLUMNS)
    tensor = write_columns(tmp_path, "w", whole, [7])
    shape = (ROWS, COLUMNS)
    region = Region("w", 8, "float32", shape, "weight", (plain_part("w", shape),))
    seen: list[tuple[int, int]] = []
    execute(
        WritePlan("test", [one_region(region)]),
        tmp_path,
        {("w", "weight"): tensor},
        tmp_path / "target",
        journal=Journal(tmp_path / "target", "key"),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (whole.nbytes, whole.nbytes + 8)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_damaged_source_file_is_named(tmp_path: Path, damage: str) -> None:
    tensor = write_columns(tmp_path, "w", draw(ROWS, COLUMNS), [7, 16])
    file = tmp_path / "w-1.bin"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-3])
    shape = (ROWS, COLUMNS)
    region = Region("w", 0, "float32", shape, "weight", (plain_part("w", shape),))
    with pytest.raises(OSError, match=r"w-1\.bin"):
        run(tmp_path, [one_region(region)], tensor)
