"""What a model computes on the way to its logits, put together from the ranks of any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from parallel.context import context_spans
from parallel.engine import Engine
from parallel.forward import run_micro_batches
from trainer.data.batch import MicroBatch
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
    """What one rank holds of an activation [sequences, s, columns] of the whole batch.

    Attributes:
        row: the sequence.
        positions: of the tokens, in the order of `data`.
        column: the first column.
        data: [len(positions), some of the columns], on the host.
    """

    point: str
    row: int
    positions: tuple[int, ...]
    column: int
    data: torch.Tensor


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
    )


def rows_needed(engine: Engine) -> int:
    """The fewest sequences that keep every data rank and every pipeline stage busy."""
    return engine.mesh.data * engine.mesh.layout.pipeline


def record(engine: Engine, batch: MicroBatch) -> list[Recording]:
    """Run `batch` forward on all ranks together; returns what this rank has seen of it.

    Args:
        batch: as many sequences as `rows_needed` says, or a multiple; one sequence is a micro-batch.
    """
    mesh = engine.mesh
    rows = range(mesh.data_rank, len(batch.tokens), mesh.data)
    recorder = _Recorder(engine, rows, batch.tokens.shape[1])
    handles = recorder.attach()
    try:
        with torch.no_grad():
            micro_batches = [_row(batch, row) for row in rows]
            run_micro_batches(engine, micro_batches, token_loss(1), forward_only=True)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.recordings


def put_together(recordings: Sequence[Recording]) -> dict[str, torch.Tensor]:
    """Whole activations [sequences, s, columns] from all ranks' recordings, which may repeat each other.

    Raises:
        ValueError: two ranks that hold the same numbers disagree, or nobody has some of them.
    """
    by_point: dict[str, list[Recording]] = {}
    for recording in recordings:
        by_point.setdefault(recording.point, []).append(recording)
    whole = {}
    for point, parts in by_point.items():
        rows = 1 + max(part.row for part in parts)
        length = 1 + max(max(part.positions) for part in parts)
        columns = max(part.column + part.data.shape[1] for part in parts)
        full = torch.full((rows, length, columns), torch.nan, dtype=parts[0].data.dtype)
        for part in parts:
            box = full[part.row, :, part.column : part.column + part.data.shape[1]]
            there = box[list(part.positions)]
            if not (there.isnan() | (there == part.data)).all():
                raise ValueError(f"the ranks disagree about {point}: two hold it and computed other numbers")
            box[list(part.positions)] = part.data
        if full.isnan().any():
            raise ValueError(f"{point} is not a number everywhere, or no rank has all of it")
        whole[point] = full
    return whole


def _row(batch: MicroBatch, row: int) -> MicroBatch:
    return MicroBatch(**{name: column[row : row + 1] for name, column in vars(batch).items()})


class _Recorder:
    """Hooks that note what passes a module; each module sees the micro-batches in their order."""

    def __init__(self, engine: Engine, rows: range, length: int) -> None:
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
        rows = iter(self._rows)

        def note(_module: Any, _inputs: Any, output: Any) -> None:
            self._note(point, next(rows), output)

        return module.register_forward_hook(note)

    def _note(self, point: str, row: int, output: Any) -> None:
        value, rest = (output[0], output[1]) if isinstance(output, tuple) else (output, None)
        if torch.is_tensor(rest) and point.endswith(("attention", "mlp")):
            value = value + rest  # megatron-core hands the bias on, to be added together with the residual
        mesh, column = self._engine.mesh, 0
        data = value.detach()[:, 0].float().cpu()  # [s, b = 1, columns]
        positions = self._positions
        if point == LOGITS:
            column = mesh.tensor_rank * data.shape[1]
            data = data[:, : max(0, self._engine.vocab_size - column)]  # the rest is padding
        elif len(data) < len(positions):  # sequence parallelism
            first = mesh.tensor_rank * len(data)
            positions = positions[first : first + len(data)]
        if data.numel():
            self.recordings.append(Recording(point, row, tuple(positions), column, data.clone()))
