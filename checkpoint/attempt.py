"""One attempt to save one step, as its ranks see it: they meet through the file system.

Background threads must not enter collectives (the training step is inside others at that time), so:

    rank 0     makes step-N.partial-ID/ and locks WRITING in it; the others wait for that
    each rank  writes rank-R.safetensors, then rank-R.json, which says that it is whole; or rank-R.error
    rank 0     gathers these, writes manifest.json, renames the folder to step-N/, marks it COMPLETE;
               or writes FAILED-ID
    the others wait for COMPLETE with this attempt's ID, or FAILED-ID
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from checkpoint import folder as on_disk
from checkpoint.manifest import MANIFEST

_SLOWEST_POLL = 0.25  # seconds between two looks, for worlds of up to 25 ranks


class SaveError(RuntimeError):
    """A checkpoint was not saved. The ones before it are untouched."""


@dataclass
class Attempt:
    """Where one save writes and how its ranks hear of each other.

    Attributes:
        folder: of all checkpoints of the run, on a file system that all ranks share.
        key: the same on all ranks, and different for every attempt.
        run: of which the save is a part; see `Saver`.
        deadline: seconds to wait for other ranks.
        published: whether this rank's file is rank 0's to use, hence not to be removed any more.
    """

    folder: Path
    step: int
    key: str
    run: str
    rank: int
    world_size: int
    deadline: float
    published: bool = False

    @property
    def partial(self) -> Path:
        return self.folder / f"{on_disk.step_name(self.step)}.partial-{self.key}"

    @property
    def final(self) -> Path:
        return self.folder / on_disk.step_name(self.step)

    @property
    def failed(self) -> str:
        """Name of rank 0's report: nobody must take an earlier attempt's for this one's."""
        return f"FAILED-{self.key}"

    @property
    def data_file(self) -> Path:
        return self.partial / f"rank-{self.rank:05d}.safetensors"

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Rank 0 makes the folder and holds its lock inside this block; the others wait until it is there."""
        if self.rank == 0:
            self.partial.mkdir(parents=True)
        else:
            self._wait_for("rank 0 to start the save", self._started)
        with on_disk.writing(self.partial) if self.rank == 0 else nullcontext():
            yield

    def publish(self, index: bytes) -> None:
        """Say that this rank's file is whole and on the disk; `index` is its manifest."""
        path = self.partial / f"rank-{self.rank:05d}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(index)
        on_disk.sync_folder(self.partial)
        os.rename(temporary, path)  # the last thing that can fail: from here on rank 0 counts on the file
        self.published = True

    def report(self, error: BaseException) -> None:
        """Tell the others that this rank has failed. Never raises: the error is on its way already."""
        if not self.published:
            with suppress(OSError):
                self.data_file.unlink(missing_ok=True)  # on a full disk, makes room for the report
        path = self.partial / (self.failed if self.rank == 0 else f"rank-{self.rank:05d}.error")
        if self.rank == 0 and not self.partial.exists() and on_disk.read_marker(self.final) is None:
            path = self.final / self.failed  # it has its name already, but could not be marked complete
        text = str(error) if isinstance(error, SaveError) else self.describe(error)
        try:
            path.parent.mkdir(exist_ok=True)
            on_disk.write_durably(path, text.encode())
        except OSError:
            if self.rank == 0:  # a folder that vanishes is a message too
                shutil.rmtree(self.partial, ignore_errors=True)

    def gather(self) -> list[bytes]:
        """Rank 0: every rank's index.

        Raises:
            SaveError: a rank has failed, or is silent for longer than the deadline; it is named.
        """
        indices = {rank: self.partial / f"rank-{rank:05d}.json" for rank in range(self.world_size)}

        def everybody() -> bool:
            names = set(os.listdir(self.partial))
            for name in sorted(names):
                if name.endswith(".error"):
                    raise SaveError((self.partial / name).read_text(encoding="utf-8"))
            return all(path.name in names for path in indices.values())

        def silent() -> str:
            ranks = [rank for rank, path in indices.items() if not path.exists()]
            return f"rank {', '.join(map(str, ranks[:8]))}{' ...' if len(ranks) > 8 else ''}"

        self._wait_for(silent, everybody)
        return [path.read_bytes() for path in indices.values()]

    def commit(self, manifest: bytes) -> None:
        """Rank 0: turn the partial folder into the complete checkpoint of its step.

        One of the same step is replaced: under another name it counts until the marker is written, and
        stays if another run had saved it.
        """
        for entry in os.scandir(self.partial):
            if entry.name.endswith(".json"):
                os.unlink(entry.path)
        on_disk.write_durably(self.partial / MANIFEST, manifest)
        replaced = None
        if self.final.exists():
            old = on_disk.read_marker(self.final)
            is_foreign = old is not None and old.run != self.run
            replaced = self.folder / f"{self.final.name}.{'kept' if is_foreign else 'replaced'}-{self.key}"
            os.rename(self.final, replaced)
        os.rename(self.partial, self.final)
        on_disk.sync_folder(self.folder)
        on_disk.mark_complete(self.final, self.step, self.key, run=self.run)
        with suppress(OSError):
            (self.final / on_disk.WRITING).unlink()
            if replaced is not None and not is_foreign:
                on_disk.remove(replaced)

    def await_commit(self) -> None:
        """The other ranks: wait until rank 0 has marked the checkpoint complete.

        Raises:
            SaveError: some rank has failed; it is named.
        """

        def committed() -> bool:
            if self.partial.exists():
                self._raise_failure(self.partial)
                return False
            marker = on_disk.read_marker(self.final)
            if marker is not None and marker.save == self.key:
                return True
            self._raise_failure(self.final)
            if not self.final.exists():
                raise SaveError(f"saving step {self.step} failed on rank 0: {self.partial} has vanished")
            return False

        # rank 0 gives up first: it knows who is silent
        self._wait_for("rank 0 to complete the save", committed, deadline=2 * self.deadline)

    def _started(self) -> bool:
        self._raise_failure(self.partial)
        return (self.partial / on_disk.WRITING).exists()

    def _raise_failure(self, place: Path) -> None:
        with suppress(FileNotFoundError):
            raise SaveError((place / self.failed).read_text(encoding="utf-8"))

    def _wait_for(
        self, what: str | Callable[[], str], done: Callable[[], bool], *, deadline: float | None = None
    ) -> None:
        deadline = deadline or self.deadline
        ends = time.monotonic() + deadline
        # each look costs 2 or 3 operations of one metadata server: of all ranks together, some 250 a second
        pause, longest = 0.001 * self.world_size, max(_SLOWEST_POLL, 0.01 * self.world_size)
        if self.rank == 0:
            pause, longest = 0.001, _SLOWEST_POLL  # alone
        while not done():
            if time.monotonic() > ends:
                missing = what if isinstance(what, str) else what()
                raise SaveError(
                    f"saving step {self.step} failed: rank {self.rank} waited {deadline:.0f} s "
                    f"for {missing} (do all ranks share the folder {self.folder}?)"
                )
            time.sleep(pause * (0.5 + self.rank / self.world_size))  # not all at the same time
            pause = min(pause * 1.5, longest)

    def describe(self, error: BaseException) -> str:
        """One line for whoever reads the log of another rank."""
        return f"saving step {self.step} failed on rank {self.rank}: {type(error).__name__}: {error}"
