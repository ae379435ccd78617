"""Metadata before documents and a cooldown without (MeCo): one schedule over all stages, on any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpoint.folder import read_manifest, step_name
from parallel.mesh import destroy_mesh
from tests.data.corpora import ragged, write_tokens
from tests.proof.runs import Records
from tests.ranks import run_ranks
from tests.trainer.stages.test_stages import BASE
from trainer.config import resolve
from trainer.data.ledger import Ledger
from trainer.loop import train
from trainer.stages.check import check_stages
from trainer.stages.load_stages import load_stages
from trainer.stages.plan import takeover

STAGES = """
[schedule]
kind = "cosine"
warmup_steps = 2
steps = 11

[[data.transforms]]
kind = "metadata"

[[data.transforms]]
kind = "loss_weight"
factor = 0.5
sources = ["plain"]

[[stage]]
name = "meco"
steps = 7

[[stage]]
name = "cooldown"
steps = 3
transforms = []
start = { policy = "continue" }

[[stage]]
name = "plug-in"
steps = 1
transforms = [{ kind = "plugin", plugin = "tests.data.test_transforms:Halves" }]
start = { policy = "continue" }
"""
SOURCE = """
[[data.sources]]
name = "plain"
path = "{folder}/plain"
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("meco")
    for seed, name in enumerate(("prose", "plain")):
        documents = [[t % 200 for t in one] for one in ragged(60, seed=seed, longest=50)]
        write_tokens(folder / name, documents)
    metadata = [[200 + t % 50 for t in one] for one in ragged(60, seed=5, longest=9)]
    write_tokens(folder / "prose.meta", metadata)
    path = folder / "run.toml"
    path.write_text((BASE + SOURCE).format(folder=folder) + STAGES)
    return path


@pytest.fixture(scope="module")
def one_rank(run_file: Path) -> dict[str, Records]:
    records: dict[str, Records] = run_ranks(_train, 1, run_file, "story")[0]
    return records


def _train(path: Path, folder: str, *layout: str) -> dict[str, Records]:
    """All stages; a target for `run_ranks`."""
    found = {}
    for stage in load_stages(path, (f"run.dir={path.parent / folder}", *layout)):
        found[stage.name] = Records()
        train(resolve(stage.config), sink=found[stage.name])
        destroy_mesh()
    return found


@pytest.mark.parametrize(
    "layout",
    ["data", "context", *(pytest.param(one, marks=pytest.mark.long) for one in ("tensor", "pipeline"))],
)
def test_two_ranks_have_the_losses_of_one(run_file: Path, one_rank: dict[str, Records], layout: str) -> None:
    found = run_ranks(_train, 2, run_file, layout, *([] if layout == "data" else [f"parallel.{layout}=2"]))[0]
    for stage, records in one_rank.items():
        for one, other in zip(records.steps, found[stage].steps, strict=True):
            assert other.loss == pytest.approx(one.loss, rel=1e-5)
            assert (other.tokens, other.source_tokens) == (one.tokens, one.source_tokens)


def test_a_plugin_weighs_what_the_ranks_count(one_rank: dict[str, Records]) -> None:
    """Half of the sequences at half their weight."""
    (record,) = one_rank["plug-in"].steps
    assert record.tokens < 0.8 * sum(one_rank["cooldown"].steps[-1].source_tokens.values())


def test_one_schedule_spans_the_stages(run_file: Path, one_rank: dict[str, Records]) -> None:
    stages = load_stages(run_file)
    check_stages(stages, [1, 1, 1], name="the test's run file")
    assert not takeover(stages[1], stages).problems
    rates = [record.lr for records in one_rank.values() for record in records.steps]
    assert len(rates) == 11
    assert rates[6] > rates[7] > rates[8] > rates[9] > rates[10] == pytest.approx(1e-5)
    state = _state(run_file, "cooldown", 10)
    assert state["scalars"]["updates"] == 10
    assert state["schedule"]["anchor"]["step"] == 0


def test_the_cooldown_goes_on_in_the_same_document(run_file: Path, one_rank: dict[str, Records]) -> None:
    meco, cooldown = (Ledger.of(_state(run_file, *at)["data"]) for at in (("meco", 7), ("cooldown", 10)))
    before, after = meco.source("prose"), cooldown.source("prose")
    assert before.metadata > 0
    assert after.metadata == before.metadata
    fed = {entry.name: entry.fed for entry in cooldown.sources}
    assert sum(fed.values()) == 10 * 4 * 32
    dealt = sum(one.dealt["prose"] * one.length for one in cooldown.segments)
    assert fed["prose"] == dealt
    assert after.tokens - before.tokens == cooldown.segments[-1].dealt["prose"] * 32


def test_the_loss_is_over_text_alone(one_rank: dict[str, Records]) -> None:
    """And its tokens are counted with their loss weights."""
    plain = [record.source_tokens["plain"] for record in one_rank["meco"].steps]
    prose = [record.source_tokens["prose"] for record in one_rank["meco"].steps]
    later = [record.source_tokens["prose"] for record in one_rank["cooldown"].steps]
    assert max(plain) <= 2 * 32 / 2
    assert max(prose) < min(later)


def _state(run_file: Path, stage: str, step: int) -> dict[str, Any]:
    state: dict[str, Any] = read_manifest(
        run_file.parent / "story" / stage / "checkpoints" / step_name(step)
    )[1].state
    return state
