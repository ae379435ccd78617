"""From megatron-core's parameters to logical tensors: which rows of a local parameter are which box.

megatron-core fuses (q, k and v into one matrix interleaved by query group; gate and up into one), splits
over tensor and expert ranks, counts layers from the first of a stage and pads the vocabulary. A `Block` takes
all of that back: every megatron-core parameter is a stack of runs of whole rows, and each run is a box of one
logical tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from parallel.mesh import Mesh

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """A run of memory inside a local parameter that is a box of a logical tensor.

    Attributes:
        name: of the logical tensor.
        shape: of the whole logical tensor.
        offset: first index of the box.
        size: extent of the box.
        start: first element of the run in the flattened local parameter.
    """

    name: str
    shape: Shape
    offset: Shape
    size: Shape
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """The run as a view of the local parameter, with the box's shape."""
        return parameter.view(-1)[self.start : self.start + self.numel].view(self.size)


@dataclass(frozen=True)
class NamedParameter:
    """A megatron-core parameter of this rank with its blocks.

    Attributes:
        kind: how it is spread: "tensor", "replicated" or "expert", see `Mesh.holders`.
        tied: the embedding that first and last pipeline stage both keep.
    """

    local_name: str
    parameter: torch.nn.Parameter
    blocks: tuple[Block, ...]
    kind: str
    tied: bool = False


@dataclass
class _Local:
    """What a naming rule sees: one local parameter and where it stands."""

    config: TransformerConfig
    mesh: Mesh
    vocab_size: int
    parameter: torch.nn.Parameter
    layer: int = 0
    expert: int | None = None
    suffix: str = "weight"
    blocks: list[Block] = field(default_factory=list)
    row: int = 0

    def add(
        self, name: str, rows: int, first: int, all_rows: int, columns: tuple[int, int] | None = None
    ) -> None:
        """Append a run of `rows` rows that are rows [first, first + rows) of `all_rows` of a logical tensor.

        Args:
            columns: (first column, all columns) where the tensor ranks split the columns.
        """
        rest = tuple(self.parameter.shape[1:])
        start = self.row * math.prod(rest)
        shape, offset = (all_rows, *rest), (first, *(0 for _ in rest))
        if columns is not None:
            offset, shape = (first, columns[0]), (all_rows, columns[1])
        self.blocks.append(Block(name, shape, offset, (rows, *rest), start))
        self.row += rows

    def in_layer(self, name: str) -> str:
        return f"model.layers.{self.layer}.{name}.{self.suffix}"


def _whole(name: str, *, in_layer: bool = True) -> Callable[[_Local], None]:
    def rule(local: _Local) -> None:
        rows = local.parameter.shape[0]
        logical = local.in_layer(name) if in_layer else f"{name}.{local.suffix}"
        local.add(logical, rows, 0, rows)

    return rule


def _vocabulary(name: str) -> Callable[[_Local], None]:
    def rule(local: _Local) -> None:
        rows = local.parameter.shape[0]
        first = local.mesh.tensor_rank * rows
        present = max(0, min(rows, local.vocab_size - first))
        if present:  # rows past the vocabulary are padding, and belong to nothing
            local.add(f"{name}.{local.suffix}", present, first, local.vocab_size)

    return rule


def _qkv(local: _Local) -> None:
    """Query groups one after the other, in each its query heads, its key head, its value head."""
    c, tensor = local.config, local.mesh.layout.tensor
    groups, head = c.num_query_groups // tensor, c.kv_channels
    queries = c.num_attention_heads // c.num_query_groups * head
    for group in range(local.mesh.tensor_rank * groups, (local.mesh.tensor_rank + 1) * groups):
        local.add(local.in_layer("self_attn.q_proj"), queries, group * queries, c.num_attention_heads * head)
        for part in ("k", "v"):
            local.add(local.in_layer(f"self_attn.{part}_proj"), head, group * head, c.num_query_groups * head)


def _columns(name: str) -> Callable[[_Local], None]:
    """Row-parallel in megatron's words: the tensor ranks split the input, the columns. A bias is whole."""

    def rule(local: _Local) -> None:
        rows = local.parameter.shape[0]
        if local.parameter.dim() == 1:
            return local.add(_mlp_or_layer(local, name), rows, 0, rows)
        width, ranks = local.parameter.shape[1], local.mesh.layout.tensor
        local.add(_mlp_or_layer(local, name), rows, 0, rows, (local.mesh.tensor_rank * width, width * ranks))
        return None

    return rule


def _gate_up(local: _Local) -> None:
    """The gate's rows, then the up projection's, each split over the tensor ranks; without a gate only up."""
    gated = local.config.gated_linear_unit
    parts = ("gate_proj", "up_proj") if gated else ("up_proj",)
    rows = local.parameter.shape[0] // len(parts)
    for part in parts:
        name = _mlp_or_layer(local, f"mlp.{part}")
        local.add(name, rows, local.mesh.tensor_rank * rows, rows * local.mesh.layout.tensor)


