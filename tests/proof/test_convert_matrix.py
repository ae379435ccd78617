"""Every source becomes every target, bit for bit: `python -m tools.convert_matrix`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

TIMEOUT = 1500


def matrix(*only: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.convert_matrix", "--json"]
    command += ["--only", *only] if only else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.stdout, done.stderr[-4000:]
    return json.loads(done.stdout)


def assert_right(rows: dict[str, Any]) -> None:
    cells = {(source, to): cell for source, row in rows.items() for to, cell in row.items()}
    assert {key: cell for key, cell in cells.items() if cell["verdict"] not in ("equal", "lost")} == {}
    assert all(
        cells[source, to]["verdict"] == "equal" for source in rows for to in ("load", "universal", "index")
    )


def test_one_source_becomes_every_target() -> None:
    rows = matrix("deepspeed ZeRO-3 DP3")
    assert len(rows) == 1
    assert_right(rows)


@pytest.mark.long
@pytest.mark.timeout(TIMEOUT)
def test_every_source_becomes_every_target() -> None:
    rows = matrix()
    assert len(rows) > 20
    assert_right(rows)
