"""Genuine checkpoints of the oracle by torch's FSDP and torch.distributed.checkpoint, on CPU ranks over gloo.

torch itself shards the model, is given the oracle's numbers, and saves; and torch itself loads folders again,
into FSDP2 of any layout, and makes one more update.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from tests.foreign.dcp_model import Names, build_model
from tests.foreign.oracle import BETAS, EPS, LR, STEP, WEIGHT_DECAY, Oracle
from tests.ranks import run_ranks

Axis = Literal["replicate", "shard", "tensor"]


@dataclass(frozen=True)
class Run:
    """How FSDP trains the oracle, and what its user saves.

    Attributes:
        mesh: extent of every axis of the device mesh; their product is the world.
        axes: what each is for.
        layout: of the saved state dict. "flat": {"model", "optim"} with the optimizer's state by parameter
            names; "nested": {"model", "optimizer"} with the optimizer's list of groups; "app": both inside of
            a Stateful "app"; "titan": torchtitan's, whose parameters are at the top level; "weights":
            {"model"} alone; "ranks": the same, where ranks save without talking to each other; "shards":
            parameters alone in safetensors; "numbered": the optimizer's own state dict, with numbers
            instead of names.
        wrapper: "fsdp2", "fsdp1", or "fsdp1-local", whose parameters are flat.
        optimizer: "adamw" or "sgd" (with momentum).
        titan_names: whether parameters have torchtitan's names and rotary order, else transformers' ones.
    """

    mesh: tuple[int, ...] = (2,)
    axes: tuple[Axis, ...] = ("shard",)
    layout: Literal["flat", "nested", "app", "titan", "weights", "ranks", "shards", "numbered"] = "flat"
    wrapper: Literal["fsdp2", "fsdp1", "fsdp1-local"] = "fsdp2"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    titan_names: bool = False

    @property
    def world(self) -> int:
        return int(torch.tensor(self.mesh).prod())


HYBRID: tuple[Axis, ...] = ("replicate", "shard")
TENSOR: tuple[Axis, ...] = ("shard", "tensor")


def save(folder: Path, oracle: Oracle, run: Run) -> Path:
    """Write a checkpoint of the oracle into `folder`, and return `folder`."""
    run_ranks(_save, run.world, str(folder), oracle, run)
    return folder


@dataclass
class Resumed:
    """What FSDP holds after it resumed and made one more update; names and tensors are logical.

    Attributes:
        states: (name, "master" | "exp_avg" | "exp_avg_sq") -> the whole tensor.
        settings: of every parameter's group, as resumed.
        steps: of every parameter, as resumed.
    """

    states: dict[tuple[str, str], torch.Tensor]
    settings: dict[str, dict[str, Any]]
    steps: dict[str, float]


def load_and_step(folder: Path, oracle: Oracle, run: Run) -> Resumed:
    """Load a folder with torch's own loader into a fresh FSDP model, and step with the oracle's gradients."""
    resumed: Resumed = run_ranks(_load_and_step, run.world, str(folder), oracle, run)[0]
    return resumed


def sharded_model(oracle: Oracle, run: Run) -> nn.Module:
    """The model, wrapped for the present process group."""
    model = build_model(oracle, run.titan_names)
    if run.wrapper != "fsdp2":
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), use_orig_params=run.wrapper == "fsdp1"
        )
    mesh = init_device_mesh("cpu", run.mesh, mesh_dim_names=run.axes)
    if "tensor" in run.axes:
        _split(model, mesh["tensor"])
    data = [axis for axis in run.axes if axis != "tensor"]
    over = mesh[tuple(data)] if len(data) > 1 else mesh[data[0]]
    for layer in _layers(model):
        fully_shard(layer, mesh=over)
    fully_shard(model, mesh=over)
    return model


def build_optimizer(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """Two groups: matrices with weight decay, vectors without."""
    parameters = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in parameters if "norm" not in name], "weight_decay": WEIGHT_DECAY},
        {"params": [p for name, p in parameters if "norm" in name], "weight_decay": 0.0},
    ]
    if run.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=LR, momentum=0.9)
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, foreach=False)


def plant(model: nn.Module, optimizer: torch.optim.Optimizer, names: Names, run: Run) -> None:
    """Give model and optimizer the oracle's numbers; fails where torch does not give them back."""
    _touch(optimizer)
    if run.wrapper != "fsdp2":
        _plant_fsdp1(model, optimizer, names)
        return
    for name, parameter in model.named_parameters():
        _fill(parameter, names.value(name, "master"))
        state = optimizer.state[parameter]
        for word, held in state.items():
            if word == "step":
                state[word] = torch.tensor(float(STEP))
            else:
                _fill(held, names.value(name, _moment(word)))


def _moment(word: str) -> str:
    return "exp_avg" if word == "momentum_buffer" else word


def _fill(held: torch.Tensor, whole: torch.Tensor) -> None:
    assert isinstance(held, DTensor)
    shard = distributed(whole, held)
    with torch.no_grad():
        held.copy_(shard)
    assert torch.equal(held.full_tensor(), whole)


