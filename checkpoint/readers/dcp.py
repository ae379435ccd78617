"""Checkpoints of torch.distributed.checkpoint: FSDP2 of any mesh, torchtitan, FSDP1 sharded.

DCP stores tensors in chunks, by the names of a state dict that its user made; `dcp_tree` finds the model and
the optimizer in it. Folders of accelerate hold two such checkpoints, one for each.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from checkpoint.readers.dcp_chunks import locate, read_begin, read_items, read_numbers
from checkpoint.readers.dcp_metadata import METADATA, SUFFIX, DcpMetadata, joined, read_dcp_metadata
from checkpoint.readers.dcp_optimizer import MASTERS, Group, name_numbers, read_groups
from checkpoint.readers.dcp_rest import read_rest, trainer_step
from checkpoint.readers.dcp_safetensors import PATTERN, read_shards
from checkpoint.readers.dcp_tree import StateName, Tree, optimizer_roots, plain_name, sort_names
from checkpoint.readers.huggingface_config import facts_of, read_config
from checkpoint.source import ParameterGroup, Source, SourceTensor

_PARTS = re.compile(r"(pytorch_model_fsdp|optimizer)(_\d+)?")
"""Folders of one checkpoint that accelerate writes."""


def recognise(path: Path) -> bool:
    """Whether this is a folder of DCP, one of accelerate that holds some, or of shards in safetensors."""
    return bool(_folders(path)) or (path.is_dir() and any(path.glob(PATTERN)))


def read(path: Path) -> Source:
    """What the headers of a checkpoint's files say.

    Damage of single files (missing, truncated) is in the source's `problems`.

    Raises:
        ValueError: the index is missing, so that the save was not finished, or damaged; parameters are flat.
    """
    folder = path.absolute()
    if not _folders(folder):
        return _read_shards(folder)
    parts = [read_dcp_metadata(part) for part in _folders(folder)]
    metadata = parts[0] if len(parts) == 1 and parts[0].folder == folder else joined(folder, parts)
    source = Source(_words(metadata), folder)
    _describe(source, folder)
    roots = optimizer_roots(metadata)
    groups = read_groups(metadata, roots, source.problems)
    listed = [name for group in groups for name in group.members if isinstance(name, str)]
    tree = sort_names(metadata, roots, listed)
    if tree.flat:
        raise ValueError(_flat(folder, tree.flat[0]))
    _name_numbered(metadata, tree, groups, source)
    _read_tensors(metadata, tree, source)
    spelled = {plain_name(name): name for name in tree.model}
    source.groups = [
        ParameterGroup(
            tuple(spelled.get(plain_name(str(name)), str(name)) for name in group.members), group.settings
        )
        for group in groups
    ]
    _find_tied(listed, source)
    read_rest(metadata, roots, tree, source)
    source.step = trainer_step(source)
    source.problems[:] = dict.fromkeys(source.problems)
    return source


def _folders(path: Path) -> list[Path]:
    """The folders of DCP that make the checkpoint at `path`."""
    if not path.is_dir():
        return []
    if _is_folder(path):
        return [path]
    inside = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and _PARTS.fullmatch(entry.name)]
    return [entry for entry in inside if _is_folder(entry)]


def _is_folder(path: Path) -> bool:
    return (path / METADATA).is_file() or any(path.glob(f"*{SUFFIX}"))


def _read_shards(folder: Path) -> Source:
    shards = len(list(folder.glob(PATTERN)))
    source = Source(f"PyTorch DCP, {shards} shards in safetensors", folder)
    _describe(source, folder)
    read_shards(folder, source)
    source.step = trainer_step(source)
    return source


def _words(metadata: DcpMetadata) -> str:
    ranks = {match[1] for file in metadata.files if (match := re.search(r"__(\d+)_\d+\.distcp$", file))}
    return f"PyTorch DCP, {len(ranks)} writing rank{'s' if len(ranks) != 1 else ''}"


def _describe(source: Source, folder: Path) -> None:
    """Take the model's sizes from a config.json that lies in the folder, or beside it."""
    for place in (folder, folder.parent):
        config = read_config(place)
        facts = facts_of(config) if config is not None else {}
        if facts:
            source.model_config, source.facts = config, facts
            source.notes.append(f"the model's sizes are those of {place / 'config.json'}")
            return


def _flat(folder: Path, name: str) -> str:
    return (
        f"{folder}: {name} is a flat parameter of FSDP1 (LOCAL_STATE_DICT), of which only the code that "
        "wrote it knows what lies where: load it there, on as many ranks, and save it with "
        "StateDictType.SHARDED_STATE_DICT"
    )


