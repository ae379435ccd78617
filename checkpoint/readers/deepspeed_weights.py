"""The model's weights: a dict in the model states, or a file for every layer of a PipelineModule.

A PipelineModule calls its parameters `{layer}.{name in the layer}` by the layer's global index, and those of
a `TiedLayerSpec` `tied_modules.{key}.{name in the layer}`. A layer's file has the names in the layer only, so
that what is tied follows from the names in the optimizer's files of the stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from checkpoint.archive.file_tensor import FileTensor
from checkpoint.readers.deepspeed_files import Files
from checkpoint.readers.deepspeed_flat import Collected
from checkpoint.readers.deepspeed_layout import Layout, model_states

Shape = tuple[int, ...]


def parameter_shapes(model: Mapping[str, Any]) -> dict[str, Shape]:
    """Name -> shape of what the model states list: parameters of the optimizer, and frozen ones."""
    found: dict[str, Shape] = {}
    for group in [*(model.get("param_shapes") or []), model.get("frozen_param_shapes") or {}]:
        found |= {name: tuple(shape) for name, shape in group.items()}
    return found


def module_parameters(model: Mapping[str, Any], left_out: list[str]) -> dict[str, FileTensor]:
    """The model's parameters: no buffers, no second names of a tensor, no placeholders of ZeRO 3."""
    module = model.get("module")
    if not isinstance(module, Mapping):
        return {}
    buffers, shared = set(model.get("buffer_names") or []), set(model.get("shared_params") or {})
    listed = parameter_shapes(model)
    places: dict[tuple[str, int, Shape], str] = {}
    found: dict[str, FileTensor] = {}
    for name, value in module.items():
        if name in buffers or not isinstance(value, FileTensor):
            left_out.append(f"{name}: a buffer of the model, not a parameter")
        elif name not in shared and value.numel:
            place = (value.file, value.start, value.shape)
            other = places.setdefault(place, name)
            if other == name:
                found[name] = value
            elif name in listed and other not in listed:  # tied: the optimizer's name is the one that counts
                found[name] = found.pop(other)
                places[place] = name
    return found


def read_module(model: Mapping[str, Any], into: Collected, left_out: list[str]) -> None:
    """Take the weights that a file of model states holds."""
    for name, tensor in module_parameters(model, left_out).items():
        into.add_whole(name, "weight", tensor)


def read_layers(files: Files, layout: Layout, ranks: Mapping[int, Collected]) -> None:
    """Take the weights of a PipelineModule.

    Args:
        ranks: where to, by model-parallel rank.
    """
    stages = [
        parameter_shapes(model_states(files, stage * layout.tensor)) for stage in range(layout.pipeline)
    ]
    stage = 0
    for (layer, tensor_rank), path in sorted(files.layers.items()):
        content = {key: value for key, value in files.open(path).items() if isinstance(value, FileTensor)}
        names, stage = _names(layer, content, stages, stage)
        into = ranks[stage * layout.tensor + tensor_rank]
        for key, name in names.items():
            if not into.has(name, "weight"):  # a tied layer may occur twice on a stage
                into.add_whole(name, "weight", content[key])


def _names(
    layer: int, keys: Iterable[str], stages: list[dict[str, Shape]], stage: int
) -> tuple[dict[str, str], int]:
    """Source names of a layer's parameters, and the stage that has the layer, `stage` or a later one."""
    own = {key: f"{layer}.{key}" for key in keys}
    for number in range(stage, len(stages)):
        if any(name in stages[number] for name in own.values()):
            return own, number
    for number in range(stage, len(stages)):
        tied = _tied_names(own, stages[number])
        if tied is not None:
            return tied, number
    return own, stage


def _tied_names(keys: Iterable[str], names: Iterable[str]) -> dict[str, str] | None:
    """The names of one tied module of a stage that has just these keys."""
    modules: dict[str, set[str]] = {}
    for name in names:
        if name.startswith("tied_modules."):
            _, module, key = name.split(".", 2)
            modules.setdefault(module, set()).add(key)
    for module, held in modules.items():
        if held == set(keys):
            return {key: f"tied_modules.{module}.{key}" for key in held}
    return None
