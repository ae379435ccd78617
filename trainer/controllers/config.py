"""`[controller]`: who changes the weights of the sources during a stage, how often and by what rule."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from parallel.settings import Settings

Kind = Literal["velocitune", "skillit", "raise_replay", "schedule", "replay_log", "plugin"]
Table = dict[str, dict[str, float]]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PointConfig(Settings):
    """One of `[[controller.points]]`: weights from a step on.

    Attributes:
        step: steps after the stage began.
        share: the same as a share of the stage's steps, rounded; instead of `step`.
        weights: by source; 0 for one that is not named.
    """

    step: int | None = Field(default=None, ge=0)
    share: Annotated[float, Field(ge=0, lt=1)] | None = None
    weights: dict[str, Weight]

    @model_validator(mode="after")
    def _one_place(self) -> PointConfig:
        if (self.step is None) == (self.share is None):
            raise ValueError("controller.points: each needs one of step and share, to say where it begins")
        if not any(self.weights.values()):
            raise ValueError("controller.points: the weights sum to zero; give a source a weight above 0")
        return self

    def begins(self, first_step: int, last_step: int) -> int:
        """The step, counted through the run, from which the weights hold in a stage of these steps."""
        if self.step is not None:
            return first_step + self.step
        assert self.share is not None
        return first_step + round(self.share * (last_step - first_step))


class ControllerConfig(Settings):
    """`[controller]`: a mixture controller; without `kind` there is none.

    Attributes:
        every: steps between two calls: at every step, counted through the run, that it divides.
        frozen: sources whose weight never changes; the others share the rest.
        validation: by source, the validation set that its held-out loss is read from; by default the one
            that is held out of it (`data.validation.source`, or the same name).
        eta: size of an update.
        smoothing: c of w <- (1 - c) w + c / (number of sources), which lets none of them vanish.
        loss: of "velocitune": whether V is made of held-out losses or of the training losses.
        targets: of "velocitune": by source, the loss it is to reach; or a JSON file of them.
        eta_decay: of "skillit": what eta is multiplied by at each call.
        window: of "skillit": calls whose losses are summed.
        graph: of "skillit": [source][source or validation set] -> how much training on the first lowers the
            loss of the second; or a JSON file of it.
        watch: of "raise_replay": validation sets of what is not to be forgotten; their mean loss counts.
        replay: of "raise_replay": the sources that help against forgetting.
        tolerance: of "raise_replay": nats that the loss may rise above its start.
        factor: of "raise_replay": what the share of `replay` is multiplied or divided by at each call.
        limit: of "raise_replay": the most that this share becomes.
        points: of "schedule": the weights from step to step.
        interpolate: of "schedule": go from point to point in a straight line, in steps of `every`.
        log: of "replay_log": the controller.jsonl whose weights are set again.
        plugin: of "plugin": an entry point of the group "ratoon.controllers", or "module:attribute".
        timeout: of "plugin": seconds that a call may take; after them the weights stay.
        options: of "plugin": handed to it as they are.
    """

    kind: Kind | None = None
    every: int | None = Field(default=None, gt=0)
    frozen: tuple[str, ...] = ()
    validation: dict[str, str] = Field(default_factory=dict)
    eta: float = Field(default=1.0, gt=0)
    smoothing: Share = 0.0
    loss: Literal["validation", "training"] = "validation"
    targets: dict[str, float] | Path | None = None
    eta_decay: float = Field(default=1.0, gt=0, le=1)
    window: int = Field(default=3, gt=0)
    graph: Table | Path | None = None
    watch: tuple[str, ...] = ()
    replay: tuple[str, ...] = ()
    tolerance: float = Field(default=0.05, ge=0)
    factor: float = Field(default=2.0, gt=1)
    limit: float = Field(default=0.5, gt=0, lt=1)
    points: tuple[PointConfig, ...] = ()
    interpolate: bool = False
    log: Path | None = None
    plugin: str | None = Field(default=None, min_length=1)
    timeout: float = Field(default=30.0, gt=0)
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> ControllerConfig:
        fields = type(self).model_fields  # a run's own config.toml says every default
        said = {
            key
            for key in fields
            if key != "kind" and getattr(self, key) != fields[key].get_default(call_default_factory=True)
        }
        if self.kind is None:
            problems = [f"controller.{key} needs a controller.kind" for key in sorted(said)]
        else:
            problems = [
                f"controller.{key} is not a key of kind = {self.kind}, which takes "
                f"{', '.join(KEYS[self.kind])}; leave it out"
                for key in sorted(said - set(KEYS[self.kind]))
            ]
            problems += [
                f"controller.{key} is missing, which kind = {self.kind} needs"
                for key in NEEDED[self.kind]
                if not getattr(self, key)
            ]
        if self.interpolate and self.every is None:
            problems.append("controller.every is missing: how many steps apart are the interpolated weights?")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def reads_evaluations(self) -> bool:
        """Whether it decides by held-out losses."""
        by_training = self.kind == "velocitune" and self.loss == "training"
        return self.kind in ("velocitune", "skillit", "raise_replay") and not by_training


KEYS: dict[Kind, tuple[str, ...]] = {
    "velocitune": ("every", "frozen", "validation", "eta", "smoothing", "loss", "targets"),
    "skillit": ("every", "frozen", "validation", "eta", "smoothing", "eta_decay", "window", "graph"),
    "raise_replay": ("every", "watch", "replay", "tolerance", "factor", "limit"),
    "schedule": ("every", "points", "interpolate"),
    "replay_log": ("log",),
    "plugin": ("every", "frozen", "plugin", "timeout", "options"),
}
"""The keys that each kind takes."""

NEEDED: dict[Kind, tuple[str, ...]] = {
    "velocitune": ("every", "targets"),
    "skillit": ("every", "graph"),
    "raise_replay": ("every", "watch", "replay"),
    "schedule": ("points",),
    "replay_log": ("log",),
    "plugin": ("every", "plugin"),
}
"""Those without which a kind cannot work."""
