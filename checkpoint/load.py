"""Loading on any layout: check everything that can be checked, then read exactly what this rank holds."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal

import xxhash

from checkpoint import peers
from checkpoint.fill import plan_filling
from checkpoint.manifest import Manifest, RankBlob
from checkpoint.opening import RATOON, Opened, open_checkpoint
from checkpoint.rounding import rounding_faults
from checkpoint.selection import Selection, select
from checkpoint.verification.checksums import check_records, find_checksums
from checkpoint.verification.report import verify_tensors
from checkpoint.verify import blob_extents, damage
from parallel.slices import TensorSlice

_LISTED = 20
_UNTOUCHED = "The model has not been touched."
_TOUCHED = "The model's memory has been overwritten, at least in part: do not train or save it."

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedState:
    """What a load has brought besides the tensors, which are in place.

    Attributes:
        path: the folder that was read.
        run_id: of the run that saved it: a `Saver` that goes on with this run takes it. None for a checkpoint
            of another trainer.
        state: as it was saved, see `Manifest`; of another trainer's checkpoint see
            `checkpoint.assembly.assemble`.
        same_layout: whether the checkpoint was saved on the layout that reads it.
        rank_state: this rank's bytes; empty unless `same_layout`.
        derived: states that were filled from another one on any rank, e.g. {"master": "weight"}.
        fresh: states that were left as they were on any rank, because only weights were asked for.
        absent: (logical name, state) of this rank's optional slices that were left as they were, because the
            checkpoint lacks them or only weights were asked for.
        bytes_needed: of pieces, by this rank.
        bytes_read: from files, with what lies between short runs.
        format: what was recognised, in words.
        notes: what was recognised and chosen, a line each; and what is not carried, a line each.
        is_native: whether it has Ratoon's own manifest.
    """

    path: Path
    run_id: str | None
    step: int
    state: Mapping[str, Any]
    same_layout: bool
    rank_state: Mapping[str, bytes]
    derived: Mapping[str, str]
    fresh: tuple[str, ...]
    absent: frozenset[tuple[str, str]]
    bytes_needed: int
    bytes_read: int
    seconds: float
    format: str = RATOON
    notes: tuple[str, ...] = ()
    is_native: bool = True


def load(
    path: Path | str | Opened,
    slices: Sequence[TensorSlice],
    *,
    rank: int | None = None,
    layout: Mapping[str, Any] | None = None,
    weights_only: bool = False,
    verify: Literal["read", "full"] = "read",
) -> LoadedState:
    """Fill each slice's `data` from a checkpoint of any format and any layout.

    All ranks of torch.distributed call it together, and all raise when one has reason to. Each reads the
    headers for itself: another trainer's with 50000 pieces take a few seconds.

    Args:
        path: as `open_checkpoint` takes it, or what that returned.
        slices: all that this rank holds.
        rank: by default torch.distributed's.
        layout: compared with the saved `state["layout"]` to decide whether ranks get their own bytes back.
        weights_only: leave all but weights and masters as they are; no master is read where some are damaged.
        verify: "read" hashes the pieces that are read whole; "full" checks all of the checkpoint first, as
            `verify_checkpoint` does, which reads it once more, shared out over the ranks.

    Raises:
        ValueError: it is incomplete, damaged, or of another model; says whether the model has been touched.
    """
    begin = time.monotonic()
    opened = _open(path, weights_only=weights_only)
    folder, manifest = opened.folder, opened.manifest
    same_layout = _is_same(manifest, layout)
    with opened.reading() as gone:
        selection = _select(opened, slices, gone, weights_only)
        filling = plan_filling(folder, selection.source, slices)
        problems = filling.problems
        blobs = _own_blobs(manifest, rank) if same_layout else []
        rank_state = {blob.name: _read_blob(folder, blob, problems) for blob in blobs}
        if verify == "full":
            problems += _verify(opened)
        _refuse(f"{folder} is damaged", problems, _UNTOUCHED)
        report = filling.read(folder, slices)
    _refuse(f"{folder} is damaged", report.problems + _rounding_faults(selection, slices), _TOUCHED)
    derived, fresh = _summary(selection, slices)
    _log.debug("loaded %s: read %.1f MB", folder, report.read / 1e6)
    return LoadedState(
        path=folder,
        run_id=opened.run_id,
        step=manifest.step,
        state=manifest.state,
        same_layout=same_layout,
        rank_state=rank_state,
        derived=derived,
        fresh=fresh,
        absent=frozenset((slices[number].name, slices[number].state) for number in selection.absent),
        bytes_needed=report.needed,
        bytes_read=report.read,
        seconds=time.monotonic() - begin,
        format=opened.format,
        notes=(*opened.notes, *(f"not carried: {line}" for line in opened.left_out)),
        is_native=opened.is_native,
    )


def _open(path: Path | str | Opened, *, weights_only: bool) -> Opened:
    """The same checkpoint on all ranks; one that cannot read it (its folder is not shared) stops them all."""
    found: Opened | None = None
    problems = []
    try:
        found = path if isinstance(path, Opened) else open_checkpoint(path)
        found = found.weights_alone() if weights_only else found
    except ValueError as error:
        problems.append(str(error))
    _refuse(f"cannot load {path}", problems, _UNTOUCHED)
    assert found is not None
    chosen = dict(peers.gather((found.digest, str(found.folder))))
    if len(chosen) > 1:
        listed = ", ".join(sorted(chosen.values()))
        raise ValueError(f"ranks would load different checkpoints: {listed}. {_UNTOUCHED}")
    return found


def _select(
    opened: Opened, slices: Sequence[TensorSlice], gone: Sequence[str], weights_only: bool
) -> Selection:
    """What fills the slices; refused when the checkpoint is damaged, or of another model."""
    remedy = f"{opened.remedy}. " if opened.remedy else ""
    _refuse(f"{opened.folder} is damaged", opened.problems, remedy + _UNTOUCHED)
    selection = select(opened.manifest, slices, weights_only=weights_only)
    problems = [*gone, *selection.problems, *_unexpected(opened.manifest, slices)]
    _refuse(f"cannot load {opened.folder} into this model", problems, _UNTOUCHED)
    return selection


def _rounding_faults(selection: Selection, slices: Sequence[TensorSlice]) -> list[str]:
    """Of weights and masters that were both read; the mean of weights is not that of masters, rounded."""
    exact = [
        slices[number]
        for number, tensor in selection.source.items()
        if tensor.state == slices[number].state and not tensor.average
    ]
    return rounding_faults(exact)


def _verify(opened: Opened) -> list[str]:
    """This rank's share of a full verification."""
    share = slice(peers.own_rank(), None, peers.world_size())
    found = verify_tensors(opened, opened.manifest.tensors[share])
    checksums = find_checksums(opened, share)
    found += checksums.findings + check_records(opened, checksums)
    blobs = damage(opened.folder, blob_extents(opened.manifest)[share])
    return [str(finding) for finding in found if finding.severity == "error"] + blobs


