"""What is laid out here is what torch.save writes, and torch.load reads it."""

from __future__ import annotations

import argparse
import collections
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import megatron.core.enums
import pytest
import torch
from torch.utils.serialization import config as serialization

from checkpoint.archive.pickle_writer import Call, Instance, Name, TensorRef, write_pickle
from checkpoint.archive.pickles import load_pickle
from checkpoint.archive.torch_file import open_torch_file
from checkpoint.archive.torch_writer import ArchiveLayout, lay_out


def write(path: Path, layout: ArchiveLayout, payloads: Mapping[str, bytes], at: int = 0) -> Path:
    """As a writer does: all that is known first, then the payloads, then what depends on their checksums."""
    with path.open("r+b" if path.exists() else "w+b") as stream:
        stream.truncate(at + layout.num_bytes)
        parts = [*layout.early, *((layout.payloads[key][0], content) for key, content in payloads.items())]
        for place, content in (*parts, *layout.late({k: zlib.crc32(c) for k, c in payloads.items()})):
            stream.seek(at + place)
            stream.write(content)
        assert os.fstat(stream.fileno()).st_size == at + layout.num_bytes
    return path


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def archive(path: Path, tensors: Mapping[str, torch.Tensor], **more: Any) -> Path:
    refs = {
        name: TensorRef(str(n), str(t.dtype)[6:], tuple(t.shape))
        for n, (name, t) in enumerate(tensors.items())
    }
    payloads = {str(number): bytes_of(tensor) for number, tensor in enumerate(tensors.values())}
    storages = [(key, len(content)) for key, content in payloads.items()]
    return write(path, lay_out(write_pickle(refs | more), storages), payloads)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.uint16)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {str(dtype): torch.arange(7).to(dtype) for dtype in (*DTYPES, torch.float8_e4m3fn)}
    return made | {"matrix": torch.randn(5, 9), "scalar": torch.tensor(1.5), "no elements": torch.zeros(0, 3)}


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_loads_what_was_laid_out(tmp_path: Path, mapped: bool) -> None:
    file = archive(tmp_path / "x.pt", tensors())
    found = torch.load(file, weights_only=True, mmap=mapped)
    assert list(found) == list(tensors())
    for name, tensor in tensors().items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes_of(found[name]) == bytes_of(tensor), name


def test_torch_may_compute_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch trusts `.format_version` to say that every header follows the last payload's descriptor."""
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")  # torch compares them with those of the directory
    with serialization.patch("load.calculate_storage_offsets", True):
        found = torch.load(archive(tmp_path / "x.pt", tensors()), weights_only=True, mmap=True)
    assert torch.equal(found["matrix"], tensors()["matrix"])


def test_zip_finds_no_damage(tmp_path: Path) -> None:
    assert zipfile.ZipFile(archive(tmp_path / "x.pt", tensors())).testzip() is None


def test_we_read_it_ourselves(tmp_path: Path) -> None:
    found = open_torch_file(archive(tmp_path / "x.pt", tensors(), step=3)).value
    assert found["step"] == 3
    assert found["matrix"].read().tolist() == tensors()["matrix"].tolist()


def test_it_may_lie_inside_a_bigger_file(tmp_path: Path) -> None:
    payload = {"0": bytes_of(torch.ones(3))}
    layout = lay_out(write_pickle(TensorRef("0", "float32", (3,))), [("0", 12)])
    write(tmp_path / "x", layout, payload)
    write(tmp_path / "x", layout, payload, at=layout.num_bytes)
    with (tmp_path / "x").open("rb") as stream:
        stream.seek(layout.num_bytes)
        assert torch.load(stream, weights_only=True).tolist() == [1.0] * 3


def _members(path: Path) -> tuple[bytes, dict[str, bytes]]:
    """The pickle and the storages of an archive."""
    source = zipfile.ZipFile(path)
    names = [name for name in source.namelist() if name.startswith(f"{path.stem}/data/")]
    return source.read(f"{path.stem}/data.pkl"), {name.split("/")[-1]: source.read(name) for name in names}


