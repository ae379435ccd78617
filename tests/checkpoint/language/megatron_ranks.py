"""What the ranks of a Megatron model hold, cut with numpy alone: the language must undo it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.checkpoint.language.rebuild import Array, Stored, store


@dataclass(frozen=True)
class Layout:
    """A model and how it is spread.

    Attributes:
        stages: number of layers of every (pipeline rank, virtual stage), in the order of the model.
        norms: "fused" into the linear layers, as Transformer Engine has them, or "apart".
        experts: 0 is a dense model; `grouped` keeps a parameter an expert in one module.
    """

    tensor: int = 1
    stages: tuple[tuple[int, int, int], ...] = ((0, 0, 1),)  # (pipeline, virtual, layers)
    heads: int = 4
    groups: int = 2
    head_dim: int = 2
    hidden: int = 6
    ffn: int = 8
    vocab: int = 11
    padded_vocab: int = 16
    tied: bool = False
    bias: bool = False
    qk_norm: bool = False
    gated: bool = True
    norms: str = "apart"
    experts: int = 0
    expert_ranks: int = 1
    grouped: bool = False

    @property
    def num_layers(self) -> int:
        return sum(layers for _, _, layers in self.stages)

    def facts(self) -> dict[str, int]:
        return {
            "num_attention_heads": self.heads,
            "num_query_groups": self.groups,
            "head_dim": self.head_dim,
            "hidden_size": self.hidden,
            "vocab_size": self.vocab,
            "num_experts": self.experts,
            "gated": int(self.gated),
            "tie_word_embeddings": int(self.tied),
        }

    def degrees(self) -> dict[str, int]:
        pipeline = 1 + max(p for p, _, _ in self.stages)
        virtual = 1 + max(v for _, v, _ in self.stages)
        return {
            "tensor": self.tensor,
            "pipeline": pipeline,
            "virtual": virtual,
            "expert": self.expert_ranks,
            "expert_tensor": self.tensor,
        }

    def layers(self) -> dict[tuple[int, int], tuple[int, ...]]:
        found, first = {}, 0
        for pipeline, virtual, count in self.stages:
            found[pipeline, virtual] = tuple(range(first, first + count))
            first += count
        return found


def logical(layout: Layout) -> dict[str, Array]:
    """Numbered elements, so that no two are alike."""
    table = (layout.vocab, layout.hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    for i in range(layout.num_layers):
        at = f"model.layers.{i}"
        shapes[f"{at}.input_layernorm.weight"] = (layout.hidden,)
        shapes |= {f"{at}.{name}": shape for name, shape in _attention_shapes(layout).items()}
        shapes[f"{at}.post_attention_layernorm.weight"] = (layout.hidden,)
        shapes |= {f"{at}.mlp.{name}": shape for name, shape in _mlp_shapes(layout).items()}
    shapes["model.norm.weight"] = (layout.hidden,)
    if not layout.tied:
        shapes["lm_head.weight"] = table
    return numbered(shapes)


def numbered(shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """Arrays of these shapes in which every element is another number."""
    found, first = {}, 1
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        found[name] = np.arange(first, first + size, dtype=float).reshape(shape)
        first += size
    return found


def _attention_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    q, kv = layout.heads * layout.head_dim, layout.groups * layout.head_dim
    shapes: dict[str, tuple[int, ...]] = {"self_attn.o_proj.weight": (layout.hidden, q)}
    for part, rows in (("q", q), ("k", kv), ("v", kv)):
        shapes[f"self_attn.{part}_proj.weight"] = (rows, layout.hidden)
        if layout.bias:
            shapes[f"self_attn.{part}_proj.bias"] = (rows,)
    if layout.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (layout.head_dim,)
    if layout.bias:
        shapes["self_attn.o_proj.bias"] = (layout.hidden,)
    return shapes


def _mlp_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    ups = ("gate_proj", "up_proj") if layout.gated else ("up_proj",)
    shapes = {f"{up}.weight": (layout.ffn, layout.hidden) for up in ups}
    shapes["down_proj.weight"] = (layout.hidden, layout.ffn)
    if not layout.experts:
        return shapes
    each = {f"experts.{e}.{name}": shape for e in range(layout.experts) for name, shape in shapes.items()}
    return {"gate.weight": (layout.experts, layout.hidden), **each}


def fused_qkv(layout: Layout, values: dict[str, Array], prefix: str, kind: str) -> Array:
    """Query groups one after the other: their query heads, their key head, their value head."""
    q, k, v = (values[f"{prefix}.{part}_proj.{kind}"] for part in "qkv")
    per, d = layout.heads // layout.groups * layout.head_dim, layout.head_dim
    rows = []
    for group in range(layout.groups):
        rows += [
            q[group * per : (group + 1) * per],
            k[group * d : (group + 1) * d],
            v[group * d : (group + 1) * d],
        ]
    return np.concatenate(rows)


def ranks(layout: Layout, values: dict[str, Array]) -> Stored:
    """Everything that all ranks hold under megatron-core's local names."""
    stored: Stored = []
    last = len(layout.stages) - 1
    for number, (pipeline, virtual, count) in enumerate(layout.stages):
        for tensor in range(layout.tensor):
            for expert in range(layout.expert_ranks):
                at = {"tensor": tensor, "pipeline": pipeline, "virtual": virtual}
                at |= {"expert": expert, "expert_tensor": tensor}
                held = _stage(layout, values, number, count, tensor, expert)
                if number == 0:
                    held["embedding.word_embeddings.weight"] = _vocabulary(
                        layout, values["model.embed_tokens.weight"], tensor
                    )
                if number == last:
                    held["decoder.final_layernorm.weight"] = values["model.norm.weight"]
                    name = "model.embed_tokens.weight" if layout.tied else "lm_head.weight"
                    if not layout.tied or last > 0:
                        held["output_layer.weight"] = _vocabulary(layout, values[name], tensor)
                stored += [store(name, array, at) for name, array in held.items()]
    return stored


