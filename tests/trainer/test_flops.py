"""FLOPs against torch's own counter on Hugging Face models, against published formulas, and the peaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from trainer.flops import causal_pairs, describe_flops, matrix_parameters, packed_pairs, training_flops
from trainer.model.architecture import Architecture
from trainer.model.config import ModelConfig
from trainer.model.parameters import count_parameters
from trainer.peak import listed_peak, measured_peak

LENGTH = 48
TINY = dict(
    num_layers=3, hidden_size=32, ffn_hidden_size=80, num_attention_heads=4, num_query_groups=2, vocab_size=72
)


def architecture(**fields: Any) -> Architecture:
    return ModelConfig(**(TINY | fields)).resolve()


def counted_by_torch(model: Any) -> int:
    tokens = torch.randint(0, 72, (2, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss.backward()
    return counter.get_total_flops()


def hugging_face(family: str, **fields: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(
        num_hidden_layers=3,
        hidden_size=32,
        intermediate_size=80,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=72,
        attn_implementation="eager",
        **fields,
    )
    return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.mark.parametrize(
    ("family", "theirs", "ours"),
    [
        ("Llama", {}, {}),
        ("Llama", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 16}, {"head_dim": 16, "qk_norm": True}),
        (
            "Mixtral",
            {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
            {"num_experts": 4, "moe_ffn_hidden_size": 80},
        ),
    ],
    ids=["untied", "tied", "wide heads", "experts"],
)
def test_full_count_equals_torchs_counter(family: str, theirs: Any, ours: Any) -> None:
    """Eager attention computes all s^2 scores, so not one FLOP may differ."""
    assert training_flops(architecture(**ours), LENGTH, 2).full == counted_by_torch(
        hugging_face(family, **theirs)
    )


def test_pairs_of_one_document_by_brute_force() -> None:
    seen = torch.ones(LENGTH, LENGTH).tril()
    assert causal_pairs(LENGTH) == seen.sum()
    assert causal_pairs(LENGTH, 7) == seen.triu(-6).sum()
    assert causal_pairs(5, 7) == 15


@pytest.mark.parametrize("window", [0, 4])
def test_packed_pairs_add_up_over_documents(window: int) -> None:
    lengths = [1, 5, 9]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    assert packed_pairs(positions, window) == sum(causal_pairs(n, window) for n in lengths)


def test_one_document_per_sequence_makes_packed_equal_causal() -> None:
    flops = training_flops(architecture(), LENGTH, 2, positions=torch.arange(LENGTH).repeat(2, 1))
    assert flops.packed == flops.causal


def test_counts_are_ordered() -> None:
    positions = torch.cat([torch.arange(20), torch.arange(28)])[None]
    flops = training_flops(architecture(), LENGTH, 1, positions=positions)
    assert flops.packed < flops.causal < flops.full


def test_a_window_counts_only_in_its_layers() -> None:
    full, some, every = (
        training_flops(architecture(**fields), LENGTH, 1)
        for fields in ({}, {"sliding_window": 8, "sliding_window_layers": (1,)}, {"sliding_window": 8})
    )
    assert full.causal - some.causal == (full.causal - every.causal) / 3
    assert full.causal - every.causal == 12 * 32 * 3 * (causal_pairs(LENGTH) - causal_pairs(LENGTH, 8))


def test_only_the_experts_of_a_token_count() -> None:
    sparse = architecture(num_experts=8, experts_per_token=2, moe_ffn_hidden_size=80)
    dense = architecture(ffn_hidden_size=160)
    router = 3 * 8 * 32
    assert matrix_parameters(sparse) == matrix_parameters(dense) + router


def test_megatrons_formula_for_a_gpt() -> None:
    """72 B s l h^2 (1 + s/6h + V/12lh): arXiv 2104.04473, equation 3, without the recomputation's 1/4."""
    model = ModelConfig(
        num_layers=4, hidden_size=64, num_attention_heads=4, vocab_size=512, activation="gelu"
    ).resolve()
    length, batch, l, h, v = 128, 3, 4, 64, 512  # noqa: E741
    published = 72 * batch * length * l * h**2 * (1 + length / (6 * h) + v / (12 * l * h))
    assert training_flops(model, length, batch).full == pytest.approx(published, rel=1e-12)


def test_matrix_parameters_of_llama_3_8b() -> None:
    """All but the input embedding and the norms."""
    model = ModelConfig(preset="llama-3-8b").resolve()
    norms = (2 * 32 + 1) * 4096
    assert matrix_parameters(model) == count_parameters(model).total - 128256 * 4096 - norms


def test_description_is_two_lines_with_the_formula() -> None:
    lines = describe_flops(architecture(sliding_window=8), LENGTH).split("\n")
    assert len(lines) == 2
    assert "2204.02311" in lines[0]
    assert "at most 8 keys" in lines[1]


@pytest.mark.parametrize(
    ("name", "arithmetic", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp8", 1978.9),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA GB200", "fp8", 5000.0),
    ],
)
def test_listed_peaks(name: str, arithmetic: str, teraflops: float) -> None:
    peak = listed_peak(name, arithmetic)
    assert peak is not None
    assert peak.flops_per_second == teraflops * 1e12


@pytest.mark.parametrize(("name", "arithmetic"), [("NVIDIA A100-SXM4-80GB", "fp8"), ("Apple M9", "bf16")])
def test_unknown_peaks_are_not_invented(name: str, arithmetic: str) -> None:
    assert listed_peak(name, arithmetic) is None


def test_a_measured_peak_says_so_and_is_what_a_matmul_reaches() -> None:
    peak = measured_peak("cpu", "fp32", torch.get_num_threads())
    assert peak.source.startswith("measured")
    assert peak.flops_per_second > 1e8  # slower than this, it measured something else than a matrix product
    assert measured_peak("cpu", "fp32", torch.get_num_threads()) is peak
