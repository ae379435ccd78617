"""Verification: everything that can be known of a checkpoint without the trainer that wrote it.

Coverage, files, hashes, finite numbers, replicas and rounded masters from one pass over the bytes; the
checksums of torch's archives, where they have some, from another; steps, groups and shapes from the headers.
Without torch, in bounded memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

from checkpoint.manifest import ITEM_SIZES, LogicalTensor, Manifest, Piece
from checkpoint.opening import Opened, UnreadableError, open_checkpoint
from checkpoint.streaming.panels import is_dense
from checkpoint.verification import causes
from checkpoint.verification.checks import Checker, Difference, Tally, weight_of
from checkpoint.verification.checksums import check_records, find_checksums
from checkpoint.verification.consistency import consistency
from checkpoint.verification.finding import Finding, Report, number
from checkpoint.verification.sweep import WORKERS, Key, Progress, sweep
from checkpoint.verify import Extent, blob_extents, cover_problem, damage

_NAMED = 5  # tensors in the words of a finding; all of them are in its list
_ORDER = {"error": 0, "warning": 1, "note": 2}


def verify_checkpoint(
    path: Path | str | Opened,
    *,
    expected: Mapping[str, tuple[int, ...]] | None = None,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> Report:
    """Check all of a checkpoint of any format.

    Args:
        path: as `open_checkpoint` takes it, or what that returned.
        expected: logical name -> shape of every parameter of the model, where that is known.
        workers: threads.
        progress: called now and then with the bytes done and the bytes in all.

    Raises:
        ValueError: there is no checkpoint of a known format at all.
    """
    begin = time.monotonic()
    try:
        opened = path if isinstance(path, Opened) else open_checkpoint(path)
    except UnreadableError as error:
        findings = [Finding("error", "open", reason) for reason in error.reasons]
        return Report(str(error.folder), error.format, findings=findings)
    manifest = opened.manifest
    with opened.reading() as gone:
        found = consistency(manifest, expected)
        checksums = find_checksums(opened)
        before, after = _in_turn(progress, checksums.num_bytes, manifest)
        found += checksums.findings
        found += check_records(opened, checksums, workers=workers, progress=before)
        found += verify_tensors(opened, manifest.tensors, workers=workers, progress=after)
        if opened.problems:
            found = [_explained(finding) for finding in found]
        found[:0] = [Finding("error", "open", line) for line in (*gone, *opened.problems)]
        found += [Finding("note", "open", opened.remedy)] if opened.remedy else []
        found += [Finding("error", "hash", line) for line in damage(opened.folder, blob_extents(manifest))]
    pieces = [piece for tensor in manifest.tensors for piece in tensor.pieces]
    checks = _summary(manifest, expected) | {"checksum": str(checksums)}
    return Report(
        path=str(opened.folder),
        format=opened.format,
        step=manifest.step,
        num_tensors=len(manifest.tensors),
        num_pieces=len(pieces),
        num_bytes=sum(tensor.numel * ITEM_SIZES[tensor.dtype] for tensor in manifest.tensors),
        seconds=time.monotonic() - begin,
        checks=checks,
        findings=sorted(found, key=lambda finding: _ORDER[finding.severity]),
        notes=list(opened.notes),
        left_out=list(opened.left_out),
    )


def _in_turn(
    progress: Progress | None, first: int, manifest: Manifest
) -> tuple[Progress | None, Progress | None]:
    """What two passes call, of which the first one reads so many bytes: they count as one."""
    if progress is None:
        return None, None
    pieces = (piece for tensor in manifest.tensors for piece in tensor.pieces)
    second = sum(piece.box.numel * ITEM_SIZES[piece.dtype] for piece in pieces)
    return (
        lambda done, total: progress(done, total + second),
        lambda done, total: progress(first + done, first + total),
    )


def verify_tensors(
    opened: Opened,
    tensors: Sequence[LogicalTensor],
    *,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> list[Finding]:
    """Check the files and the bytes of some of a checkpoint's tensors."""
    by_key = opened.manifest.by_key()
    sizes = _file_sizes(opened.folder, opened.manifest.tensors)
    findings = list(_file_findings(tensors, sizes))
    checkers: dict[Key, Checker] = {}
    pieces: list[tuple[Key, Piece]] = []
    for tensor in tensors:
        findings += _coverage(tensor)
        key = (tensor.name, tensor.state)
        weight = weight_of(tensor, by_key.get((tensor.name, "weight")))
        if weight is not None:
            weight = replace(weight, pieces=_readable(weight.pieces, sizes))
        replicas = tuple(_readable(replica, sizes) for replica in tensor.replicas)
        checkers[key] = Checker(replace(tensor, replicas=replicas), weight)
        pieces += [(key, piece) for piece in _readable(tensor.pieces, sizes)]
    aside = [extent for tensor in tensors for extent in _hashed_aside(tensor, sizes)]
    findings += [Finding("error", "hash", line, cause=causes.HASH) for line in damage(opened.folder, aside)]
    tallies = sweep(opened.folder, checkers, pieces, workers=workers, progress=progress)
    for key, tally in tallies.items():
        findings += _byte_findings(by_key[key], tally)
        findings += _copy_findings(by_key[key], tally, opened.format)
    return findings


