"""A reference's likeliest tokens on disk, by the number of the sequence, so that a run needs no second model.

    targets.json              what it is; written last
    tokens.bin                int32 [sequences, s, k]
    log_probabilities.bin     float32 [sequences, s, k]
    log_rest.bin              float32 [sequences, s]
    hashes.bin                uint64 [sequences], of the tokens of each sequence

Sequence i of step t (i counts in the global batch, steps through the whole run) is row (t - first step) x
global batch + i, whatever the layout that wrote or reads it. The files are mapped into memory: a rank reads
its own rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from parallel.context import context_slice, context_spans
from parallel.forward import Batch
from parallel.mesh import Mesh
from parallel.top_k import TopK, spread
from trainer.losses.targets import Reading, SameLayout

HEADER = "targets.json"


@dataclass(frozen=True)
class CacheHeader:
    """What a folder of targets holds.

    Attributes:
        first_step, steps: the steps it covers: from the one after `first_step` steps.
        reference: which model it was, as `Targets.state` says it.
    """

    first_step: int
    steps: int
    global_batch: int
    sequence_length: int
    top_k: int
    temperature: float
    vocab_size: int
    document_mask: bool
    reference: dict[str, Any]

    @property
    def sequences(self) -> int:
        return self.steps * self.global_batch

    def save(self, folder: Path) -> None:
        """Write it beside the files, which are complete now."""
        (folder / HEADER).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> CacheHeader:
        """Raises ValueError where there is none, or one of another shape."""
        try:
            return CacheHeader(**json.loads((folder / HEADER).read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / HEADER} is no header of cached targets: {error}") from None


class _Files:
    """The four arrays of a folder."""

    def __init__(self, folder: Path, header: CacheHeader, mode: Any) -> None:
        def open_one(name: str, dtype: Any, *shape: int) -> NDArray[Any]:
            whole = (header.sequences, *shape)
            return np.memmap(folder / f"{name}.bin", dtype=dtype, mode=mode, shape=whole)

        length, k = header.sequence_length, header.top_k
        self.tokens = open_one("tokens", np.int32, length, k)
        self.log_probabilities = open_one("log_probabilities", np.float32, length, k)
        self.log_rest = open_one("log_rest", np.float32, length)
        self.hashes = open_one("hashes", np.uint64)


def write_targets(
    folder: Path,
    source: SameLayout,
    header: CacheHeader,
    batches: Callable[[int], Sequence[Batch]],
) -> None:
    """Run the reference over all steps of the header and keep what it says. A collective.

    The ranks must share the file system. A folder whose header is missing was not finished.

    Args:
        source: reads all sources, with the header's top_k and temperature.
        batches: this data rank's micro-batches of a step.
    """
    mesh = source.model.mesh
    if mesh.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HEADER).unlink(missing_ok=True)
        _Files(folder, header, "w+")
    dist.barrier()
    files = _Files(folder, header, "r+")
    for step in range(header.first_step, header.first_step + header.steps):
        parts = batches(step)
        source.prepare(step, parts)
        for number, answer in source.take().items():
            if mesh.tensor_rank == 0:  # tensor ranks have the same answers
                rows = _rows(header, mesh, step, number, len(parts[number].tokens))
                _write(files, rows, answer, parts[number], mesh)
    del files  # written back when the mapping goes
    dist.barrier()
    if mesh.rank == 0:
        header.save(folder)
    dist.barrier()


def _write(files: _Files, rows: slice, answer: TopK, batch: Batch, mesh: Mesh) -> None:
    spans = context_spans(batch.tokens.size(1), mesh.context_rank, mesh.layout.context)
    first = 0
    for start, end in spans:
        here = slice(first, first + end - start)
        files.tokens[rows, start:end] = answer.tokens[:, here].cpu().numpy()
        files.log_probabilities[rows, start:end] = answer.log_probabilities[:, here].cpu().numpy()
        files.log_rest[rows, start:end] = answer.log_rest[:, here].cpu().numpy()
        first += end - start
    if mesh.context_rank == 0:
        files.hashes[rows] = _hashes(batch)


@dataclass
class CachedTargets:
    """Targets that are read from a folder."""

    folder: Path
    mesh: Mesh
    reading: Reading
    header: CacheHeader
    _kept: dict[int, TopK] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._files = _Files(self.folder, self.header, "r")

    def prepare(self, step: int, batches: Sequence[Batch]) -> None:
        """Read the rows of this rank's sequences.

        Raises:
            ValueError: on every rank: the folder does not cover the step, or was made of other sequences.
        """
        self._kept.clear()
        header = self.header
        if not header.first_step <= step < header.first_step + header.steps:
            raise ValueError(
                f"{self.folder} has targets of the steps {header.first_step + 1} to "
                f"{header.first_step + header.steps}, not of step {step + 1}: make them for the whole run, "
                "or set until_step"
            )
        wrong = 0
        for number in self.reading.wanted(batches):
            rows = _rows(header, self.mesh, step, number, len(batches[number].tokens))
            wrong += int((self._files.hashes[rows] != _hashes(batches[number])).sum())
            if self.mesh.is_last_stage:
                self._kept[number] = self._read(rows)
        found = torch.tensor(wrong)
        dist.all_reduce(found)
        if found:
            raise ValueError(
                f"{self.folder}: sequences of step {step + 1} are not those that the targets were made of: "
                "the data, their mixture or the seed have changed; make the targets anew"
            )

    def log_probabilities(self, number: int, logits: Tensor) -> Tensor | None:
        """As `Targets.log_probabilities`; each micro-batch's answer is given once."""
        kept = self._kept.pop(number, None)
        if kept is None:
            return None
        return spread(kept, logits, self.mesh.groups.tp, temperature=self.reading.temperature)

    def state(self) -> dict[str, Any]:
        """Which reference it was."""
        return self.header.reference

    def _read(self, rows: slice) -> TopK:
        mesh, files = self.mesh, self._files

        def mine(column: NDArray[Any]) -> Tensor:
            whole = torch.from_numpy(np.array(column[rows]))
            return context_slice(whole, 1, mesh.context_rank, mesh.layout.context).to(mesh.device)

        return TopK(mine(files.tokens), mine(files.log_probabilities), mine(files.log_rest))


def header_problems(header: CacheHeader, expected: dict[str, Any]) -> list[str]:
    """Where the header differs from what the run needs, by field."""
    return [
        f"{key} is {getattr(header, key)} in the targets and {value} in the run"
        for key, value in expected.items()
        if getattr(header, key) != value
    ]


def _rows(header: CacheHeader, mesh: Mesh, step: int, number: int, size: int) -> slice:
    """Rows of micro-batch `number` of this data rank."""
    first = (step - header.first_step) * header.global_batch + (number * mesh.data + mesh.data_rank) * size
    return slice(first, first + size)


def _hashes(batch: Batch) -> NDArray[np.uint64]:
    rows = [xxhash.xxh3_64_intdigest(row.numpy().tobytes()) for row in batch.tokens]
    return np.array(rows, dtype=np.uint64)
