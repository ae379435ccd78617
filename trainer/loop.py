"""The training loop."""

from __future__ import annotations

import contextlib
import time

from checkpoint.attempt import SaveError
from checkpoint.save import Saved
from trainer.config import RunConfig
from trainer.controllers.hook import Mixing
from trainer.data.prefetch import Prefetcher
from trainer.evaluation import Evaluator, Extent
from trainer.losses.hook import losses_at
from trainer.metrics.sink import MetricSink, RunInfo
from trainer.model.parameters import count_parameters
from trainer.progress import Progress
from trainer.session import Session, StepBatches, open_session, saved_sentence
from trainer.step import NonFiniteError, StepReport, train_step


def train(config: RunConfig, *, sink: MetricSink) -> None:
    """Train to `train.steps`, from the run's own newest checkpoint or `checkpoint.load` where there is one.

    Runs on every rank of an initialised process group; only the first rank's sink takes records.
    """
    session, notes = open_session(config)
    progress, evaluator, mixing = Progress(session), Evaluator(session), Mixing(session.hooks)
    sink.start(_info(session, [*notes, *progress.notes]))
    if session.step >= config.train.steps:
        sink.event(
            f"nothing to do: train.steps = {config.train.steps} are done; raise it to go on",
            step=session.step,
        )
    try:
        if evaluator.due_at_start():
            _evaluate(evaluator, "whole", mixing, sink)
        _reweigh(mixing, session.step, sink)
        ahead = Prefetcher(session.batches, stop=config.train.steps, undecided=mixing.is_border)
        with ahead as prefetcher:
            while session.step < config.train.steps:
                mixing.add_step(_step(session, prefetcher, progress, sink))
                last = session.step == config.train.steps
                if extent := evaluator.due(last=last):
                    _evaluate(evaluator, extent, mixing, sink)
                _reweigh(mixing, session.step, sink)
                if last or _saves_at(config, session.step):
                    _report_save(sink, session.saver.wait())
                    session.save()
        _report_save(sink, session.saver.close())
    finally:
        with contextlib.suppress(SaveError):  # a save under way is worth finishing, whatever else went wrong
            session.saver.close()
        sink.close()


def _evaluate(evaluator: Evaluator, extent: Extent, mixing: Mixing, sink: MetricSink) -> None:
    record = evaluator.run(extent)
    sink.evaluation(record)
    mixing.add_evaluation(record)


def _reweigh(mixing: Mixing, step: int, sink: MetricSink) -> None:
    """Let the controller change the mixture, after an evaluation and before a save."""
    if text := mixing.reweigh(step):
        sink.event(text, step=step)


def _saves_at(config: RunConfig, step: int) -> bool:
    return step % config.checkpoint.every == 0 or step in config.checkpoint.at


def _step(
    session: Session, prefetcher: Prefetcher[StepBatches], progress: Progress, sink: MetricSink
) -> StepReport:
    config = session.config
    began = time.monotonic()
    batches = prefetcher.get(session.step)
    try:
        report = train_step(
            session.engine,
            batches.micro_batches,
            tokens=batches.tokens,
            lr=session.schedule.lr(session.step, session.anchor),
            source_names=session.stream.source_names,
            document_mask=config.data.document_mask,
            losses=losses_at(session.hooks, session.step),
        )
    except NonFiniteError as error:
        raise NonFiniteError(f"step {session.step + 1}: {error}") from None
    session.step += 1
    session.lr = report.lr
    seconds = time.monotonic() - began
    progress.add(report, seconds)
    if session.step % config.metrics.every == 0 or session.step == config.train.steps:
        sink.step(progress.record(report, batches.micro_batches, seconds))
    _report_save(sink, session.saver.poll())
    return report


def _report_save(sink: MetricSink, saved: Saved | None) -> None:
    """Say what a save took that has come to its end; one that failed has raised."""
    if saved is not None:
        sink.event(saved_sentence(saved), step=saved.step)


def _info(session: Session, notes: list[str]) -> RunInfo:
    config = session.config
    return RunInfo(
        name=config.run.name,
        first_step=session.step,
        total_steps=config.train.steps,
        tokens_per_step=config.tokens_per_step,
        layout=config.parallel.describe(session.mesh.world_size),
        parameters=count_parameters(session.model).total,
        notes=notes,
    )
