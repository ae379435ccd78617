"""A prepared corpus: Megatron's pair of files, and a JSON beside it that says how it was made."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trainer.data.config import DataConfig, SourceConfig, ValidationConfig
from trainer.data.indexed import IndexedReader
from trainer.data.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sidecar:
    """PREFIX.json: what a pair of files cannot say about itself."""

    tokenizer: str
    """As it was named when the data were prepared."""
    eod: str | None
    fingerprint: str
    vocab_size: int
    eod_id: int
    documents: int
    tokens: int
    """The end of each document included."""
    text_bytes: int
    """UTF-8 bytes of the documents."""
    inputs: list[str]
    bad_records: dict[str, int] = field(default_factory=dict)
    """How many records were skipped, by reason."""
    ratoon: str = ""
    """The version that prepared them."""

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_sidecar(prefix: str) -> Sidecar | None:
    """The JSON beside PREFIX.bin; None when there is none, as with data that Megatron-LM prepared.

    Raises:
        ValueError: there is one, but it is not ours.
    """
    path = Path(prefix + ".json")
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Sidecar(**{one.name: content[one.name] for one in fields(Sidecar)})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not written by ratoon data prepare ({error!r}); move it away") from error


def open_corpus(prefix: str, tokenizer: Tokenizer) -> IndexedReader:
    """Map a corpus that was made with `tokenizer`.

    Raises:
        ValueError: it is missing, broken, empty, or made with another tokenizer.
    """
    corpus = IndexedReader(prefix)
    if corpus.num_tokens == 0:
        raise ValueError(f"{prefix}: holds no tokens; prepare it from files that have text")
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        logger.warning(
            "%s.json does not exist: nothing says which tokenizer made these tokens; ids are only checked to "
            "be below %d",
            prefix,
            tokenizer.vocab_size,
        )
    elif sidecar.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{prefix}: made with the tokenizer {sidecar.tokenizer} ({sidecar.vocab_size} ids, fingerprint "
            f"{sidecar.fingerprint}), the run has another ({tokenizer.vocab_size} ids, fingerprint "
            f"{tokenizer.fingerprint}); set data.tokenizer to that one or prepare the data again"
        )
    elif (sidecar.documents, sidecar.tokens) != (corpus.num_documents, corpus.num_tokens):
        raise ValueError(
            f"{prefix}: its .json counts {sidecar.documents} documents and {sidecar.tokens} tokens, its .idx "
            f"{corpus.num_documents} and {corpus.num_tokens}; they are not of one set, prepare the data again"
        )
    return corpus


def open_corpora(
    config: DataConfig,
) -> tuple[Tokenizer, list[IndexedReader], list[IndexedReader]]:
    """The tokenizer, the sources and the validation sets of a run.

    Raises:
        ValueError: lists everything that is wrong with any of them.
    """
    problems = config.problems()
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = load_tokenizer(config.tokenizer, config.eod)
    except ValueError as error:
        if not any(problem.startswith("data.tokenizer") for problem in problems):
            problems.append(f"data.tokenizer: {error}")
    opened: dict[str, list[IndexedReader]] = {"sources": [], "validation": []}
    sections: dict[str, tuple[SourceConfig, ...] | tuple[ValidationConfig, ...]] = {
        "sources": config.sources,
        "validation": config.validation,
    }
    for section, entries in sections.items():
        for entry in entries:
            where = f"data.{section} {entry.name!r}"
            if tokenizer is None or any(problem.startswith(where) for problem in problems):
                continue
            try:
                opened[section].append(open_corpus(entry.path, tokenizer))
            except ValueError as error:
                problems.append(f"{where}: {error}")
    if problems or tokenizer is None:
        raise ValueError("the data cannot be read:\n" + "\n".join(f"- {problem}" for problem in problems))
    return tokenizer, opened["sources"], opened["validation"]
