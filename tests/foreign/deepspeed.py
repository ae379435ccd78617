"""Genuine DeepSpeed checkpoints of the oracle, made on CPU ranks over gloo.

DeepSpeed itself trains a step, gets the oracle's numbers planted by its own functions, and saves; and
DeepSpeed itself resumes from universal folders.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # asked for while deepspeed is imported

import deepspeed
import torch
import transformers
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)

from tests.foreign.deepspeed_optimizers import build_optimizer, by_muon, moments
from tests.foreign.oracle import LR, STEP, WEIGHT_DECAY, Oracle
from tests.foreign.parameters import Parameters
from tests.ranks import run_ranks

# gloo alone: DeepSpeed's own shared-memory collectives would be compiled first
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

TAG = f"global_step{STEP}"
SAMPLES = 56


class Values(Protocol):
    """The oracle, or a view of it by other names or in parts."""

    def value(self, name: str, state: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class Run:
    """How DeepSpeed trains the oracle.

    Attributes:
        stage: of ZeRO, 0 for none.
        optimizer: "adamw", "sgd", "lion", "muon", or "cpu_adam": DeepSpeed's own, whose steps are integers.
        frozen: parameters that are not trained: a pattern that some part of the name matches.
        config: more keys of DeepSpeed's own configuration.
    """

    stage: int
    world: int = 2
    optimizer: str = "adamw"
    frozen: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)


def save(folder: Path, oracle: Oracle, run: Run, **client_state: Any) -> Path:
    """Write a checkpoint of the oracle into `folder`, and return `folder`."""
    run_ranks(_save, run.world, str(folder), oracle, run, client_state)
    return folder


@dataclass
class Resumed:
    """What DeepSpeed holds after it resumed and made one more update, and the groups' settings before it."""

    states: dict[tuple[str, str], torch.Tensor]
    groups: list[tuple[set[str], dict[str, Any]]]
    global_steps: int


def load_universal_and_step(folder: Path, oracle: Oracle, run: Run, *, separate: bool = True) -> Resumed:
    """Resume a universal folder by DeepSpeed's own `load_universal`, and step with the oracle's gradients.

    Args:
        separate: give every parameter group its own step tensor, which ZeRO 3 does not.
    """
    resumed: Resumed = run_ranks(_load_universal_and_step, run.world, str(folder), oracle, run, separate)[0]
    return resumed


def resume_and_step(folder: Path, oracle: Oracle, run: Run) -> Resumed:
    """The same from a checkpoint of DeepSpeed's own, on the layout that saved it."""
    resumed: Resumed = run_ranks(_resume_and_step, run.world, str(folder), oracle, run)[0]
    return resumed


def save_weights(folder: Path, oracle: Oracle) -> None:
    """The model alone, as transformers saves it."""
    model = build_model(oracle)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(oracle.value(name, "master"))
    model.save_pretrained(folder)


def load_universal_weights(folder: Path, oracle: Oracle, run: Run) -> None:
    """Load the weights alone by `load_universal`; fails where DeepSpeed does not hold the oracle's then."""
    run_ranks(_load_universal_weights, run.world, str(folder), oracle, run)


def build_model(oracle: Oracle) -> torch.nn.Module:
    """transformers' Llama of the oracle's sizes; its parameters have the logical names."""
    if oracle.experts:  # of which transformers makes one tensor, and names it otherwise
        return Parameters({name: torch.zeros(shape) for name, shape in oracle.shapes().items()})
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**oracle.huggingface_config(), attn_implementation="eager")
    return transformers.LlamaForCausalLM(config)


def start_engine(oracle: Oracle, run: Run, **more: Any) -> Any:
    """A DeepSpeed engine over the present process group."""
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = build_model(oracle)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (run.frozen and re.search(run.frozen, name)))
    optimizer = build_optimizer(run.optimizer, model)
    config = engine_config(oracle, run) | more
    torch.compiler.set_stance("force_eager")  # Muon's update would be compiled
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=trained,
        config=config,
        dist_init_required=False,
    )[0]


