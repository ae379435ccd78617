"""Hugging Face folders: weights in safetensors or torch.save files, one or many, and a config.json beside.

Also the sharded safetensors that torch.distributed.checkpoint writes, whose `DCP_SHARDING_INFO` says where
each shard lies in its tensor.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.archive.file_tensor import FileTensor
from checkpoint.archive.safetensors_file import read_safetensors_header
from checkpoint.archive.torch_file import open_torch_file
from checkpoint.boxes import Box
from checkpoint.manifest import Piece
from checkpoint.readers.huggingface_config import facts_of, quantisation, read_config
from checkpoint.source import Source, SourceTensor

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SHARDING = "DCP_SHARDING_INFO"
WEIGHTS = re.compile(r".+\.safetensors|pytorch_model.*\.bin")
FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
TABLES = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias|position_ids)")
MASKS = re.compile(r".*\.(attn|attention)\.bias")
"""Old versions of transformers saved tables with the parameters; the masks among them have four axes."""
SCALES = re.compile(r".*\.(weight_scale|weight_scale_inv|input_scale|qweight|qzeros|absmax|SCB)")
"""Names that only quantised weights come with."""
DEQUANTISE = "load the model with transformers, dequantise it and save it"
HEADS = {"model.embed_tokens.weight": "lm_head.weight", "gpt_neox.embed_in.weight": "embed_out.weight"}
"""Input embedding -> output embedding."""
BESIDE = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state*.pth", "scaler.pt", "adapter_model.*")


@dataclass
class _Gathered:
    """What the files hold.

    Attributes:
        pieces: of every parameter.
        shapes: of every parameter.
        holders: files of every tensor, parameter or not.
        quantised: names of tensors that are no parameters as they were trained, by dtype.
    """

    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    holders: dict[str, list[str]] = field(default_factory=dict)
    quantised: dict[str, list[str]] = field(default_factory=dict)


def recognise(path: Path) -> bool:
    """Whether it is a file of weights, an index of some, or a folder of those."""
    if path.is_dir():
        return any(_is_weights(entry.name) for entry in path.iterdir())
    return _is_weights(path.name)


def read(path: Path) -> Source:
    """The tensors of a folder, or of one file or one index of it.

    Raises:
        ValueError: there are no weights, or an index or config.json is damaged. What is wrong with files of
            weights is in `Source.problems`.
    """
    path = path.absolute()
    folder = path if path.is_dir() else path.parent
    config = read_config(folder)
    source = Source("Hugging Face", folder, model_config=config, facts=facts_of(config or {}))
    index, files = _files(path, source)
    gathered = _Gathered()
    readable = [file.name for file in files if _gather(file, gathered, source)]
    source.tensors = [
        SourceTensor(name, "weight", gathered.shapes[name], tuple(pieces))
        for name, pieces in sorted(gathered.pieces.items())
    ]
    _check_index(index, gathered, readable, source)
    _check_quantised(gathered, source)
    if path == folder or path.name in INDICES:
        _check_head(gathered, source)
    _describe(files, source)
    return source


def _is_weights(name: str) -> bool:
    return bool(WEIGHTS.fullmatch(name)) or name in INDICES


def _files(path: Path, source: Source) -> tuple[Mapping[str, str], list[Path]]:
    """Tensor -> file of an index, if there is one, and the files to read."""
    folder = source.folder
    if path.is_file() and path.name not in INDICES:
        return {}, [path]
    for name in [path.name] if path.is_file() else INDICES:
        single = name.removesuffix(".index.json")
        if (folder / name).is_file():
            return _indexed(folder, name, source)
        if (folder / single).is_file():
            _note_others(folder, {single}, source)
            return {}, [folder / single]
    files = sorted(entry for entry in folder.iterdir() if WEIGHTS.fullmatch(entry.name))
    if not files:
        raise ValueError(f"{path}: no *.safetensors or pytorch_model*.bin is there")
    return {}, files


def _indexed(folder: Path, name: str, source: Source) -> tuple[Mapping[str, str], list[Path]]:
    """The same, of an index; files that it names and that are missing become problems."""
    index = _read_index(folder / name)
    wanted = sorted(set(index.values()))
    _note_others(folder, {*wanted, name}, source)
    missing = [file for file in wanted if not (folder / file).is_file()]
    held = {file: sum(value == file for value in index.values()) for file in missing}
    source.problems += [
        f"{folder / file}: is missing; {name} puts {held[file]} tensors there" for file in missing
    ]
    return index, [folder / file for file in wanted if file not in missing]


def _read_index(file: Path) -> dict[str, str]:
    try:
        index = dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
        outside = [name for name in index.values() if Path(name).name != name]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: is no index of weights ({type(error).__name__}: {error})") from None
    if outside:
        raise ValueError(f"{file}: names {outside[0]!r}, which is no file of its folder")
    return index


def _note_others(folder: Path, known: set[str], source: Source) -> None:
    others = sorted(e.name for e in folder.iterdir() if WEIGHTS.fullmatch(e.name) and e.name not in known)
    if others:
        source.notes.append(f"not read, since nothing refers to them: {', '.join(others)}")


def _gather(file: Path, gathered: _Gathered, source: Source) -> bool:
    """Add a file's tensors; whether it could be read: what is wrong with it becomes a problem."""
    try:
        if file.suffix == ".safetensors":
            tensors, metadata = read_safetensors_header(file)
            offsets = _offsets(file, metadata, source)
        else:
            tensors, offsets = _state_dict(file, source), {}
    except ValueError as error:
        source.problems.append(str(error))
        return False
    for name, tensor in tensors.items():
        gathered.holders.setdefault(name, []).append(file.name)
        box = Box(offsets.get(name, (0,) * len(tensor.shape)), tensor.shape)
        _add(name, tensor, box, gathered=gathered, source=source)
    return True


