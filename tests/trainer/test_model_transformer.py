"""megatron-core's configuration: what it must say so that our numbers come out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.utils import is_layer_window_attention

from parallel.layout import Layout
from trainer.model.config import ModelConfig, presets
from trainer.model.transformer import Execution, gpt_arguments, padded_vocab_size, transformer_config

INTERLEAVED = Layout(tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True)


def config(layout: Layout = Layout(), execution: Execution = Execution(), **fields: Any) -> Any:  # noqa: B008
    return transformer_config(ModelConfig(**({"preset": "tiny"} | fields)).resolve(257), layout, execution)


@pytest.mark.parametrize("name", presets())
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_megatron_accepts_every_preset(name: str, recompute: Any) -> None:
    config(INTERLEAVED, Execution("bf16", recompute=recompute), preset=name)


def test_dropout_is_off() -> None:
    assert (config().hidden_dropout, config().attention_dropout) == (0.0, 0.0)


def test_gradients_are_divided_by_tokens_once() -> None:
    assert config().calculate_per_token_loss


def test_interleaved_stages_do_not_batch_their_messages() -> None:
    """Batched, two messages between the same two ranks are swapped without an error."""
    ours = config(INTERLEAVED)
    assert (ours.overlap_p2p_comm, ours.batch_p2p_comm) == (True, False)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(precision: Any, dtype: torch.dtype) -> None:
    ours = config(Layout(pipeline=2), Execution(precision))
    assert (ours.params_dtype, ours.pipeline_dtype, ours.bf16) == (dtype, dtype, precision == "bf16")


def test_no_fusion_without_cuda() -> None:
    ours = config()
    fusions = (ours.bias_activation_fusion, ours.bias_dropout_fusion, ours.gradient_accumulation_fusion)
    assert not any(fusions)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu"])
def test_fusions_on_cuda_suit_every_activation(activation: Any) -> None:
    assert config(execution=Execution(cuda=True), activation=activation).bias_activation_fusion is (
        activation != "gelu"
    )


@pytest.mark.parametrize(
    ("activation", "gated", "function"),
    [("swiglu", True, F.silu), ("geglu", True, F.gelu), ("gelu", False, F.gelu)],
)
def test_activations(activation: Any, gated: bool, function: Any) -> None:
    ours = config(activation=activation)
    assert (ours.gated_linear_unit, ours.activation_func) == (gated, function)


def test_biases() -> None:
    assert (config(qkv_bias=True).add_qkv_bias, config(qkv_bias=True).add_bias_linear) == (True, False)
    assert config(linear_bias=True).add_bias_linear


def test_the_window_counts_the_query_itself_outside_megatron_only() -> None:
    ours = config(sliding_window=16, sliding_window_layers=[1, 3])
    assert ours.window_size == (15, 0)
    layers = [is_layer_window_attention(ours.window_size, ours.window_attn_skip_freq, n) for n in range(1, 5)]
    assert layers == [False, True, False, True]


def test_a_window_in_every_layer() -> None:
    ours = config(sliding_window=16)
    assert all(is_layer_window_attention(ours.window_size, ours.window_attn_skip_freq, n) for n in (1, 4))


@pytest.mark.parametrize(("coefficient", "kind"), [(0.0, "none"), (0.01, "seq_aux_loss")])
def test_load_balancing_is_off_unless_asked_for(coefficient: float, kind: str) -> None:
    ours = config(preset="tiny-moe", router_aux_loss_coefficient=coefficient)
    assert (ours.moe_router_load_balancing_type, ours.moe_aux_loss_coeff) == (kind, coefficient)


@pytest.mark.parametrize(
    ("fp8", "recipe"), [("delayed", "delayed"), ("current", "tensorwise"), ("mxfp8", "mxfp8")]
)
def test_fp8_recipes_go_by_megatrons_names(fp8: Any, recipe: str) -> None:
    ours = config(execution=Execution("bf16", fp8=fp8, cuda=True))
    assert (ours.fp8, ours.fp8_recipe) == ("hybrid", recipe)


def test_fp8_is_off_by_default() -> None:
    assert config().fp8 is None


@pytest.mark.parametrize(
    ("vocab_size", "tensor", "cuda", "padded"),
    [(257, 1, False, 257), (257, 4, False, 260), (257, 2, True, 512), (128256, 8, True, 129024)],
)
def test_padded_vocabulary(vocab_size: int, tensor: int, cuda: bool, padded: int) -> None:
    assert padded_vocab_size(vocab_size, tensor, cuda=cuda) == padded


def test_gpt_arguments_of_llama_3_2() -> None:
    model = ModelConfig(preset="llama-3.2-1b").resolve()
    arguments = gpt_arguments(model, Layout(), Execution(), sequence_length=4096)
    assert (arguments.vocab_size, arguments.max_sequence_length) == (128256, 4096)
    assert (arguments.rotary_base, arguments.rope_scaling, arguments.rope_scaling_factor) == (5e5, True, 32.0)
    assert arguments.share_embeddings_and_output_weights
