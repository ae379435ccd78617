"""A flipped bit in a file of torch.save is found by the checksums in it; no file is accused falsely."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint.archive.checksums import TASK_BYTES, Archive, StoredRecord, compare, read_records
from checkpoint.load import load
from checkpoint.opening import Opened, open_checkpoint
from checkpoint.readers.dcp_metadata import read_dcp_metadata
from checkpoint.verification import causes
from checkpoint.verification.finding import Finding
from checkpoint.verification.report import verify_checkpoint
from parallel.layout import Layout
from tests.checkpoint.models import Grid, slices_of
from tests.foreign import dcp, deepspeed, huggingface, megatron
from tests.foreign.oracle import Oracle

BF16 = Oracle(hidden=64, layers=2, vocab=131, precision="bf16")
FP32 = replace(BF16, precision="fp32")
Save = Callable[[Path], Path]
SOURCES: dict[str, tuple[str, Save]] = {
    "Megatron torch": ("exp_avg", lambda f: megatron.save_torch(f, BF16, megatron.Run(Layout(tensor=2), 2))),
    "Megatron torch_dist": ("exp_avg", lambda f: megatron.save_torch_dist(f, BF16, megatron.Run())),
    "DeepSpeed": ("exp_avg", lambda f: deepspeed.save(f, BF16, deepspeed.Run(stage=2))),
    "DCP": ("exp_avg", lambda f: dcp.save(f, FP32, dcp.Run())),
    "bin": ("weight", lambda f: huggingface.save_bin(f, FP32)),
}
NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(params=SOURCES)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A checkpoint, and a state whose values no other one of it confirms."""
    state, save = SOURCES[request.param]
    return save(tmp_path / "saved"), state


@pytest.fixture
def without_crc() -> Iterator[None]:
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


def flip(path: Path, state: str, name: str = NAME) -> Path:
    """Flip the lowest bit of a number: it stays finite, and is of about the same size."""
    piece = open_checkpoint(path).manifest.by_key()[name, state].pieces[0]
    return flip_byte(Path(piece.file), piece.start)


def flip_byte(path: Path, at: int) -> Path:
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    return path


def only(opened: Opened | Path) -> Finding:
    (finding,) = verify_checkpoint(opened).errors
    return finding


def test_a_flipped_bit_is_found_and_named_with_file_record_and_tensor(saved: tuple[Path, str]) -> None:
    path, state = saved
    assert verify_checkpoint(path).is_sound
    file = flip(path, state)
    finding = only(path)
    assert (finding.check, finding.file, finding.cause) == ("checksum", str(file), causes.HASH)
    assert finding.what.startswith("record ")
    assert "/data/" in finding.what
    assert f"{NAME} ({state})" in finding.tensors


def test_what_was_compared_is_said(tmp_path: Path) -> None:
    path = huggingface.save_bin(tmp_path / "bin", FP32)
    (file,) = path.glob("*.bin")
    records = len(read_records(Archive(file)))
    told = f"{records} records of 1 files have a CRC-32"
    assert verify_checkpoint(path).checks["checksum"] == told


def test_safetensors_has_no_checksums_and_it_is_said(tmp_path: Path) -> None:
    checks = verify_checkpoint(huggingface.save(tmp_path, FP32)).checks
    assert checks["checksum"] == "0 records of 0 files have a CRC-32; no checksums in the files: 1 files"


@pytest.mark.parametrize("source", ["DCP", "bin"])
def test_files_saved_without_crc_are_not_accused(source: str, without_crc: None, tmp_path: Path) -> None:
    state, save = SOURCES[source]
    path = save(tmp_path)
    for _ in range(2):
        report = verify_checkpoint(path)
        assert report.is_sound
        assert report.checks["checksum"].startswith("0 records of 0 files have a CRC-32; no checksums in ")
        flip(path, state)  # nothing in the files tells


def test_files_of_the_older_format_have_no_checksums(tmp_path: Path) -> None:
    report = verify_checkpoint(huggingface.save_bin(tmp_path, FP32, zipped=False))
    assert report.is_sound
    assert (
        report.checks["checksum"] == "0 records of 0 files have a CRC-32; no checksums in the files: 1 files"
    )


def test_a_load_with_full_verification_refuses(tmp_path: Path) -> None:
    path = dcp.save(tmp_path, FP32, dcp.Run())
    flip(path, "exp_avg")
    tensors = {(NAME, state): FP32.value(NAME, state) for state in ("weight", "exp_avg", "exp_avg_sq")}
    found = open_checkpoint(path)
    kept = tuple(tensor for tensor in found.manifest.tensors if tensor.name == NAME)
    opened = replace(found, manifest=replace(found.manifest, tensors=kept))
    with pytest.raises(ValueError, match="CRC-32"):
        load(opened, slices_of(tensors, Grid(), 0), verify="full")


def test_records_of_states_that_nobody_asks_for_do_not_count(tmp_path: Path) -> None:
    path = dcp.save(tmp_path, FP32, dcp.Run())
    flip(path, "exp_avg")
    found = open_checkpoint(path)
    weights = tuple(tensor for tensor in found.manifest.tensors if tensor.state == "weight")
    alone = replace(found, manifest=replace(found.manifest, tensors=weights))
    assert verify_checkpoint(alone).is_sound
    flip(path, "weight")
    assert only(alone).tensors == (f"{NAME} (weight)",)


def test_an_item_that_is_no_tensor_is_compared_too(tmp_path: Path) -> None:
    """A settings object of DCP lies in the file of its tensors, as an archive of its own."""
    path = dcp.save(tmp_path, FP32, dcp.Run())
    stored = next(iter(read_dcp_metadata(path).items.values()))
    records = read_records(Archive(path / stored.file, stored.start, stored.length))
    version = next(record for record in records if record.name.endswith("version"))
    flip_byte(version.file, version.start)
    finding = only(path)
    assert finding.what.startswith(f"record {version.name}: ")
    assert finding.what.endswith("it holds no tensor that is carried")


def test_a_large_record_is_read_in_parts(tmp_path: Path) -> None:
    """More than a buffer, and more records than one thread takes at a time."""
    whole = torch.arange(TASK_BYTES // 4, dtype=torch.int32)
    torch.save({"a": whole, "b": whole + 1, "c": torch.ones(3)}, tmp_path / "x.pt")
    records = read_records(Archive(tmp_path / "x.pt"))
    assert not [fault for _, faults in compare(records, workers=2) for fault in faults]
    last = next(record for record in records if record.name.endswith("data/1"))
    with open(tmp_path / "x.pt", "r+b") as file:
        file.seek(last.start + last.num_bytes - 1)
        file.write(b"\x07")
    (fault,) = [fault for _, faults in compare(records, workers=2) for fault in faults]
    assert fault.record == last


def test_the_records_are_those_of_the_directory(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(100)}, tmp_path / "x.pt")
    members = {(m.filename, m.file_size, m.CRC) for m in zipfile.ZipFile(tmp_path / "x.pt").infolist()}
    found = read_records(Archive(tmp_path / "x.pt"))
    assert {(r.name, r.num_bytes, r.crc) for r in found} == members
    assert all(isinstance(record, StoredRecord) and record.has_crc for record in found)


def test_an_archive_that_is_gone_is_said_once(tmp_path: Path) -> None:
    path = huggingface.save_bin(tmp_path / "bin", FP32)
    opened = open_checkpoint(path)
    (file,) = path.glob("*.bin")
    shutil.move(file, tmp_path / "elsewhere")
    assert only(opened).check == "file"
