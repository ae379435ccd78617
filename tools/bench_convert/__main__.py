"""Conversion and resharding, beside the trainers' own tools, on a genuine ZeRO-2 checkpoint.

    python -m tools.bench_convert [--gb 1.5] [--rounds 5] [--folder FOLDER] [--only convert|load]

Needs about four times the checkpoint on the disk that FOLDER is on (by default the system's for temporary
files). All programs take turns in one run, cold (the source dropped from the page cache, which is checked)
and warm; a turn counts from the start of the process until `sync` returns, so that all have to bring their
bytes to the disk. Prints medians, ratios and the targets; exit code 1 when one is missed.

An index takes what every conversion takes besides copying: the interpreter's start, headers, the plan.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.bench_convert.contest import Program, Turns, compete

RANKS, SMALLER = 2, 3  # the memory is measured at two sizes, one of them a third of the other
UNIVERSAL, VERIFIED, INDEX = "ratoon universal", "ratoon universal, verified", "ratoon index"
DEEPSPEED, COPY, THEIRS = "ratoon deepspeed_universal", "cp -r", "ds_to_universal"
COMPILED = ("env", "-u", "PYTHONDONTWRITEBYTECODE")  # as where a package is installed
ON_CPU = (*COMPILED, "DS_ACCELERATOR=cpu")
FASTER, AS_COPY, MEMORY, INDEX_SECONDS = 3.0, 1.25, 256e6, 2.0
OWN_BYTES, SAME_LAYOUT = 1.1, 1.2


@dataclass(frozen=True)
class Target:
    """What was wanted, and what was found."""

    what: str
    found: float
    limit: float
    unit: str = ""
    at_least: bool = False

    @property
    def is_met(self) -> bool:
        return self.found >= self.limit if self.at_least else self.found <= self.limit

    def __str__(self) -> str:
        word = "at least" if self.at_least else "at most"
        verdict = "met   " if self.is_met else "MISSED"
        return f"{verdict} {self.what}: {self.found:.2f}{self.unit}, wanted {word} {self.limit:g}{self.unit}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench_convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=1.5, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--only", choices=("convert", "load"), default=None)
    chosen = parser.parse_args(arguments)
    targets: list[Target] = []
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="bench-convert-") as name:
        folder = Path(name)
        large = make(folder / "large", int(chosen.gb * 1e9))
        if chosen.only != "load":
            small = make(folder / "small", int(chosen.gb * 1e9 / SMALLER))
            targets += conversions(large, small, folder, chosen.rounds)
        if chosen.only != "convert":
            targets += loads(large, folder / "loads", chosen.rounds)
    print()
    for target in targets:
        print(target)
    return 0 if all(target.is_met for target in targets) else 1


def make(folder: Path, num_bytes: int) -> Path:
    """A checkpoint by DeepSpeed, in a process of its own; returns the folder that `latest` names."""
    folder.mkdir()
    program = (sys.executable, "-W", "ignore", "-m", "tools.bench_convert.zero2")
    command = (*ON_CPU, *program, str(folder), str(num_bytes), str(RANKS))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tag = folder / (folder / "latest").read_text().strip()
    size = sum(path.stat().st_size for path in tag.iterdir())
    print(f"DeepSpeed ZeRO-2, {RANKS} ranks, bf16: {size / 1e9:.2f} GB in {len(list(tag.iterdir()))} files")
    return tag


def programs(source: Path, target: Path) -> list[Program]:
    """All that take turns."""
    convert = (
        str(Path(sys.executable).with_name("ratoon")),
        "checkpoint",
        "convert",
        str(source),
        str(target),
    )
    workers = str(os.cpu_count() or 1)
    theirs = (
        *(*ON_CPU, sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"),
        *("--num_extract_workers", workers, "--num_merge_workers", workers),
        *("--input_folder", str(source), "--output_folder", str(target)),
    )
    fast = ("--no-verify", "--drop")
    return [
        Program(COPY, ("cp", "-r", str(source), str(target)), target),
        Program(UNIVERSAL, (*convert, "--to", "universal", *fast), target),
        Program(VERIFIED, (*convert, "--to", "universal", "--drop"), target),
        Program(DEEPSPEED, (*convert, "--to", "deepspeed_universal", *fast), target),
        Program(INDEX, (*convert, "--to", "index", *fast), target),
        Program(THEIRS, theirs, target),
    ]


def conversions(large: Path, small: Path, folder: Path, rounds: int) -> list[Target]:
    """Let all convert, cold and warm."""
    targets = []
    contestants = programs(large, folder / "out")
    compete(contestants, large, 1, cold=False)  # does not count: compiles Python's files
    for cold in (True, False):
        turns = compete(contestants, large, rounds, cold=cold)
        show("cold" if cold else "warm", turns)
        how = "cold" if cold else "warm"
        ours, index, copy = turns[UNIVERSAL].median, turns[INDEX].median, turns[COPY].median
        print(f"copying alone, without what an index takes too: {(ours - index) / copy:.2f} of cp -r")
        targets += [
            Target(f"{how}: ds_to_universal / ours", turns[THEIRS].median / ours, FASTER, at_least=True),
            Target(f"{how}: ours / cp -r", ours / copy, AS_COPY),
            Target(f"{how}: index", index, INDEX_SECONDS, " s"),
        ]
    ours_only = [p for p in programs(small, folder / "out") if p.name in (UNIVERSAL, VERIFIED, DEEPSPEED)]
    for size, found in (("large", turns), ("small", compete(ours_only, small, 1, cold=False))):
        for program in ours_only:
            most = max(found[program.name].anonymous) / 1e6
            targets.append(Target(f"{size}: anonymous memory of {program.name}", most, MEMORY / 1e6, " MB"))
    return targets


def show(how: str, turns: Mapping[str, Turns]) -> None:
    """A line a program."""
    print(f"\n{how:30} median s   all turns          anonymous MB")
    for name, found in sorted(turns.items(), key=lambda entry: entry[1].median):
        each = " ".join(f"{seconds:.2f}" for seconds in found.seconds)
        print(f"{name:30} {found.median:8.2f}   {each:18} {max(found.anonymous) / 1e6:8.0f}")


def loads(source: Path, folder: Path, rounds: int) -> list[Target]:
    """Load on the layout that saved, and on another."""
    import statistics

    from tools.bench_convert.loads import measure

    targets = []
    for cold in (True, False):
        how = "cold" if cold else "warm"
        folder.mkdir(exist_ok=True)
        found = measure(source, folder, rounds, cold=cold)
        seconds: dict[str, float] = {}
        for what in dict.fromkeys(each.what for each in found):
            seconds[what] = statistics.median(each.seconds for each in found if each.what == what)
        read = {each.what: each.read / each.own for each in found if each.own}
        print(f"\n{how:30} median s   bytes read / own")
        for what, median in seconds.items():
            print(f"{what:30} {median:8.2f}   " + (f"{read[what]:.3f}" if what in read else ""))
        for layout, other in (("tensor", "flat"), ("flat", "tensor")):
            there, here = f"ratoon: {layout} from {other}", f"ratoon: {layout} from {layout}"
            targets.append(
                Target(f"{how}: {there}, time / same layout", seconds[there] / seconds[here], SAME_LAYOUT)
            )
            targets.append(Target(f"{how}: {there}, bytes read / own", read[there], OWN_BYTES))
    return targets


if __name__ == "__main__":
    sys.exit(main())
