"""Every family has the logits of transformers at all positions, into Ratoon and back, on several layouts."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from checkpoint.convert.run import convert, prepare
from checkpoint.opening import open_checkpoint
from checkpoint.writers.options import WriteOptions
from parallel.layout import Layout
from tests.families.cases import FAMILIES, build_model
from tests.ranks import run_ranks
from trainer.parity.job import ParityJob, architectures, run_parity

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trainer.loop  # noqa: F401  # ranks are forked warm

LAYOUTS = {"dense": [(Layout(), 1), (Layout(tensor=2, pipeline=2, sequence_parallel=True), 4)]}
LAYOUTS["experts"] = [(Layout(), 1), (Layout(expert=2, pipeline=2), 4)]


def save(name: str, folder: Path, *, tied: bool) -> Path:
    """The family's model, tied or not, as transformers saves it."""
    torch.manual_seed(7)
    model = build_model(FAMILIES[name])
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder)
    return folder


def relative_difference(ours: Path, theirs: Path, layout: Layout, world_size: int) -> float:
    model, _ = architectures(open_checkpoint(ours), open_checkpoint(theirs))
    job = ParityJob(ours, theirs, model, layout, length=32)
    return run_ranks(_run, world_size, job)[0]


def _run(job: ParityJob) -> float:
    torch.set_num_threads(1)
    return run_parity(job).logits.relative


def go_round(name: str, tmp_path: Path, *, tied: bool, layouts: list[tuple[Layout, int]]) -> None:
    source = save(name, tmp_path / "source", tied=tied)
    convert(prepare(source, "universal", WriteOptions()), tmp_path / "universal")
    convert(prepare(tmp_path / "universal", "huggingface", WriteOptions()), tmp_path / "target")
    for layout, world_size in layouts:
        into = relative_difference(source, source, layout, world_size)
        back = relative_difference(tmp_path / "universal", tmp_path / "target", layout, world_size)
        assert max(into, back) < 1e-5, (name, tied, layout)  # 1e-4 is what the gate allows


@pytest.mark.parametrize("name", ["llama", "qwen3_moe, normed"])
def test_a_dense_family_and_one_with_experts(name: str, tmp_path: Path) -> None:
    kind = "experts" if FAMILIES[name].moe else "dense"
    go_round(name, tmp_path, tied=False, layouts=LAYOUTS[kind][1:])


@pytest.mark.long
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", [name for name in FAMILIES if "tied" not in name])
def test_every_family(name: str, tied: bool, tmp_path: Path) -> None:
    go_round(name, tmp_path, tied=tied, layouts=LAYOUTS["experts" if FAMILIES[name].moe else "dense"])
