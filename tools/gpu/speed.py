"""Tokens per second, MFU and memory of a stack of Llama-3-8B's layers."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from parallel.engine import Engine
from parallel.layout import Layout
from parallel.mesh import build_mesh, destroy_mesh
from tools.gpu.report import Table
from trainer.build import build_engine, execution_here
from trainer.data.batch import NEXT_TOKEN, NO_GROUP, MicroBatch
from trainer.flops import training_flops
from trainer.memory import Batch, estimate_memory
from trainer.model.architecture import Architecture
from trainer.model.config import ModelConfig
from trainer.model.transformer import Execution, Recompute
from trainer.optimizer import OptimizerConfig
from trainer.peak import peak
from trainer.precision import FP8, accelerator_here, fp8_refusal
from trainer.step import train_step

COLUMNS = (
    "modules",
    "precision",
    "documents",
    "recompute",
    "tokens/s",
    "MFU (causal)",
    "peak memory",
    "estimated",
)
TITLE = "Speed on one GPU"


@dataclass(frozen=True)
class Case:
    """One way to run the stack."""

    fp8: FP8 = "off"
    portable: bool = False
    documents: bool = False
    recompute: Recompute = "none"


@dataclass(frozen=True)
class Stack:
    """Sizes: the layer is Llama-3-8B's, the vocabulary small, so that the layers have the say."""

    layers: int
    sequence: int
    micro_batches: int
    steps: int  # counted; two more warm up
    fields: tuple[tuple[str, int], ...] = ()


FULL = Stack(layers=8, sequence=8192, micro_batches=2, steps=6)
SMALL = Stack(2, 128, 2, 1, (("hidden_size", 64), ("ffn_hidden_size", 128), ("num_attention_heads", 4)))
VOCABULARY, DOCUMENT = 16_384, 1024  # DOCUMENT: mean number of tokens

# Cases that share a process, by what a crash of one should not take along.
ENGINE = (Case(), Case(documents=True), Case(recompute="selective"), Case(recompute="full"))
ENGINE_FP8 = (Case(fp8="current"), Case(fp8="delayed"), Case(fp8="current", documents=True))
PORTABLE = (Case(portable=True), Case(portable=True, documents=True))


def measure(stack: Stack, cases: Sequence[Case]) -> Table:
    """A row for each case that this machine can run."""
    table = Table(TITLE, COLUMNS)
    for case in cases:
        accelerator = accelerator_here()
        if not case.portable and accelerator.transformer_engine is None:
            continue
        if fp8_refusal(case.fp8, "bf16", accelerator) is not None:
            continue
        try:
            table.rows.append(_row(stack, case))
        except Exception:
            table.fail(str(case), traceback.format_exc())
        finally:
            destroy_mesh()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return table


def describe(stack: Stack) -> str:
    """What was run, in a sentence."""
    model = _model(stack)
    return (
        f"{stack.layers} layers of hidden size {model.hidden_size}, ffn {model.ffn_hidden_size}, "
        f"{model.num_attention_heads} heads, {model.num_query_groups} key/value heads, a vocabulary of "
        f"{model.vocab_size:,}; sequences of {stack.sequence:,} tokens, {stack.micro_batches} a step; whole "
        f"steps with AdamW in fp32; the median of {stack.steps}"
    )


def _model(stack: Stack) -> Architecture:
    fields: dict[str, Any] = dict(num_layers=stack.layers, vocab_size=VOCABULARY) | dict(stack.fields)
    if stack.fields:
        fields |= dict(num_query_groups=2, head_dim=16)
    return ModelConfig(preset="llama-3-8b", **fields).resolve()


def _row(stack: Stack, case: Case) -> tuple[str, ...]:
    model, layout = _model(stack), Layout()
    execution = execution_here(
        precision="bf16", fp8=case.fp8, recompute=case.recompute, portable=case.portable
    )
    engine = build_engine(
        build_mesh(layout),
        model,
        OptimizerConfig(lr=1e-5),
        execution,
        sequence_length=stack.sequence,
        seed=None,
    )
    _draw_here(engine)
    seconds = statistics.median(_time_steps(engine, stack, documents=case.documents))
    flops = training_flops(model, stack.sequence, stack.micro_batches).causal
    best = peak("bf16" if case.fp8 == "off" else "fp8", ranks=1)
    tokens = stack.micro_batches * stack.sequence
    return (
        engine.backend.kind,
        "bf16" if case.fp8 == "off" else f"fp8 {case.fp8}",
        f"of {DOCUMENT} tokens" if case.documents else "one",
        case.recompute,
        f"{tokens / seconds:,.0f}",
        f"{flops / seconds / best.flops_per_second:.1%} of {best.flops_per_second / 1e12:,.4g} TFLOP/s",
        *_memory(model, layout, execution, stack),
    )


def _draw_here(engine: Engine) -> None:
    """Random weights, drawn on the device in a moment: zeros would cost less power, and so run faster."""
    for entry in engine.named:
        if entry.parameter.dim() > 1:
            entry.parameter.data.normal_(0.0, 0.02)
        else:
            entry.parameter.data.fill_(1.0)
    engine.weights_changed()


def _time_steps(engine: Engine, stack: Stack, *, documents: bool) -> list[float]:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for step in range(stack.steps + 2):
        batches = [
            _batch(stack, step * stack.micro_batches + index, documents=documents)
            for index in range(stack.micro_batches)
        ]
        began = time.perf_counter()
        train_step(engine, batches, lr=1e-5, source_names=("random",), document_mask=documents)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


def _batch(stack: Stack, seed: int, *, documents: bool) -> MicroBatch:
    """One sequence of random tokens, in documents of geometric lengths or in one."""
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(VOCABULARY, (1, stack.sequence + 1), generator=generator)
    starts = torch.rand(1, stack.sequence, generator=generator) < (1 / DOCUMENT if documents else 0)
    places = torch.arange(stack.sequence)
    return MicroBatch(
        tokens=stream[:, :-1],
        labels=stream[:, 1:].contiguous(),
        loss_weights=torch.ones(1, stack.sequence),
        positions=places - torch.where(starts, places, 0).cummax(1).values,
        documents=starts.int().cumsum(1).int(),
        sources=torch.zeros(1, stack.sequence, dtype=torch.int32),
        objectives=torch.full((1, stack.sequence), NEXT_TOKEN, dtype=torch.int32),
        groups=torch.full((1, stack.sequence), NO_GROUP, dtype=torch.int32),
    )


def _memory(model: Architecture, layout: Layout, execution: Execution, stack: Stack) -> tuple[str, str]:
    batch = Batch(stack.sequence, micro_batch=1, micro_batches=stack.micro_batches)
    estimate = estimate_memory(model, layout, execution, world_size=1, batch=batch)[0].total
    found = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return "not on a GPU" if found is None else _gib(found), _gib(estimate)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