def distributed(whole: torch.Tensor, like: DTensor) -> DTensor:
    """This rank's part of a tensor that all ranks have; without sending, which fails for uneven strides."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _plant_fsdp1(model: nn.Module, optimizer: torch.optim.Optimizer, names: Names) -> None:
    weights = {name: names.value(name, "master") for name in names.logical()}
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        model.load_state_dict(weights)
        full = FullyShardedDataParallel.optim_state_dict(model, optimizer)
        for name in names.logical():
            full["state"][name] = {
                "step": torch.tensor(float(STEP)),
                **{word: names.value(name, word) for word in ("exp_avg", "exp_avg_sq")},
            }
        optimizer.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, full))


def _touch(optimizer: torch.optim.Optimizer) -> None:
    """One step by zero, so that there are states."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = LR


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    return (module for name, module in model.named_modules() if re.fullmatch(r"(model\.)?layers\.\d+", name))


def _split(model: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism as DTensors: every matrix by rows or by columns, the vocabulary unevenly."""
    columns = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "wq", "wk", "wv", "w1", "w3"}
    rows = {"o_proj", "down_proj", "embed_tokens", "wo", "w2", "tok_embeddings"}
    plan: dict[str, ParallelStyle] = {}
    for name, _ in model.named_modules():
        last = name.rpartition(".")[2]
        if last in columns | {"output"}:
            plan[name] = ColwiseParallel()
        elif last in rows:
            plan[name] = RowwiseParallel()
    parallelize_module(model, mesh, plan)


def _state_dict(model: nn.Module, optimizer: torch.optim.Optimizer, run: Run) -> dict[str, Any]:
    """What a user gives to `dcp.save`, without what is not of model and optimizer."""
    options = StateDictOptions(flatten_optimizer_state_dict=run.layout in ("flat", "titan"))
    weights = get_model_state_dict(model, options=options)
    if run.layout in ("weights", "ranks", "shards"):
        return {"model": weights}
    if run.layout == "numbered":
        return {"model": weights, "optim": optimizer.state_dict()}
    states = get_optimizer_state_dict(model, optimizer, options=options)
    if run.layout == "titan":
        return {**weights, "optimizer": states}
    if run.layout == "nested":
        return {"model": weights, "optimizer": states}
    return {"model": weights, "optim": states}


class _App(Stateful):
    """The application state of torch's own tutorial."""

    def __init__(self, states: dict[str, Any]) -> None:
        self._states = states

    def state_dict(self) -> dict[str, Any]:
        return self._states

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._states = state_dict


def _others(optimizer: torch.optim.Optimizer, run: Run) -> dict[str, Any]:
    """What else people save."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    others: dict[str, Any] = {"lr_scheduler": scheduler.state_dict()}
    if run.layout == "titan":
        others["dataloader"] = {"world_size": run.world, f"dp_rank_{dist.get_rank()}": b"a pickled position"}
        others["train_state"] = {
            "step": torch.tensor(STEP, dtype=torch.int32),
            "ntokens_seen": torch.tensor(1 << 20),
        }
    else:
        others["step"] = STEP
        others["rng"] = torch.get_rng_state()
    return others


def _save(folder: str, oracle: Oracle, run: Run) -> None:
    model = sharded_model(oracle, run)
    optimizer = build_optimizer(model, run)
    if run.wrapper == "fsdp1-local":
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.LOCAL_STATE_DICT):
            save_dcp({"model": model.state_dict()}, checkpoint_id=folder)
        return
    plant(model, optimizer, Names(oracle, run.titan_names), run)
    states = _state_dict(model, optimizer, run)
    if run.layout == "shards":
        save_dcp(states["model"], storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True))
        return
    if run.layout == "app":
        states = {"app": _App(states)}
    together = run.layout != "ranks"
    save_dcp({**states, **_others(optimizer, run)}, checkpoint_id=folder, use_collectives=together)


def _load_and_step(folder: str, oracle: Oracle, run: Run) -> Resumed:
    model = sharded_model(oracle, run)
    optimizer = build_optimizer(model, run)
    states = _state_dict(model, optimizer, run)
    load_dcp({"app": _App(states)} if run.layout == "app" else states, checkpoint_id=folder)
    options = StateDictOptions(flatten_optimizer_state_dict=run.layout in ("flat", "titan"))
    optim = states.pop("optimizer" if run.layout in ("titan", "nested") else "optim")
    set_model_state_dict(model, states.get("model", states), options=options)
    set_optimizer_state_dict(model, optimizer, optim, options=options)
    return _step(model, optimizer, Names(oracle, run.titan_names))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, names: Names) -> Resumed:
    logical = names.logical()
    resumed = Resumed({}, {}, {})
    parameters = {name: p for name, p in model.named_parameters() if name in logical}
    by_parameter = {id(p): name for name, p in parameters.items()}
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        resumed.settings |= {logical[by_parameter[id(p)]]: settings for p in group["params"]}
    for name, parameter in parameters.items():
        resumed.steps[logical[name]] = float(optimizer.state[parameter]["step"])
        assert isinstance(parameter, DTensor)
        parameter.grad = distributed(names.value(name, "grad"), parameter)
    optimizer.step()
    for name, parameter in parameters.items():
        held = {"master": parameter.data, **optimizer.state[parameter]}
        for state in ("master", "exp_avg", "exp_avg_sq"):
            whole = names.from_stored(logical[name], held[state].full_tensor())
            resumed.states[logical[name], state] = whole
    return resumed
