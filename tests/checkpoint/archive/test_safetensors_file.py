"""Headers of safetensors files: the library's own are read, and nothing in a damaged one is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoint.archive.safetensors_file import read_safetensors_header

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {str(dtype): torch.arange(5).to(dtype) for dtype in (*DTYPES, torch.uint16)}
    return made | {"matrix": torch.randn(5, 9), "scalar": torch.tensor(1.5), "no elements": torch.zeros(0, 3)}


def test_the_librarys_files_are_read(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x.safetensors", {"format": "pt"})
    found, metadata = read_safetensors_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    assert set(found) == set(tensors())
    for name, tensor in tensors().items():
        assert (found[name].dtype, found[name].shape) == (str(tensor.dtype)[6:], tuple(tensor.shape)), name
        assert found[name].read().tolist() == tensor.tolist(), name


def test_float8_keeps_its_dtype(tmp_path: Path) -> None:
    made = {"a": torch.ones(3).to(torch.float8_e4m3fn), "b": torch.ones(3).to(torch.float8_e5m2)}
    save_file(made, tmp_path / "x.safetensors")
    found, _ = read_safetensors_header(tmp_path / "x.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "a": "float8_e4m3fn",
        "b": "float8_e5m2",
    }


def write(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, end: int, *shape: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_keys_need_no_order_and_gaps_are_allowed(tmp_path: Path) -> None:
    file = write(tmp_path / "x", {"b": entry(12, 20, 2), "a": entry(0, 8, 2)}, bytes(20))
    found, _ = read_safetensors_header(file)
    assert list(found) == ["a", "b"]
    assert found["b"].start - found["a"].start == 12


BAD = {
    "truncated": (
        {"a": entry(0, 12, 3)},
        11,
        r"ends at byte \d+, where 1 tensors reach further, a up to byte \d+",
    ),
    "wrong shape": (
        {"a": entry(0, 12, 4)},
        12,
        r"a: F32 of shape \[4\] takes 16 bytes, its data_offsets \[0, 12\]",
    ),
    "negative": ({"a": entry(8, 0, 2)}, 8, r"a: F32 of shape \[2\] takes 8 bytes"),
    "overlap": ({"a": entry(0, 8, 2), "b": entry(4, 12, 2)}, 12, r"a and b share bytes \d+ to \d+"),
    "same bytes": ({"a": entry(0, 8, 2), "b": entry(0, 8, 2)}, 8, r"a and b share bytes"),
    "dtype": ({"a": entry(0, 8, 16, dtype="F4")}, 8, "a: its dtype 'F4' is not known"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "a: its entry .* lacks dtype, shape"),
    "no entry": ({"a": 3}, 8, "a: its entry 3 lacks"),
    "fraction": ({"a": entry(0, 8, 2) | {"shape": [2.0]}}, 8, "a: its entry .* lacks"),
    "no object": ([1, 2], 8, "its header is no JSON object"),
    "no JSON": (b'{"a": ', 8, "its header is no JSON"),
    "twice": (b'{"a": 1, "a": 2}', 8, "'a' occurs twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(tmp_path: Path, name: str) -> None:
    header, size, message = BAD[name]
    with pytest.raises(ValueError, match=rf"(?s)x\.safetensors: .*{message}"):
        read_safetensors_header(write(tmp_path / "x.safetensors", header, bytes(size)))


def test_all_problems_are_given_at_once(tmp_path: Path) -> None:
    header = {"a": entry(0, 12, 4), "b": entry(12, 20, 2, dtype="X"), "c": entry(12, 24, 3)}
    with pytest.raises(ValueError, match=r"(?s)a: .*b: .*1 tensors reach further, c"):
        read_safetensors_header(write(tmp_path / "x", header, bytes(20)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"1234", r"truncated \(4 bytes\)"),
        ((1 << 40).to_bytes(8, "little"), "is no safetensors file: its header would have"),
        ((1000).to_bytes(8, "little") + b"{}", "is truncated: 10 bytes, of which the header needs 1008"),
    ],
)
def test_a_file_without_a_header_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x: .*{message}"):
        read_safetensors_header(tmp_path / "x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gone: No such file"):
        read_safetensors_header(tmp_path / "gone")
