"""The `[optimizer]` section: AdamW, which parameters decay, and the same in megatron-core's words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from parallel.settings import Settings
from trainer.precision import MEGATRON_FP8_RECIPE

if TYPE_CHECKING:
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

    from parallel.layout import Layout
    from trainer.model.transformer import Execution

Momentum = Annotated[float, Field(ge=0, lt=1)]

# Group -> pattern of logical names. Every parameter of every family matches exactly one.
PARAMETER_GROUPS: dict[str, re.Pattern[str]] = {
    "bias": re.compile(r".*\.bias"),
    "norm": re.compile(r".*norm\.weight"),
    "embedding": re.compile(r"model\.embed_tokens\.weight"),
    "matrix": re.compile(r"(.*(_proj|\.gate)|lm_head)\.weight"),
}


class OptimizerConfig(Settings):
    """`[optimizer]`: AdamW (arXiv 1711.05101) and the bounds of its learning rate.

    Attributes:
        lr: highest learning rate of the schedule.
        min_lr: learning rate at which the schedule's decay ends.
        betas: decay of the averages of the gradient and of its square.
        weight_decay: subtracted per step is lr x weight_decay x weight, of matrices only: biases and norms
            never decay.
        decay_embeddings: whether the input embedding (and with it a tied output layer) decays as well.
        clip: largest norm of the gradient over the whole mesh; None or 0 does not clip.
    """

    lr: PositiveFloat = 3e-4
    min_lr: NonNegativeFloat = 0.0
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    decay_embeddings: bool = True
    clip: NonNegativeFloat | None = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr} and lr is {self.lr}: min_lr must not be above lr")
        return self


def parameter_group(name: str) -> str:
    """The one group of PARAMETER_GROUPS that a logical name belongs to.

    Raises:
        ValueError: when no group or more than one matches, so that no parameter is forgotten or taken twice.
    """
    groups = [group for group, pattern in PARAMETER_GROUPS.items() if pattern.fullmatch(name)]
    if len(groups) != 1:
        raise ValueError(
            f"parameter {name} matches {groups or 'no group'}: every parameter needs exactly one group "
            f"of {', '.join(PARAMETER_GROUPS)}"
        )
    return groups[0]


def weight_decay(config: OptimizerConfig, name: str) -> float:
    """Weight decay of the parameter with this logical name."""
    group = parameter_group(name)
    decays = group == "matrix" or (group == "embedding" and config.decay_embeddings)
    return config.weight_decay if decays else 0.0


def settings_by_group(config: OptimizerConfig, names: Iterable[str], lr: float) -> list[dict[str, Any]]:
    """The optimizer's settings as a checkpoint keeps them: groups of logical names with the same settings.

    Args:
        lr: learning rate of the last update.
    """
    groups: dict[float, list[str]] = {}
    for name in names:
        groups.setdefault(weight_decay(config, name), []).append(name)
    return [
        {"names": held, "lr": lr, "weight_decay": decay, "betas": list(config.betas), "eps": config.eps}
        for decay, held in groups.items()
    ]


def megatron_optimizer_config(
    config: OptimizerConfig, execution: Execution, layout: Layout
) -> MegatronOptimizerConfig:
    """megatron-core's optimizer configuration; which parameters decay is told apart, by `weight_decay`."""
    import torch
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

    bf16 = execution.precision == "bf16"
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        fp8_recipe=MEGATRON_FP8_RECIPE.get(execution.fp8),
        use_distributed_optimizer=layout.distributed_optimizer,
        clip_grad=config.clip or 0.0,
    )
