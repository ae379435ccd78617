"""TensorBoard scalars of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.metrics.sink import EvaluationRecord, RunInfo, StepRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """A `MetricSink` that writes one event file per start of the run into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None

    def start(self, info: RunInfo) -> None:
        """Open an event file, which hides what earlier ones say about steps after `info.first_step`."""
        from torch.utils.tensorboard import SummaryWriter  # half a second that `ratoon check` need not pay

        purge = info.first_step + 1 if info.first_step else None
        self._writer = SummaryWriter(str(self.folder), purge_step=purge, flush_secs=10)
        self._writer.add_text("run", f"{info.name}: {info.layout}", info.first_step)

    def step(self, record: StepRecord) -> None:
        """Write the scalars of one step."""
        scalars: dict[str, float | None] = {
            "train/loss": record.loss,
            "train/lr": record.lr,
            "train/grad_norm": record.grad_norm,
            "speed/step_seconds": record.step_seconds,
            "speed/tokens_per_second": record.tokens_per_second,
            "memory/peak_gib": None if record.memory_bytes is None else record.memory_bytes / 2**30,
        }
        scalars |= {f"loss_by_source/{name}": loss for name, loss in record.source_losses.items()}
        scalars |= {f"auxiliary/{name}": loss for name, loss in record.auxiliary.items()}
        for name, losses in record.auxiliary_by_source.items():
            scalars |= {f"auxiliary_{name}/{source}": loss for source, loss in losses.items()}
        scalars |= {f"mfu/{count}": share for count, share in record.mfu.items()}
        scalars |= {f"gpu/{name}": reading for name, reading in record.gpu.items()}
        self._add(scalars, record.step)

    def event(self, text: str, *, step: int) -> None:
        """Write the event as text."""
        assert self._writer is not None, "start() comes first"
        self._writer.add_text("events", text, step)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Write loss, perplexity and bits per byte of each validation set, and the dense ones."""
        self._add({f"validation/{name}": loss for name, loss in record.losses.items()}, record.step)
        perplexities = {f"validation_perplexity/{name}": record.perplexity(name) for name in record.losses}
        self._add(perplexities, record.step)
        bits = {f"validation_bits_per_byte/{name}": one for name, one in record.bits_per_byte.items()}
        self._add(bits, record.step)
        firsts = {f"validation_dense/{name}": loss for name, loss in record.dense_losses.items()}
        self._add(firsts, record.step)
        assert self._writer is not None
        self._writer.flush()

    def close(self) -> None:
        """Write what is buffered and close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, scalars: Mapping[str, float | None], step: int) -> None:
        assert self._writer is not None, "start() comes first"
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
