"""How fast this machine writes to a folder, measured in a moment."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

_SAMPLE = 1 << 25


def measure_speed(folder: Path) -> float:
    """Bytes a second that a new file in `folder`, or in the nearest folder above that exists, takes."""
    while not folder.is_dir():
        folder = folder.parent
    content = os.urandom(1 << 20) * (_SAMPLE >> 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        begin = time.monotonic()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return _SAMPLE / max(time.monotonic() - begin, 1e-6)
