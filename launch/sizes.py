"""Numbers as people read them."""

from __future__ import annotations


def readable_size(num_bytes: float) -> str:
    """Four digits and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} TB"


def counted(number: int, what: str) -> str:
    """A number and a noun, which takes an s for any but one."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