def _vocabulary(layout: Layout, table: Array, tensor: int) -> Array:
    padding = np.full((layout.padded_vocab - layout.vocab, layout.hidden), -1.0)
    return np.split(np.concatenate([table, padding]), layout.tensor)[tensor]


def _stage(
    layout: Layout, values: dict[str, Array], number: int, count: int, tensor: int, expert: int
) -> dict[str, Array]:
    first = sum(layers for _, _, layers in layout.stages[:number])
    held: dict[str, Array] = {}
    for local in range(count):
        source, here = f"model.layers.{first + local}", f"decoder.layers.{local}"
        fused = layout.norms == "fused"
        held[
            f"{here}.self_attention.linear_qkv.layer_norm_weight"
            if fused
            else f"{here}.input_layernorm.weight"
        ] = values[f"{source}.input_layernorm.weight"]
        held[f"{here}.mlp.linear_fc1.layer_norm_weight" if fused else f"{here}.pre_mlp_layernorm.weight"] = (
            values[f"{source}.post_attention_layernorm.weight"]
        )
        for kind in ("weight", "bias") if layout.bias else ("weight",):
            qkv = fused_qkv(layout, values, f"{source}.self_attn", kind)
            held[f"{here}.self_attention.linear_qkv.{kind}"] = np.split(qkv, layout.tensor)[tensor]
        projection = values[f"{source}.self_attn.o_proj.weight"]
        held[f"{here}.self_attention.linear_proj.weight"] = np.split(projection, layout.tensor, axis=1)[
            tensor
        ]
        if layout.bias:
            held[f"{here}.self_attention.linear_proj.bias"] = values[f"{source}.self_attn.o_proj.bias"]
        if layout.qk_norm:
            for part in "qk":
                held[f"{here}.self_attention.{part}_layernorm.weight"] = values[
                    f"{source}.self_attn.{part}_norm.weight"
                ]
        held |= _mlps(layout, values, f"{source}.mlp", f"{here}.mlp", (tensor, expert))
    return held


def _mlps(
    layout: Layout, values: dict[str, Array], source: str, here: str, rank: tuple[int, int]
) -> dict[str, Array]:
    tensor, expert = rank
    if not layout.experts:
        fc1, fc2 = _mlp(layout, values, source, tensor)
        return {f"{here}.linear_fc1.weight": fc1, f"{here}.linear_fc2.weight": fc2}
    held = {f"{here}.router.weight": values[f"{source}.gate.weight"]}
    each = layout.experts // layout.expert_ranks
    for local in range(each):
        fc1, fc2 = _mlp(layout, values, f"{source}.experts.{expert * each + local}", tensor)
        if layout.grouped:
            (
                held[f"{here}.experts.linear_fc1.weight{local}"],
                held[f"{here}.experts.linear_fc2.weight{local}"],
            ) = fc1, fc2
        else:
            held[f"{here}.experts.local_experts.{local}.linear_fc1.weight"] = fc1
            held[f"{here}.experts.local_experts.{local}.linear_fc2.weight"] = fc2
    return held


def _mlp(layout: Layout, values: dict[str, Array], source: str, tensor: int) -> tuple[Array, Array]:
    ups = [values[f"{source}.{part}_proj.weight"] for part in (("gate", "up") if layout.gated else ("up",))]
    fc1 = np.concatenate([np.split(up, layout.tensor)[tensor] for up in ups])
    return fc1, np.split(values[f"{source}.down_proj.weight"], layout.tensor, axis=1)[tensor]
