"""What a DeepSpeed universal folder says besides tensors: steps, settings of parameter groups, counters.

How DeepSpeed 0.19.8 restores settings (runtime/base_optimizer.py, runtime/zero/stage3.py) decides what it
is told:

- ZeRO 3 gives all groups what it finds in the first one. So the first one has only what all groups agree
  on, and the engine keeps what it was configured with for the rest, such as weight decay of one group
  alone.
- ZeRO 1 and 2 pair groups by number, and load no parameter of a group beyond the file's last. So the file
  has as many groups as there are parameters. Groups of a DeepSpeed checkpoint come first, in its order, as
  DeepSpeed itself would restore them; another trainer's order means nothing to an engine, and gives only
  what all agree on.
"""

from __future__ import annotations

import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from checkpoint.archive.pickle_writer import Call, TensorRef, write_pickle
from checkpoint.archive.torch_writer import lay_out
from checkpoint.opening import Opened
from checkpoint.readers.deepspeed_state import COUNTERS
from checkpoint.readers.deepspeed_universal import GROUPS

VERSION = "0.19.8"  # whose format is written
COMMON = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "amsgrad")
"""Settings that mean the same to every trainer's optimizer."""
_COUNTS_IN_INTEGERS = "bias_correction"  # a setting of DeepSpeed's own Adam, which torch's does not have


@dataclass
class Settings:
    """What is known of a checkpoint besides its tensors, in the target's names.

    Attributes:
        steps: of the optimizer, by parameter; empty where the checkpoint has no such number.
        groups: names and settings.
        own: whether DeepSpeed saved the checkpoint.
        state: under DeepSpeed's words.
        iteration: of the trainer.
        parameters: names.
        lost: what has no place, a line each.
        notes: for the user, a line each.
    """

    steps: dict[str, int]
    groups: list[tuple[list[str], dict[str, Any]]]
    own: bool
    state: dict[str, Any]
    iteration: int
    parameters: list[str]
    lost: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, opened: Opened, members: Mapping[str, Sequence[str]]) -> Settings:
        """From a manifest; `members` has the logical names in every target."""
        state = opened.manifest.state
        source = dict(state.get("source", {}))
        target_of = {name: target for target, names in members.items() for name in names}
        groups, lost = [], []
        for group in state.get("groups", []):
            names = list(dict.fromkeys(target_of[name] for name in group["names"] if name in target_of))
            groups.append((names, {k: _setting(v) for k, v in group.items() if k != "names"}))
        owners = [name for names, _ in groups for name in names]
        if len(owners) > len(set(owners)):
            twice = sorted({name for name in owners if owners.count(name) > 1})
            lost.append(f"{', '.join(twice)}: parts of it are in different parameter groups")
        numbers = dict(state.get("per_parameter", {}))
        steps = _steps(state.get("scalars", {}).get("updates"), numbers.pop("step", {}), members)
        lost += [f"{name}: a number of each parameter, for which there is no file" for name in numbers]
        if len(set(steps.values())) > 1:
            lost.append(
                f"step: from {min(steps.values())} to {max(steps.values())}; under ZeRO 3 DeepSpeed has one "
                "for all, the largest here, and under ZeRO 1 and 2 one for every group"
            )
        is_own = "ds_version" in source
        settings = cls(steps, groups, is_own, source, opened.manifest.step, list(members), lost)
        settings._note()
        return settings

    def agreed(self) -> dict[str, Any]:
        """Settings that all groups have alike."""
        if not self.groups:
            return {}
        first = self.groups[0][1]
        keys = [key for key in first if self.own or key in COMMON]
        return {
            key: first[key] for key in keys if all(g.get(key, self) == first[key] for _, g in self.groups)
        }

    def _note(self) -> None:
        agreed = self.agreed()
        differing = {k: None for _, group in self.groups for k in group if k in COMMON and k not in agreed}
        if differing:
            stages = "under ZeRO 3" if self.own else "under any ZeRO stage"
            self.notes.append(
                f"{', '.join(differing)} differ between parameter groups: {stages} the engine keeps its own"
            )
        if self.has_muon:
            self.lost.append(
                "momentum_buffer: DeepSpeed's load_universal does not restore the momentum of Muon (under "
                "ZeRO 3 it refuses a checkpoint of Muon)"
            )
        if len(self.groups) > 1 and not self.counts_in_integers:
            self.notes.append(
                "under ZeRO 3 DeepSpeed gives all groups one step tensor, which torch's optimizers count up "
                "once a group. After load_checkpoint, separate them: for s in "
                "engine.optimizer.optimizer.state.values(): s['step'] = s['step'].clone()"
            )

    @property
    def has_muon(self) -> bool:
        """Whether Muon updates some of the parameters."""
        return any(group.get("use_muon") for _, group in self.groups)

    @property
    def counts_in_integers(self) -> bool:
        """Whether the optimizer is DeepSpeed's own Adam; torch's refuses a step that is no tensor."""
        return any(_COUNTS_IN_INTEGERS in group for _, group in self.groups)


