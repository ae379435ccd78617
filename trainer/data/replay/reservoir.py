"""The samples on disk: a pair of files each, written by one rank ahead of time, awaited by the others."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

import numpy as np

from checkpoint.folder import sync_folder
from trainer.data.indexed import DTYPES, IndexedReader, write_index
from trainer.data.replay.pool import Pool, pool_of_sample
from trainer.data.replay.sampling import draw_sample
from trainer.data.replay.seen import OpenParts, Seen, SeenDocuments

PATIENCE = 1800.0
"""Seconds that a rank waits for a sample that another one writes."""
TOKENS_AT_ONCE = 2**22

logger = logging.getLogger(__name__)


class Reservoir:
    """The samples of one replay source, by the step from which on each is read."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        tokens: int,
        seed: int,
        open_parts: OpenParts,
        writes: bool,
    ) -> None:
        """Keep samples of at most `tokens` tokens in `folder`; with `writes` off another rank writes them."""
        self._folder, self._name, self._tokens, self._seed = folder, name, tokens, seed
        self._open_parts = open_parts
        self._writes = writes
        self._written: dict[Path, Future[None]] = {}

    def prefix(self, step: int, seen: Sequence[Seen]) -> Path:
        """Where the sample of what was seen lies: by what it is made of, so none is taken for another."""
        made_of = [self._name, self._seed, self._tokens]
        made_of += [[one.name, one.seed, one.epoch_tokens, one.tokens] for one in seen]
        digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
        return self._folder / f"{self._stem}-{step:09d}-{digest}"

    def prepare(self, step: int, seen: Sequence[Seen]) -> None:
        """Begin to write the sample in the background, on the rank that writes and unless it is there."""
        prefix = self.prefix(step, seen)
        if self._writes and prefix not in self._written:
            self._written[prefix] = _in_background(lambda: self._write(prefix, seen))

    def open(self, step: int, seen: Sequence[Seen], *, patience: float = PATIENCE) -> IndexedReader:
        """The sample, once it has been written.

        Raises:
            ValueError: its documents cannot be read, or it has not come after so many seconds.
        """
        prefix = self.prefix(step, seen)
        self.prepare(step, seen)
        if self._writes:
            self._written[prefix].result()
        else:
            _wait(prefix, patience)
        return IndexedReader(prefix)

    def remove_before(self, step: int) -> None:
        """Remove samples that were read from earlier steps on; whoever goes back there writes them again."""
        if not self._writes:
            return
        sample = re.escape(self._stem) + r"-(\d{9,})-[0-9a-f]{12}"
        pattern = re.compile(rf"({sample}|\.{sample}\.[0-9a-f]{{8}}\.partial)\.(bin|idx)")
        for path in sorted(self._folder.glob("*"), reverse=True):  # .idx first: no sample without tokens
            if (found := pattern.fullmatch(path.name)) and int(found[2] or found[3]) < step:
                path.unlink(missing_ok=True)
                self._written.pop(path.with_suffix(""), None)

    @property
    def _stem(self) -> str:
        safe = re.sub(r"[^\w.-]", "_", self._name)
        unique = hashlib.sha256(self._name.encode()).hexdigest()[:8]
        return safe if safe == self._name else f"{safe}-{unique}"  # or "a b" and "a_b" were one

    def _write(self, prefix: Path, seen: Sequence[Seen]) -> None:
        if _is_whole(prefix):
            return
        for left in self._folder.glob(f".{glob.escape(prefix.name)}.*.partial.*"):
            left.unlink(missing_ok=True)  # by a process that was killed
        began = time.monotonic()
        parts = self._open_parts(seen)
        sample = draw_sample(parts, tokens=self._tokens, seed=self._seed, name=self._name)
        if not len(sample.documents):
            raise ValueError(f"data.sources {self._name!r}: {nothing_seen(self._name, seen)}")
        pool = pool_of_sample(parts, sample)
        write_pair(prefix, pool, token_type(parts))
        logger.info(
            "replay source %r: wrote a sample of %d documents, %d tokens, in %.1f s: %s",
            self._name,
            len(pool),
            pool.num_tokens,
            time.monotonic() - began,
            prefix,
        )


def nothing_seen(name: str, seen: Sequence[Seen]) -> str:
    """The error of a replay without documents."""
    sources = ", ".join(one.name for one in seen)
    return (
        f"no document of {sources} has been read to its end yet, so there is nothing to replay; name sources "
        f"that earlier stages have read, or leave the replay out: data.mixture.weights.{name} = 0"
    )


def token_type(parts: Sequence[SeenDocuments]) -> np.dtype[np.generic]:
    """A type of the format that holds the tokens of all of them."""
    read = [part.corpus.tokens[np.zeros(1, dtype=np.int64)].dtype for part in parts if part.count]
    common = np.result_type(*read)
    fitting = [np.dtype(kind) for kind in DTYPES.values() if np.can_cast(common, kind)]
    return min(fitting, key=lambda kind: kind.itemsize)


def write_pair(prefix: Path, pool: Pool, dtype: np.dtype[np.generic]) -> None:
    """Write all documents of a pool as a pair of files that is either whole or not there."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    temporary = prefix.with_name(f".{prefix.name}.{secrets.token_hex(4)}.partial")
    begins, lengths = pool.spans(np.arange(len(pool), dtype=np.int64))
    ends = np.cumsum(lengths)
    with open(f"{temporary}.bin", "wb") as file:
        first = 0
        while first < len(pool):
            done = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, done + TOKENS_AT_ONCE, side="right")))
            count = lengths[first:last]
            shifts = np.repeat(begins[first:last] - (ends[first:last] - count), count)
            file.write(pool.tokens[shifts + np.arange(done, int(ends[last - 1]))].astype(dtype).tobytes())
            first = last
        file.flush()
        os.fsync(file.fileno())
    with open(f"{temporary}.idx", "wb") as file:
        write_index(file, dtype, [lengths.astype(np.int32)])
        file.flush()
        os.fsync(file.fileno())
    for suffix in (".bin", ".idx"):  # nobody opens a pair before its index is there
        os.replace(f"{temporary}{suffix}", f"{prefix}{suffix}")
    sync_folder(prefix.parent)


def _is_whole(prefix: Path) -> bool:
    if not Path(f"{prefix}.idx").is_file():
        return False
    try:
        IndexedReader(prefix)
    except ValueError:
        return False
    return True


def _wait(prefix: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while not Path(f"{prefix}.idx").is_file():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{prefix}.idx has not been written within {patience:.0f} s: the first rank writes it, so "
                "its log says what keeps it; and run.dir must lie on a file system that all machines share"
            )
        time.sleep(0.05)


def _in_background(work: Callable[[], None]) -> Future[None]:
    """Do it in a thread that does not keep the process from ending."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="reservoir", daemon=True).start()
    return future