def _mlp_or_layer(local: _Local, name: str) -> str:
    if local.expert is not None:
        name = name.replace("mlp.", f"mlp.experts.{local.expert}.")
    return local.in_layer(name)


Rule = tuple[str, str, Callable[[_Local], None]]

_EXPERT = r"mlp\.experts\.(?:local_experts\.(?P<expert>\d+)\.)?"

# (megatron-core's name below the layer, how it is spread, rule). The first match counts.
_LAYER_RULES: tuple[Rule, ...] = (
    (r"(input_layernorm\.|self_attention\.linear_qkv\.layer_norm_)", "replicated", _whole("input_layernorm")),
    (r"self_attention\.linear_qkv\.", "tensor", _qkv),
    (r"self_attention\.linear_proj\.", "tensor", _columns("self_attn.o_proj")),
    (r"self_attention\.q_layernorm\.", "replicated", _whole("self_attn.q_norm")),
    (r"self_attention\.k_layernorm\.", "replicated", _whole("self_attn.k_norm")),
    (
        r"(pre_mlp_layernorm\.|mlp\.linear_fc1\.layer_norm_)",
        "replicated",
        _whole("post_attention_layernorm"),
    ),
    (r"mlp\.router\.", "replicated", _whole("mlp.gate")),
    (_EXPERT + r"linear_fc1\.", "expert", _gate_up),
    (_EXPERT + r"linear_fc2\.", "expert", _columns("mlp.down_proj")),
    (r"mlp\.linear_fc1\.", "tensor", _gate_up),
    (r"mlp\.linear_fc2\.", "tensor", _columns("mlp.down_proj")),
)
_MODEL_RULES: tuple[Rule, ...] = (
    (r"embedding\.word_embeddings\.", "tensor", _vocabulary("model.embed_tokens")),
    (r"decoder\.final_layernorm\.", "replicated", _whole("model.norm", in_layer=False)),
    (r"output_layer\.", "tensor", _vocabulary("lm_head")),
)
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_SUFFIX = re.compile(r"(weight|bias)(\d*)$")


def name_parameters(chunks: list[Any], mesh: Mesh, *, vocab_size: int, tied: bool) -> list[NamedParameter]:
    """Every parameter of this rank's GPTModel chunks with the boxes of logical tensors that it holds.

    Args:
        chunks: bare GPTModel modules, in the order of virtual stages.
        vocab_size: of the tokenizer, without padding.
        tied: output and input embedding are one tensor.

    Raises:
        RuntimeError: naming every parameter that no rule matches: a model this naming does not know.
    """
    named, unknown = [], []
    for chunk in chunks:
        for local_name, parameter in chunk.named_parameters():
            match = _LAYER.fullmatch(local_name)
            layer = chunk.decoder.layers[int(match[1])].layer_number - 1 if match else 0
            found = _name(local_name, parameter, layer, mesh, chunk.config, vocab_size)
            if found is None:
                unknown.append(local_name)
                continue
            if tied and local_name.startswith(("output_layer.", "embedding.word_embeddings.")):
                found = _tie(found)
            named.append(found)
    if unknown:
        raise RuntimeError(f"parameters without a logical name: {', '.join(unknown)}")
    return named


def _name(
    local_name: str, parameter: Any, layer: int, mesh: Mesh, config: TransformerConfig, vocab_size: int
) -> NamedParameter | None:
    match = _LAYER.fullmatch(local_name)
    below = match[2] if match else local_name
    suffix = _SUFFIX.search(below)
    if suffix is None:
        return None
    for pattern, kind, rule in _LAYER_RULES if match else _MODEL_RULES:
        found = re.match(pattern, below)
        if found is None:
            continue
        local = _Local(config, mesh, vocab_size, parameter, layer, suffix=suffix[1])
        if kind == "expert":
            first = mesh.expert_rank * (config.num_moe_experts // mesh.layout.expert)
            local.expert = first + int(found["expert"] or suffix[2])
        rule(local)
        if (
            kind == "tensor"
            and suffix[1] == "bias"
            and below.endswith(("linear_proj.bias", "linear_fc2.bias"))
        ):
            kind = "replicated"  # added once, after the sum over the tensor ranks
        return NamedParameter(local_name, parameter, tuple(local.blocks), kind)
    return None


def _tie(named: NamedParameter) -> NamedParameter:
    """Both copies of a tied embedding go by the input's name."""
    blocks = tuple(
        Block("model.embed_tokens.weight", b.shape, b.offset, b.size, b.start) for b in named.blocks
    )
    return NamedParameter(named.local_name, named.parameter, blocks, named.kind, tied=True)
