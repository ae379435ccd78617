"""PyTorch DCP: a folder that FSDP2 loads with its optimizer, or torchtitan's.

Without a naming spec: {"model": ..., "optim": ...} in transformers' names, the optimizer flattened by name
as `torch.distributed.checkpoint.state_dict` gives and takes it with `flatten_optimizer_state_dict`. With
torchtitan's spec: its own layout, parameters at the top level and the optimizer under "optimizer".
FSDP2 keeps one copy of a parameter, in fp32: a weight is written from its master where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from checkpoint.convert.output import WritePlan
from checkpoint.language.arrange import Arranged, arrange
from checkpoint.language.spec import Spec, load_spec
from checkpoint.manifest import LogicalTensor
from checkpoint.source import Part, plain_part
from checkpoint.writers.dcp_folder import DcpFolder, Keys
from checkpoint.writers.options import WriteOptions

if TYPE_CHECKING:
    from checkpoint.opening import Opened

_ELSEWHERE = ("groups", "per_parameter", "left_out")
"""Of a manifest's state, what the optimizer's part of the folder says."""


@dataclass(frozen=True)
class _Layout:
    """Where a state dict has what.

    Attributes:
        model: keys before a parameter's name.
        optimizer: key of the optimizer.
        step: keys of the trainer's counter.
    """

    model: Keys
    optimizer: str
    step: Keys

    def weight(self, name: str) -> Keys:
        return (*self.model, name)

    def state(self, name: str, word: str) -> Keys:
        return (self.optimizer, f"state.{name}.{word}")

    def setting(self, name: str, key: str) -> Keys:
        return (self.optimizer, f"param_groups.{name}.{key}")


_USUAL = _Layout(("model",), "optim", ("step",))
_TITAN = _Layout((), "optimizer", ("train_state", "step"))


def plan(opened: Opened, options: WriteOptions) -> WritePlan:
    """The files of a DCP folder of a checkpoint of any format.

    Raises:
        SpecError: the naming spec cannot write this model.
    """
    spec = load_spec(options.spec or "logical")
    titan = spec.name.startswith("torchtitan")
    writer = _Writer(opened, options, _TITAN if titan else _USUAL)
    facts = {**opened.manifest.state.get("facts", {}), **options.facts}
    targets = arrange(spec, writer.shapes, facts=facts)
    for target in targets:
        writer.write(target)
    _tie(writer, spec, {target.name for target in targets})
    writer.finish()
    if titan:
        writer.plan.notes.append(
            "torchtitan also wants lr_scheduler, dataloader and train_state.ntokens_seen, which no other "
            "trainer has: list them in its checkpoint.exclude_from_loading"
        )
    return writer.plan


def _tie(writer: _Writer, spec: Spec, written: set[str]) -> None:
    """Other names of tied parameters, which a model's state dict has as well."""
    aliases = {rule.match: rule.to for rule in spec.rules if rule.tied and rule.match and rule.to}
    if spec.name == "logical":
        aliases["lm_head.weight"] = "model.embed_tokens.weight"
    for alias, name in aliases.items():
        if "{" not in alias and alias not in written and name in written:
            writer.alias(alias, name)


