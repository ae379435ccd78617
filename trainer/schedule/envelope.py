"""The peak of each stage: a schedule over schedules.

That the peaks of successive stages should themselves follow a falling curve: Roth et al. 2024, A
Practitioner's Guide to Continual Multimodal Pretraining, arXiv 2408.14471. The forms are this module's own.
"""

from __future__ import annotations

import math

from trainer.schedule.config import EnvelopeConfig
from trainer.schedule.decays import DECAYS


def envelope(config: EnvelopeConfig) -> float:
    """Peak of the stage as a share of optimizer.lr; 1 for the first stage.

    "linear" and "cosine" reach `last` at the last of `stages` and keep it; "inverse_sqrt" is
    1 / sqrt(1 + stage), "exponential" factor^stage.
    """
    stage = config.stage
    if config.kind == "constant" or stage == 0:
        return 1.0
    if config.kind == "inverse_sqrt":
        return 1 / math.sqrt(1 + stage)
    if config.kind == "exponential":
        return config.factor**stage
    assert config.stages is not None, "envelope_problems refuses a fall without a number of stages"
    progress = min(1.0, stage / max(1, config.stages - 1))
    return config.last + (1 - config.last) * DECAYS[config.kind](progress)


def envelope_problems(config: EnvelopeConfig) -> list[str]:
    """Contradictions of `[schedule.envelope]`."""
    name, falls = "schedule.envelope", config.kind in ("linear", "cosine")
    if falls and config.stages is None:
        return [
            f"{name}.kind is {config.kind!r} and {name}.stages is missing: say over how many stages it falls"
        ]
    found = []
    if falls and config.stages is not None and config.stage >= config.stages:
        found.append(
            f"{name}.stages is {config.stages} and this is number "
            f"{config.stage + 1} of them: raise {name}.stages"
        )
    for key, kinds in (("stages", "linear cosine"), ("last", "linear cosine"), ("factor", "exponential")):
        value = getattr(config, key)
        if value != EnvelopeConfig.model_fields[key].default and config.kind not in kinds.split():
            wanted = " and ".join(repr(kind) for kind in kinds.split())
            found.append(
                f"{name}.{key} is {value} and {name}.kind is {config.kind!r}: only {wanted} takes "
                "it; remove it"
            )
    return found
