"""What all runs of the table have in common: their size, their corpora, the frame of their run files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Values = dict[str, Any]
"""A run file, or sections of one."""

CORPORA = ("prose", "code", "cpp", "questions")
"""Of the demo corpora."""
PEAK, FLOOR = 1e-2, 1e-3
"""Learning rates: schedules warm up to the first and decay to the second, unless an arm says otherwise."""


@dataclass(frozen=True)
class Size:
    """How much work one seed is.

    Attributes:
        pretrain: steps on prose, or on chains, from nothing.
        more: steps of every stage that goes on from there.
        warmup: steps of every warm-up.
        skill: steps on each source alone for the skill graph.
        call: steps between two calls of a controller.
        reservoir: tokens of prose that a reservoir holds.
        documents: of every corpus of chains.
        held_out: documents of each besides, to evaluate on.
        fisher: gradients that EWC's Fisher matrix is measured on.
        eval_batches, dense_batches: the most global batches that whole and dense evaluations read of a set;
            the first are the first ones, the others are spread over those.
        global_batch: sequences of 128 tokens.
    """

    pretrain: int
    more: int
    warmup: int
    skill: int
    call: int
    reservoir: int
    documents: int
    held_out: int
    fisher: int
    eval_batches: int
    dense_batches: int
    global_batch: int

    @property
    def cooldown(self) -> int:
        """Steps of the infinite schedule's cooldown."""
        return self.pretrain // 2

    @property
    def last_anneal(self) -> int:
        """Steps of an anneal at the end of a stage."""
        return max(1, self.more // 5)


FULL = Size(
    pretrain=400,
    more=200,
    warmup=20,
    skill=30,
    call=25,
    reservoir=50_000,
    documents=7_000,
    held_out=600,
    fisher=128,
    eval_batches=40,
    dense_batches=6,
    global_batch=8,
)
TINY = Size(
    pretrain=6,
    more=5,
    warmup=1,
    skill=1,
    call=1,
    reservoir=2_000,
    documents=100,
    held_out=20,
    fisher=2,
    eval_batches=1,
    dense_batches=1,
    global_batch=2,
)

MODEL: Values = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 192,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "tie_word_embeddings": True,
    "init_std": 0.05,
}


@dataclass(frozen=True)
class Bed:
    """One seed's place.

    Attributes:
        data: folder of the corpora.
        folder: of the seed; every run has a folder in it, and its run file beside that.
        metadata_share: tokens of the names of domains, for each token of their text.
    """

    data: Path
    folder: Path
    seed: int
    size: Size
    metadata_share: float = 0.0

    def corpus(self, name: str) -> str:
        """Prefix of a corpus."""
        return str(self.data / name)

    def source(self, name: str, weight: float) -> Values:
        """An entry of [[data.sources]]."""
        return {"name": name, "path": self.corpus(name), "weight": weight}

    def frame(self, name: str, sources: Mapping[str, float], *, sets: tuple[str, ...]) -> Values:
        """A run file without its length and without a start.

        Args:
            sources: corpora and their weights.
            sets: corpora whose held-out documents are evaluated.
        """
        size = self.size
        return {
            "run": {"name": name, "dir": str(self.folder / name), "seed": self.seed},
            "model": MODEL,
            "data": {
                "tokenizer": str(self.data / "tokenizer.json"),
                "sequence_length": 128,
                "sources": [self.source(*entry) for entry in sources.items()],
                "validation": [{"name": one, "path": self.corpus(f"{one}-validation")} for one in sets],
            },
            "optimizer": {"lr": PEAK, "min_lr": FLOOR},
            "schedule": {"kind": "cosine", "warmup_steps": size.warmup},
            "train": {
                "steps": 1,
                "global_batch": size.global_batch,
                "micro_batch": size.global_batch,
                "precision": "fp32",
            },
            "checkpoint": {"every": 10**6},
            "eval": {
                "dense": False,
                "batches": size.eval_batches,
                "dense_batches": size.dense_batches,
                "dense_per_decade": 6,
            },
            "metrics": {"every": 5, "tensorboard": False},
        }


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Values:
    """`below` with what `above` says on top, table by table."""
    result = dict(below)
    for key, value in above.items():
        held = result.get(key)
        both = isinstance(held, Mapping) and isinstance(value, Mapping)
        result[key] = merged(held, value) if both else value  # type: ignore[arg-type]
    return result
