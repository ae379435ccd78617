"""A ~30M-parameter Llama on one CPU process: Ratoon against transformers' Llama with torch AdamW.

    python -m tools.bench_cpu [--steps 10] [--threads 2]

Same shapes, same numbers (fp32), same threads; the two take turns in one process, so that whatever else the
machine does meets both. Each makes a whole step: batch in, loss, gradients, clipping by norm, AdamW. Prints
medians and their ratio, and how many times faster than the step the data pipeline delivers tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch.ranks import run_ranks
from parallel.engine import Engine
from parallel.layout import Layout
from parallel.mesh import build_mesh
from trainer.build import build_engine, execution_here
from trainer.data.batch import MicroBatch
from trainer.data.config import DataConfig
from trainer.data.prepare import PrepareOptions, prepare
from trainer.data.stream import TokenStream
from trainer.model.architecture import Architecture
from trainer.model.config import ModelConfig
from trainer.optimizer import OptimizerConfig
from trainer.step import train_step

SEQUENCE, BATCH, VOCABULARY = 512, 4, 8192
STEP_RATIO, DATA_RATIO = 1.2, 20.0
LR = 1e-4


@dataclass(frozen=True)
class Result:
    """Seconds a step of each, alternating, and the losses both started from."""

    ours: list[float]
    theirs: list[float]
    first_losses: tuple[float, float]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig.model_validate(
            {
                "sequence_length": SEQUENCE,
                "tokenizer": "bytes",
                "sources": [{"name": "code", "path": prepare_code(Path(folder)), "weight": 1.0}],
            }
        )
        result = run_ranks(compare, 1, data, arguments.steps, arguments.threads)[0]
        pipeline = measure_pipeline(data)
    return report(result, pipeline, arguments.threads)


def prepare_code(folder: Path) -> str:
    """Some of the standard library, tokenized."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = tuple(str(library / name) for name in ("json", "email", "asyncio", "importlib"))
    prepare(PrepareOptions(inputs=files, output=str(folder / "code"), suffixes=(".py",)))
    return str(folder / "code")


def compare(data: DataConfig, steps: int, threads: int) -> Result:
    """Let the two take turns; the first step of each warms up and does not count."""
    torch.set_num_threads(threads)
    stream = TokenStream(data, seed=0, global_batch=BATCH)
    model = ModelConfig(preset="llama-30m").resolve(VOCABULARY)
    execution = execution_here(precision="fp32")
    engine = build_engine(
        build_mesh(Layout()), model, OptimizerConfig(lr=LR), execution, sequence_length=SEQUENCE, seed=1
    )
    peer = build_peer(model, engine)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)

    def ours(batch: MicroBatch) -> float:
        return train_step(engine, [batch], lr=LR, source_names=("code",), document_mask=False).loss

    def theirs(batch: MicroBatch) -> float:
        optimizer.zero_grad()
        labels = batch.labels.masked_fill(batch.loss_weights == 0, -100)
        loss = peer(input_ids=batch.tokens, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    rounds = []
    for step in range(steps + 1):
        batch = stream.micro_batches(step, data_rank=0, data_size=1, micro_batch=BATCH)[0]
        rounds.append((timed(ours, batch), timed(theirs, batch)))
    (first_ours, first_theirs), rounds = rounds[0], rounds[1:]
    return Result([a[0] for a, _ in rounds], [b[0] for _, b in rounds], (first_ours[1], first_theirs[1]))


def build_peer(model: Architecture, engine: Engine) -> LlamaForCausalLM:
    """transformers' Llama of the same shape, with the same weights."""
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups,
            rms_norm_eps=model.norm_epsilon,
            tie_word_embeddings=model.tie_word_embeddings,
        )
    )
    weights = peer.state_dict()
    for entry in engine.named:
        for block in entry.blocks:
            box = tuple(slice(o, o + s) for o, s in zip(block.offset, block.size, strict=True))
            weights[block.name][box].copy_(block.view(entry.parameter.data))
    return peer


def timed(step: Callable[[MicroBatch], float], batch: MicroBatch) -> tuple[float, float]:
    """Wall seconds of a step, and its loss."""
    began = time.perf_counter()
    loss = step(batch)
    return time.perf_counter() - began, loss


def measure_pipeline(data: DataConfig, steps: int = 200) -> float:
    """Tokens per second that the data pipeline delivers by itself, in this process."""
    stream = TokenStream(data, seed=0, global_batch=BATCH)
    began = time.perf_counter()
    for step in range(steps):
        stream.micro_batches(step, data_rank=0, data_size=1, micro_batch=BATCH)
    return steps * BATCH * SEQUENCE / (time.perf_counter() - began)


def report(result: Result, pipeline: float, threads: int) -> int:
    """Print the comparison; 0 when both ratios are reached."""
    ours, theirs = statistics.median(result.ours), statistics.median(result.theirs)
    pairs = [b / a for a, b in zip(result.ours, result.theirs, strict=True)]
    ratio, tokens = statistics.median(pairs), BATCH * SEQUENCE
    first = result.first_losses
    versions = f"{threads} threads, torch {torch.__version__}"
    print(f"Llama of 32M parameters, {BATCH} x {SEQUENCE} tokens, fp32, {versions}")
    print(f"first loss            Ratoon {first[0]:.5f}   transformers {first[1]:.5f}")
    print(f"median step           Ratoon {ours:.3f} s   transformers {theirs:.3f} s, {len(pairs)} of each")
    print(f"tokens per second     Ratoon {tokens / ours:,.0f}   transformers {tokens / theirs:,.0f}")
    print(f"median of the ratios  {ratio:.2f} (of {min(pairs):.2f} to {max(pairs):.2f}; wanted {STEP_RATIO})")
    supply = pipeline / (tokens / ours)
    print(
        f"data pipeline alone   {pipeline:,.0f} tokens/s, {supply:,.0f} x the step (wanted {DATA_RATIO:.0f})"
    )
    return 0 if ratio >= STEP_RATIO and supply >= DATA_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
