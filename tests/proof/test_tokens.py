"""Exactly the same tokens, and so the same losses, under every data, context and micro-batch split."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from parallel.layout import Layout
from parallel.mesh import destroy_mesh
from tests.proof.runs import GLOBAL_BATCH, SEQUENCE, Records, run, run_config, write_corpora
from tests.ranks import run_ranks
from trainer.config import RunConfig
from trainer.data.batch import MicroBatch
from trainer.session import open_session

STEPS = 4
SPLITS = {
    "one rank, batches of 3": (1, Layout(), 3),
    "one rank, one batch": (1, Layout(), 6),
    "DP2": (2, Layout(), 1),
    "DP3, batches of 2": (3, Layout(), 2),
    "CP2": (2, Layout(context=2), 1),
    "CP2 DP2, batches of 3": (4, Layout(context=2, context_kind="all_gather"), 3),
    "TP2 PP2, batches of 2": (4, Layout(tensor=2, pipeline=2), 2),
}


@dataclass(frozen=True)
class Fed:
    """What one rank was given, and the losses of the run."""

    data_rank: int
    sequences: list[Counter[bytes]]  # by step: every sequence with all that is known of its tokens
    records: Records


def feed(config: RunConfig) -> Fed:
    session, _ = open_session(config)
    steps = range(session.step, session.step + STEPS)
    sequences = [Counter(rows(session.batches(step).micro_batches)) for step in steps]
    session.saver.close()
    destroy_mesh()
    return Fed(session.mesh.data_rank, sequences, run(config))


def rows(batches: list[MicroBatch]) -> list[bytes]:
    fields = ("tokens", "labels", "loss_weights", "positions", "documents", "sources")
    return [
        b"".join(getattr(batch, name)[row].numpy().tobytes() for name in fields)
        for batch in batches
        for row in range(len(batch.tokens))
    ]


def feed_split(folder: Path, ranks: int, layout: Layout, micro_batch: int) -> list[Fed]:
    name = f"{ranks}-{layout.context}-{layout.tensor}-{micro_batch}"
    config = run_config(folder, layout, run__name=name, train__micro_batch=micro_batch, train__steps=STEPS)
    return run_ranks(feed, ranks, config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    write_corpora(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Fed:
    return feed_split(folder, 1, Layout(), 1)[0]


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_sees_the_same_sequences_and_losses(folder: Path, alone: Fed, split: str) -> None:
    ranks = feed_split(folder, *SPLITS[split])
    by_data_rank = {fed.data_rank: fed.sequences for fed in ranks}
    assert all(fed.sequences == by_data_rank[fed.data_rank] for fed in ranks), "others hold the same"
    for step in range(STEPS):
        seen = sum((sequences[step] for sequences in by_data_rank.values()), Counter())
        assert seen == alone.sequences[step]
        assert seen.total() == GLOBAL_BATCH
    for found, one in zip(ranks[0].records.steps, alone.records.steps, strict=True):
        # fp32 adds in another order; a token more or less would be a share of 1 / 192 of the loss.
        assert found.loss == pytest.approx(one.loss, rel=1e-6)
        assert found.source_losses == pytest.approx(one.source_losses, rel=1e-6)
        assert found.source_tokens == one.source_tokens
        assert found.tokens == one.tokens < GLOBAL_BATCH * SEQUENCE


def test_no_sequence_comes_twice(alone: Fed) -> None:
    assert set(sum(alone.sequences, Counter()).values()) == {1}


def test_a_new_mixture_goes_on_where_each_source_was(folder: Path) -> None:
    """Four steps of prose, then four with code added: no sequence comes twice, none of prose is left out."""
    prose = [{"name": "prose", "path": str(folder / "prose")}]
    both = [*prose, {"name": "code", "path": str(folder / "code")}]
    changes = {"data__sources": prose, "train__steps": STEPS}
    first = run_config(folder, run__name="prose", **changes)
    changes = {"data__sources": both, "train__steps": 2 * STEPS, "checkpoint__load": first.run.folder}
    second = run_config(folder, run__name="prose-and-code", **changes)
    seen = sum(run_ranks(feed, 1, first)[0].sequences, Counter())
    seen += sum(run_ranks(feed, 1, second)[0].sequences, Counter())
    assert seen.total() == 2 * STEPS * GLOBAL_BATCH
    assert set(seen.values()) == {1}

    changes = {"data__sources": prose, "train__steps": 2 * STEPS, "checkpoint__load": first.run.folder}
    alone = run_config(folder, run__name="prose-goes-on", **changes)
    later = sum(run_ranks(feed, 1, alone)[0].sequences[: STEPS // 2], Counter())
    assert later <= seen, "half of the second run's sequences are the next ones of prose"