@dataclass
class _Writer:
    opened: Opened
    options: WriteOptions
    layout: _Layout
    plan: WritePlan = field(default_factory=lambda: WritePlan("PyTorch DCP"))

    def __post_init__(self) -> None:
        self.folder = DcpFolder(self.options.shard_bytes)
        manifest = self.opened.manifest
        self.tensors = manifest.by_key()
        weights = [t for t in manifest.tensors if t.state == "weight"]
        masters = [t for t in manifest.tensors if t.state == "master"]
        self.shapes = {tensor.name: tensor.shape for tensor in (*weights, *masters)}
        words = dict.fromkeys(tensor.state for tensor in manifest.tensors)
        self.words = [word for word in words if word not in ("weight", "master")]
        groups = manifest.state.get("groups") or []
        self.settings: dict[str, dict[str, Any]] = {
            name: {key: value for key, value in group.items() if key != "names"}
            for group in groups
            for name in group["names"]
        }
        self.defaults = _torch_defaults(self.words) if self.settings else {}
        self.unsaid: dict[str, None] = {}

    def write(self, target: Arranged) -> None:
        """One tensor of the target's model, and all that its optimizer keeps of it."""
        logical = list(dict.fromkeys(part.name for part in target.parts))
        self._weight(target, logical)
        for word in self.words:
            self._state(target, logical, word)
        if self.words:
            self._numbers(target.name, logical)
            self._settings(target.name, logical)

    def alias(self, alias: str, name: str) -> None:
        """A tied parameter's other name; its optimizer knows one of them."""
        self.folder.add_alias(self.layout.weight(alias), self.layout.weight(name))

    def finish(self) -> None:
        """All that is not of a parameter, and the files."""
        manifest, state = self.opened.manifest, self.opened.manifest.state
        self.folder.add_item(self.layout.step, manifest.step)
        kept = {key: value for key, value in state.items() if key not in _ELSEWHERE}
        self.folder.add_item(("ratoon",), json.loads(json.dumps(kept)))
        if manifest.rank_blobs:
            self.plan.notes.append("random states of ranks belong to the layout that saved them: not written")
        if self.words and not self.settings:
            self.plan.notes.append(
                "the source says no settings of parameter groups: none are written, and the optimizer's "
                "state has to be loaded without them"
            )
        if self.unsaid:
            self.plan.notes.append(
                f"settings that the source does not say are torch's defaults: {', '.join(self.unsaid)}"
            )
        if state.get("model_config"):
            self.plan.small["config.json"] = json.dumps(state["model_config"], indent=2).encode()
        self.plan.files = self.folder.files()
        self.plan.small |= self.folder.small()
        self.plan.last = lambda _: self.folder.index()

    def _weight(self, target: Arranged, logical: list[str]) -> None:
        state = "master" if all((name, "master") in self.tensors for name in logical) else "weight"
        missing = [name for name in logical if (name, state) not in self.tensors]
        if missing:
            self.plan.lost.append(
                f"{target.name}: made of several, of which {missing[0]} has no {state}: not written"
            )
            return
        held = self.tensors[logical[0], state].dtype
        dtype = self.options.dtype or held
        if state == "master" and dtype != held:
            line = f"masters in {held}: FSDP keeps one copy of a parameter, which is written in {dtype}"
            self.plan.lost += [line] if line not in self.plan.lost else []
        self._tensor(self.layout.weight(target.name), dtype, target.shape, state, target.parts)

    def _state(self, target: Arranged, logical: list[str], word: str) -> None:
        found = [self.tensors[name, word] for name in logical if (name, word) in self.tensors]
        if not found:
            return
        keys = self.layout.state(target.name, word)
        odd = [tensor for tensor in found if tensor.shape != self.shapes[tensor.name]]
        if not odd and len(found) == len(logical):
            self._tensor(keys, found[0].dtype, target.shape, word, target.parts)
        elif target.parts == (plain_part(logical[0], target.shape),):
            self._tensor(keys, found[0].dtype, found[0].shape, word, (_whole(found[0]),))
        else:
            self.plan.lost.append(
                f"{word} of {found[0].name}: {target.name} is made of several tensors, and not all of them "
                "have it in the parameter's shape"
            )

    def _tensor(
        self, keys: Keys, dtype: str, shape: tuple[int, ...], state: str, parts: Iterable[Part]
    ) -> None:
        self.folder.add_tensor(keys, dtype, shape, state=state, parts=tuple(parts))

    def _numbers(self, name: str, logical: list[str]) -> None:
        state = self.opened.manifest.state
        kept: dict[str, Mapping[str, float]] = dict(state.get("per_parameter") or {})
        updates = (state.get("scalars") or {}).get("updates")
        if "step" not in kept and updates is not None:
            kept["step"] = dict.fromkeys(logical, updates)
        for word, values in kept.items():
            mine = [values[each] for each in logical if each in values]
            if not mine:
                continue
            if len(set(mine)) > 1:
                self.plan.lost.append(f"{word} of {logical[1]}: {name} has one number, {mine[0]}")
            if word == "step":
                self.folder.add_number(self.layout.state(name, word), float(mine[0]))
            else:
                self.folder.add_item(self.layout.state(name, word), mine[0])

    def _settings(self, name: str, logical: list[str]) -> None:
        mine = [self.settings[each] for each in logical if each in self.settings]
        if not mine:
            return
        if any(other != mine[0] for other in mine):
            self.plan.lost.append(f"settings of {logical[1]}: {name} is in one group, that of {logical[0]}")
        self.unsaid |= {
            f"{key} = {value}": None
            for key, value in self.defaults.items()
            if key not in mine[0] and key in ("lr", "betas", "eps", "weight_decay", "momentum")
        }
        for key, value in {**self.defaults, **mine[0]}.items():
            kept = tuple(value) if key == "betas" else value
            self.folder.add_item(self.layout.setting(name, key), kept)


def _whole(tensor: LogicalTensor) -> Part:
    return plain_part(tensor.name, tensor.shape)


def _torch_defaults(words: list[str]) -> dict[str, Any]:
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
