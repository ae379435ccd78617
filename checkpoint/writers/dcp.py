"""PyTorch DCP: a folder that FSDP2 loads with its optimizer, or torchtitan's.

Without a naming spec: {"model": ..., "optim": ...} in transformers' names, the optimizer flattened by name
as `torch.distributed.checkpoint.state_dict` gives and takes it with `flatten_optimizer_state_dict`. With
torchtitan's spec: its own layout, parameters at the top level and the optimizer under "optimizer".
FSDP2 keeps one copy of a parameter, in fp32: a weight is written from its master where there is one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.convert.output import WritePlan
from checkpoint.language.arrange import Arranged, arrange
from checkpoint.language.spec import Spec, load_spec
from checkpoint.source import plain_part
from checkpoint.writers.dcp_folder import DcpFolder, Keys
from checkpoint.writers.dcp_optimizer import OptimizerValues
from checkpoint.writers.options import WriteOptions

if TYPE_CHECKING:
    from checkpoint.opening import Opened

_PARAMETER = ("weight", "master")
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
    _tie(writer, spec, targets)
    found = writer.finish()
    if titan:
        found.notes.append(
            "torchtitan also wants lr_scheduler, dataloader and train_state.ntokens_seen, which no other "
            "trainer has: list them in its checkpoint.exclude_from_loading"
        )
    return found


def _tie(writer: _Writer, spec: Spec, targets: list[Arranged]) -> None:
    """Other names of tied parameters, which a model's state dict has as well."""
    aliases = {rule.match: rule.to for rule in spec.rules if rule.tied and rule.match and rule.to}
    if spec.name == "logical":
        aliases["lm_head.weight"] = "model.embed_tokens.weight"
    written = {target.name for target in targets}
    targets_of = {t.parts[0].name: t.name for t in targets if len(t.parts) == 1}
    for alias, logical in aliases.items():
        if "{" not in alias and alias not in written and logical in targets_of:
            writer.alias(alias, targets_of[logical])


class _Writer:
    """Puts a checkpoint into a folder, tensor by tensor."""

    def __init__(self, opened: Opened, options: WriteOptions, layout: _Layout) -> None:
        self.plan = WritePlan("PyTorch DCP")
        self._manifest, self._dtype, self._layout = opened.manifest, options.dtype, layout
        self._folder = DcpFolder(options.shard_bytes)
        self._tensors = self._manifest.by_key()
        words = dict.fromkeys(tensor.state for tensor in self._manifest.tensors)
        self._words = [word for word in words if word not in _PARAMETER]
        self._values = OptimizerValues(self._manifest.state, self._words)
        found = sorted(self._tensors.values(), key=lambda tensor: tensor.state == "weight")
        self.shapes = {tensor.name: tensor.shape for tensor in found if tensor.state in _PARAMETER}

    def write(self, target: Arranged) -> None:
        """One tensor of the target's model, and all that its optimizer keeps of it."""
        logical = list(dict.fromkeys(part.name for part in target.parts))
        self._weight(target, logical)
        for word in self._words:
            self._state(target, logical, word)
        if not self._words:
            return
        for word, number in self._values.numbers(target.name, logical).items():
            keys = self._layout.state(target.name, word)
            if word == "step":
                self._folder.add_number(keys, float(number))
            else:
                self._folder.add_item(keys, number)
        for key, value in self._values.settings(target.name, logical).items():
            self._folder.add_item(self._layout.setting(target.name, key), value)

    def alias(self, alias: str, name: str) -> None:
        """A tied parameter's other name; its optimizer knows one of them."""
        self._folder.add_alias(self._layout.weight(alias), self._layout.weight(name))

    def finish(self) -> WritePlan:
        """All that is not of a parameter, and the files."""
        state = self._manifest.state
        self._folder.add_item(self._layout.step, self._manifest.step)
        kept = {key: value for key, value in state.items() if key not in _ELSEWHERE}
        self._folder.add_item(("ratoon",), kept)
        self.plan.lost += self._values.lost
        self.plan.notes += self._notes()
        if state.get("model_config"):
            self.plan.small["config.json"] = json.dumps(state["model_config"], indent=2).encode()
        self.plan.files = self._folder.files()
        self.plan.small |= self._folder.small()
        self.plan.last = lambda _: self._folder.index()
        return self.plan

    def _notes(self) -> list[str]:
        notes = []
        if self._manifest.rank_blobs:
            notes.append("random states of ranks belong to the layout that saved them: not written")
        if self._words and not self._values.has_settings:
            notes.append(
                "the source says no settings of parameter groups: none are written, and the optimizer's "
                "state has to be loaded without them"
            )
        if self._values.unsaid:
            unsaid = ", ".join(self._values.unsaid)
            notes.append(f"settings that the source does not say are torch's defaults: {unsaid}")
        return notes

    def _weight(self, target: Arranged, logical: list[str]) -> None:
        state = "master" if all((name, "master") in self._tensors for name in logical) else "weight"
        missing = [name for name in logical if (name, state) not in self._tensors]
        if missing:
            self.plan.lost.append(f"{target.name}: {missing[0]}, which belongs to it, has no {state}")
            return
        held = self._tensors[logical[0], state].dtype
        dtype = self._dtype or held
        if state == "master" and dtype != held:
            line = f"masters in {held}: FSDP keeps one copy of a parameter, which is written in {dtype}"
            self.plan.lost += [line] if line not in self.plan.lost else []
        keys = self._layout.weight(target.name)
        self._folder.add_tensor(keys, dtype, target.shape, state=state, parts=target.parts)

    def _state(self, target: Arranged, logical: list[str], word: str) -> None:
        found = [self._tensors[name, word] for name in logical if (name, word) in self._tensors]
        if not found:
            return
        first, keys = found[0], self._layout.state(target.name, word)
        alike = all(tensor.shape == self.shapes[tensor.name] for tensor in found)
        if alike and len(found) == len(logical):
            self._folder.add_tensor(keys, first.dtype, target.shape, state=word, parts=target.parts)
        elif target.parts == (plain_part(logical[0], target.shape),):
            whole = (plain_part(first.name, first.shape),)
            self._folder.add_tensor(keys, first.dtype, first.shape, state=word, parts=whole)
        else:
            self.plan.lost.append(
                f"{word} of {first.name}: {target.name} is made of several tensors, and not all of them "
                "have it in the parameter's shape"
            )
