"""The trainers' own loaders, in a process of theirs: `python -m tests.foreign --serve`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType

ASKED = ("huggingface", "torch_dist", "deepspeed_universal", "dcp")
"""Formats that another program reads; Ratoon's own are opened and compared here."""


class OwnLoaders:
    """Lets the trainer of a format load a converted folder and make one update, and hears what is wrong."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "tests.foreign", "--serve"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __enter__(self) -> OwnLoaders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def faults(self, to: str, folder: Path, oracle: str, *, optimizer: bool) -> list[str]:
        """A line for each thing that is wrong; none of formats that no other program reads.

        Args:
            oracle: its key in tests.foreign.
            optimizer: whether masters and moments are there, so that an update can be made.

        Raises:
            RuntimeError: the process has ended.
        """
        if to not in ASKED:
            return []
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"to": to, "folder": str(folder), "oracle": oracle, "optimizer": optimizer}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"tests.foreign --serve ended with {self._process.wait(60)} at {asked}")
        found: list[str] = json.loads(answer)
        return [f"by its own loader: {line}" for line in found]
