"""The text of the demo: what every Python brings along, as prose and as code, prepared like any other.

Prose is the language reference behind `help("...")`; code is the standard library. Neither needs a download.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.data.prepare import PrepareOptions, PrepareReport, prepare

DOCUMENT_CHARACTERS = 4000
CODE_BYTES = 1_500_000
LARGEST_MODULE = 60_000
HELD_OUT_SHARE = 0.1
MADE_BY_MACHINE = "_sysconfigdata"
"""What the module begins with that describes the machine on which this Python was built."""


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus and what was held out of it."""

    name: str
    prefix: Path
    report: PrepareReport

    @property
    def held_out(self) -> Path:
        """Prefix of the documents that no run trains on, where there are any."""
        return self.prefix.with_name(self.prefix.name + "-validation")


def prose_documents(topics: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The topics in pieces of some paragraphs, as JSON records with "topic" and "text".

    Topics quote each other at length. A paragraph is taken once, since a copy of it among the held-out
    documents would be no test of anything.
    """
    seen: set[str] = set()
    for topic in sorted(topics):
        piece: list[str] = []
        for paragraph in topics[topic].split("\n\n"):
            if not paragraph.strip() or paragraph in seen:
                continue
            seen.add(paragraph)
            piece.append(paragraph)
            if sum(map(len, piece)) >= DOCUMENT_CHARACTERS:
                yield {"topic": topic, "text": "\n\n".join(piece)}
                piece = []
        if piece:
            yield {"topic": topic, "text": "\n\n".join(piece)}


def write_prose(path: Path) -> None:
    """Write Python's own topics as JSON lines."""
    from pydoc_data.topics import topics

    lines = (json.dumps(document, ensure_ascii=False) for document in prose_documents(topics))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def choose_code(library: Path | None = None) -> list[str]:
    """The standard library's modules of ordinary size, in the order of their names, up to CODE_BYTES.

    The same on every machine: what was written when Python was built is left out.

    Raises:
        ValueError: this Python has come without the source of its library.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    chosen: list[str] = []
    total = 0
    for path in sorted(library.glob("*.py")):
        size = path.stat().st_size
        written = not path.name.startswith(MADE_BY_MACHINE)
        if written and size <= LARGEST_MODULE and total + size <= CODE_BYTES:
            chosen.append(str(path))
            total += size
    if not chosen:
        raise ValueError(
            f"no .py file in {library}: the demo reads the standard library's source, which this Python "
            "came without; use one that was installed in full"
        )
    return chosen


def held_out(text: str) -> bool:
    """Whether `prepare_corpus` holds this document out: by the hash that `prepare` goes by."""
    import xxhash

    return xxhash.xxh3_64_intdigest(text.encode()) < int(HELD_OUT_SHARE * 2**64)


def prepare_corpus(name: str, inputs: list[str], folder: Path, *, tokenizer: str) -> Corpus:
    """Prepare `inputs` as FOLDER/NAME, a tenth of the documents held out."""
    options = PrepareOptions(
        inputs=tuple(inputs),
        output=str(folder / name),
        tokenizer=tokenizer,
        validation_share=HELD_OUT_SHARE,
    )
    return Corpus(name, folder / name, prepare(options))


def unigram_loss(train: Path, held_out: Path, vocab_size: int) -> float:
    """Nats a token that knowing each token's frequency and nothing else costs on the held-out documents.

    Frequencies are those of the training documents, every count raised by one so that none is zero.
    """
    import numpy as np

    from trainer.data.indexed import IndexedReader

    counts = np.bincount(IndexedReader(str(train)).tokens, minlength=vocab_size) + 1.0
    held_out_counts = np.bincount(IndexedReader(str(held_out)).tokens, minlength=vocab_size)
    return float(-(held_out_counts / held_out_counts.sum()) @ np.log(counts / counts.sum()))
