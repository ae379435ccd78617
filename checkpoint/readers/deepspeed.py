"""DeepSpeed's own checkpoints, of every ZeRO stage, with tensor and pipeline parallelism.

The folder of a run holds `latest` and a folder for every tag. `deepspeed_files` has the files' names; the
formats are those of DeepSpeed 0.5 to 0.19 (`deepspeed/runtime/engine.py`, `runtime/zero/`,
`runtime/bf16_optimizer.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.readers import deepspeed_zero3, deepspeed_zero12
from checkpoint.readers.deepspeed_files import Files, list_files, missing_files, tag_folder
from checkpoint.readers.deepspeed_flat import Collected
from checkpoint.readers.deepspeed_layout import Layout, find_layout, model_states
from checkpoint.readers.deepspeed_state import Numbers, plain_items, trainer_state
from checkpoint.readers.deepspeed_weights import module_parameters, parameter_shapes, read_layers, read_module
from checkpoint.readers.deepspeed_zero0 import read_optimizer
from checkpoint.readers.huggingface_config import facts_of, read_config
from checkpoint.source import Source


def recognise(path: Path) -> bool:
    """Whether this is a run's folder with `latest`, or the folder of one tag."""
    folder = tag_folder(path, "latest")
    if folder is None:
        return False
    files = list_files(folder)
    return files.any_model and not files.universal


def read(path: Path) -> Source:
    """What the headers of a checkpoint's files say.

    Damage (missing, truncated or mixed files) is in the source's `problems`.
    """
    folder = tag_folder(path, "latest")
    if folder is None:
        raise ValueError(f"{path}: is no folder")
    files = list_files(folder.absolute())
    source = Source("DeepSpeed", files.folder, problems=files.problems)
    layout = find_layout(files)
    files.problems += missing_files(files, layout.model_ranks, layout.data)
    numbers = Numbers(files.problems, source.left_out)
    ranks = {
        rank: Collected(layout.at(rank), files.problems)
        for rank in range(layout.model_ranks)
        if model_states(files, rank)
    }
    for rank, into in ranks.items():
        _read_rank(files, layout, rank, into=into, numbers=numbers)
    if files.layers and not files.problems:
        read_layers(files, layout, ranks)
    source.tensors = [tensor for into in ranks.values() for tensor in into.tensors()]
    source.scalars, source.groups = numbers.values, numbers.groups()
    source.degrees = layout.degrees
    _describe(source, files, layout)
    source.model_config = read_config(folder) or read_config(folder.parent)  # the Trainer of transformers
    source.facts = facts_of(source.model_config or {})
    return source


def _read_rank(files: Files, layout: Layout, rank: int, *, into: Collected, numbers: Numbers) -> None:
    """All that the files of one model-parallel rank hold."""
    model = model_states(files, rank)
    read_module(model, into, numbers.left_out)
    if layout.stage == 3:
        _read_frozen(files, layout, rank, into=into)
    elif model.get("optimizer"):
        parameters = {name: t.shape for name, t in module_parameters(model, []).items()}
        read_optimizer(model["optimizer"], parameters, into, numbers)
    shapes = [{n: tuple(s) for n, s in group.items()} for group in model.get("param_shapes") or []]
    states = {
        data: state
        for (owner, data), path in sorted(files.optimizers.items())
        if owner == rank and (state := files.open(path).get("optimizer_state_dict"))
    }
    try:
        if layout.stage == 3:
            place = layout.data[rank]
            deepspeed_zero3.read_ranks(states, shapes, place, into=into, numbers=numbers)
        else:
            deepspeed_zero12.read_ranks(states, shapes, into, numbers)
    except (KeyError, IndexError) as error:
        files.problems.append(
            f"{files.folder}: an optimizer file of model-parallel rank {rank} lacks {error}"
        )
    if states and not files.problems:
        reader = deepspeed_zero3 if layout.stage == 3 else deepspeed_zero12
        reader.read_groups(states[min(states)], shapes, numbers)


def _read_frozen(files: Files, layout: Layout, rank: int, *, into: Collected) -> None:
    for (owner, data), path in sorted(files.sharded_models.items()):
        model = files.open(path)
        fragments = model.get("frozen_param_fragments")
        if owner == rank and fragments:
            place = (data, layout.data[rank])
            deepspeed_zero3.take_frozen(fragments, parameter_shapes(model), place, into)


def _describe(source: Source, files: Files, layout: Layout) -> None:
    """The source's name, counters, and what is not carried."""
    model = model_states(files, min((*files.models, *(rank for rank, _ in files.sharded_models)), default=0))
    optimizer: Mapping[str, Any] = {}
    if files.optimizers:
        optimizer = files.open(next(iter(files.optimizers.values()))).get("optimizer_state_dict", {})
    source.format = _name(layout, model, pipeline_module=bool(files.layers))
    source.state = trainer_state(model, optimizer, source.left_out)
    source.step = int(model.get("global_steps") or 0)
    info = model.get("universal_checkpoint_info") or optimizer.get("universal_checkpoint_info")
    if info:
        source.universal_info = plain_items(info, "universal_checkpoint_info", source.left_out)
    if layout.stage == 3:
        source.notes.append(
            "ZeRO 3 saves no weights beside the masters: the weights are the masters, rounded"
        )
    if shared := model.get("shared_params"):
        source.notes += [f"{alias} is {kept}" for alias, kept in shared.items()]
    source.left_out[:] = dict.fromkeys(source.left_out)
    if files.experts:
        files.problems.append(
            f"{files.folder}: {files.experts[0]} and {len(files.experts) - 1} more files of DeepSpeed's own "
            "mixture of experts, which is not read"
        )
    if model.get("ds_autoep_layers") or model.get("autoep_layers"):
        files.problems.append(f"{files.folder}: saved with AutoEP (expert parallelism), which is not read")
    if (files.folder / "offloaded_tensors").is_dir():
        files.problems.append(
            f"{files.folder}/offloaded_tensors: optimizer states on NVMe are not read; save without that"
        )


def _name(layout: Layout, model: Mapping[str, Any], *, pipeline_module: bool) -> str:
    config = model.get("ds_config") or {}
    kinds = ("bf16", "fp16")
    precision = next(
        (k for k in kinds if isinstance(config.get(k), Mapping) and config[k].get("enabled")), "fp32"
    )
    words = [f"DeepSpeed ZeRO-{layout.stage}" if layout.stage else "DeepSpeed without ZeRO"]
    if pipeline_module:
        words[0] += " PipelineModule"
    degrees = {"data": layout.degrees["data"], "tensor": layout.tensor, "pipeline": layout.pipeline}
    words += [f"{count} {axis} ranks" for axis, count in degrees.items() if count > 1]
    return ", ".join([*words, precision])
