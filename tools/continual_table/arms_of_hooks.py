"""The runs about auxiliary losses, updates and slow weights."""

from __future__ import annotations

from tools.continual_table.arm import FROZEN, NEW, OLD, STRENGTHS, Arm, onward, shares
from tools.continual_table.bed import Bed


def loss_arms(bed: Bed) -> list[Arm]:
    """Stay near the start on replayed text, near it on the new text, and log^2 Z."""
    kl = {"kind": "kl", "weight": 1.0}
    return [
        onward(bed, "kl-replay", shares(0.05), losses=[kl | {"weight": 4.0, "sources": [OLD]}]),
        onward(bed, "kl-new", losses=[kl | {"sources": [NEW]}]),
        onward(bed, "kl-all", shares(0.05), losses=[kl | {"weight": 1.0}]),
        onward(bed, "z", losses=[{"kind": "z", "weight": 1e-3}]),
    ]


def update_arms(bed: Bed) -> list[Arm]:
    """Frozen layers, and anchors of three kinds, each at three strengths."""
    fisher = {"sources": [OLD], "batches": bed.size.fisher}
    arms = [onward(bed, "freeze", updates={"freeze": FROZEN})]
    for kind in ("l2", "ewc", "si"):
        for word, strength in STRENGTHS.items():
            anchor = {"kind": kind, "strength": strength} | (fisher if kind == "ewc" else {})
            arms.append(onward(bed, f"{kind}-{word}", updates={"anchor": anchor}))
    return arms


def slow_arms(bed: Bed) -> list[Arm]:
    """An average at a constant learning rate, and a long one."""
    constant = {"kind": "constant", "warmup_steps": bed.size.warmup}
    ema = {"kind": "ema", "evaluate": True}
    return [
        onward(bed, "constant-average", schedule=constant, slow_weights=ema | {"decay": 0.95}),
        onward(bed, "long-average", slow_weights=ema | {"decay": 0.995}),
    ]
