"""Files that go along with a model: its configuration, tokenizer, and settings of generation."""

from __future__ import annotations

from pathlib import Path

from checkpoint.opening import Opened

CONFIG = "config.json"
CARRIED = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def carried_files(opened: Opened, folder: Path | None) -> dict[str, Path]:
    """Name -> path of those that are there.

    Args:
        folder: where to look; None looks beside the source.

    Raises:
        ValueError: the folder has none of them.
    """
    place = opened.folder if folder is None else folder
    found = {name: place / name for name in CARRIED if (place / name).is_file()}
    if folder is not None and not found:
        raise ValueError(f"--carry {folder}: it has none of {', '.join(CARRIED)}")
    return found
