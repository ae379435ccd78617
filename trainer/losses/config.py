"""`[[losses]]`: what is added to the cross-entropy, on which sources, and for which steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from parallel.layout import Layout
from parallel.settings import Settings
from trainer.data.choice import Described, choice_problems, is_chosen

START = "start"


class AuxLossConfig(Settings):
    """`[[losses]]`: one auxiliary loss.

    The objective is (sum of the cross-entropies + weight x sum of this loss) / tokens of the global batch.
    All tokens that count in the cross-entropy count, of whatever source: `weight` is what a token of the
    chosen sources weighs, whatever share of the batch they have.
    """

    kind: Literal["kl", "z"]
    """`kl`: the divergence from a frozen reference; `z`: log^2 Z (PaLM, arXiv 2204.02311, section 5)."""
    name: str | None = Field(default=None, min_length=1)
    """How reports call it; the kind when not given."""
    weight: float = Field(ge=0, allow_inf_nan=False)
    """0 measures the loss and leaves every number of the training as it is."""
    sources: tuple[str, ...] = ("*",)
    """Only tokens of these sources are in this loss: names of `[[data.sources]]`, patterns such as
    "replay-*", groups and tags, as in "group:web" and "tag:language=de"."""
    from_step: int = Field(default=0, ge=0)
    """Steps done before it begins, counted through the whole run."""
    until_step: int | None = Field(default=None, gt=0)
    """Steps done when it ends; to the end when not given."""

    reference: str = START
    """kl: `start`, what the stage started from, or the path of a checkpoint of any format."""
    spec: str | None = None
    """kl: what the names in `reference` mean, as `checkpoint.spec`."""
    direction: Literal["forward", "reverse"] = "forward"
    """kl: forward is KL(reference || model), reverse KL(model || reference)."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """kl: of both softmaxes. The loss is multiplied by its square, so that the gradient keeps its size
    (Hinton et al., arXiv 1503.02531, section 2)."""
    top_k: int | None = Field(default=None, gt=0)
    """kl: keep the k likeliest tokens of the reference, and the rest as one; all of them when not given."""
    layout: Layout | None = None
    """kl: the reference runs on this layout of the same ranks; needs `top_k`."""
    cache: Path | None = None
    """kl: a folder of the reference's likeliest tokens, read instead of running the reference."""

    @model_validator(mode="after")
    def _consistent(self) -> AuxLossConfig:
        problems = []
        if self.kind != "kl":
            fields = type(self).model_fields
            problems += [
                f"losses: {key} is a key of kind kl, this one is {self.kind}; leave it out"
                for key in KL_KEYS
                if getattr(self, key) != fields[key].default
            ]
        elif self.layout is not None and self.top_k is None:
            problems.append(
                "losses: layout without top_k: the reference's tokens go from rank to rank only as its "
                "likeliest ones; set top_k (128, say)"
            )
        elif self.cache is not None and (self.layout is not None or self.top_k is not None):
            problems.append("losses: cache says itself how many tokens it has; leave out top_k and layout")
        if self.until_step is not None and self.until_step <= self.from_step:
            problems.append(
                f"losses: until_step = {self.until_step} is not after from_step = {self.from_step}, so the "
                "loss is never on"
            )
        if not self.sources:
            problems.append("losses: sources is empty; leave it out for all sources, or name some")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def label(self) -> str:
        """Its name in reports."""
        return self.name or self.kind

    def covers(self, step: int) -> bool:
        """Whether the loss is on in the step after `step` steps."""
        return self.from_step <= step and (self.until_step is None or step < self.until_step)

    def chosen(self, sources: Sequence[Described]) -> tuple[bool, ...]:
        """For each source, whether its tokens are in this loss."""
        return tuple(is_chosen(source, self.sources) for source in sources)


KL_KEYS = ("reference", "spec", "direction", "temperature", "top_k", "layout", "cache")


def loss_problems(
    losses: Sequence[AuxLossConfig],
    sources: Sequence[Described],
    *,
    vocab_size: int,
    global_batch: int,
    world_size: int,
    layout_facts: Mapping[str, Any],
) -> list[str]:
    """What is wrong with `[[losses]]` that their sections alone do not show.

    Args:
        layout_facts: the model's sizes as `Layout.problems` takes them.
    """
    problems = []
    labels = [one.label for one in losses]
    for label in dict.fromkeys(labels):
        if labels.count(label) > 1:
            problems.append(
                f"losses: {labels.count(label)} are called {label!r}; give each a name of its own"
            )
    for one in losses:
        problems += [
            f"losses {one.label!r}: sources has {text}" for text in choice_problems(one.sources, sources)
        ]
        if one.top_k is not None and one.top_k > vocab_size:
            problems.append(
                f"losses {one.label!r}: top_k = {one.top_k} of a vocabulary of {vocab_size}; lower it"
            )
        problems += _file_problems(one)
        if one.layout is not None:
            problems += _layout_problems(one, one.layout, global_batch, world_size, layout_facts)
    return problems


def _file_problems(one: AuxLossConfig) -> list[str]:
    if one.cache is not None:
        header = one.cache / "targets.json"
        return [] if header.is_file() else [f"losses {one.label!r}: cache: {header} does not exist"]
    if one.reference != START and not Path(one.reference).exists():
        return [
            f"losses {one.label!r}: reference {one.reference} does not exist; give a checkpoint or 'start'"
        ]
    return []


def _layout_problems(
    one: AuxLossConfig, layout: Layout, batch: int, world_size: int, facts: Mapping[str, Any]
) -> list[str]:
    found = [f"losses {one.label!r}: {text}" for text in layout.problems(world_size, **facts)]
    if not found and batch % layout.data(world_size):
        found.append(
            f"losses {one.label!r}: train.global_batch = {batch} does not divide over the "
            f"{layout.data(world_size)} data ranks of its layout"
        )
    if layout.virtual_pipeline:
        found.append(
            f"losses {one.label!r}: layout.virtual_pipeline speeds up a backward pass only; leave it out"
        )
    return found
