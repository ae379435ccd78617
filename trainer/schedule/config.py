"""What the `[schedule]` section may say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from parallel.settings import Settings

Kind = Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd", "infinite", "anneal", "cyclic"]
DecayStyle = Literal["linear", "cosine", "exponential", "1-sqrt"]
CooldownStyle = Literal["cosine", "inverse_sqrt"]
EnvelopeKind = Literal["constant", "linear", "cosine", "inverse_sqrt", "exponential"]
Share = Annotated[float, Field(gt=0, le=1)]


class EnvelopeConfig(Settings):
    """`[schedule.envelope]`: how the peak falls from stage to stage; the first stage always has optimizer.lr.

    Attributes:
        kind: form of the fall; "constant" gives every stage the same peak.
        stage: number of this stage, from 0; a run file of several stages counts them itself.
        stages: of "linear" and "cosine" only: number of stages, over which the peak falls to `last`.
        last: of "linear" and "cosine" only: peak of the last stage, as a share of the first one's.
        factor: of "exponential" only: peak of a stage as a share of the peak before it.
    """

    kind: EnvelopeKind = "constant"
    stage: NonNegativeInt = 0
    stages: PositiveInt | None = None
    last: Share = 0.1
    factor: Share = 0.5


class ScheduleConfig(Settings):
    """`[schedule]`: the shape of the learning rate between `optimizer.lr` and `optimizer.min_lr`.

    Attributes:
        warmup_steps: steps after the anchor until lr is reached.
        warmup_init_lr: where the warm-up of a new run starts.
        steps: length, counted from the anchor; by default to the end of the run. min_lr is reached at the
            last of them and kept.
        decay_steps: of "wsd" only: length of the final decay; a tenth of the schedule by default.
        decay_style: of "wsd" and "anneal" only: form of the decay.
        cooldown_steps: of "infinite" only: steps from the end of the warm-up until constant_lr is reached.
        cooldown_style: of "infinite" only: form of the cooldown.
        cooldown_steepness: of the "inverse_sqrt" cooldown only: the larger, the more of it happens early.
        constant_lr: of "infinite" only: the learning rate that is kept; by default the peak.
        anneal_steps: of "infinite" only: length of an exponential anneal at the end; by default none.
        period: of "cyclic" only: steps of the first cycle.
        period_growth: of "cyclic" only: length of a cycle, as a multiple of the one before.
        peak_decay: of "cyclic" only: height of a peak above min_lr, as a share of the one before.
        envelope: how the peak falls from stage to stage.
    """

    kind: Kind = "cosine"
    warmup_steps: NonNegativeInt = 0
    warmup_init_lr: NonNegativeFloat = 0.0
    steps: PositiveInt | None = None
    decay_steps: PositiveInt | None = None
    decay_style: DecayStyle = "1-sqrt"
    cooldown_steps: NonNegativeInt = 0
    cooldown_style: CooldownStyle = "cosine"
    cooldown_steepness: PositiveFloat = 10.0
    constant_lr: PositiveFloat | None = None
    anneal_steps: PositiveInt | None = None
    period: Annotated[int, Field(ge=2)] | None = None
    period_growth: Annotated[float, Field(ge=1)] = 1.0
    peak_decay: Share = 1.0
    envelope: EnvelopeConfig = EnvelopeConfig()
