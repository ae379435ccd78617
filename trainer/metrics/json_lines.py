"""`metrics.jsonl`: one JSON object a line, flushed as it is written.

Every line has "kind" (start, step, event, evaluation), "time" (Unix seconds) and "step" (optimizer steps
done). A step stands in the file once: when a run resumes from step n, lines of later steps belong to a future
that is about to be computed again, so they move to `metrics.superseded.jsonl` beside it. Nothing is thrown
away, and whoever reads `metrics.jsonl` needs no rule for duplicates. A line torn by a kill moves there too.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

from trainer.metrics.sink import EvaluationRecord, RunInfo, StepRecord


class JsonLines:
    """A `MetricSink` over one file."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._file: IO[str] | None = None

    def start(self, info: RunInfo) -> None:
        """Open the file and set aside what lies after `info.first_step`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            supersede(self.path, after=info.first_step)
        self._file = self.path.open("a", encoding="utf-8")
        content = asdict(info)
        self._write("start", step=content.pop("first_step"), **content)

    def step(self, record: StepRecord) -> None:
        """Append one step; readings that this machine does not have are left out."""
        self._write("step", **_said(record))

    def event(self, text: str, *, step: int) -> None:
        """Append one event."""
        self._write("event", step=step, text=text)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Append one evaluation."""
        always = {"losses": record.losses, "tokens": record.tokens}
        self._write("evaluation", **always | _said(record))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, kind: str, **content: Any) -> None:
        assert self._file is not None, "start() comes first, close() last"
        line = {"kind": kind, "time": round(self._clock(), 3)} | content
        self._file.write(json.dumps(valid_json(line), allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()


def _said(record: StepRecord | EvaluationRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if value is not None and value != {}}


def read_evaluations(path: Path) -> list[EvaluationRecord]:
    """The evaluations in a `metrics.jsonl`, in their order; torn lines are left out.

    Raises:
        ValueError: there is no such file, or a line of it is no evaluation that we have written.
    """
    known = {one.name for one in fields(EvaluationRecord)}
    found = []
    for line in read_lines(path):
        if line["kind"] != "evaluation":
            continue
        try:
            content = {key: _numbers(value) for key, value in line.items() if key in known}
            found.append(EvaluationRecord(**content))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: step {line.get('step')} is no evaluation ({error})") from error
    return found


def read_steps(path: Path) -> tuple[int, float, int]:
    """Steps done at the first start in a `metrics.jsonl`, when that was (Unix seconds), and steps done last.

    Raises:
        ValueError: there is no such file, or it has no start.
    """
    lines = list(read_lines(path))
    starts = [line for line in lines if line["kind"] == "start"]
    if not starts:
        raise ValueError(f'{path} has no line of kind "start"; expected the records of a run')
    return starts[0]["step"], starts[0]["time"], max(line["step"] for line in lines)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, as they stand there; torn ones are left out.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected what a run writes beside its config.toml")
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a run that was killed, or that is writing at this moment
        if isinstance(line, dict) and {"kind", "step"} <= line.keys():
            yield line


def _numbers(value: Any) -> Any:
    """What `valid_json` has made a string of is a number again; only losses can be such."""
    if isinstance(value, dict):
        return {key: float(one) if one in ("nan", "inf", "-inf") else one for key, one in value.items()}
    return value


def valid_json(value: Any) -> Any:
    """`value` with non-finite floats as the strings "nan", "inf", "-inf": JSON has no such numbers.

    `float()` reads them back.
    """
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case Mapping():
            return {str(key): valid_json(item) for key, item in value.items()}
        case str():
            return value
        case Sequence():
            return [valid_json(item) for item in value]
        case _:
            return value


def supersede(path: Path, *, after: int) -> int:
    """Move the lines of steps later than `after`, and torn ones, to `*.superseded.jsonl`; return how many."""
    kept: list[str] = []
    moved: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        (kept if _is_settled(line, after) else moved).append(line + "\n")
    if not moved:
        return 0
    with path.with_suffix(".superseded.jsonl").open("a", encoding="utf-8") as aside:
        aside.writelines(moved)
    partial = path.with_suffix(".jsonl.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)
    return len(moved)


def _is_settled(line: str, after: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= after
    except (ValueError, TypeError, KeyError):
        return False
