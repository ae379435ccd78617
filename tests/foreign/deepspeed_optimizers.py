"""Optimizers over two groups of a model's parameters: matrices decay, vectors do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.foreign.oracle import BETAS, EPS, LR, WEIGHT_DECAY

ADAM = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def moments(optimizer: str, name: str) -> dict[str, str]:
    """What an optimizer keeps of a parameter, by its own word, and the oracle's value that it is given."""
    if optimizer == "sgd" or (optimizer == "muon" and by_muon(name)):
        return {"momentum_buffer": "exp_avg"}
    return {"exp_avg": "exp_avg"} if optimizer == "lion" else ADAM


def by_muon(name: str) -> bool:
    """Whether Muon updates the parameter itself: the matrices between embedding and head."""
    return "_proj." in name


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


def build_optimizer(name: str, model: torch.nn.Module) -> torch.optim.Optimizer | None:
    """The optimizer; None for "muon", which DeepSpeed makes by itself from marks on the parameters."""
    if name == "muon":
        for path, parameter in model.named_parameters():
            parameter.use_muon = by_muon(path)  # type: ignore[attr-defined]
        return None
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