def _name_numbered(metadata: DcpMetadata, tree: Tree, groups: list[Group], source: Source) -> None:
    """Give names to the parameters of optimizers that were saved by number."""
    numbered = [group for group in groups if any(isinstance(name, int) for name in group.members)]
    if not numbered:
        return
    shapes: dict[int, tuple[int, ...]] = {}
    for state in tree.states:
        tensor = metadata.tensors.get(state.stored)
        if state.parameter.isdigit() and tensor is not None and tensor.shape:
            shapes[int(state.parameter)] = tensor.shape
    order = {stored: number for number, stored in enumerate(metadata.paths)}
    names_in_order = sorted(tree.model, key=lambda name: order.get(tree.model[name], 0))
    model = {name: metadata.tensors[tree.model[name]].shape for name in names_in_order}
    try:
        names = name_numbers(numbered, shapes, model)
    except ValueError as error:
        source.problems.append(f"{source.folder}: {error}")
        return
    source.notes.append(
        "the optimizer's state was saved by parameter number: numbers were taken to count in the model's "
        "order, which all shapes agree with"
    )
    tree.states = [
        state._replace(parameter=names[int(state.parameter)]) if state.parameter.isdigit() else state
        for state in tree.states
    ]
    for group in numbered:
        group.members = [names.get(int(number), str(number)) for number in group.members]


def _read_tensors(metadata: DcpMetadata, tree: Tree, source: Source) -> None:
    """Weights, copies and states; numbers that an optimizer keeps of each parameter become scalars."""
    wanted = [("weight", name, stored) for name, stored in tree.model.items()]
    wanted += [(word, name, at) for word, inside in tree.copies.items() for name, at in inside.items()]
    numbers: list[StateName] = []
    for state in tree.states:
        tensor = metadata.tensors.get(state.stored)
        if tensor is None or (math.prod(tensor.shape) == 1 and not _is_whole(metadata, tree, state)):
            numbers.append(state)
        else:
            word = "master" if state.word in MASTERS else state.word
            wanted.append((word, state.parameter, state.stored))
    pieces, problems = locate(metadata, [stored for _, _, stored in wanted])
    source.problems += problems
    source.tensors = [
        SourceTensor(name, word, metadata.tensors[stored].shape, pieces[stored])
        for word, name, stored in wanted
    ]
    _read_numbers(metadata, numbers, source)


def _find_tied(listed: list[str], source: Source) -> None:
    """Say that the output layer is tied where no optimizer has it, and it begins as the embedding does."""
    pieces = {tensor.name: tensor.pieces for tensor in source.tensors if tensor.state == "weight"}
    trained = {plain_name(name) for name in listed}
    heads = [name for name in pieces if plain_name(name) == "lm_head.weight"]
    embeddings = [name for name in pieces if plain_name(name) == "model.embed_tokens.weight"]
    if not (heads and embeddings) or "tie_word_embeddings" in source.facts:
        return
    if plain_name(heads[0]) in trained or plain_name(embeddings[0]) not in trained:
        return
    begin = [read_begin(pieces[name]) for name in (heads[0], embeddings[0])]
    if begin[0] and begin[0] == begin[1]:
        source.facts["tie_word_embeddings"] = 1
        source.notes.append(f"{heads[0]} is tied to {embeddings[0]}: no optimizer has it, and it is the same")


def _is_whole(metadata: DcpMetadata, tree: Tree, state: StateName) -> bool:
    """Whether a state of one element has as many as its parameter."""
    stored = tree.model.get(state.parameter)
    shape = metadata.tensors[state.stored].shape
    return stored is not None and bool(shape) and metadata.tensors[stored].shape == shape


def _read_numbers(metadata: DcpMetadata, numbers: list[StateName], source: Source) -> None:
    tensors, problems = read_numbers(metadata, [n.stored for n in numbers if n.stored in metadata.tensors])
    items, wrong = read_items(metadata, [n.stored for n in numbers if n.stored in metadata.items])
    source.problems += [*problems, *wrong]
    values: dict[str, Any] = {**tensors, **items}
    for number in numbers:
        value = values.get(number.stored)
        if isinstance(value, int | float):
            source.scalars.setdefault(number.word, {})[number.parameter] = value
        elif value is not None:
            source.left_out.append(f"{number.stored}: a {type(value).__name__} kept of a parameter")
