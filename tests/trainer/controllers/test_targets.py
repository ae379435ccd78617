"""Targets from a curve, and a graph from short runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.proof.runs import Records, run_config, write_corpora
from tests.ranks import run_ranks
from trainer.config import RunConfig, schedule, validate
from trainer.controllers.config import Table
from trainer.controllers.graph import measure_graph, relative_drops, transforms_of
from trainer.controllers.targets import fit_curve, fit_targets
from trainer.data.config import SourceConfig
from trainer.data.transforms.config import TransformConfig
from trainer.metrics.json_lines import JsonLines
from trainer.metrics.sink import EvaluationRecord, RunInfo

TOKENS = [1e6 * 2**k for k in range(8)]


@pytest.mark.parametrize(("a", "b", "c"), [(2.0, 300.0, 0.35), (0.0, 20.0, 0.1), (1.5, 4e4, 0.7)])
def test_a_curve_is_found_again(a: float, b: float, c: float) -> None:
    losses = [a + b * n**-c for n in TOKENS]
    curve = fit_curve(TOKENS, losses)
    assert curve.c == pytest.approx(c, rel=1e-3)
    assert curve.at(1e9) == pytest.approx(a + b * 1e9**-c, abs=1e-3)


def test_one_bad_point_hardly_moves_it() -> None:
    losses = [2.0 + 300.0 * n**-0.35 for n in TOKENS]
    noise = np.random.default_rng(0).normal(0, 0.002, len(losses))
    bad = [loss + one for loss, one in zip(losses, noise, strict=True)]
    bad[4] += 0.8
    assert fit_curve(TOKENS, bad).at(1e9) == pytest.approx(2.0 + 300.0 * 1e9**-0.35, abs=0.06)


def test_a_loss_that_rises_has_a_flat_curve() -> None:
    curve = fit_curve(TOKENS, [3.0 + 0.01 * k for k in range(8)])
    assert curve.b == 0.0
    assert 3.0 < curve.at(1e9) < 3.07


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="4 or more different numbers of tokens"):
        fit_curve([1.0, 2.0, 2.0, 3.0], [4.0, 3.0, 3.0, 2.0])


def test_targets_come_out_of_a_run_folder(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink.start(RunInfo("short", first_step=100, total_steps=200, tokens_per_step=1000))
    for step in (100, 110, 120, 140, 180):
        loss = 9.0 if step == 100 else 2.0 + 300.0 * (1000.0 * (step - 100)) ** -0.35
        sink.evaluation(
            EvaluationRecord(step, {"held-out": loss}, {"held-out": 5}, sources={"held-out": "code"})
        )
    sink.close()
    output = tmp_path / "targets.json"
    targets = fit_targets(tmp_path, 1e6, output)
    assert targets == {"code": pytest.approx(2.0 + 300.0 * 1e6**-0.35, abs=1e-3)}
    assert json.loads(output.read_text()) == targets


def test_a_drop_is_relative_and_not_negative() -> None:
    assert relative_drops({"a": 4.0, "b": 2.0}, {"a": 3.0, "b": 2.5}) == {"a": 0.25, "b": 0.0}


def _measure(config: RunConfig, folder: Path) -> Table:
    return measure_graph(config, folder, steps=4)


def test_a_graph_is_measured_from_one_checkpoint(tmp_path: Path) -> None:
    write_corpora(tmp_path)
    held_out = [{"name": "both", "path": str(tmp_path / "held-out")}]
    changes = {"data__validation": held_out, "eval__batches": 2, "optimizer__lr": 3e-3}
    config = run_config(tmp_path, run__name="measured", **changes)
    ranks = run_ranks(_measure, 2, config, tmp_path / "graph")
    found = json.loads((tmp_path / "graph" / "graph.json").read_text())
    assert found == ranks[0] == ranks[1]
    assert set(found) == {"prose", "code"}
    assert all(0.0 < row["both"] < 1.0 for row in found.values())
    assert found["prose"] != found["code"]
    skillit = {"kind": "skillit", "every": 3, "graph": str(tmp_path / "graph" / "graph.json")}
    controlled = run_config(tmp_path, run__name="then", controller=skillit, eval__every=3, **changes)
    assert validate(controlled, 1) == []


def test_transforms_of_replay_alone_are_left_out_of_the_graph() -> None:
    source = SourceConfig(name="prose", path="prose")
    given = [
        TransformConfig(kind="loss_weight", factor=0.5, sources=("replay",)),
        TransformConfig(kind="loss_weight", factor=0.1, sources=("replay", "p*")),
    ]
    (found,) = transforms_of(given, [source])
    assert (found.factor, found.sources) == (0.1, ("p*",))


def _watched(config: RunConfig, folder: Path) -> tuple[Table, list[float]]:
    records = Records()
    table = measure_graph(config, folder, steps=2, watch=lambda source: records)
    return table, [step.lr for step in records.steps]


def test_a_graph_is_of_corpora_under_the_learning_rates_of_the_run(tmp_path: Path) -> None:
    """Whatever caps and shares they have in the mixture; what has a number of its own is left out."""
    write_corpora(tmp_path)
    sources: list[dict[str, object]] = [
        {"name": "prose", "path": str(tmp_path / "prose"), "max_epochs": 0.01},
        {"name": "code", "path": str(tmp_path / "code"), "share": 0.1},
        {"name": "fixed", "path": str(tmp_path / "code"), "per_batch": 2},
        {"name": "web", "path": str(tmp_path / "prose")},
    ]
    config = run_config(
        tmp_path,
        run__name="lr",
        data__sources=sources,
        data__validation=[{"name": "both", "path": str(tmp_path / "held-out")}],
        eval__batches=1,
        train__steps=20,
        schedule={"kind": "cosine", "warmup_steps": 2},
    )
    table, rates = run_ranks(_watched, 1, config, tmp_path / "graph")[0]
    assert list(table) == ["prose", "code", "web"]
    plan = schedule(config)
    assert rates == [plan.lr(step, plan.begin()) for step in (0, 1)] * 3
    assert [path.name for path in (tmp_path / "graph").iterdir()] == ["graph.json"]