def engine_config(oracle: Oracle, run: Run) -> dict[str, Any]:
    muon = {"type": "Muon", "params": {"lr": LR, "momentum": 0.95, "weight_decay": WEIGHT_DECAY}}
    return {
        **({"optimizer": muon} if run.optimizer == "muon" else {}),
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": run.stage} | run.config.get("zero_optimization", {}),
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": oracle.precision == "bf16"},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_max_lr": LR}},
        **{key: value for key, value in run.config.items() if key != "zero_optimization"},
    }


def named_trained(engine: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((n, p) for n, p in engine.module.named_parameters() if p.requires_grad)


def backward(engine: Any, oracle: Oracle) -> None:
    tokens = torch.arange(8).reshape(1, 8)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)


def plant(engine: Any, oracle: Values, optimizer: str = "adamw") -> None:
    """Make the engine hold the oracle's numbers; fails where DeepSpeed does not give them back."""
    link_states(engine)
    if getattr(engine.optimizer, "round_robin_gradients", False):
        return plant_flat(engine, oracle)
    for name, parameter in named_trained(engine):
        master = oracle.value(name, "master")
        safe_set_full_fp32_param(parameter, master)
        assert torch.equal(safe_get_full_fp32_param(parameter), master), name
        whole = optimizer == "muon" and not hasattr(parameter, "ds_id")
        kept = {} if whole and by_muon(name) else moments(optimizer, name)
        for state, moment in kept.items():
            value = oracle.value(name, moment)
            safe_set_full_optimizer_state(parameter, value, state)
            assert torch.equal(safe_get_full_optimizer_state(parameter, state), value), (name, state)
    if optimizer == "muon" and hasattr(engine.optimizer, "params_in_partition"):
        plant_muon(engine.optimizer, oracle)
    plant_steps(engine)


def plant_muon(zero: Any, oracle: Values) -> None:
    """ZeRO 1 and 2: a rank has the whole momentum of every matrix of which it has some elements."""
    for group, members in enumerate(zero.params_in_partition):
        state = zero.optimizer.state[zero.single_partition_of_fp32_groups[group]]
        if "momentum_buffer" in state:
            values = [oracle.value(zero.param_names[member], "exp_avg").flatten() for member in members]
            state["momentum_buffer"].copy_(torch.cat(values))


def plant_steps(engine: Any) -> None:
    for state in engine.optimizer.optimizer.state.values():
        if "step" in state:
            state["step"] = torch.tensor(float(STEP)) if torch.is_tensor(state["step"]) else STEP
    if hasattr(engine.optimizer, "update_lp_params"):
        engine.optimizer.update_lp_params()


def plant_flat(engine: Any, oracle: Values) -> None:
    """ZeRO 1 and 2 with reordered parameters, where DeepSpeed's own functions set those of other names."""
    zero = engine.optimizer
    for number, (members, offsets) in enumerate(
        zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True)
    ):
        mine = zero.single_partition_of_fp32_groups[number]
        begin = torch.distributed.get_rank() * mine.numel()
        for state, target in {"master": mine, **zero.optimizer.state[mine]}.items():
            if state == "step":
                continue
            whole = torch.zeros(mine.numel() * torch.distributed.get_world_size())
            for parameter, offset in zip(members, offsets, strict=True):
                value = oracle.value(zero.param_names[parameter], state).flatten()
                whole[offset : offset + value.numel()] = value
            target.data.copy_(whole[begin : begin + mine.numel()])
    plant_steps(engine)