def _offsets(file: Path, metadata: Mapping[str, str], source: Source) -> dict[str, tuple[int, ...]]:
    """First index of each shard in its tensor."""
    if SHARDING not in metadata:
        return {}
    note = f"shards of {SHARDING} do not say how many they are: that the last one is there is not checked"
    if note not in source.notes:
        source.notes.append(note)
    try:
        return {name: tuple(at["saved_offsets"]) for name, at in json.loads(metadata[SHARDING]).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: its {SHARDING} is damaged ({type(error).__name__}: {error})") from None


def _state_dict(file: Path, source: Source) -> dict[str, FileTensor]:
    """Tensors by name, of what torch.save wrote."""
    value: Any = open_torch_file(file).value
    for key in ("state_dict", "model", "module"):
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds {type(value).__name__}, a dict of tensors is expected")
    tensors = {
        name: each for name, each in value.items() if isinstance(each, FileTensor) and isinstance(name, str)
    }
    others = [reprlib.repr(name) for name in value if name not in tensors]
    source.left_out += [f"{file.name}: {name} is no tensor" for name in others]
    return tensors


def _add(name: str, tensor: FileTensor, box: Box, *, gathered: _Gathered, source: Source) -> None:
    """Add a tensor as a piece of a parameter; what is none is listed."""
    if TABLES.fullmatch(name) or (MASKS.fullmatch(name) and len(tensor.shape) == 4):
        source.left_out.append(f"{name}: a table that the model computes itself")
        return
    if tensor.dtype not in FLOATS or SCALES.fullmatch(name):
        gathered.quantised.setdefault(tensor.dtype, []).append(name)
        return
    try:
        piece = tensor.piece(box)
    except ValueError as error:
        source.problems.append(f"{name}: {error}")
        return
    gathered.pieces.setdefault(name, []).append(piece)
    ends = tuple(offset + size for offset, size in zip(box.offset, box.size, strict=True))
    gathered.shapes[name] = tuple(map(max, gathered.shapes.get(name, ends), ends))


def _check_index(index: Mapping[str, str], gathered: _Gathered, readable: list[str], source: Source) -> None:
    """What the index and the files say differently."""
    for name, file in index.items():
        found = gathered.holders.get(name, [])
        if file in readable and file not in found:
            source.problems.append(f"{name}: the index puts it in {file}, where it is not")
        elif len(found) > 1:
            source.problems.append(f"{name}: is in {' and '.join(found)}; the index puts it in {file}")
    unlisted = sorted(set(gathered.pieces) - set(index)) if index else []
    if unlisted:
        source.notes.append(f"read, though the index does not list them: {', '.join(unlisted)}")


def _check_quantised(gathered: _Gathered, source: Source) -> None:
    method = quantisation(source.model_config or {})
    if method is not None:
        source.problems.append(f"config.json says that the weights are quantised ({method}): {DEQUANTISE}")
    source.problems += [
        f"{len(names)} tensors of dtype {dtype} are parts of quantised parameters, the first is {names[0]}: "
        f"{DEQUANTISE}"
        for dtype, names in gathered.quantised.items()
    ]


def _check_head(gathered: _Gathered, source: Source) -> None:
    """Whether the output embedding is where it should be; a model without its own is tied."""
    if source.problems:  # it may be in a file that could not be read
        return
    for embedding, head in HEADS.items():
        if embedding in gathered.holders and head not in gathered.holders:
            if source.facts.setdefault("tie_word_embeddings", 1) == 0:
                source.problems.append(
                    f"{head}: is in no file, but config.json has tie_word_embeddings = false"
                )


def _describe(files: list[Path], source: Source) -> None:
    """The format in words, and what lies beside."""
    config = source.model_config
    kind = "torch.save" if any(file.suffix == ".bin" for file in files) else "safetensors"
    family = f", {config['model_type']}" if config and "model_type" in config else ""
    source.format = f"Hugging Face {kind}, {len(files)} file{'s' * (len(files) != 1)}{family}"
    for pattern in BESIDE:
        source.left_out += [f"{file.name}: not read" for file in sorted(source.folder.glob(pattern))]
    if config is None:
        source.notes.append("no config.json lies beside: give what the model's spec needs as facts")
