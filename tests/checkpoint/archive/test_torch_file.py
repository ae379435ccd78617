"""Files of torch.save are read as torch.load reads them, and damage is named."""

from __future__ import annotations

import contextlib
import io
import random
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint.archive.file_tensor import FileTensor
from checkpoint.archive.standins import Opaque
from checkpoint.archive.torch_file import open_torch_file, read_torch_bytes
from checkpoint.boxes import Box
from tests.ranks import run_ranks

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    grid = torch.randn(6, 8)
    made = {str(dtype): torch.arange(5).to(dtype) for dtype in (torch.float64, torch.float16, torch.int64)}
    made |= {str(dtype): torch.arange(5).to(dtype) for dtype in (torch.bool, torch.uint8, torch.int16)}
    return made | {
        "float32": grid,
        "bfloat16": torch.randn(3, 4, 5).bfloat16(),
        "uint16": torch.arange(7).to(torch.uint16),
        "complex64": torch.randn(3, dtype=torch.complex64),
        "transposed": grid.t(),
        "view": grid[2:4, 1:7:2],
        "same storage": grid[3],
        "scalar": torch.tensor(2.5),
        "no elements": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }


def plain(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


@FORMATS
def test_every_tensor_is_found_where_it_lies(tmp_path: Path, zipped: bool) -> None:
    torch.save(tensors(), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    found = open_torch_file(tmp_path / "x.pt").value
    assert list(found) == list(tensors())
    for name, tensor in tensors().items():
        assert (found[name].dtype, found[name].shape) == (str(tensor.dtype)[6:], tuple(tensor.shape)), name
        np.testing.assert_array_equal(found[name].read(), plain(tensor), err_msg=name)


@FORMATS
def test_tensors_of_one_storage_lie_in_the_same_bytes(tmp_path: Path, zipped: bool) -> None:
    weight = torch.randn(4, 4)
    torch.save({"embed": weight, "head": weight}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    found = open_torch_file(tmp_path / "x.pt").value
    assert found["embed"] == found["head"]


@FORMATS
def test_what_is_no_tensor_comes_out_as_itself(tmp_path: Path, zipped: bool) -> None:
    value = {
        "step": 7,
        "groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": [0, 1]}],
        "name": "ü",
        "none": None,
    }
    torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert open_torch_file(tmp_path / "x.pt").value == value


def test_float8_keeps_its_dtype(tmp_path: Path) -> None:
    torch.save(torch.ones(3).to(torch.float8_e4m3fn), tmp_path / "x.pt")
    found = open_torch_file(tmp_path / "x.pt").value
    assert (found.dtype, found.shape, found.piece().num_bytes) == ("float8_e4m3fn", (3,), 3)


def test_a_file_of_optimizer_state_is_read(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "x.pt")
    found = open_torch_file(tmp_path / "x.pt").value
    assert found["state"][0]["step"].item() == 1.0
    assert found["param_groups"][0]["lr"] == 1e-3
    np.testing.assert_array_equal(
        found["state"][1]["exp_avg"].read(), optimizer.state_dict()["state"][1]["exp_avg"].numpy()
    )


def test_an_archive_inside_a_bigger_file_is_read(tmp_path: Path) -> None:
    content = b"".join(_saved({"a": torch.full((3,), float(n))}) for n in range(3))
    length = len(content) // 3
    (tmp_path / "many").write_bytes(content)
    for number in range(3):
        found = read_torch_bytes(tmp_path / "many", number * length, length).value
        assert found["a"].read().tolist() == [number] * 3
    with pytest.raises(ValueError, match=r"many \(bytes 5 to 105\).*is no file of torch\.save"):
        read_torch_bytes(tmp_path / "many", 5, 100)
    with pytest.raises(ValueError, match=rf"many .*only {len(content)} bytes"):
        read_torch_bytes(tmp_path / "many", 2 * length, length + 1)


def test_thousands_of_tensors_are_quick(tmp_path: Path) -> None:
    torch.save({f"layer.{n}.weight": torch.ones(2) for n in range(5000)}, tmp_path / "x.pt")
    start = time.process_time()
    assert len(open_torch_file(tmp_path / "x.pt").value) == 5000
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("keep", [0, 1, 3, 4, 30, 100, 1000, -1, -22, -100, -1000])
@FORMATS
def test_a_truncated_file_is_named(tmp_path: Path, zipped: bool, keep: int) -> None:
    file = tmp_path / "x.pt"
    torch.save({"a": torch.randn(300), "b": torch.randn(300)}, file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    file.write_bytes(content[:keep] if keep >= 0 else content[: len(content) + keep])
    with pytest.raises(
        ValueError, match=r"x\.pt.*(empty|truncated|cut off|announces|is no file of torch\.save)"
    ):
        open_torch_file(file)


@FORMATS
def test_random_damage_is_a_value_error_or_in_the_payload(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "x.pt"
    torch.save(
        {"a": torch.randn(3), "n": [1, "x", torch.Size([2])]}, file, _use_new_zipfile_serialization=zipped
    )
    good = file.read_bytes()
    chance = random.Random(0)
    for _ in range(1000):
        damaged = bytearray(good)
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        file.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            open_torch_file(file)


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _rezipped(compression: int = zipfile.ZIP_STORED, **replaced: bytes) -> bytes:
    """A torch.save archive written again by Python's zipfile, with some members replaced."""
    source = zipfile.ZipFile(io.BytesIO(_saved({"a": torch.ones(40)})))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, replaced.get(name.split("/")[-1].replace(".", "_"), source.read(name)))
        if "constants_pkl" in replaced:
            target.writestr("archive/constants.pkl", b"x")
    return buffer.getvalue()


DAMAGED = {
    "compressed": (_rezipped(zipfile.ZIP_DEFLATED), "compressed"),
    "big-endian": (_rezipped(byteorder=b"big"), "big-endian"),
    "TorchScript": (_rezipped(constants_pkl=b"x"), "TorchScript"),
    "short storage": (_rezipped(**{"0": b"1234"}), "should have 160 bytes, the archive holds 4"),
    "another zip": (_rezipped().replace(b"data.pkl", b"dota.pkl"), r"without data\.pkl"),
    "no zip": (b"hello, this is text", r"is no file of torch\.save: it begins with b'hello, t'"),
    "damaged pickle": (_rezipped().replace(b"Float", b"Flout"), "checksum"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_wrong_is_said(tmp_path: Path, name: str) -> None:
    content, message = DAMAGED[name]
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.pt: .*{message}"):
        open_torch_file(tmp_path / "x.pt")


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    content = bytearray(_rezipped())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pt: .*encrypted"):
        open_torch_file(tmp_path / "x.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.pt: No such file"):
        open_torch_file(tmp_path / "gone.pt")


UNREADABLE = {
    "sparse": torch.eye(3).to_sparse(),
    "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "meta": torch.ones(3, device="meta"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_tensors_that_are_no_plain_ones_are_refused_by_name(tmp_path: Path, name: str) -> None:
    torch.save(UNREADABLE[name], tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: .*{name}"):
        open_torch_file(tmp_path / "x.pt")


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    content = _saved(torch.ones(40)).replace(b"K(\x85", b"K\x29\x85")
    position = content.index(b"data.pkl")
    content = content[:position] + content[position:].replace(_crc_of(_saved(torch.ones(40))), b"\0\0\0\0")
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"shape \[41\] does not fit into its storage of 160 bytes"):
        open_torch_file(tmp_path / "x.pt")


def _crc_of(saved: bytes) -> bytes:
    info = zipfile.ZipFile(io.BytesIO(saved)).infolist()[0]
    return info.CRC.to_bytes(4, "little")


def save_sharded(folder: str) -> None:
    """A DTensor of FSDP2, saved by each rank for itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    tensor = distribute_tensor(torch.arange(10.0).reshape(5, 2), mesh, [Shard(0)])
    torch.save({"weight": tensor}, Path(folder) / f"{mesh.get_local_rank()}.pt")


def test_a_dtensor_is_its_local_part_and_a_description(tmp_path: Path) -> None:
    run_ranks(save_sharded, 2, str(tmp_path))
    found = open_torch_file(tmp_path / "1.pt").value["weight"]
    assert isinstance(found, Opaque)
    assert found.name == "torch.distributed.tensor.DTensor"
    assert found.state["_local_tensor"].read().tolist() == [[6.0, 7.0], [8.0, 9.0]]


def _flat(file: Path) -> FileTensor:
    torch.save(torch.arange(24.0), file)
    found: FileTensor = open_torch_file(file).value
    return found


def test_a_part_of_a_flat_tensor_is_a_box_of_a_matrix(tmp_path: Path) -> None:
    part = _flat(tmp_path / "x.pt").narrow((6,), (8,))
    piece = part.piece(Box((3, 0), (2, 4)))
    assert (piece.start, piece.box, piece.strides) == (part.start, Box((3, 0), (2, 4)), None)
    assert part.reshape((2, 4)).read().tolist() == [[6, 7, 8, 9], [10, 11, 12, 13]]


def test_a_column_keeps_its_strides(tmp_path: Path) -> None:
    columns = _flat(tmp_path / "x.pt").reshape((4, 6)).narrow((1, 2), (3, 2))
    assert columns.read().tolist() == [[8, 9], [14, 15], [20, 21]]
    assert columns.piece().strides == (6, 1)
    with pytest.raises(ValueError, match=r"shape \[3, 2\] cannot become \[6\]"):
        columns.piece(Box((0,), (6,)))


def test_an_expanded_tensor_is_no_piece(tmp_path: Path) -> None:
    torch.save(torch.ones(1, 4).expand(3, 4), tmp_path / "x.pt")
    found = open_torch_file(tmp_path / "x.pt").value
    assert found.read().tolist() == [[1.0] * 4] * 3
    with pytest.raises(ValueError, match=r"x\.pt: an expanded tensor"):
        found.piece()


def test_only_one_element_is_an_item(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a number is expected, found a tensor of shape \[24\]"):
        _flat(tmp_path / "x.pt").item()
