"""What the ranks of any layout compute of a model on the way to its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from parallel.context import context_spans
from parallel.engine import Engine
from parallel.forward import run_micro_batches
from trainer.data.batch import NEXT_TOKEN, NO_GROUP, MicroBatch
from trainer.loss import token_loss

EMBEDDING, LOGITS = "embedding", "logits"


def layer_points(layer: int) -> tuple[str, str, str]:
    """Names of what is recorded of a layer, in the order of computation; `layer` counts globally from 0."""
    return f"layer {layer} attention", f"layer {layer} mlp", f"layer {layer}"


def points(num_layers: int) -> list[str]:
    """Names of everything that is recorded, in the order of computation."""
    return [EMBEDDING, *(point for layer in range(num_layers) for point in layer_points(layer)), LOGITS]


@dataclass(frozen=True)
class Recording:
    """What one rank holds of an activation [sequences, s, columns].

    Attributes:
        row: the sequence.
        positions: of the tokens, in the order of `data`.
        column: the first column.
        data: float32 [len(positions), some of the columns], on the host.
        is_copy: another rank has the same numbers and speaks for them.
    """

    point: str
    row: int
    positions: tuple[int, ...]
    column: int
    data: torch.Tensor
    is_copy: bool


def random_batch(vocab_size: int, rows: int, length: int, *, seed: int = 0) -> MicroBatch:
    """Sequences [rows, length] of random tokens, each a document of its own."""
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(vocab_size, (rows, length + 1), generator=generator)
    return MicroBatch(
        tokens=stream[:, :-1].contiguous(),
        labels=stream[:, 1:].contiguous(),
        loss_weights=torch.ones(rows, length),
        positions=torch.arange(length).repeat(rows, 1),
        documents=torch.zeros(rows, length, dtype=torch.int32),
        sources=torch.zeros(rows, length, dtype=torch.int32),
        objectives=torch.full((rows, length), NEXT_TOKEN, dtype=torch.int32),
        groups=torch.full((rows, length), NO_GROUP, dtype=torch.int32),
    )


def rows_needed(engine: Engine) -> int:
    """The fewest sequences that keep every pipeline stage busy; all data ranks compute the same ones."""
    return engine.mesh.layout.pipeline


def record(engine: Engine, batch: MicroBatch) -> list[Recording]:
    """Run `batch` forward on all ranks together; returns what this rank has seen of it.

    Logits are recorded of every sequence, the rest of the first one only: of all sequences it would fill the
    host's memory.

    Args:
        batch: as many sequences as `rows_needed` says, or a multiple; one sequence is a micro-batch.
    """
    recorder = _Recorder(engine, *batch.tokens.shape)
    handles = recorder.attach()
    try:
        with torch.no_grad():
            micro_batches = [_row(batch, row) for row in range(len(batch.tokens))]
            run_micro_batches(engine, micro_batches, token_loss(1), forward_only=True)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.recordings


def _row(batch: MicroBatch, row: int) -> MicroBatch:
    return MicroBatch(**{name: column[row : row + 1] for name, column in vars(batch).items()})


class _Recorder:
    """Hooks that note what passes a module; each module sees the micro-batches in their order."""

    def __init__(self, engine: Engine, rows: int, length: int) -> None:
        self.recordings: list[Recording] = []
        self._engine = engine
        self._rows = rows
        mesh = engine.mesh
        spans = context_spans(length, mesh.context_rank, mesh.layout.context)
        self._positions = [place for start, end in spans for place in range(start, end)]

    def attach(self) -> list[Any]:
        """Hook into the modules of all chunks; returns the handles."""
        handles = []
        for chunk in self._engine.chunks:
            if chunk.pre_process:
                handles.append(self._hook(chunk.embedding, EMBEDDING))
            for layer in chunk.decoder.layers:
                attention, mlp, whole = layer_points(layer.layer_number - 1)
                handles.append(self._hook(layer.self_attention, attention))
                handles.append(self._hook(layer.mlp, mlp))
                handles.append(self._hook(layer, whole))
            if chunk.post_process:
                handles.append(self._hook(chunk.output_layer, LOGITS))
        return handles

    def _hook(self, module: Any, point: str) -> Any:
        rows = iter(range(self._rows))

        def note(_module: Any, _inputs: Any, output: Any) -> None:
            self._note(point, next(rows), output)

        return module.register_forward_hook(note)

    def _note(self, point: str, row: int, output: Any) -> None:
        if row and point != LOGITS:
            return
        value, rest = (output[0], output[1]) if isinstance(output, tuple) else (output, None)
        if torch.is_tensor(rest) and point.endswith(("attention", "mlp")):
            value = value + rest  # megatron-core hands the bias on, to be added together with the residual
        mesh, column = self._engine.mesh, 0
        data = value.detach()[:, 0].to("cpu", torch.float32, copy=True)  # [s, b = 1, columns]
        positions, is_copy = self._positions, mesh.data_rank > 0
        if point == LOGITS:
            column = mesh.tensor_rank * data.shape[1]
            data = data[:, : max(0, self._engine.vocab_size - column)]  # the rest is padding
        elif len(data) < len(positions):  # sequence parallelism
            first = mesh.tensor_rank * len(data)
            positions = positions[first : first + len(data)]
        else:
            is_copy = is_copy or mesh.tensor_rank > 0
        if data.numel():
            self.recordings.append(Recording(point, row, tuple(positions), column, data, is_copy))
