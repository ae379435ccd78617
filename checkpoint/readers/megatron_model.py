"""The parameters in a rank's file of the format `torch`, by megatron-core's names.

Models from before megatron-core nest their dictionaries and call things otherwise; they hold the same
matrices, so that they are given the present names. Before checkpoint version 2 the rows of query, key and
value lay in another order (Megatron-LM, `fix_query_key_value_ordering`), which pieces undo.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from checkpoint.archive.file_tensor import FileTensor
from checkpoint.boxes import Box
from checkpoint.manifest import ITEM_SIZES, Piece

_OLD_LAYER = {
    "input_norm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "post_attention_norm": "pre_mlp_layernorm",
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "attention.query_key_value": "self_attention.linear_qkv",
    "attention.dense": "self_attention.linear_proj",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
}
_OLD_MODEL = {
    "language_model.embedding.word_embeddings": "embedding.word_embeddings",
    "language_model.embedding.position_embeddings": "embedding.position_embeddings",
    "language_model.output_layer": "output_layer",
    "word_embeddings_for_head": "output_layer",
}
_OLD_STACK = re.compile(r"language_model\.(?:encoder|transformer)\.(.*)")
_IN_LAYER = re.compile(r"(layers\.\d+\.)(.*)\.(weight|bias)")
_NAMED_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXTRA = "_extra_state"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter, or a buffer of a module, as a rank's file holds it.

    Attributes:
        name: megatron-core's; layers count from the first of the chunk.
        virtual: number of the model chunk.
    """

    name: str
    tensor: FileTensor
    virtual: int

    @property
    def of_expert(self) -> bool:
        return ".experts." in self.name

    @property
    def is_vector(self) -> bool:
        """Whether Megatron-LM spares it weight decay."""
        return len(self.tensor.shape) == 1 or self.name.endswith(".bias")


class Held(NamedTuple):
    """What the model of a rank's file holds.

    Attributes:
        parameters: in the order in which the model registered them.
        extra_states: how many modules have a state of their own (FP8 scaling).
        others: names of what is no tensor.
        chunks: how many; one without layers may have no parameters.
    """

    parameters: list[Parameter]
    extra_states: int
    others: list[str]
    chunks: int


def read_model(content: Mapping[str, Any]) -> Held:
    """The parameters of all chunks: "model", or "model0", "model1", ..., one a virtual stage."""
    chunks = {0: content["model"]} if "model" in content else {}
    chunks |= {int(key[5:]): content[key] for key in content if re.fullmatch(r"model\d+", key)}
    held = Held([], 0, [], len(chunks))
    extra_states = 0
    for virtual, chunk in sorted(chunks.items()):
        for name, value in _flattened(chunk, ""):
            if isinstance(value, FileTensor) and not name.endswith(_EXTRA):
                held.parameters.append(Parameter(present_name(name), value, virtual))
            elif name.endswith(_EXTRA):
                extra_states += value is not None
            elif value is not None:
                held.others.append(name)
    return held._replace(extra_states=extra_states)


def _flattened(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flattened(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def present_name(name: str) -> str:
    """megatron-core's name of a parameter that was called otherwise before; any other name as it is."""
    if match := _OLD_STACK.fullmatch(name):
        below = match[1].replace("final_norm.", "final_layernorm.")
        if layer := _IN_LAYER.fullmatch(below):
            below = f"{layer[1]}{_OLD_LAYER.get(layer[2], layer[2])}.{layer[3]}"
        return f"decoder.{below}"
    module, _, kind = name.rpartition(".")
    return f"{_OLD_MODEL[module]}.{kind}" if module in _OLD_MODEL else name


def count_layers(parameters: list[Parameter]) -> dict[int, int]:
    """Virtual stage -> how many layers of the decoder its chunk holds."""
    found: dict[int, int] = {}
    for parameter in parameters:
        match = _NAMED_LAYER.match(parameter.name)
        layers = int(match[1]) + 1 if match else 0
        found[parameter.virtual] = max(found.get(parameter.virtual, 0), layers)
    return found


def is_qkv(name: str) -> bool:
    """Whether the rows of a parameter are those of queries, keys and values."""
    return name.endswith((".linear_qkv.weight", ".linear_qkv.bias"))


def reordered_qkv(piece: Piece, version: float, head_dim: int) -> list[Piece]:
    """A whole fused query, key and value of an old checkpoint, as pieces of its present order.

    The rows were [3, heads, head_dim] in version 0, [heads, head_dim, 3] in version 1, and are [heads, 3,
    head_dim] since; these models know no shared key heads.
    """
    rows, *rest = piece.box.size
    heads, width = rows // (3 * head_dim), piece.box.numel // rows
    pieces = []
    for head in range(heads):
        for part in range(3):
            first, step = (
                ((part * heads + head) * head_dim, 1) if version < 1 else (head * head_dim * 3 + part, 3)
            )
            box = Box(((head * 3 + part) * head_dim, *(0 for _ in rest)), (head_dim, *rest))
            strides = None if step == 1 else (step * width, *(1 for _ in rest))
            start = piece.start + first * width * ITEM_SIZES[piece.dtype]
            pieces.append(Piece(piece.file, start, piece.dtype, box, strides=strides))
    return pieces
