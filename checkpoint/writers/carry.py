"""Files that go along with a model: its configuration, tokenizer, and settings of generation."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoint.convert.output import WritePlan
from checkpoint.opening import Opened
from checkpoint.writers.huggingface_config import config_of

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


def configure(written: WritePlan, opened: Opened, dtype: str) -> None:
    """Let the config.json that goes along say `dtype`; make one where none does and the model is known."""
    if CONFIG in written.carried:
        config = json.loads(written.carried[CONFIG].read_text(encoding="utf-8"))
        stated = {key: dtype for key in ("dtype", "torch_dtype") if config.get(key, dtype) != dtype}
        if stated:
            written.small[CONFIG] = json.dumps(config | stated, indent=2).encode()
            del written.carried[CONFIG]
        return
    model = opened.manifest.state.get("model")
    if model is None:
        return
    try:
        written.small[CONFIG] = json.dumps(config_of(model, dtype=dtype), indent=2).encode()
    except ValueError as error:
        written.notes.append(f"no config.json goes along: {error}")
