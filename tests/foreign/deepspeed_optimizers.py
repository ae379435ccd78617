"""Optimizers over two groups of a model's parameters: matrices decay, vectors do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.foreign.oracle import BETAS, EPS, LR, WEIGHT_DECAY

MOMENTS: dict[str, dict[str, str]] = {
    "adamw": {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    "cpu_adam": {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    "sgd": {"momentum_buffer": "exp_avg"},
    "lion": {"exp_avg": "exp_avg"},
}
"""What each optimizer keeps of a parameter, by its own word, and which of the oracle's values it is given."""


class Lion(torch.optim.Optimizer):
    """The sign of an interpolated momentum (arXiv 2302.06675, algorithm 2)."""

    def __init__(self, groups: Any, *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                average = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                update = average.lerp(parameter.grad, 1 - first).sign()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                average.lerp_(parameter.grad, 1 - second)


def decay_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]


def build_optimizer(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    groups = decay_groups(model)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    if name == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles itself when it is made first

        return DeepSpeedCPUAdam(groups, lr=LR, betas=BETAS, eps=EPS)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=LR, momentum=0.9)
    if name == "lion":
        return Lion(groups, lr=LR, betas=BETAS)
    raise KeyError(name)
