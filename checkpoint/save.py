"""Saving: each rank copies its share aside, and a thread writes it while training goes on."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoint import folder as on_disk
from checkpoint import peers
from checkpoint.attempt import Attempt, SaveError
from checkpoint.manifest import LogicalTensor, Manifest
from checkpoint.merge import merge
from checkpoint.verify import cover_problem
from checkpoint.write import HostCopy, share_out, write_rank_file
from parallel.slices import TensorSlice

__all__ = ["SaveError", "Saved", "Saver", "library_versions"]

_LIBRARIES = ("ratoon", "torch", "megatron-core", "transformer-engine", "numpy")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """What one save took on this rank.

    Attributes:
        num_bytes: of this rank's file.
        stall_seconds: for which `save` kept the training waiting, an earlier save included.
        write_seconds: from the end of the copy until the checkpoint was complete.
    """

    path: Path
    step: int
    num_bytes: int
    stall_seconds: float
    write_seconds: float


class Saver:
    """Saves checkpoints of one run into one folder, and removes the old ones.

    Every rank builds one, together, and calls `save` for the same steps in the same order. Only `__init__`
    talks through torch.distributed; afterwards the ranks meet through the file system, which they must share.
    """

    deadline_seconds = 1800.0  # how long ranks wait for each other's files before a save has failed

    def __init__(
        self,
        folder: Path | str,
        *,
        rank: int = 0,
        world_size: int = 1,
        keep_last: int = 2,
        keep_every: int | None = None,
        keep_steps: Collection[int] = (),
        background: bool = True,
        run_id: str | None = None,
    ) -> None:
        """
        Args:
            folder: made when the first checkpoint is saved.
            keep_last: so many checkpoints of this run stay, the last saved.
            keep_every: checkpoints of steps divisible by this stay for ever.
            keep_steps: checkpoints of these steps stay for ever, too.
            background: write in a thread; False writes inside `save`.
            run_id: of the run that goes on, as `LoadedState.run_id` says; None begins one. Checkpoints of
                other runs in the folder are never removed.
        """
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep_last = {keep_last}, keep_every = {keep_every}: both must be at least 1")
        self.folder = Path(folder)
        self.rank = rank
        self.world_size = world_size
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._keep_steps = frozenset(keep_steps)
        self._background = background
        session = secrets.token_hex(4)
        if world_size > 1:
            assert peers.world_size() == world_size, (
                f"{world_size} ranks, but {peers.world_size()} are joined"
            )
            session = peers.gather(session)[0]
        self._session = session  # tells this run's partial folders from those that a killed run left
        self._run_id = run_id or session
        if rank == 0:
            self._name_foreign()
        self._num_saves = 0
        self._host_copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: Saved | None = None

    def save(
        self,
        step: int,
        slices: Sequence[TensorSlice],
        state: Mapping[str, Any],
        rank_state: Mapping[str, bytes] | None = None,
    ) -> None:
        """Save a checkpoint; in the background, return as soon as this rank's share is copied aside.

        Args:
            slices: all that this rank holds; of the ranks that hold the same box one writes it.
            state: what is not a tensor, JSON-able (tuples come back as lists), the same on all ranks; see
                `Manifest` for the keys. Library versions are added under `versions`.
            rank_state: bytes of this rank, given back only on the same layout.

        Raises:
            SaveError: an earlier save in the background has failed, or, in the foreground, this one.
            TypeError: `state` is not JSON-able.
        """
        begin = time.monotonic()
        self.wait()
        self._num_saves += 1
        key = f"{self._session}-{self._num_saves}"
        attempt = Attempt(
            self.folder, step, key, self._run_id, self.rank, self.world_size, self.deadline_seconds
        )
        versions = library_versions() | dict(state.get("versions", {}))
        frozen = json.loads(json.dumps({**state, "versions": versions}))
        try:
            mine = share_out(slices, self.rank)
            if self._background:
                mine = self._host_copy.take(mine)
        except BaseException as error:
            with attempt.entered():  # the others wait for this rank's file
                attempt.report(error)
            raise
        job = _Job(attempt, mine, frozen, dict(rank_state or {}), begin, time.monotonic())
        if self._background:
            self._thread = threading.Thread(
                target=self._run, args=(job,), name=f"save-step-{step}", daemon=True
            )
            self._thread.start()
        else:
            self._run(job)
            self._saved = self._saved and replace(self._saved, stall_seconds=time.monotonic() - begin)
            self._raise_error()

    def poll(self) -> Saved | None:
        """Called at every step: what the background save took, once, when it is done; None otherwise.

        Raises:
            SaveError: the background save has failed on some rank, which is named: raised once on each.
        """
        if self._thread is not None and self._thread.is_alive():
            return None
        self._thread = None
        self._raise_error()
        saved, self._saved = self._saved, None
        return saved

    def wait(self) -> Saved | None:
        """Wait for the save under way, then as `poll`."""
        if self._thread is not None:
            if self._thread.is_alive():
                _log.info("waiting for %s to be written", self._thread.name)
            self._thread.join()
        return self.poll()

    def close(self) -> Saved | None:
        """Wait for the save under way and free the host memory. The last call."""
        saved = self.wait()
        self._host_copy = HostCopy()
        return saved

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, job: _Job) -> None:
        try:
            self._saved = self._write(job)
        except BaseException as error:
            job.attempt.report(error)
            self._error = error
            if not isinstance(error, SaveError):
                self._error = SaveError(job.attempt.describe(error))
                self._error.__cause__ = error

    def _write(self, job: _Job) -> Saved:
        attempt = job.attempt
        if self.rank == 0:
            self._tidy(on_disk.remove_leftovers)
        with attempt.entered():
            written = write_rank_file(
                attempt.data_file,
                job.slices,
                job.rank_state,
                rank=self.rank,
                step=attempt.step,
                world_size=self.world_size,
            )
            attempt.publish(written.manifest.to_json())
            if self.rank == 0:
                attempt.commit(self._merged(job))
            else:
                attempt.await_commit()
        if self.rank == 0:
            self._tidy(self._retire)
        return Saved(
            path=attempt.final,
            step=attempt.step,
            num_bytes=written.num_bytes,
            stall_seconds=job.copied - job.begin,
            write_seconds=time.monotonic() - job.copied,
        )

    def _tidy(self, work: Callable[[Path], None]) -> None:
        """Removing what is old: a failure there costs space, not the checkpoint."""
        try:
            work(self.folder)
        except OSError as error:
            _log.warning("could not remove an old checkpoint in %s: %s", self.folder, error)

    def _name_foreign(self) -> None:
        foreign = [old.path.name for old in on_disk.list_complete(self.folder) if old.run != self._run_id]
        if foreign:
            _log.info("%s holds checkpoints of other runs, which stay: %s", self.folder, ", ".join(foreign))

    def _retire(self, folder: Path) -> None:
        on_disk.retire(
            folder,
            self._run_id,
            keep_last=self._keep_last,
            keep_every=self._keep_every,
            keep_steps=self._keep_steps,
        )

    def _merged(self, job: _Job) -> bytes:
        """The manifest of the whole from every rank's; refused when a tensor is not covered exactly once."""
        tensors, blobs = merge(job.attempt.gather())
        faults: list[str] = []
        whole = Manifest(job.attempt.step, self.world_size, (), job.state, blobs)
        text = whole.with_tensors(_checked(tensors, faults))
        if faults:
            raise SaveError(
                "the ranks' slices do not cover every tensor exactly once:\n  " + "\n  ".join(faults)
            )
        return text


def _checked(tensors: Iterable[LogicalTensor], faults: list[str]) -> Iterator[LogicalTensor]:
    """The same tensors; a line is added to `faults` for each that is not covered exactly once."""
    for tensor in tensors:
        if fault := cover_problem(tensor):
            faults.append(fault)
        yield tensor


@dataclass(frozen=True)
class _Job:
    attempt: Attempt
    slices: Sequence[TensorSlice]
    state: Mapping[str, Any]
    rank_state: Mapping[str, bytes]
    begin: float
    copied: float


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that decide what a checkpoint means."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