def _summary(selection: Selection, slices: Sequence[TensorSlice]) -> tuple[dict[str, str], tuple[str, ...]]:
    """What was derived and what is fresh, the same on every rank, also on one that holds no moments."""
    derived: dict[str, str] = {}
    fresh: set[str] = set()
    here = (selection.derived(slices), {slices[number].state for number in selection.fresh})
    for theirs, left in peers.gather(here):
        derived |= theirs
        fresh |= left
    return derived, tuple(sorted(fresh))


def _refuse(title: str, problems: Sequence[str], consequence: str) -> None:
    """Raise on every rank when any rank has found problems: one error with the first of them."""
    own = list(dict.fromkeys(problems))
    answers = peers.gather((len(own), own[:_LISTED]))  # not all: thousands of ranks may have thousands
    found = list(dict.fromkeys(problem for _, some in answers for problem in some))
    if not found:
        return
    count = max(len(found), *(count for count, _ in answers))
    is_cut = len(answers) > 1 and any(count > len(some) for count, some in answers)
    number = f"{'at least ' if is_cut else ''}{count} problem{'s' if count > 1 else ''}"
    lines = [f"{title} ({number})", *found[:_LISTED]]
    if count > _LISTED:
        lines.append(f"... and {count - _LISTED} more")
    raise ValueError("\n  ".join(lines) + f"\n{consequence}")


def _unexpected(manifest: Manifest, slices: Sequence[TensorSlice]) -> list[str]:
    """Parameters of the checkpoint that no rank's model has. A collective: stages know only their own."""
    names = sorted({tensor.name for tensor in manifest.tensors})
    here = {piece.name for piece in slices}
    # a bit a name instead of the names: thousands of ranks gather this
    bits = sum(1 << number for number, name in enumerate(names) if name in here)
    wanted = reduce(or_, peers.gather(bits))
    shapes = {tensor.name: list(tensor.shape) for tensor in manifest.tensors}
    return [
        f"{name}: in the checkpoint {shapes[name]}, not in the model"
        for number, name in enumerate(names)
        if not wanted >> number & 1
    ]


def _own_blobs(manifest: Manifest, rank: int | None) -> list[RankBlob]:
    rank = peers.own_rank() if rank is None else rank
    return [blob for blob in manifest.rank_blobs if blob.rank == rank]


def _read_blob(folder: Path, blob: RankBlob, problems: list[str]) -> bytes:
    try:
        with open(folder / blob.file, "rb") as file:
            file.seek(blob.start)
            content = file.read(blob.num_bytes)
    except OSError as error:
        problems.append(f"{blob.file}: {error.strerror}")
        return b""
    if xxhash.xxh3_64_hexdigest(content) != blob.hash:
        problems.append(f"{blob.file}: the {blob.name} of rank {blob.rank} does not have the recorded hash")
    return content


def _is_same(manifest: Manifest, layout: Mapping[str, Any] | None) -> bool:
    """Whether ranks mean the same as when the checkpoint was saved."""
    if layout is None or manifest.world_size != peers.world_size():
        return False
    return bool(json.loads(json.dumps(layout)) == manifest.state.get("layout"))
