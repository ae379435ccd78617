"""`[updates]` and `[slow_weights]`: what is frozen, what is held near an anchor, what follows slowly."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from parallel.settings import Settings

AnchorKind = Literal["l2", "ewc", "si"]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_compiles)]
"""A regular expression that has to match a whole logical name, e.g. `model\\.layers\\.[0-3]\\..*`."""


class AnchorConfig(Settings):
    """`[updates.anchor]`: after Adam, theta -= min(1, lr x strength x importance) x (theta - anchor).

    Attributes:
        kind: the importance of each element. "l2": 1. "ewc": the diagonal of the Fisher matrix (Kirkpatrick
            et al. 2017, arXiv 1612.00796). "si": the path integral of earlier stages that had this anchor
            (Zenke et al. 2017, arXiv 1703.04200).
        strength: with normalised importance a mean element returns to the anchor by `lr x strength` of its
            distance at each update.
        only: patterns of the parameters that are held; all that are not frozen when not given.
        keep: hold on to the anchor and the importance of the checkpoint; else a new stage takes its own
            start for the anchor.
        normalise: divide the importance by its mean over all held elements.
        sources: "ewc": training or validation sets that the Fisher matrix is measured on.
        batches: "ewc": how many gradients are squared.
        sequences: "ewc": of each of these gradients; 1 is the Fisher matrix, more its cheaper approximation.
        retain: "ewc": share of the checkpoint's importance that is added to the new one (Schwarz et al.
            2018, arXiv 1805.06370, section 3.2).
        xi: "si": added to the squared distance that the path integral is divided by.
    """

    kind: AnchorKind
    strength: NonNegativeFloat
    only: tuple[Pattern, ...] = ()
    keep: bool = False
    normalise: bool = True
    sources: tuple[str, ...] = ()
    batches: PositiveInt = 64
    sequences: PositiveInt = 1
    retain: NonNegativeFloat = 0.0
    xi: PositiveFloat = 1e-3

    @model_validator(mode="after")
    def _of_its_kind(self) -> AnchorConfig:
        fisher = {"sources", "batches", "sequences", "retain"}
        foreign = {"l2": fisher | {"xi", "normalise"}, "ewc": {"xi"}, "si": fisher}[self.kind]
        problems = _not_of(self, self.kind, foreign)
        if self.kind == "ewc" and not self.sources:
            problems.append('kind = "ewc" needs sources: names of training or validation sets of old data')
        if problems:
            raise ValueError("; ".join(problems))
        return self


class UpdatesConfig(Settings):
    """`[updates]`: what every update leaves alone or undoes in part.

    Attributes:
        freeze: patterns of logical names whose weights stay, bit for bit; their moments go on.
    """

    freeze: tuple[Pattern, ...] = ()
    anchor: AnchorConfig | None = None


class SlowWeightsConfig(Settings):
    """`[slow_weights]`: a second, slower copy of the weights.

    Attributes:
        kind: "ema": the average ema <- decay x ema + (1 - decay) x theta, beside the training. "reptile":
            theta <- theta_0 + epsilon x (theta - theta_0), theta_0 <- theta (Nichol et al. 2018, arXiv
            1803.02999; with replay, Riemer et al. 2019, arXiv 1810.11910), Adam's moments kept.
        decay: "ema": share of the average that stays.
        every: updates from one change to the next.
        epsilon: "reptile": share of the way that is kept.
        reset: begin anew at the start of a stage, rather than go on with what the checkpoint has.
        evaluate: "ema": evaluations report the losses of the average as well.
    """

    kind: Literal["ema", "reptile"] | None = None
    decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    every: PositiveInt = 1
    epsilon: Annotated[float, Field(ge=0, le=1)] | None = None
    reset: bool = False
    evaluate: bool = False

    @model_validator(mode="after")
    def _of_its_kind(self) -> SlowWeightsConfig:
        both = {"every", "reset"}
        foreign = {
            None: {"decay", "epsilon", "evaluate"} | both,
            "ema": {"epsilon"},
            "reptile": {"decay", "evaluate"},
        }[self.kind]
        problems = _not_of(self, self.kind or "nothing", foreign)
        needed = {"ema": ("decay",), "reptile": ("every", "epsilon")}.get(self.kind or "", ())
        missing = [key for key in needed if key not in self.model_fields_set]
        if missing:
            problems.append(f'kind = "{self.kind}" needs {" and ".join(missing)}')
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _not_of(section: Settings, kind: str, foreign: set[str]) -> list[str]:
    """Keys that differ from their default though this kind does not read them."""
    fields = type(section).model_fields
    said = [key for key in sorted(foreign) if getattr(section, key) != fields[key].default]
    return [f'{", ".join(said)}: not read with kind = "{kind}"; remove'] if said else []
