"""The parameter groups of an optimizer as megatron-core asks for them in common.pt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from checkpoint.manifest import Manifest
from checkpoint.writers.dcp_optimizer import OptimizerValues

_MEANING = ("lr", "betas", "eps", "weight_decay")
_DEFAULTS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


class _Identity(NamedTuple):
    """What megatron-core matches a stored group with one of its own by."""

    wd_mult: float
    lr_mult: float
    is_expert_parallel: bool
    is_decoupled_lr: bool


class Groups:
    """The settings of an optimizer, in the groups that megatron-core forms by a rule of its own.

    Vectors and biases have no weight decay. A source that decays other parameters is not what megatron-core
    would go on with.

    Attributes:
        lost: what megatron-core would do otherwise, a line each.
        is_said: whether the source has settings; torch's defaults take their place.
    """

    def __init__(self, manifest: Manifest, *, experts_apart: bool) -> None:
        self.lost: list[str] = []
        self._manifest, self._experts_apart = manifest, experts_apart
        words = [t.state for t in manifest.tensors if t.state not in ("weight", "master")]
        self._values = OptimizerValues(manifest.state, list(dict.fromkeys(words)))
        self.is_said = self._values.has_settings
        self._shapes = {t.name: t.shape for t in manifest.tensors if t.state == "exp_avg"}
        self._settings: dict[_Identity, dict[str, Any]] = {}
        self._steps: dict[float | int, str] = {}

    def add(self, name: str, logical: Sequence[str]) -> None:
        """A parameter of megatron-core's that is made of some logical tensors."""
        numbers = self._values.numbers(name, logical)
        self._steps.setdefault(numbers.pop("step", self._manifest.step), name)
        self.lost += [f"{state} of {name}: megatron-core keeps no such number" for state in numbers]
        settings = self._values.settings(name, logical)
        decayed = len(self._shapes[logical[0]]) > 1 and not name.endswith(".bias")
        if settings and bool(settings.get("weight_decay")) != decayed and self._decays():
            self.lost.append(
                f"weight_decay {settings.get('weight_decay')} of {name}: megatron-core "
                + ("decays it" if decayed else "never decays vectors")
            )
            settings = {key: value for key, value in settings.items() if key != "weight_decay"}
        identity = _Identity(
            float(decayed),
            float(settings.get("lr_mult", 1.0)),
            self._experts_apart and ".experts." in name,
            bool(settings.get("is_decoupled_lr")),
        )
        known = self._settings.setdefault(identity, settings)
        for key in _MEANING:
            if key in settings and known.setdefault(key, settings[key]) != settings[key]:
                self.lost.append(
                    f"{key} {settings[key]} of {name}: others of its group in megatron-core have {known[key]}"
                )

    def state(self) -> dict[Any, Any]:
        """What "optimizer" of the common state holds: of one optimizer, or of two by their numbers."""
        if len(self._steps) > 1:
            counts = ", ".join(f"{step} ({name})" for step, name in self._steps.items())
            self.lost.append(
                f"counts of updates: megatron-core has one for all parameters, found are {counts}"
            )
        self.lost = list(dict.fromkeys([*self.lost, *self._values.lost]))
        self._complete()
        if not self._experts_apart:
            return self._optimizer(self._settings)
        parts = (
            [identity for identity in self._settings if identity.is_expert_parallel is experts]
            for experts in (False, True)
        )
        return {number: self._optimizer(part) for number, part in enumerate(parts)}

    def settings(self) -> list[dict[str, Any]]:
        """Of all groups, after `state`."""
        return [{**_DEFAULTS, **settings} for settings in self._settings.values()]

    def _decays(self) -> bool:
        """Whether the source decays anything: otherwise all groups have a weight decay of zero."""
        groups = self._manifest.state.get("groups") or []
        return any(group.get("weight_decay") for group in groups)

    def _complete(self) -> None:
        """megatron-core asks for decayed and other parameters, even where a rank has none of them."""
        for identity in list(self._settings):
            other = identity._replace(wd_mult=1.0 - identity.wd_mult)
            base = self._settings[identity]
            decay = max((float(each.get("weight_decay") or 0) for each in self._settings.values()), default=0)
            self._settings.setdefault(other, base | {"weight_decay": decay * other.wd_mult})

    def _optimizer(self, identities: Iterable[_Identity]) -> dict[str, Any]:
        step = max(self._steps, default=self._manifest.step)
        groups = [
            {
                "bias_correction": True,
                "default_config": True,
                **_DEFAULTS,
                **self._settings[identity],
                **identity._asdict(),
                "step": step,
            }
            for identity in sorted(identities, reverse=True)
        ]
        return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"}
