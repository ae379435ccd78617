"""A prepared corpus: Megatron's pair of files, and a JSON beside it that says how it was made."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from checkpoint.folder import write_durably
from trainer.data.config import DataConfig
from trainer.data.indexed import IndexedReader
from trainer.data.tokenizer import Tokenizer, load_tokenizer

Section = Literal["sources", "validation"]
OpenedCorpora = tuple[Tokenizer, list[IndexedReader]]
"""A section's corpora in their order, and the tokenizer that made them."""

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
    template: str | None = None
    """Of PREFIX.meta: how the metadata of a document is written before it."""

    def write(self, path: Path) -> None:
        """Write it as JSON, safely on the disk."""
        content = asdict(self)
        if self.template is None:
            del content["template"]
        write_durably(path, (json.dumps(content, indent=2) + "\n").encode())


def read_sidecar(prefix: str) -> Sidecar | None:
    """The JSON beside PREFIX.bin; None when there is none, as with data that Megatron-LM prepared.

    Raises:
        ValueError: there is one, but it is not ours.
    """
    path = Path(prefix + ".json")
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = {"template": None} | json.loads(path.read_text(encoding="utf-8"))
        return Sidecar(**{one.name: content[one.name] for one in fields(Sidecar)})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not written by ratoon data prepare ({error!r}); move it away") from error


def open_corpus(prefix: str, tokenizer: Tokenizer) -> IndexedReader:
    """Map a corpus that was made with `tokenizer`, as far as its sidecar tells.

    Raises:
        ValueError: it is missing, broken, empty, or made with another tokenizer.
    """
    corpus = IndexedReader(prefix)
    if corpus.num_tokens == 0:
        raise ValueError(f"{prefix}: holds no tokens; prepare it from files that have text")
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        return corpus
    if sidecar.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{prefix}: made with the tokenizer {sidecar.tokenizer} ({sidecar.vocab_size} ids, fingerprint "
            f"{sidecar.fingerprint}), the run has another ({tokenizer.vocab_size} ids, fingerprint "
            f"{tokenizer.fingerprint}); set data.tokenizer to that one or prepare the data again"
        )
    if (sidecar.documents, sidecar.tokens) != (corpus.num_documents, corpus.num_tokens):
        raise ValueError(
            f"{prefix}: its .json counts {sidecar.documents} documents and {sidecar.tokens} tokens, its .idx "
            f"{corpus.num_documents} and {corpus.num_tokens}; they are not of one set, prepare the data again"
        )
    return corpus


def open_corpora(config: DataConfig, section: Section) -> OpenedCorpora:
    """The tokenizer of a run, and the corpora of this section in their order; replay has none of its own.

    Raises:
        ValueError: lists everything that is wrong; of the other section, only which files are missing.
    """
    problems = config.problems()
    tokenizer, corpora = _open(config, (section,), problems)
    if problems or tokenizer is None:
        raise ValueError("the data cannot be read:\n" + "\n".join(f"- {problem}" for problem in problems))
    _warn_of_unknown_makers(corpora, tokenizer)
    return tokenizer, corpora


def data_problems(config: DataConfig) -> list[str]:
    """What keeps a run from reading its data, training and validation; opens every corpus, reads no token."""
    problems = config.problems()
    _open(config, ("sources", "validation"), problems)
    return problems


def _open(
    config: DataConfig, sections: tuple[Section, ...], problems: list[str]
) -> tuple[Tokenizer | None, list[IndexedReader]]:
    """Open what has no problem yet; adds to `problems` what is found wrong on the way."""
    corpora: list[IndexedReader] = []
    try:
        tokenizer = load_tokenizer(config.tokenizer, config.eod)
    except ValueError as error:
        if not any(problem.startswith("data.tokenizer") for problem in problems):
            problems.append(f"data.tokenizer: {error}")
        return None, corpora
    known = tuple(problems)
    for section in sections:
        for entry in config.sources if section == "sources" else config.validation:
            where = f"data.{section} {entry.name!r}: "
            if entry.path is not None and not any(problem.startswith(where) for problem in known):
                try:
                    corpora.append(open_corpus(entry.path, tokenizer))
                except ValueError as error:
                    problems.append(where + str(error))
    return tokenizer, corpora


def _warn_of_unknown_makers(corpora: Sequence[IndexedReader], tokenizer: Tokenizer) -> None:
    bare = [corpus.prefix for corpus in corpora if read_sidecar(corpus.prefix) is None]
    if bare:
        logger.warning(
            "no .json beside %s%s: nothing says which tokenizer made these tokens, so their ids are only "
            "checked to be below %d",
            ", ".join(bare[:3]),
            f" and {len(bare) - 3} more" if len(bare) > 3 else "",
            tokenizer.vocab_size,
        )