def test_it_is_byte_for_byte_what_torch_writes(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "x.pt")
    pickled, payloads = _members(tmp_path / "x.pt")
    layout = lay_out(pickled, [(key, len(content)) for key, content in payloads.items()], name="x")
    ours = write(tmp_path / "ours", layout, payloads).read_bytes()
    names = [
        zipfile.ZipFile(path).read("x/.data/serialization_id")
        for path in (tmp_path / "ours", tmp_path / "x.pt")
    ]
    ours = ours.replace(names[0], names[1])  # the one thing that is made differently, and its checksum
    ours = ours.replace(*(struct.pack("<I", zlib.crc32(name)) for name in names))
    assert ours == (tmp_path / "x.pt").read_bytes()


def test_headers_beyond_4_gib_are_those_of_torch(tmp_path: Path) -> None:
    """torch leaves the payload as a hole in the file, and its checksum as 0."""
    sizes = {"0": 4 * 1_100_000_000, "1": 12, "2": 8}
    with torch.serialization.skip_data():
        torch.save([torch.empty(size // 4) for size in sizes.values()], tmp_path / "x.pt")
    theirs = zipfile.ZipFile(tmp_path / "x.pt")
    layout = lay_out(theirs.read("x/data.pkl"), list(sizes.items()), name="x")
    with (tmp_path / "ours").open("wb") as stream:
        stream.truncate(layout.num_bytes)
        for place, content in (*layout.early, *layout.late(dict.fromkeys(sizes, 0))):
            stream.seek(place)
            stream.write(content)
    ours = zipfile.ZipFile(tmp_path / "ours")
    fields = ("filename", "header_offset", "file_size", "compress_size", "extra", "flag_bits")
    for mine, other in zip(ours.infolist(), theirs.infolist(), strict=True):
        assert [getattr(mine, field) for field in fields] == [getattr(other, field) for field in fields]
    mapped = torch.load(tmp_path / "ours", weights_only=True, mmap=True)
    assert [tensor.nbytes for tensor in mapped] == list(sizes.values())
    found = open_torch_file(tmp_path / "ours").value
    assert [tensor.start for tensor in found] == [layout.payloads[key][0] for key in sizes]
    assert found[2].read().tolist() == [0.0, 0.0]


def test_plain_values_are_written_as_they_are(tmp_path: Path) -> None:
    value = {
        "numbers": [0, 255, 256, -1, 2**31, -(2**31), 2**40, -(2**70), 0.1, float("inf"), True, None],
        "texts": ("", "ü", b"\x00\xff", bytearray(b"xy")),
        "nested": {"a": [(1, (2, ())), [], {}]},
        "ordered": collections.OrderedDict(b=1, a=2),
        3: {1, 2},
    }
    found = torch.load(archive(tmp_path / "x.pt", {}, value=value), weights_only=True)["value"]
    assert found == value
    assert load_pickle(write_pickle(value), "x") == value


def test_objects_are_written_by_name(tmp_path: Path) -> None:
    value = {
        "dtype": Name("torch.bfloat16"),
        "size": Call("torch.Size", ((2, 3),)),
        "kind": Call("megatron.core.enums.ModelType", (1,)),
        "args": Instance("argparse.Namespace", {"lr": 0.1}),
    }
    found = torch.load(archive(tmp_path / "x.pt", {}, value=value), weights_only=False)["value"]
    assert found == {
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "kind": megatron.core.enums.ModelType(1),
        "args": argparse.Namespace(lr=0.1),
    }


def test_stand_ins_become_again_what_they_stand_for(tmp_path: Path) -> None:
    args = argparse.Namespace(kind=megatron.core.enums.ModelType(1), sizes=[1, 2])
    torch.save({"args": args}, tmp_path / "x.pt")
    read = open_torch_file(tmp_path / "x.pt").value
    assert torch.load(archive(tmp_path / "y.pt", {}, **read), weights_only=False) == {"args": args}


def test_a_value_of_an_unknown_type_is_named() -> None:
    with pytest.raises(ValueError, match=r"\['a'\]\[1\]\['b'\] is of type object, which is not written"):
        write_pickle({"a": [0, {"b": object()}]})
    with pytest.raises(ValueError, match=r"\['a'\] is a tensor of dtype 'int12', which is not known"):
        write_pickle({"a": TensorRef("0", "int12", (3,))})
