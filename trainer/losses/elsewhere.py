"""What a frozen reference says about the step's tokens, when it runs on another layout of the same ranks.

The step's sequences are known by their number in the global batch, (m x data ranks + r) x b + j for row j of
micro-batch m of data rank r: another layout deals the same sequences out to its own data ranks, and the
answers, the likeliest tokens of every position, come back by these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.context import context_slice, context_spans
from parallel.forward import Batch, forward_logits
from parallel.frozen import FrozenModel
from parallel.mesh import Mesh
from parallel.second_mesh import SecondMesh
from parallel.top_k import TopK, spread, top_k
from trainer.data.batch import COLUMNS, MicroBatch
from trainer.losses.targets import Reading


@dataclass
class OtherLayout:
    """Runs the reference on a second mesh; `reading.top_k` must be given.

    Attributes:
        mesh: of the training.
        second: of the reference.
    """

    mesh: Mesh
    second: SecondMesh
    model: FrozenModel
    reading: Reading
    identity: dict[str, Any]
    _kept: dict[int, TopK] = field(default_factory=dict)

    def prepare(self, step: int, batches: Sequence[Batch]) -> None:
        """Deal the step's sequences out to the reference, run it, and fetch the answers for one's own."""
        self._kept.clear()
        if not self._anybody_wants(batches):
            return
        rows, length = batches[0].tokens.shape
        whole = gather_batch(self.mesh, batches)
        with self.second.active():
            answers = self._answer(whole, rows)
        slab = rows * self.mesh.data  # sequences of one micro-batch of all data ranks
        for number in range(len(batches)):
            found = self._exchange(answers, range(number * slab, (number + 1) * slab), length)
            if self.mesh.is_last_stage:
                self._kept[number] = self._own(found, rows)

    def log_probabilities(self, number: int, logits: Tensor) -> Tensor | None:
        """As `Targets.log_probabilities`; each micro-batch's answer is given once."""
        kept = self._kept.pop(number, None)
        if kept is None:
            return None
        return spread(kept, logits, self.mesh.groups.tp, temperature=self.reading.temperature)

    def state(self) -> dict[str, Any]:
        """Which reference it is."""
        return self.identity

    def _anybody_wants(self, batches: Sequence[Batch]) -> bool:
        wanted = torch.tensor(len(self.reading.wanted(batches)))
        dist.all_reduce(wanted, group=self.mesh.groups.dp)
        return bool(wanted)

    def _answer(self, whole: MicroBatch, rows: int) -> dict[int, TopK]:
        """By number, the sequences that this rank of the reference speaks for: [s/CP, ...] each."""
        mesh = self.second.mesh
        dealt = deal(len(whole.tokens), mesh.data_rank, mesh.data, rows)
        found: dict[int, TopK] = {}

        def keep(place: int, logits: Tensor) -> None:
            k = self.reading.top_k
            assert k is not None
            answer = top_k(logits, k, mesh.groups.tp, temperature=self.reading.temperature)
            if mesh.tensor_rank == 0:  # tensor ranks have the same answers
                found.update(zip(dealt[place], _rows(answer), strict=True))

        parts = [MicroBatch(**{name: getattr(whole, name)[numbers] for name in COLUMNS}) for numbers in dealt]
        forward_logits(self.model, parts, keep, document_mask=self.reading.document_mask)
        return found

    def _exchange(self, answers: dict[int, TopK], numbers: range, length: int) -> TopK:
        """The answers for these sequences, whole, on every rank: [sequences, s, ...].

        A sum over all ranks of what one of them has and the others have as zeros, one micro-batch at a time:
        a gather would hold as many copies as the reference has tensor and pipeline ranks.
        """
        k, mesh = self.reading.top_k, self.second.mesh
        assert k is not None
        shape = (len(numbers), length)
        device = self.mesh.device
        tokens = torch.zeros(*shape, k, dtype=torch.int32, device=device)
        values = torch.zeros(*shape, k, device=device)
        rest = torch.zeros(shape, device=device)
        spans = context_spans(length, mesh.context_rank, mesh.layout.context)
        places = torch.cat([torch.arange(start, end, device=device) for start, end in spans])
        for row, number in enumerate(numbers):
            if number in answers:
                answer = answers[number]
                tokens[row, places] = answer.tokens
                values[row, places] = answer.log_probabilities
                rest[row, places] = answer.log_rest
        for part in (tokens, values, rest):
            dist.all_reduce(part)
        return TopK(tokens, values, rest)

    def _own(self, found: TopK, rows: int) -> TopK:
        """This data rank's rows, this context rank's positions."""
        mine = slice(self.mesh.data_rank * rows, (self.mesh.data_rank + 1) * rows)
        return TopK(
            *(
                context_slice(part[mine], 1, self.mesh.context_rank, self.mesh.layout.context)
                for part in (found.tokens, found.log_probabilities, found.log_rest)
            )
        )


def gather_batch(mesh: Mesh, batches: Sequence[Batch]) -> MicroBatch:
    """All sequences of the step, [global batch, s], in the order of their numbers, on every rank's host."""
    columns = {}
    for name in COLUMNS:
        own = torch.stack([getattr(batch, name) for batch in batches])  # [micro-batches, b, s]
        parts = [torch.empty_like(own) for _ in range(mesh.data)]
        dist.all_gather(parts, own, group=mesh.groups.dp)
        columns[name] = torch.stack(parts, 1).flatten(0, 2)
    return MicroBatch(**columns)


def deal(sequences: int, data_rank: int, data: int, rows: int) -> list[list[int]]:
    """Numbers of the sequences of each micro-batch of a data rank.

    A micro-batch has `rows` sequences, or as many fewer as divide this rank's share.
    """
    own = sequences // data
    size = math.gcd(own, rows)
    return [[(part * data + data_rank) * size + row for row in range(size)] for part in range(own // size)]


def _rows(answer: TopK) -> list[TopK]:
    return [TopK(*row) for row in zip(answer.tokens, answer.log_probabilities, answer.log_rest, strict=True)]
