"""The gate before the first step of a run that starts from a Hugging Face model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil

from parallel.engine import Engine
from parallel.forward import gather_texts
from trainer.config import RunConfig, architecture
from trainer.model.of_checkpoint import architecture_of
from trainer.model.parameters import count_parameters
from trainer.parity.gate import POSITIONS, measure
from trainer.parity.reference import transformers_missing
from trainer.parity.report import ParityReport
from trainer.parity.suspects import configuration_suspects, place_suspects

if TYPE_CHECKING:
    from checkpoint.opening import Opened

_BYTES = 4  # transformers computes in fp32 on rank 0


def gate(config: RunConfig, engine: Engine, opened: Opened) -> str:
    """Compare the logits with transformers', as `checkpoint.parity` asks. All ranks call it together.

    Args:
        opened: the Hugging Face folder that the engine has been loaded from.

    Returns:
        What was measured, or why nothing was; empty when it is turned off.

    Raises:
        ValueError: on every rank: the logits differ, or "always" is asked for and cannot be.
    """
    wish = config.checkpoint.parity
    if wish == "never":
        return ""
    # One answer for all ranks, from the one that would do it: machines differ in memory.
    reason = gather_texts(_obstacle(config, engine) if engine.mesh.rank == 0 else "")[0]
    if reason and wish == "always":
        raise ValueError(f"checkpoint.parity = always, but {reason}")
    if reason:
        return f"logits not compared with transformers: {reason}"
    report = measure(engine, opened.folder, length=_length(config))
    if not report.same:
        suspects = "; ".join(_suspects(config, opened, report))
        raise ValueError(
            f"{opened.folder}: {report.sentence()}. Suspects: {suspects}. "
            "Training would start from another model than the one that was meant; to train all the same: "
            "checkpoint.parity = never"
        )
    return report.sentence()


def _suspects(config: RunConfig, opened: Opened, report: ParityReport) -> list[str]:
    """Settings of [model] that are not the folder's, else the place: the weights are the folder's own."""
    assert report.first is not None
    ours, theirs = architecture(config), architecture_of(opened)
    found = configuration_suspects(ours, theirs) if theirs is not None else []
    return found or place_suspects(report.first.point, ours)


def _length(config: RunConfig) -> int:
    """At most POSITIONS, and cut as the run's own sequences are."""
    step = 2 * config.parallel.context * config.parallel.tensor
    return min(config.data.sequence_length, max(step, POSITIONS // step * step))


def _obstacle(config: RunConfig, engine: Engine) -> str:
    """Why the comparison cannot be made on this machine; empty when it can."""
    if missing := transformers_missing():
        return missing
    if config.precision.fp8 != "off":
        return "fp8 rounds more than the comparison allows for; compare in bf16 by `ratoon checkpoint parity`"
    needed = _BYTES * count_parameters(architecture(config)).total
    free = psutil.virtual_memory().available
    if 2 * needed > free:
        return (
            f"transformers would need {needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free on the "
            "machine of rank 0; run `ratoon checkpoint parity` on a larger one"
        )
    return ""
