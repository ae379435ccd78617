"""A genuine ZeRO-2 checkpoint of a Llama of the wanted size, trained for one step by DeepSpeed itself.

    env DS_ACCELERATOR=cpu python -m tools.bench_convert.zero2 FOLDER BYTES RANKS

A program of its own: DeepSpeed asks for its accelerator while it is imported.
"""

from __future__ import annotations

import math
import sys

import deepspeed
import torch
import transformers

from launch.ranks import run_ranks

# gloo alone: DeepSpeed's own shared-memory collectives would be compiled first
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

TAG = "global_step1"
BYTES_PER_PARAMETER = 14  # bf16 weight, fp32 master and two moments
VOCABULARY, HEAD = 16384, 64
QUERIES = 2  # query heads a key head


def shape(parameters: int) -> dict[str, int]:
    """Arguments of LlamaConfig for about so many parameters: up to 12 layers, as wide as it takes."""
    layers = max(2, min(12, parameters // 5_000_000))
    # a layer has 3 h^2 (attention) and 8 h^2 (MLP), the two embeddings 2 V h
    hidden = (-VOCABULARY + math.sqrt(VOCABULARY**2 + 11 * layers * parameters)) / (11 * layers)
    hidden = max(1, round(hidden / (QUERIES * HEAD))) * QUERIES * HEAD
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 64 * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD // QUERIES,
        "head_dim": HEAD,
        "max_position_embeddings": 256,
    }


def _train(folder: str, sizes: dict[str, int]) -> None:
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[
        0
    ]
    tokens = torch.arange(8).reshape(1, 8)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    engine.save_checkpoint(folder, tag=TAG)


if __name__ == "__main__":
    run_ranks(_train, int(sys.argv[3]), sys.argv[1], shape(int(sys.argv[2]) // BYTES_PER_PARAMETER))