def _explained(finding: Finding) -> Finding:
    """What is missing has a known cause where the headers are damaged."""
    is_lack = finding.cause in (causes.FROZEN, causes.GAP, causes.LAYERS)
    return replace(finding, cause=causes.ABOVE) if is_lack else finding


def _all_pieces(tensor: LogicalTensor) -> Iterator[Piece]:
    yield from tensor.pieces
    for replica in tensor.replicas:
        yield from replica


def _file_sizes(folder: Path, tensors: Iterable[LogicalTensor]) -> dict[str, int | None]:
    """Of every file in bytes; None for one that is not there."""
    sizes: dict[str, int | None] = {}
    for name in {piece.file for tensor in tensors for piece in _all_pieces(tensor)}:
        try:
            sizes[name] = os.stat(folder / name).st_size
        except OSError:
            sizes[name] = None
    return sizes


def _ends(piece: Piece) -> int:
    return piece.start + piece.num_bytes


def _readable(pieces: Iterable[Piece], sizes: Mapping[str, int | None]) -> tuple[Piece, ...]:
    """Those that their files hold in full."""
    return tuple([piece for piece in pieces if _ends(piece) <= (sizes[piece.file] or 0)])


def _hashed_aside(tensor: LogicalTensor, sizes: Mapping[str, int | None]) -> Iterator[Extent]:
    """Pieces with a hash that the one pass over the bytes does not read from end to end."""
    owner = f"{tensor.name} ({tensor.state})"
    sparse = [piece for piece in tensor.pieces if not is_dense(piece)]
    for piece in _readable([*sparse, *chain.from_iterable(tensor.replicas)], sizes):
        if piece.hash is not None:
            yield Extent(piece.file, piece.start, piece.num_bytes, piece.hash, owner)


def _file_findings(tensors: Iterable[LogicalTensor], sizes: Mapping[str, int | None]) -> Iterator[Finding]:
    """One for each file that is missing, empty or too short, with all tensors that it should hold."""
    needed: dict[str, int] = {}
    lost: dict[str, dict[str, None]] = {}
    for tensor in tensors:
        for piece in _all_pieces(tensor):
            end, size = _ends(piece), sizes[piece.file]
            if size is None or size < end:
                needed[piece.file] = max(needed.get(piece.file, 0), end)
                lost.setdefault(piece.file, {})[f"{tensor.name} ({tensor.state})"] = None
    for name in sorted(needed):
        size, names = sizes[name], tuple(lost[name])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        holds = f"{len(names)} tensors lie in what is lost: {', '.join(names[:_NAMED])}{more}"
        if size is None:
            what, cause = "is missing", causes.MISSING
        elif size == 0:
            what, cause = "is empty", causes.EMPTY
        else:
            what, cause = f"has {size} bytes, at least {needed[name]} are needed", causes.TRUNCATED
        yield Finding("error", "file", f"{what}; {holds}", file=name, cause=cause, tensors=names)


