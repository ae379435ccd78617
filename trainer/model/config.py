"""The `[model]` section: a preset, a Hugging Face config.json, or fields; fields win over both."""

from __future__ import annotations

import difflib
import functools
import tomllib
from importlib import resources
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from parallel.settings import Settings
from trainer.model.architecture import (
    Activation,
    Architecture,
    AuxLossType,
    Normalization,
    RopeScaling,
    architecture_problems,
)
from trainer.model.huggingface import read_huggingface_config

REQUIRED = ("num_layers", "hidden_size", "num_attention_heads")


class ModelConfig(Settings):
    """`[model]`: where the architecture comes from. A field that is not given stays as its source has it.

    `Architecture` documents the fields. `preset` and `hf` exclude each other; with neither, num_layers,
    hidden_size and num_attention_heads are required. `vocab_size` comes from the tokenizer where neither
    the fields nor the source say it.
    """

    preset: str | None = None
    hf: str | None = None
    num_layers: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    ffn_hidden_size: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None
    num_query_groups: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    vocab_size: PositiveInt | None = None
    max_position_embeddings: PositiveInt | None = None
    normalization: Normalization | None = None
    norm_epsilon: PositiveFloat | None = None
    activation: Activation | None = None
    qkv_bias: bool | None = None
    linear_bias: bool | None = None
    qk_norm: bool | None = None
    tie_word_embeddings: bool | None = None
    rope_theta: PositiveFloat | None = None
    rope_scaling: RopeScaling | None = None
    rope_scaling_factor: PositiveFloat | None = None
    sliding_window: NonNegativeInt | None = None
    sliding_window_layers: tuple[int, ...] | None = None
    hidden_dropout: NonNegativeFloat | None = None
    attention_dropout: NonNegativeFloat | None = None
    num_experts: NonNegativeInt | None = None
    experts_per_token: NonNegativeInt | None = None
    moe_ffn_hidden_size: NonNegativeInt | None = None
    norm_topk_prob: bool | None = None
    router_aux_loss_coefficient: NonNegativeFloat | None = None
    router_aux_loss_type: AuxLossType | None = None
    init_std: PositiveFloat | None = None

    def resolve(self, tokenizer_size: int | None = None) -> Architecture:
        """Fill in everything: source, then fields, then what follows from them.

        `tokenizer_size` is the number of tokens that the data can contain.

        Raises:
            ValueError: naming every problem at once.
        """
        fields = self._source() | self._fields()
        if fields.get("vocab_size") is None and tokenizer_size is not None:
            fields["vocab_size"] = tokenizer_size
        missing = [key for key in (*REQUIRED, "vocab_size") if fields.get(key) is None]
        if missing:
            raise ValueError(
                "\n".join(f"model.{key} is missing: set it, or model.preset, or model.hf" for key in missing)
            )
        try:
            model = Architecture(**complete(fields))
        except ValidationError as error:
            raise ValueError(_sentences(error)) from None
        problems = architecture_problems(model)
        if tokenizer_size is not None and tokenizer_size > model.vocab_size:
            problems.append(
                f"model.vocab_size is {model.vocab_size} and the tokenizer has {tokenizer_size} tokens: "
                f"set model.vocab_size to at least {tokenizer_size}"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return model

    def _fields(self) -> dict[str, Any]:
        return self.model_dump(exclude={"preset", "hf"}, exclude_none=True)

    def _source(self) -> dict[str, Any]:
        if self.preset is not None and self.hf is not None:
            raise ValueError(
                f"model.preset is {self.preset!r} and model.hf is {self.hf!r}: keep one of the two"
            )
        if self.preset is not None:
            return preset(self.preset)
        return read_huggingface_config(self.hf) if self.hf is not None else {}


@functools.cache
def presets() -> dict[str, dict[str, Any]]:
    """Name -> fields of every preset, from presets.toml."""
    return tomllib.loads((resources.files(__package__) / "presets.toml").read_text(encoding="utf-8"))


def preset(name: str) -> dict[str, Any]:
    """The fields of one preset. Raises ValueError with the nearest names."""
    if name not in presets():
        near = difflib.get_close_matches(name, presets(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"model.preset is {name!r}: {hint}the presets are {', '.join(presets())}")
    return dict(presets()[name])


def complete(fields: dict[str, Any]) -> dict[str, Any]:
    """Fill what is not given from what is. Pure, and silent about contradictions.

    The inner width of a gated MLP is 8/3 hidden_size rounded up to a multiple of 64, so that its three
    matrices are as large as the two of an ungated one of 4 hidden_size (arXiv 2002.05202, section 3.1).
    """
    given = {key: value for key, value in fields.items() if value is not None}
    hidden, heads = given["hidden_size"], given["num_attention_heads"]
    gated = given.get("activation", "swiglu") in ("swiglu", "geglu")
    ffn = given.get("ffn_hidden_size", -(-8 * hidden // 192) * 64 if gated else 4 * hidden)
    experts = given.get("num_experts", 0)
    window = given.get("sliding_window", 0)
    defaults = dict(
        ffn_hidden_size=ffn,
        num_query_groups=heads,
        head_dim=max(1, hidden // heads),
        max_position_embeddings=4096,
        normalization="RMSNorm",
        norm_epsilon=1e-5,
        activation="swiglu",
        qkv_bias=False,
        linear_bias=False,
        qk_norm=False,
        tie_word_embeddings=False,
        rope_theta=10000.0,
        rope_scaling="none",
        rope_scaling_factor=1.0,
        sliding_window=window,
        sliding_window_layers=tuple(range(given["num_layers"])) if window else (),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_experts=experts,
        experts_per_token=min(2, experts),
        moe_ffn_hidden_size=ffn if experts else 0,
        norm_topk_prob=experts > 1,
        router_aux_loss_coefficient=0.0,
        router_aux_loss_type="seq_aux_loss",
        init_std=0.02,
    )
    return defaults | given


def _sentences(error: ValidationError) -> str:
    """One line per wrong field of a source (a hand-written config.json can hold anything)."""
    return "\n".join(
        f"model.{'.'.join(str(part) for part in item['loc'])} is {item['input']!r}: {item['msg']}"
        for item in error.errors()
    )
