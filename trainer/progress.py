"""What a step was worth: throughput, model FLOPs utilisation and device readings, as one record."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import torch

from parallel.forward import gather_texts, sum_over_data
from trainer import peak as peaks
from trainer.data.batch import MicroBatch
from trainer.flops import Flops, describe_flops, training_flops
from trainer.metrics.nvml import GpuMonitor, current_device_uuid
from trainer.metrics.sink import StepRecord
from trainer.metrics.throughput import Throughput
from trainer.session import Session
from trainer.step import StepReport


class Progress:
    """Turns step reports into records. Every rank has one, since the counts are sums over ranks."""

    def __init__(self, session: Session) -> None:
        """Find the peak to compare with; on a CPU it is measured, by all ranks at the same time."""
        self._session = session
        self._throughput = Throughput()
        self._gpu = GpuMonitor(current_device_uuid() if session.mesh.rank == 0 else None)
        execution = session.execution
        arithmetic = "fp8" if execution.fp8 != "off" else execution.precision
        machine = socket.gethostname()
        peak = peaks.peak(arithmetic, ranks=gather_texts(machine).count(machine))
        self._peak = peak.flops_per_second * session.mesh.world_size
        self.notes = [
            *describe_flops(session.model, session.config.data.sequence_length).splitlines(),
            f"MFU = training FLOPs / seconds / ({session.mesh.world_size} ranks x {peak.source})",
        ]

    def add(self, report: StepReport, seconds: float) -> None:
        """Count a step that took `seconds`."""
        self._throughput.add(seconds, round(report.tokens))

    def record(self, report: StepReport, batches: Sequence[MicroBatch], seconds: float) -> StepRecord:
        """The record of the step just counted; called on every rank."""
        session = self._session
        names = session.stream.source_names
        flops = self._flops(batches)
        present = [
            (name, loss, count) for name, (loss, count) in zip(names, report.by_source, strict=True) if count
        ]
        cuda = torch.cuda.is_available()
        return StepRecord(
            step=session.step,
            loss=report.loss,
            lr=report.lr,
            grad_norm=report.grad_norm,
            tokens=round(report.tokens),
            step_seconds=seconds,
            tokens_per_second=self._throughput.tokens_per_second,
            eta_seconds=self._throughput.eta_seconds(session.config.train.steps - session.step),
            mfu={
                "causal": flops.causal / seconds / self._peak,
                "full": flops.full / seconds / self._peak,
                "packed": flops.packed / seconds / self._peak,
            },
            source_losses={name: loss for name, loss, _ in present},
            source_tokens={name: round(count) for name, _, count in present},
            auxiliary={one.name: one.loss for one in report.auxiliary},
            auxiliary_by_source={one.name: one.by_source for one in report.auxiliary},
            memory_bytes=torch.cuda.max_memory_allocated() if cuda else None,
            gpu=self._gpu.read(),
        )

    def _flops(self, batches: Sequence[MicroBatch]) -> Flops:
        """FLOPs of the whole step; only the packed count depends on the tokens, and needs every data rank."""
        session = self._session
        length = session.config.data.sequence_length
        positions = torch.cat([batch.positions for batch in batches])
        mine = training_flops(session.model, length, len(positions), positions=positions)
        whole = training_flops(session.model, length, session.config.train.global_batch)
        return Flops(whole.causal, whole.full, sum_over_data(session.engine, mine.packed))
