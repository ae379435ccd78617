"""Small corpora with known tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from trainer.data.indexed import write_index

EOD = 9_999


def write_tokens(prefix: Path, documents: Sequence[Sequence[int]], dtype: type[np.generic] = np.int32) -> str:
    """A pair of files that holds exactly these documents, and no sidecar."""
    np.array([t for document in documents for t in document], dtype=dtype).tofile(f"{prefix}.bin")
    with open(f"{prefix}.idx", "wb") as file:
        write_index(file, dtype, [np.array([len(document) for document in documents], dtype=np.int32)])
    return str(prefix)


def ragged(count: int, *, first: int = 0, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Documents of 1 to `longest` tokens in which no token id occurs twice."""
    lengths = np.random.default_rng(seed).integers(1, longest + 1, count)
    ends = first + np.cumsum(lengths)
    return [
        list(range(end - length, end)) for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
    ]


def write_words(folder: Path) -> str:
    """A tokenizer.json with ids 0 to 9,998 for the words w0, w1, ..., and EOD."""
    vocabulary = {f"w{number}": number for number in range(EOD)} | {"<|endoftext|>": EOD}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = folder / "words.json"
    tokenizer.save(str(path))
    return str(path)


def write_lines(path: Path, texts: Sequence[str]) -> str:
    """A .jsonl with one text a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)
