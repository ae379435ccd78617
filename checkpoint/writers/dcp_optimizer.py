"""What FSDP's optimizer asks for besides tensors: numbers of each parameter, and settings of its group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

_MEANING = ("lr", "betas", "eps", "weight_decay", "momentum")
"""Settings that change what an update does."""
_COMPUTATION = ("foreach", "fused", "capturable", "differentiable")
"""How torch computes it. Whoever loads another trainer's choice would compute with other kernels."""


@dataclass
class OptimizerValues:
    """Numbers and settings by target parameter, from a manifest's state.

    Args:
        state: of the manifest, see `checkpoint.assembly.assemble`.
        words: states that its tensors have.

    Attributes:
        lost: where a target parameter made of several logical ones can have one value only, a line each.
        unsaid: settings that the source does not say, with what torch takes instead.
    """

    state: Mapping[str, Any]
    words: Sequence[str]
    lost: list[str] = field(default_factory=list)
    unsaid: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._settings: dict[str, dict[str, Any]] = {
            name: {key: value for key, value in group.items() if key != "names"}
            for group in self.state.get("groups") or []
            for name in group["names"]
        }
        self._defaults = _torch_defaults(self.words)
        self._is_torch = str(self.state.get("format", "")).startswith("PyTorch DCP")

    @property
    def has_settings(self) -> bool:
        return bool(self._settings)

    def numbers(self, name: str, logical: Sequence[str]) -> dict[str, float | int]:
        """State -> number of a target parameter that is made of some logical ones."""
        kept: dict[str, Mapping[str, float | int]] = dict(self.state.get("per_parameter") or {})
        updates = (self.state.get("scalars") or {}).get("updates")
        if "step" not in kept and updates is not None:
            kept["step"] = dict.fromkeys(logical, updates)
        found = {word: [v[each] for each in logical if each in v] for word, v in kept.items()}
        for word, values in found.items():
            if len(set(values)) > 1:
                self.lost.append(f"{word} of {logical[1]}: {name} has one number, that of {logical[0]}")
        return {word: values[0] for word, values in found.items() if values}

    def settings(self, name: str, logical: Sequence[str]) -> dict[str, Any]:
        """Of the group of a target parameter, with all keys that torch's optimizer has; empty if unknown."""
        mine = [self._settings[each] for each in logical if each in self._settings]
        if not mine:
            return {}
        if any(other != mine[0] for other in mine):
            self.lost.append(f"settings of {logical[1]}: {name} is in one group, that of {logical[0]}")
        missing = {key: value for key, value in self._defaults.items() if key not in mine[0]}
        self.unsaid |= {f"{key} = {value}": None for key, value in missing.items() if key in _MEANING}
        how = {key: self._defaults[key] for key in _COMPUTATION if key in self._defaults}
        found = {**missing, **mine[0], **({} if self._is_torch else how)}
        return {key: tuple(value) if key == "betas" else value for key, value in found.items()}


def _torch_defaults(words: Sequence[str]) -> dict[str, Any]:
    """Settings that torch's optimizer of these states has in each group, and asks for when it loads."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer: torch.optim.Optimizer
    if {"exp_avg", "exp_avg_sq"} <= set(words):
        optimizer = torch.optim.AdamW([parameter])
    elif "momentum_buffer" in words:
        optimizer = torch.optim.SGD([parameter])
    else:
        return {}
    return {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
