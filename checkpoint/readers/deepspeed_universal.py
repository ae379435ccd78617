"""DeepSpeed's universal folders: a file for every state of every parameter, whole.

    latest_universal                       names the folder of a tag, in which
    zero/{parameter}/{state}.pt            {"param": tensor, ...}, or a flat tensor alone (from ZeRO 3)
    zero/{parameter}/step.pt               a number
    zero/optimizer_state.pt                settings of the parameter groups, in ZeRO 1 and 2's way or in ZeRO
    3's *_model_states.pt                      counters, shapes, and weights in the layout of the run that was
    converted

Format: `ds_to_universal.py` and `universal_checkpoint.py` of deepspeed/checkpoint. States are those of the
optimizer by its own words, but for "fp32", the master.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint.archive.file_tensor import FileTensor
from checkpoint.readers import deepspeed
from checkpoint.readers.deepspeed_files import Files, list_files, tag_folder
from checkpoint.readers.deepspeed_flat import Collected
from checkpoint.readers.deepspeed_layout import model_states
from checkpoint.readers.deepspeed_state import Numbers, trainer_state
from checkpoint.readers.deepspeed_weights import module_parameters, parameter_shapes
from checkpoint.readers.deepspeed_zero12 import put_number
from checkpoint.readers.huggingface_config import facts_of, read_config
from checkpoint.source import Source

GROUPS = "parameter_groups"
"""Where Ratoon's own universal folders say which parameters have which settings; DeepSpeed passes over it."""
STATES = {"fp32": "master"}


def recognise(path: Path) -> bool:
    """Whether this is a folder of a tag with `zero`, or a run's folder whose only checkpoint is universal."""
    folder = tag_folder(path, "latest_universal")
    if folder is None or (folder != path and deepspeed.recognise(path)):
        return False  # a run that goes on from its own checkpoints has converted one of them before
    return list_files(folder).universal and (folder / "zero" / "optimizer_state.pt").is_file()


def read(path: Path) -> Source:
    """What the headers of a universal folder's files say. Damage is in the source's `problems`."""
    folder = tag_folder(path, "latest_universal")
    if folder is None:
        raise ValueError(f"{path}: is no folder")
    files = list_files(folder.absolute())
    source = Source("DeepSpeed universal", files.folder, problems=files.problems)
    ranks = sorted({*files.models, *(rank for rank, _ in files.sharded_models)})
    models = [model_states(files, rank) for rank in ranks]
    numbers = Numbers(files.problems, source.left_out)
    into = Collected({}, files.problems)
    _read_parameters(files, models, into, numbers)
    _read_weights(models, into, source)
    optimizer = files.open(files.folder / "zero" / "optimizer_state.pt")
    _read_groups(optimizer, models, numbers)
    source.tensors = into.tensors()
    source.scalars, source.groups = numbers.values, numbers.groups()
    first = models[0] if models else {}
    source.state = trainer_state(first, optimizer, source.left_out)
    source.step = int(first.get("global_steps") or 0)
    source.left_out[:] = dict.fromkeys(source.left_out)
    source.model_config = read_config(files.folder) or read_config(files.folder.parent)
    source.facts = facts_of(source.model_config or {})
    return source


def _read_parameters(
    files: Files, models: Sequence[Mapping[str, Any]], into: Collected, numbers: Numbers
) -> None:
    shapes = {name: shape for model in models for name, shape in parameter_shapes(model).items()}
    aliases = {alias for model in models for alias in model.get("shared_params") or {}}
    for folder in sorted(path for path in (files.folder / "zero").iterdir() if path.is_dir()):
        found = sorted(folder.glob("*.pt"))
        if folder.name in aliases:
            continue  # the weight once more, by another name
        if not (folder / "fp32.pt").is_file():
            files.problems.append(f"{folder}/fp32.pt is missing: every parameter has one")
        for path in found:
            value = files.load(path)
            if isinstance(value, Mapping):
                value = value.get("param")
            if path.stem == "step" or not isinstance(value, FileTensor):
                if value is not None:
                    put_number(numbers, path.stem, [folder.name], value)
                continue
            state = STATES.get(path.stem, path.stem)
            shape = shapes.get(folder.name) if len(value.shape) == 1 else value.shape
            if shape is None:
                files.problems.append(
                    f"{path}: a flat tensor, and no file of model states has the shape of {folder.name}"
                )
                continue
            into.add_flat(folder.name, state, shape, run=value.reshape((value.numel,)))


def _read_weights(models: Sequence[Mapping[str, Any]], into: Collected, source: Source) -> None:
    """The model states are those of the run that was converted: of one model-parallel rank they are whole."""
    if len(models) == 1:
        for name, tensor in module_parameters(models[0], source.left_out).items():
            into.add_whole(name, "weight", tensor)
    elif any(model.get("module") for model in models):
        source.notes.append(
            f"the weights of {len(models)} model-parallel ranks are not read: they are the masters, rounded"
        )


def _read_groups(optimizer: Mapping[str, Any], models: Sequence[Mapping[str, Any]], numbers: Numbers) -> None:
    if GROUPS in optimizer:
        numbers.put_groups((group["names"], group["settings"]) for group in optimizer[GROUPS])
        return
    inner = optimizer.get("optimizer_state_dict", {})
    groups = optimizer.get("param_groups") or inner.get("param_groups") or []
    for model in models:
        shapes = model.get("param_shapes") or []
        if "param_groups" in optimizer:
            members = [list(group) for group in shapes]
        else:
            members = [[n for k in group["params"] if k < len(shapes) for n in shapes[k]] for group in groups]
        numbers.put_groups(zip(members, groups, strict=False))
