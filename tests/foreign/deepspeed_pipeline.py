"""Genuine checkpoints of a PipelineModule: a Llama in layers with the oracle's numbers, tied or not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch.nn.functional import cross_entropy, linear
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

import tests.foreign.deepspeed as made  # its import decides where DeepSpeed runs
from tests.foreign.deepspeed_optimizers import build_optimizer
from tests.foreign.oracle import Oracle
from tests.ranks import run_ranks

SPEC = r"""
name = "pipeline-llama"
about = "layers of tests/foreign/deepspeed_pipeline.py"

[[rule]]
match = "tied_modules.embedding.weight"
to = "model.embed_tokens.weight"
replicated = "pipeline"
optional = true

[[rule]]
match = "0.weight"
to = "model.embed_tokens.weight"
optional = true

[[rule]]
match = '{layer+1}.{kind:self_attn\.._proj|mlp\.\w+_proj|\w+_layernorm}.weight'
to = "model.layers.{layer}.{kind}.weight"

[[rule]]
match = "5.weight"
to = "model.norm.weight"

[[rule]]
match = "6.weight"
to = "lm_head.weight"
optional = true
"""
"""How a spec says what DeepSpeed calls the parameters of this model of four layers."""


class Block(LlamaDecoderLayer):
    """transformers' layer, which makes the positions it needs by itself."""

    def __init__(self, config: transformers.LlamaConfig, index: int) -> None:
        super().__init__(config, index)
        self.rotary = [LlamaRotaryEmbedding(config)]  # in a list: no submodule

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        positions = torch.arange(hidden.shape[1])[None]
        return super().forward(hidden, position_embeddings=self.rotary[0](hidden, positions))


def layers(oracle: Oracle) -> list[Any]:
    """The model as a PipelineModule takes it."""
    config = transformers.LlamaConfig(**oracle.huggingface_config(), attn_implementation="eager")
    sizes = (oracle.vocab, oracle.hidden)
    blocks = [LayerSpec(Block, config, index) for index in range(oracle.layers)]
    norm = LayerSpec(LlamaRMSNorm, oracle.hidden)
    if not oracle.tied:
        head = LayerSpec(torch.nn.Linear, oracle.hidden, oracle.vocab, bias=False)
        return [LayerSpec(torch.nn.Embedding, *sizes), *blocks, norm, head]
    first = TiedLayerSpec("embedding", torch.nn.Embedding, *sizes)
    last = TiedLayerSpec("embedding", torch.nn.Embedding, *sizes, forward_fn=_output)
    return [first, *blocks, norm, last]


def logical_name(name: str) -> str:
    """Of a parameter as DeepSpeed calls it."""
    if name in ("0.weight", "tied_modules.embedding.weight"):
        return "model.embed_tokens.weight"
    if name in ("5.weight", "6.weight"):
        return {"5": "model.norm.weight", "6": "lm_head.weight"}[name[0]]
    return re.sub(r"^(\d+)", lambda match: f"model.layers.{int(match[1]) - 1}", name)


def save_pipeline(folder: Path, oracle: Oracle, run: made.Run, stages: int = 2) -> Path:
    """Write a checkpoint of `stages` pipeline stages into `folder`, and return `folder`."""
    run_ranks(_save, run.world, str(folder), oracle, run, stages)
    return folder


def load_universal_pipeline(folder: Path, oracle: Oracle, run: made.Run, stages: int) -> None:
    """Resume a universal folder by DeepSpeed's own loader; fails where a rank does not hold the oracle."""
    run_ranks(_load_universal, run.world, str(folder), oracle, run, stages)


def _output(embedding: torch.nn.Embedding, hidden: torch.Tensor) -> torch.Tensor:
    return linear(hidden, embedding.weight)


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def _start(oracle: Oracle, run: made.Run, stages: int, **more: Any) -> Any:
    made.deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(1)
    model = PipelineModule(
        layers=layers(oracle), num_stages=stages, loss_fn=_loss, partition_method="uniform"
    )
    return made.deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(run.optimizer, model),
        config=made.engine_config(oracle, run) | {"gradient_accumulation_steps": 2, **more},
        dist_init_required=False,
    )[0]


def _save(folder: str, oracle: Oracle, run: made.Run, stages: int) -> None:
    engine = _start(oracle, run, stages)
    tokens = torch.arange(8).reshape(1, 8)
    engine.train_batch(iter([(tokens, tokens)] * 2))
    made.plant(engine, Renamed(oracle), run.optimizer)
    made.count_steps(engine)
    engine.save_checkpoint(folder, tag=made.TAG)


def _load_universal(folder: str, oracle: Oracle, run: made.Run, stages: int) -> None:
    engine = _start(oracle, run, stages, checkpoint={"load_universal": True})
    path, _ = engine.load_checkpoint(folder)
    assert path is not None, f"DeepSpeed found nothing in {folder}"
    for name, parameter in made.named_trained(engine):
        master = made.safe_get_full_fp32_param(parameter)
        assert torch.equal(master, oracle.value(logical_name(name), "master")), name
        for state in ("exp_avg", "exp_avg_sq"):
            value = oracle.value(logical_name(name), state)
            assert torch.equal(made.safe_get_full_optimizer_state(parameter, state), value), (name, state)


class Renamed:
    """The oracle by DeepSpeed's names of a pipeline's parameters."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle

    def value(self, name: str, state: str) -> torch.Tensor:
        return self.oracle.value(logical_name(name), state)
