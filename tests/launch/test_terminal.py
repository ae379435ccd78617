"""What a person sees while a run trains, on a terminal and in a file."""

import dataclasses
import io
import math

import pytest
from rich.console import Console

from launch.terminal import Terminal, count, duration, live_line
from trainer.metrics.sink import EvaluationRecord, RunInfo, StepRecord

INFO = RunInfo("run", 0, 200, 64, layout="TP2 PP2 DP1", parameters=1_234_567, notes=("kernels: portable",))
RECORD = StepRecord(
    step=7,
    loss=2.34567,
    lr=3e-4,
    grad_norm=1.25,
    tokens=64,
    step_seconds=0.5,
    tokens_per_second=12_345.0,
    eta_seconds=3723.4,
    mfu={"causal": 0.4123, "full": 0.5},
    source_losses={"prose": 2.2, "code": 2.5},
)


def lines_of(*, terminal: bool, width: int = 80) -> list[str]:
    """Everything that a small run prints."""
    stream = io.StringIO()
    shown = Terminal(Console(file=stream, force_terminal=terminal, width=width, highlight=False))
    shown.start(INFO)
    shown.step(RECORD)
    shown.event("saved (1.2 GiB, stall 0.03 s)", step=7)
    shown.evaluation(EvaluationRecord(step=7, losses={"held-out": 1.0}, tokens={"held-out": 2048}))
    shown.close()
    shown.close()
    return stream.getvalue().splitlines()


def test_a_file_gets_a_line_for_every_record_and_no_control_characters() -> None:
    lines = lines_of(terminal=False)
    assert "\x1b" not in "".join(lines)
    assert lines[:4] == [
        "run: TP2 PP2 DP1, 1.23M parameters",
        "kernels: portable",
        "step 7/200  loss 2.3457  lr 3.00e-04  tok/s 12.3k  ETA 1:02:03  MFU 41.2%  norm 1.25"
        "  prose 2.2000  code 2.5000",
        "step 7: saved (1.2 GiB, stall 0.03 s)",
    ]
    assert any("held-out" in line and "2.72" in line and "2.05k" in line for line in lines)


def test_a_terminal_has_one_live_line_that_stays() -> None:
    text = "\n".join(lines_of(terminal=True))
    assert "7/200" in text.rpartition("held-out")[2]  # drawn again below what was printed since
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back


@pytest.mark.parametrize("width", range(10, 130))
def test_the_live_line_fits_every_width(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(live_line(RECORD, 200, width))
    (line,) = capture.get().splitlines()
    assert len(line) <= width
    assert line.startswith("7/200")


def test_eighty_columns_have_room_for_what_matters() -> None:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    with console.capture() as capture:
        console.print(live_line(RECORD, 200_000, 80))
    line = capture.get()
    assert [key for key in ("loss", "lr", "tok/s", "MFU", "ETA") if key in line] == [
        "loss",
        "lr",
        "tok/s",
        "MFU",
        "ETA",
    ]


def test_auxiliary_losses_stand_behind_the_loss_in_eighty_columns() -> None:
    record = dataclasses.replace(RECORD, auxiliary={"kl": 0.012345, "z": math.nan})
    console = Console(file=io.StringIO(), width=80, color_system=None)
    with console.capture() as capture:
        console.print(live_line(record, 20_000, 80))
    line = " ".join(capture.get().split())
    assert "loss 2.3457 kl 0.0123 z - lr 3.00e-04 tok/s 12.3k" in line
    assert "ETA" in line


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (12_345, "12.3k"),
        (999_600, "1M"),
        (8.03e9, "8.03B"),
        (2.5e15, "2500T"),
        (math.inf, "inf"),
    ],
)
def test_counts(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.6, "00:05"), (754, "12:34"), (11_045, "3:04:05"), (180_000, "2 days, 2:00:00"), (math.nan, "?")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
