"""Checksums that other trainers' files have: the CRC-32 of torch.save's records. safetensors has none."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from checkpoint.archive.checksums import Archive, Fault, StoredRecord, compare, read_records
from checkpoint.manifest import LogicalTensor, Piece
from checkpoint.opening import Opened
from checkpoint.readers.dcp_metadata import SUFFIX, read_dcp_metadata
from checkpoint.source import SourceTensor
from checkpoint.verification import causes
from checkpoint.verification.finding import Finding
from checkpoint.verification.sweep import WORKERS, Progress

_NAMED = 5  # tensors in the words of a finding; all of them are in its list
_ALL = slice(None)


@dataclass
class Checksums:
    """What the archives of a checkpoint have to be compared with.

    Attributes:
        records: to compare, in the order of files.
        covered: files with checksums.
        without: files without any.
        findings: archives that cannot be read.
    """

    records: list[StoredRecord] = field(default_factory=list)
    covered: set[Path] = field(default_factory=set)
    without: set[Path] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """That `check_records` reads."""
        return sum(record.num_bytes for record in self.records)

    def __str__(self) -> str:
        told = f"{len(self.records)} records of {len(self.covered)} files have a CRC-32"
        return told + (f"; no checksums in the files: {len(self.without)} files" if self.without else "")


def find_checksums(opened: Opened, share: slice = _ALL) -> Checksums:
    """The checksums of all files with pieces that no recorded hash covers.

    Records of states that the manifest was left without, because nobody asks for them, do not count.

    Args:
        share: of the archives, where several ranks divide them.
    """
    found = Checksums()
    for archive in _archives(opened, found)[share]:
        try:
            records = read_records(archive)
        except ValueError as error:
            text = str(error).removeprefix(f"{archive.file}: ")
            found.findings.append(Finding("error", "checksum", text, file=str(archive.file)))
            continue
        except OSError:
            continue  # missing files have a finding of their own
        records = [record for record in records if record.has_crc]
        found.records += records
        (found.covered if records else found.without).add(archive.file)
    found.without -= found.covered
    found.records = _wanted(opened, found.records)
    return found


def check_records(
    opened: Opened, checksums: Checksums, *, workers: int = WORKERS, progress: Progress | None = None
) -> list[Finding]:
    """Read every record and name those that are not as they were saved, with the tensors in them."""
    faults: list[Fault] = []
    done, total = 0, checksums.num_bytes
    for task, wrong in compare(checksums.records, workers=workers):
        faults += wrong
        done += sum(record.num_bytes for record in task)
        if progress is not None:
            progress(done, total)
    return list(_findings(opened, faults))


def _archives(opened: Opened, found: Checksums) -> list[Archive]:
    """Of all files, in order; those of DCP's files, which hold many, stand in its index."""
    files = {
        opened.folder / piece.file
        for tensor in opened.manifest.tensors
        for piece in _pieces(tensor)
        if piece.hash is None
    }
    bundles = {file for file in files if file.name.endswith(SUFFIX)}
    archives = [Archive(file) for file in files - bundles]
    for folder in {file.parent for file in bundles}:
        try:
            metadata = read_dcp_metadata(folder)
        except ValueError as error:
            found.findings.append(Finding("error", "checksum", str(error)))
            continue
        chunks = (chunk.stored for tensor in metadata.tensors.values() for chunk in tensor.chunks)
        inside = {
            stored for stored in (*chunks, *metadata.items.values()) if stored and not stored.transforms
        }
        archives += [Archive(folder / each.file, each.start, each.length) for each in inside]
    return sorted(archives, key=lambda archive: (str(archive.file), archive.start))


def _pieces(tensor: LogicalTensor | SourceTensor) -> Iterator[Piece]:
    return chain(tensor.pieces, *(tensor.replicas if isinstance(tensor, LogicalTensor) else ()))


def _wanted(opened: Opened, records: list[StoredRecord]) -> list[StoredRecord]:
    """All but those with nothing but states that the source has and the manifest does not."""
    states = {tensor.state for tensor in opened.manifest.tensors}
    others = (
        [tensor for tensor in opened.source.tensors if tensor.state not in states] if opened.source else []
    )
    if not others:
        return records
    files = {record.file for record in records}
    held, beside = _by_file(opened, opened.manifest.tensors, files), _by_file(opened, others, files)
    return [
        record
        for record in records
        if _inside(record, held[record.file]) or not _inside(record, beside[record.file])
    ]


def _findings(opened: Opened, faults: Sequence[Fault]) -> Iterator[Finding]:
    if not faults:
        return
    held = _by_file(opened, opened.manifest.tensors, {fault.record.file for fault in faults})
    for record, what in faults:
        names = _inside(record, held[record.file])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        holds = (
            f"it holds {', '.join(names[:_NAMED])}{more}" if names else "it holds no tensor that is carried"
        )
        text = f"record {record.name}: {what}; {holds}"
        yield Finding("error", "checksum", text, file=str(record.file), cause=causes.HASH, tensors=names)


_Held = tuple[int, int, str]
"""First byte, end, and whose they are."""


def _by_file(
    opened: Opened, tensors: Iterable[LogicalTensor | SourceTensor], files: Iterable[Path]
) -> dict[Path, list[_Held]]:
    held: dict[Path, list[_Held]] = {file: [] for file in files}
    for tensor in tensors:
        for piece in _pieces(tensor):
            file = opened.folder / piece.file
            if file in held:
                end = piece.start + piece.num_bytes
                held[file].append((piece.start, end, f"{tensor.name} ({tensor.state})"))
    return {file: sorted(entries) for file, entries in held.items()}


def _inside(record: StoredRecord, held: Sequence[_Held]) -> tuple[str, ...]:
    """Tensors with bytes in a record, which lie in it from end to end."""
    first = bisect_left(held, (record.start, 0, ""))
    last = bisect_left(held, (record.start + record.num_bytes, 0, ""))
    return tuple(dict.fromkeys(name for _, _, name in held[first:last]))