def link_states(engine: Any) -> None:
    """Let DeepSpeed's own functions find the moments: ZeRO 1 and 2 link those of the first group only."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def plant_frozen(engine: Any, oracle: Oracle) -> None:
    frozen = {n: p for n, p in engine.module.named_parameters() if not p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(frozen.values()), modifier_rank=0):
        for name, parameter in frozen.items():
            parameter.data.copy_(oracle.value(name, "weight"))


def plant_without_zero(engine: Any, oracle: Oracle) -> None:
    """ZeRO 0: the base optimizer holds one tensor a parameter, in bf16 beside fp32 masters."""
    wrapped = hasattr(engine.optimizer, "fp32_groups")
    base = engine.optimizer.optimizer if wrapped else engine.optimizer
    names = {id(p): n for n, p in engine.module.named_parameters()}
    for index, group in enumerate(base.param_groups):
        models = engine.optimizer.fp16_groups[index] if wrapped else group["params"]
        for model, master in zip(models, group["params"], strict=True):
            name = names[id(model)]
            master.data.copy_(oracle.value(name, "master"))
            model.data.copy_(oracle.value(name, "weight"))
            base.state[master] = {
                "step": torch.tensor(float(STEP)),
                "exp_avg": oracle.value(name, "exp_avg"),
                "exp_avg_sq": oracle.value(name, "exp_avg_sq"),
            }


def count_steps(engine: Any) -> None:
    """Let the engine have made as many steps as the oracle, the warm-up behind it."""
    engine.global_steps, engine.global_samples, engine.skipped_steps = STEP, SAMPLES, 1
    engine.lr_scheduler.last_batch_iteration = STEP
    for group in engine.lr_scheduler.optimizer.param_groups:
        group["lr"] = LR


def _save(folder: str, oracle: Oracle, run: Run, client_state: dict[str, Any]) -> None:
    engine = start_engine(oracle, run)
    backward(engine, oracle)
    engine.step()
    if run.stage == 0:
        plant_without_zero(engine, oracle)
    else:
        plant(engine, oracle, run.optimizer)
        plant_frozen(engine, oracle)
    count_steps(engine)
    engine.save_checkpoint(folder, tag=TAG, client_state=client_state)


def _load_universal_and_step(folder: str, oracle: Oracle, run: Run, separate: bool) -> Resumed:
    engine = start_engine(oracle, run, checkpoint={"load_universal": True})
    path, _ = engine.load_checkpoint(folder)
    assert path is not None, f"DeepSpeed found nothing in {folder}"
    for state in engine.optimizer.optimizer.state.values() if separate else ():
        if "step" in state:
            state["step"] = copy.deepcopy(state["step"])
    return _step(engine, oracle, run.optimizer)


def _load_universal_weights(folder: str, oracle: Oracle, run: Run) -> None:
    engine = start_engine(oracle, run, checkpoint={"load_universal": True})
    path, _ = engine.load_checkpoint(folder, load_module_only=True)
    assert path is not None, f"DeepSpeed found nothing in {folder}"
    for name, parameter in named_trained(engine):
        assert torch.equal(safe_get_full_fp32_param(parameter), oracle.value(name, "master")), name


def _resume_and_step(folder: str, oracle: Oracle, run: Run) -> Resumed:
    engine = start_engine(oracle, run)
    path, _ = engine.load_checkpoint(folder)
    assert path is not None, f"DeepSpeed found nothing in {folder}"
    return _step(engine, oracle, run.optimizer)


def _step(engine: Any, oracle: Oracle, optimizer: str) -> Resumed:
    names = {id(p): n for n, p in engine.module.named_parameters()}
    groups = [
        ({names[id(p)] for p in members}, {k: v for k, v in group.items() if k != "params"})
        for members, group in zip(
            _group_members(engine), engine.optimizer.optimizer.param_groups, strict=True
        )
    ]
    backward(engine, oracle)
    for name, parameter in named_trained(engine):
        safe_set_full_grad(parameter, oracle.value(name, "grad"))
    engine.step()
    link_states(engine)
    states = {}
    for name, parameter in named_trained(engine):
        states[name, "master"] = safe_get_full_fp32_param(parameter).clone()
        for state in moments(optimizer, name):
            states[name, state] = safe_get_full_optimizer_state(parameter, state).clone()
    return Resumed(states, groups, engine.global_steps)


def _group_members(engine: Any) -> list[list[torch.nn.Parameter]]:
    optimizer = engine.optimizer
    if not hasattr(optimizer, "sub_group_to_group_id"):
        return [list(group) for group in optimizer.bit16_groups]
    members: list[list[torch.nn.Parameter]] = [[] for _ in optimizer.optimizer.param_groups]
    for number, sub_group in enumerate(optimizer.fp16_groups):
        members[optimizer.sub_group_to_group_id[number]] += sub_group
    return members
