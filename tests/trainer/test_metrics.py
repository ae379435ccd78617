"""What a run says about itself, in files that other tools read."""

import json
import math
from pathlib import Path

import pytest

from trainer.metrics.json_lines import JsonLines
from trainer.metrics.nvml import GpuMonitor
from trainer.metrics.sink import EvaluationRecord, RunInfo, SinkList, StepRecord
from trainer.metrics.tensorboard import TensorBoard
from trainer.metrics.throughput import Throughput


def info(first_step: int = 0) -> RunInfo:
    return RunInfo(name="r", first_step=first_step, total_steps=10, tokens_per_step=64)


def record(step: int, loss: float = 2.0, **more: object) -> StepRecord:
    return StepRecord(step=step, loss=loss, lr=1e-3, grad_norm=1.5, tokens=64, step_seconds=0.5, **more)


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_there_before_the_file_is_closed(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl", clock=lambda: 7.0)
    sink.start(info())
    sink.step(record(1, source_losses={"prose": 2.5}, mfu={"causal": 0.25}))
    sink.event("saved", step=1)
    sink.evaluation(EvaluationRecord(step=1, losses={"held-out": 3.0}, tokens={"held-out": 100}))
    lines = read(sink.path)
    assert [line["kind"] for line in lines] == ["start", "step", "event", "evaluation"]
    assert lines[1] == {
        "kind": "step",
        "time": 7.0,
        "step": 1,
        "loss": 2.0,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "tokens": 64,
        "step_seconds": 0.5,
        "mfu": {"causal": 0.25},
        "source_losses": {"prose": 2.5},
    }
    sink.close()


def test_non_finite_numbers_stay_valid_json(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink.start(info())
    sink.step(record(1, math.nan, source_losses={"a": math.inf, "b": -math.inf}))
    sink.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads(sink.path.read_text().splitlines()[1], parse_constant=refuse)
    assert (line["loss"], line["source_losses"]) == ("nan", {"a": "inf", "b": "-inf"})


def test_after_a_resume_every_step_stands_there_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    first.start(info())
    for step in range(1, 6):
        first.step(record(step, loss=9.0))
    first.close()
    with path.open("a") as file:
        file.write('{"kind": "step", "st')  # killed in the middle of a line
    second = JsonLines(path)
    second.start(info(first_step=3))
    for step in range(4, 6):
        second.step(record(step, loss=1.0))
    second.close()
    steps = [(line["step"], line["loss"]) for line in read(path) if line["kind"] == "step"]
    assert steps == [(1, 9.0), (2, 9.0), (3, 9.0), (4, 1.0), (5, 1.0)]
    aside = (tmp_path / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in aside[:2]] == [4, 5]
    assert aside[2:] == ['{"kind": "step", "st']


def test_a_resume_that_loses_nothing_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for first_step in (0, 1):
        sink = JsonLines(path)
        sink.start(info(first_step))
        sink.step(record(first_step + 1))
        sink.close()
    assert [line["step"] for line in read(path)] == [0, 1, 1, 2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def scalars(folder: Path, tag: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_tensorboard_shows_the_resumed_curve_only(tmp_path: Path) -> None:
    for first_step, loss in ((0, 9.0), (2, 1.0)):
        board = TensorBoard(tmp_path)
        board.start(info(first_step))
        for step in range(first_step + 1, 5):
            board.step(record(step, loss, source_losses={"prose": loss}))
        board.evaluation(EvaluationRecord(step=4, losses={"held-out": loss}, tokens={"held-out": 8}))
        board.close()
    assert scalars(tmp_path, "train/loss") == {1: 9.0, 2: 9.0, 3: 1.0, 4: 1.0}
    assert scalars(tmp_path, "loss_by_source/prose")[4] == 1.0
    assert scalars(tmp_path, "validation/held-out") == {4: 1.0}


def test_sinks_get_every_record_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    sinks = SinkList([JsonLines(path, clock=lambda: 0.0) for path in paths])
    sinks.start(info())
    sinks.step(record(1))
    sinks.event("e", step=1)
    sinks.evaluation(EvaluationRecord(step=1, losses={}, tokens={}))
    sinks.close()
    sinks.close()
    assert read(paths[0]) == read(paths[1])
    assert len(read(paths[0])) == 4


def test_perplexity_does_not_overflow() -> None:
    evaluation = EvaluationRecord(step=1, losses={"a": 0.0, "b": 1e6}, tokens={})
    assert (evaluation.perplexity("a"), evaluation.perplexity("b")) == (1.0, math.inf)


def test_throughput_leaves_out_the_first_step_and_outliers() -> None:
    throughput = Throughput(window=5)
    throughput.add(100.0, 10)
    assert (throughput.tokens_per_second, throughput.eta_seconds(7)) == (None, None)
    for seconds in (2.0, 2.0, 50.0, 2.0, 2.0):
        throughput.add(seconds, 10)
    assert throughput.tokens_per_second == 5.0
    assert throughput.eta_seconds(7) == 14.0


def test_throughput_follows_a_change_of_speed() -> None:
    throughput = Throughput(window=3)
    for seconds in (1.0, 1.0, 1.0, 1.0, 4.0, 4.0):
        throughput.add(seconds, 8)
    assert throughput.step_seconds == 4.0


@pytest.mark.parametrize("uuid", [None, "GPU-00000000-0000-0000-0000-000000000000"])
def test_without_that_gpu_there_are_no_readings(uuid: str | None) -> None:
    assert GpuMonitor(uuid).read() == {}