def saved_step(settings: Settings, name: str) -> bytes | None:
    """The file `step.pt` of a parameter; None without a number of steps."""
    if name not in settings.steps:
        return None
    value, storages = _step(settings, settings.steps[name])
    return archive(value, storages)


def optimizer_state(settings: Settings) -> bytes:
    """The file `optimizer_state.pt`, for all stages at once."""
    agreed = {**settings.agreed(), "params": []}
    own = [{**group, "params": []} for _, group in settings.groups] if settings.own else []
    count = max(len(settings.parameters), len(own))
    step, storages = _step(settings, max(settings.steps.values(), default=0))
    value = {
        "param_groups": own + [agreed] * (count - len(own)),
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [agreed]},
        "ds_version": settings.state.get("ds_version", VERSION),
        GROUPS: [{"names": names, "settings": group} for names, group in settings.groups],
    }
    return archive(value, storages)


def model_states(settings: Settings, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """The file of model states: counters, scheduler and client state, no weights."""
    held = settings.state
    value: dict[str, Any] = {
        "module": {},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": _shapes(settings, shapes),
        "shared_params": {},
        "global_steps": settings.iteration,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "lr_scheduler": _scheduler(settings.iteration),
        "ds_version": VERSION,
    }
    value |= {key: held[key] for key in COUNTERS if key in held and key != "mp_world_size"}
    return archive(value | dict(held.get("client_state", {})), {})


def archive(value: Any, storages: Mapping[str, bytes]) -> bytes:
    """A small file of torch.save."""
    layout = lay_out(write_pickle(value), [(key, len(content)) for key, content in storages.items()])
    content = bytearray(layout.num_bytes)
    crcs = {key: zlib.crc32(payload) for key, payload in storages.items()}
    payloads = [(layout.payloads[key][0], payload) for key, payload in storages.items()]
    for start, part in (*layout.early, *payloads, *layout.late(crcs)):
        content[start : start + len(part)] = part
    return bytes(content)


def _steps(
    agreed: int | None, each: Mapping[str, float], members: Mapping[str, Sequence[str]]
) -> dict[str, int]:
    """How many updates every target had; the most of its parts."""
    found = {}
    for target, names in members.items():
        own = [int(each[name]) for name in names if name in each]
        if own or agreed is not None:
            found[target] = max(own) if own else int(agreed or 0)
    return found


def _step(settings: Settings, steps: int) -> tuple[Any, dict[str, bytes]]:
    """The number of steps as the optimizer keeps it, and the storages of that."""
    if settings.counts_in_integers:
        return steps, {}
    return TensorRef("0", "float32", ()), {"0": struct.pack("<f", steps)}


def _shapes(settings: Settings, shapes: Mapping[str, tuple[int, ...]]) -> list[OrderedDict[str, Any]]:
    """`param_shapes`: of every group; all in one where no groups are known."""
    groups = [names for names, _ in settings.groups] or [settings.parameters]
    return [OrderedDict((name, Call("torch.Size", (shapes[name],))) for name in names) for names in groups]


def _scheduler(iteration: int) -> dict[str, Any]:
    """The position in a schedule as DeepSpeed's own schedulers and torch's LambdaLR both read it."""
    return {
        "last_batch_iteration": iteration - 1,
        "last_epoch": iteration,
        "_step_count": iteration + 1,
        "lr_lambdas": [],
    }


def _setting(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
