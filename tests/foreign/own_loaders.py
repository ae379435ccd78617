"""What the trainers themselves make of folders that were converted for them: they load, and update once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp

from parallel.layout import Layout
from parallel.slices import TensorSlice
from tests.foreign import dcp, deepspeed, huggingface, megatron
from tests.foreign.dcp_model import Names
from tests.foreign.megatron_model import Run
from tests.foreign.oracle import LR, STEP, Oracle
from tests.proof.gather import copy_slices, whole_tensors
from tests.ranks import run_ranks

ROUNDING = 1.2e-7
"""megatron-core's AdamW is one rounding of fp32 apart from torch's: 2^-24 of values below 1."""
_LISTED = 3


@dataclass(frozen=True)
class WithoutMasters(Oracle):
    """What is left of the oracle in a checkpoint of weights: they are the masters too."""

    def value(self, name: str, state: str) -> torch.Tensor:
        value = super().value(name, state)
        return value.bfloat16().float() if state == "master" and self.precision == "bf16" else value


@dataclass(frozen=True)
class CoarseGradients(Oracle):
    """The oracle for trainers that hold gradients in the weights' precision, as DeepSpeed does."""

    def value(self, name: str, state: str) -> torch.Tensor:
        value = super().value(name, state)
        return value.bfloat16().float() if state == "grad" and self.precision == "bf16" else value


def faults(to: str, folder: Path, oracle: Oracle, *, optimizer: bool) -> list[str]:
    """What is wrong with a converted folder by the word of the trainer that it is for; a line each.

    Args:
        to: "huggingface", "torch_dist", "deepspeed_universal" or "dcp".
        optimizer: whether the folder has masters and moments: then an update is made.
    """
    try:
        return _LOADERS[to](folder, oracle, optimizer)
    except Exception as error:  # of any trainer
        return [f"{type(error).__name__}: {str(error)[-2000:]}"]


def _huggingface(folder: Path, oracle: Oracle, optimizer: bool) -> list[str]:
    return huggingface.differences(folder, oracle)


def _deepspeed(folder: Path, oracle: Oracle, optimizer: bool) -> list[str]:
    """ZeRO-2 on two ranks."""
    run = deepspeed.Run(2)
    if not optimizer:
        deepspeed.load_universal_weights(folder, _like(WithoutMasters, oracle), run)
        return []
    coarse = _like(CoarseGradients, oracle)
    resumed = deepspeed.load_universal_and_step(folder, coarse, run)
    settings = {name: held for names, held in resumed.groups for name in names}
    steps = [] if resumed.global_steps == STEP + 1 else [f"global_steps is {resumed.global_steps}"]
    return _differing(resumed.states, coarse) + _other_settings(settings, oracle) + steps


def _dcp(folder: Path, oracle: Oracle, optimizer: bool) -> list[str]:
    """FSDP2 on two ranks."""
    if not optimizer:
        held = run_ranks(_dcp_weights, 2, str(folder), oracle)[0]
        return _differing(held, _like(WithoutMasters, oracle), stepped=False)
    resumed = dcp.load_and_step(folder, oracle, dcp.Run())
    steps = [f"step of {name} is {step}" for name, step in resumed.steps.items() if step != STEP][:_LISTED]
    return _differing(resumed.states, oracle) + _other_settings(resumed.settings, oracle) + steps


def _dcp_weights(folder: str, oracle: Oracle) -> dict[tuple[str, str], torch.Tensor]:
    model = dcp.sharded_model(oracle, dcp.Run())
    weights = get_model_state_dict(model)
    load_dcp({"model": weights}, checkpoint_id=folder)
    set_model_state_dict(model, weights)
    logical = Names(oracle).logical()
    held = {logical[name]: parameter for name, parameter in model.named_parameters() if name in logical}
    return {(name, "master"): parameter.full_tensor() for name, parameter in held.items()}


def _torch_dist(folder: Path, oracle: Oracle, optimizer: bool) -> list[str]:
    """TP2 x PP2, or EP2 with experts: as the sources' own layouts, so that other cells change layouts."""
    run = Run(Layout(expert=2), 2) if oracle.experts else Run(Layout(tensor=2, pipeline=2), 4)
    (inside,) = [path.parent for path in folder.glob("*/metadata.json")]
    if optimizer:
        held = megatron.load_and_step(inside, oracle, run, megatron.Dist("fully_reshardable"))
        return _differing(held, oracle, apart=ROUNDING)
    held = whole_tensors(run_ranks(_megatron_weights, run.world, str(inside), oracle, run))
    wrong = [
        name
        for name in oracle.shapes()
        if not torch.equal(held[name, "weight"], oracle.value(name, "weight"))
    ]
    return [f"{len(wrong)} weights differ: {', '.join(wrong[:_LISTED])}"] if wrong else []


def _megatron_weights(folder: str, oracle: Oracle, run: Run) -> list[TensorSlice]:
    engine = megatron.build(oracle, run)
    wanted = megatron.sharded_state(engine, oracle, run, megatron.Dist(optimizer=False), is_loading=True)
    loaded = dist_checkpointing.load(wanted, folder)
    for index, chunk in enumerate(engine.chunks):
        chunk.load_state_dict(loaded["model" if len(engine.chunks) == 1 else f"model{index}"], strict=False)
    return [piece for piece in copy_slices(engine) if piece.state == "weight"]


def _differing(
    held: dict[tuple[str, str], torch.Tensor], oracle: Oracle, *, stepped: bool = True, apart: float = 0.0
) -> list[str]:
    """Names and states that are not what the oracle has, after an update or before."""
    wrong = []
    for name in oracle.shapes():
        wanted = oracle.stepped(name) if stepped else {"master": oracle.value(name, "master")}
        for state, expected in wanted.items():
            found = held.get((name, state), held.get((name, "weight")))  # in fp32 it is the master
            if found is None or not torch.allclose(found, expected, rtol=0, atol=apart):
                wrong.append(f"{name} ({state})")
    return [f"{len(wrong)} tensors differ: {', '.join(wrong[:_LISTED])}"] if wrong else []


def _other_settings(settings: dict[str, dict[str, object]], oracle: Oracle) -> list[str]:
    """Groups' settings, as they were loaded, that are not the oracle's."""
    wrong = []
    for name in oracle.shapes():
        held = settings.get(name, {})
        if (held.get("lr"), held.get("weight_decay")) != (LR, oracle.weight_decay(name)):
            wrong.append(f"{name}: lr {held.get('lr')}, weight_decay {held.get('weight_decay')}")
    return [f"settings of {len(wrong)} parameters differ: {wrong[0]}"] if wrong else []


def _like(kind: type[Oracle], oracle: Oracle) -> Oracle:
    return kind(**vars(oracle))


_LOADERS = {
    "huggingface": _huggingface,
    "torch_dist": _torch_dist,
    "deepspeed_universal": _deepspeed,
    "dcp": _dcp,
}
