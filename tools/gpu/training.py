"""Loss curves of the demo's model on the same text: Transformer Engine, FP8, portable modules, the CPU."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from parallel.layout import Layout
from parallel.mesh import build_mesh, destroy_mesh
from tools.gpu.report import Table
from trainer.build import build_engine, execution_here
from trainer.data.config import DataConfig
from trainer.data.stream import TokenStream
from trainer.data.tokenizer import load_tokenizer
from trainer.model.config import ModelConfig
from trainer.optimizer import OptimizerConfig
from trainer.precision import FP8, accelerator_here, fp8_refusal
from trainer.step import train_step

BATCH, MICRO_BATCH, LR = 8, 4, 1e-3

# Relative differences of a loss, of which each has 8 bits from bf16 weights and activations, averaged over
# thousands of tokens; rounding pushes the weights apart a little at every step, FP8's 3 or 4 bits more so.
BF16_BOUND, FP8_BOUND = 2e-2, 5e-2
# fp32 sums in another order, grown over the steps.
FP32_BOUND = 1e-4


@dataclass(frozen=True)
class Case:
    """One way to carry out the same training."""

    name: str
    precision: Literal["fp32", "bf16"]
    fp8: FP8 = "off"
    portable: bool = True


@dataclass(frozen=True)
class Curve:
    """Losses of one case, or why there are none."""

    losses: Sequence[float] = ()
    error: str = ""


FP32 = Case("fp32", "fp32")
BF16 = Case("bf16, portable", "bf16")
ENGINE = Case("bf16, Transformer Engine", "bf16", portable=False)
FP8_CASES = tuple(Case(f"fp8 {recipe}", "bf16", recipe, portable=False) for recipe in ("delayed", "current"))


def cases_here() -> list[Case]:
    """What this machine can do."""
    accelerator = accelerator_here()
    cases = [FP32, BF16]
    if accelerator.capability is not None and accelerator.transformer_engine is not None:
        cases += [ENGINE, *(c for c in FP8_CASES if fp8_refusal(c.fp8, c.precision, accelerator) is None)]
    return cases


def train_curves(data: DataConfig, steps: int, cases: Sequence[Case] | None = None) -> dict[str, Curve]:
    """The curve of every case, of all that this machine can do where none are given; runs on a rank."""
    curves = {}
    for case in cases_here() if cases is None else cases:
        try:
            curves[case.name] = Curve(train_curve(data, steps, case))
        except Exception:
            curves[case.name] = Curve(error=traceback.format_exc())
        finally:
            destroy_mesh()
    return curves


def train_curve(data: DataConfig, steps: int, case: Case) -> list[float]:
    """Train a new model and return the loss of every step."""
    model = ModelConfig(preset="demo").resolve(load_tokenizer(data.tokenizer, data.eod).vocab_size)
    engine = build_engine(
        build_mesh(Layout()),
        model,
        OptimizerConfig(lr=LR),
        execution_here(precision=case.precision, fp8=case.fp8, portable=case.portable),
        sequence_length=data.sequence_length,
        seed=1,
    )
    stream = TokenStream(data, seed=0, global_batch=BATCH)
    losses = []
    for step in range(steps):
        batches = stream.micro_batches(step, data_rank=0, data_size=1, micro_batch=MICRO_BATCH)
        losses.append(train_step(engine, batches, lr=LR, source_names=stream.source_names).loss)
    return losses


def compare_curves(here: Mapping[str, Curve], on_cpu: Mapping[str, Curve]) -> Table:
    """The largest relative difference of each curve from the one that it should follow."""
    steps = max((len(curve.losses) for curve in (*here.values(), *on_cpu.values())), default=0)
    table = Table(
        f"The demo's model, {steps} steps on the same text: largest relative difference of the loss",
        ("curve", "found", "allowed", "verdict", "against", "first and last loss"),
    )
    _compare(table, FP32.name, here, "fp32 on the CPU", on_cpu.get(FP32.name), FP32_BOUND)
    _compare(table, BF16.name, here, FP32.name, here.get(FP32.name), BF16_BOUND)
    if ENGINE.name in here:
        _compare(table, ENGINE.name, here, BF16.name, here.get(BF16.name), BF16_BOUND)
    for case in FP8_CASES:
        if case.name in here:
            _compare(table, case.name, here, ENGINE.name, here.get(ENGINE.name), FP8_BOUND)
    return table


def _compare(
    table: Table, name: str, curves: Mapping[str, Curve], other: str, wanted: Curve | None, allowed: float
) -> None:
    curve = curves.get(name, Curve(error="it was not trained"))
    if not curve.losses:
        table.fail(name, curve.error)
        return
    if wanted is None or not wanted.losses:
        table.fail(name, f"there is no curve of {other} to compare with: {wanted.error if wanted else ''}")
        return
    pairs = zip(curve.losses, wanted.losses, strict=True)
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    ends = f"{curve.losses[0]:.4f}, {curve.losses[-1]:.4f}"
    table.compare(name, worst, allowed, other, ends)
    if not curve.losses[-1] < curve.losses[0]:
        table.failures.append(f"{name}: the loss did not fall: {ends}")
