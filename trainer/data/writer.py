"""Writing prepared corpora so that a pair of files is either whole or not there."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from checkpoint.folder import sync_folder
from trainer.data.corpus import Sidecar, read_sidecar
from trainer.data.indexed import write_index
from trainer.data.tokenizer import Tokenizer

SUFFIXES = (".bin", ".json", ".idx")
"""In the order in which they appear: nothing opens a corpus that has no .idx."""
LOCK = "WRITING"

logger = logging.getLogger(__name__)


class OutputFolder:
    """A hidden folder beside the outputs, gone when the work ends, well or badly.

    Only a kill leaves it behind; the next run for the same output clears it.
    """

    def __init__(self, prefixes: Sequence[str], *, overwrite: bool) -> None:
        """Raises ValueError when an output exists and may not be replaced."""
        existing = [p + suffix for p in prefixes for suffix in SUFFIXES if os.path.exists(p + suffix)]
        if existing and not overwrite:
            raise ValueError(
                f"already there: {', '.join(existing)}; choose another output or pass --overwrite"
            )
        for prefix in prefixes:
            read_sidecar(prefix)  # somebody else's PREFIX.json is not ours to replace
        self._prefixes = [Path(prefix) for prefix in prefixes]
        self.path = self._prefixes[0].with_name(f".{self._prefixes[0].name}.partial")
        self._lock: BinaryIO

    def __enter__(self) -> OutputFolder:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(exist_ok=True)
        self._lock = open(self.path / LOCK, "wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(
                f"another process is writing {self._prefixes[0]}; wait for it, or end it"
            ) from None
        except OSError as error:  # some network file systems have no locks
            logger.info("%s cannot be locked (%s): start nothing else with this output", self.path, error)
        for leftover in self.path.iterdir():
            if leftover.name != LOCK:
                leftover.unlink()
        return self

    def publish(self) -> None:
        """Move the finished files to their places, each set's index last."""
        for prefix in self._prefixes:
            Path(f"{prefix}.idx").unlink(missing_ok=True)
        for prefix in reversed(self._prefixes):  # metadata before what it belongs to
            for suffix in SUFFIXES:
                os.replace(self.path / (prefix.name + suffix), f"{prefix}{suffix}")
        sync_folder(self.path.parent)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()
        with suppress(OSError):  # NFS keeps a file that is open, and so its folder, until here
            self.path.rmdir()


@dataclass(frozen=True)
class Making:
    """How a corpus was made, for its sidecar; see `Sidecar`."""

    spec: str
    eod: str | None
    tokenizer: Tokenizer
    inputs: list[str]
    bad_records: dict[str, int]


class PairWriter:
    """One corpus being written into a folder."""

    def __init__(self, folder: Path, prefix: str, dtype: type[np.generic]) -> None:
        self.prefix = prefix
        self.documents = 0
        self.tokens = 0
        self._text_bytes = 0
        self._base = folder / Path(prefix).name
        self._dtype = dtype
        self._lengths: list[NDArray[np.int32]] = []
        self._bin = open(f"{self._base}.bin", "wb")

    def add(self, tokens: NDArray[Any], lengths: NDArray[np.int32], text_bytes: int) -> None:
        """Append documents: their tokens one after the other, and how many each has."""
        self._bin.write(tokens.data)
        self._lengths.append(lengths)
        self.documents += len(lengths)
        self.tokens += len(tokens)
        self._text_bytes += text_bytes

    def finish(self, made: Making, template: str | None = None) -> None:
        """Write the index and the sidecar, and put all three safely on the disk."""
        _close(self._bin)
        with open(f"{self._base}.idx", "wb") as file:
            write_index(file, self._dtype, self._lengths)
            _close(file)
        Sidecar(
            tokenizer=made.spec,
            eod=made.eod,
            fingerprint=made.tokenizer.fingerprint,
            vocab_size=made.tokenizer.vocab_size,
            eod_id=made.tokenizer.eod_id,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self._text_bytes,
            inputs=made.inputs,
            bad_records=made.bad_records,
            ratoon=version("ratoon"),
            template=template,
        ).write(Path(f"{self._base}.json"))


def _close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