def _coverage(tensor: LogicalTensor) -> list[Finding]:
    copies = [tensor.pieces, *(tensor.replicas if tensor.average else ())]
    faults = [cover_problem(replace(tensor, pieces=pieces)) for pieces in copies]
    prefix = f"{tensor.name} ({tensor.state}): "
    return [
        Finding(
            "error",
            "coverage",
            fault.removeprefix(prefix),
            tensor.name,
            tensor.state,
            cause=causes.OVERLAP if "overlap" in fault else causes.GAP,
        )
        for fault in faults
        if fault is not None
    ]


def _byte_findings(tensor: LogicalTensor, tally: Tally) -> Iterator[Finding]:
    """Of one tensor alone."""
    about = partial(Finding, "error", tensor=tensor.name, state=tensor.state)
    for file, fault in dict.fromkeys(tally.unread):
        yield about("file", fault, file=file)
    for file, fault in tally.hashes:
        yield about("hash", fault, file=file, cause=causes.HASH)
    for (count, first), kind, cause in (
        (tally.nonfinite, "not finite", causes.NONFINITE),
        (tally.negative, "negative", causes.NEGATIVE),
    ):
        if count:
            what = f"{count} of {tensor.numel} numbers are {kind}, first at {first}"
            yield about("finite", what, file=_file_of(tensor, first), cause=cause)


def _copy_findings(tensor: LogicalTensor, tally: Tally, form: str) -> Iterator[Finding]:
    """Of what should be equal."""
    about = partial(Finding, tensor=tensor.name, state=tensor.state)
    for index, found in sorted(tally.replicas.items()):
        if not found.count:
            continue
        what = (
            f"replica {index + 1} of {len(tensor.replicas)} differs in {found.count} of {found.compared} "
            f"numbers, by {number(found.largest)} at most; {_places(found)}"
        )
        files = ", ".join(found.files)
        if tensor.average:
            yield about("note", "replicas", f"{what}; the mean is taken", file=files)
        else:
            cause = causes.replica_cause(found, tensor.shape, tensor.name)
            yield about("error", "replicas", what, file=files, cause=cause)
    found = tally.rounding
    if found.count:
        what = (
            f"is not the master of its weight: rounded, {found.count} of {found.compared} numbers differ, by "
            f"{number(found.largest)} at most; {_places(found)}"
        )
        file = _file_of(tensor, found.places[0][0])
        yield about("error", "rounding", what, file=file, cause=causes.rounding_cause(found, form))


def _places(difference: Difference) -> str:
    listed = (f"{place} {number(one)} and {number(other)}" for place, one, other in difference.places)
    return "first at " + ", ".join(listed)


def _file_of(tensor: LogicalTensor, place: Sequence[int]) -> str | None:
    """The file that holds an element."""
    for piece in tensor.pieces:
        if all(o <= at < o + s for o, s, at in zip(piece.box.offset, piece.box.size, place, strict=True)):
            return piece.file
    return None


def _summary(manifest: Manifest, expected: Mapping[str, tuple[int, ...]] | None) -> dict[str, str]:
    """What each check had to compare, also where that was nothing."""
    tensors, by_key, state = manifest.tensors, manifest.by_key(), manifest.state
    pieces = [piece for tensor in tensors for piece in tensor.pieces]
    hashed = sum(piece.hash is not None for piece in pieces)
    copied = sum(bool(tensor.replicas) and not tensor.average for tensor in tensors)
    rounding = sum(weight_of(t, by_key.get((t.name, "weight"))) is not None for t in tensors)
    steps = (state.get("per_parameter") or {}).get("step")
    updates = (state.get("scalars") or {}).get("updates", "not known")
    model = f"those of the model's {len(expected)}" if expected is not None else "those of its other states"
    return {
        "coverage": f"{len(tensors)} tensors must hold every element exactly once",
        "hash": f"{hashed} of {len(pieces)} pieces have a recorded hash",
        "finite": f"{len(tensors)} tensors must hold finite numbers",
        "replicas": f"{copied} tensors have copies, which must be equal",
        "rounding": f"{rounding} masters must round to their weights",
        "steps": f"updates: {updates}" if steps is None else f"{len(steps)} parameters count for themselves",
        "groups": f"{len(state.get('groups') or [])} parameter groups",
        "shapes": f"{len({tensor.name for tensor in tensors})} parameters, compared with {model}",
    }
