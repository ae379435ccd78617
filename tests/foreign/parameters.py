"""A module of parameters alone, for trainers that wrap, save, load and update but never compute with it."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import nn


class Parameters(nn.Module):
    """Parameters of given names and values, and a loss that reaches them all."""

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(value.clone()))

    def forward(self, **batch: object) -> SimpleNamespace:
        """transformers' form of a result, whatever the batch."""
        means = [parameter.float().square().mean() for parameter in self.parameters()]
        return SimpleNamespace(loss=torch.stack(means).sum())
