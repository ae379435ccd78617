"""Corpora of Markov chains, whose difficulty is known: domains that a text gives away slowly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch.demo.texts import Record, write_records
from trainer.data.metadata import MetadataOptions
from trainer.data.prepare import PrepareOptions, prepare

NAMES = "ABCDEFGHIJKLMNOP"
SYMBOLS = "abcdefghijklmnopqrstuvwxyz012345"
TOKENIZER = "bytes"
"""One token for a symbol, and one for the name of a domain."""
CHAINS: Mapping[str, int] = {"chains-1": 1, "chains-4": 4, "chains-16": 16}
"""By corpus, how many domains it mixes: the more, the longer it takes to learn."""
MIXED = "chains-16"
LENGTH = 80
"""Characters of a document."""
FOLLOWS = 0.8
"""Probability that a symbol is followed by its successor in the domain; any symbol follows else."""
TRAINED_SEED, HELD_OUT_SEED = 1, 2


@dataclass(frozen=True)
class Domains:
    """So many Markov chains over `SYMBOLS`.

    The successors of a domain are a permutation of the symbols, so that all symbols are equally frequent in
    all domains, and only pairs of neighbours tell which domain it is.
    """

    count: int

    def documents(self, count: int, seed: int) -> Iterator[Record]:
        """Documents with "domain" and "text".

        The name of its domain stands once in each, anywhere, as a page mentions its site: what comes before
        it has to be told from the symbols, what comes behind it need not.
        """
        successors = self._successors()
        chance = np.random.default_rng(seed)
        for _ in range(count):
            domain, symbol = int(chance.integers(self.count)), int(chance.integers(len(SYMBOLS)))
            keep = chance.random(LENGTH) < FOLLOWS
            other = chance.integers(len(SYMBOLS), size=LENGTH)
            text = [SYMBOLS[symbol]]
            for at in range(1, LENGTH - 1):
                symbol = int(successors[domain, symbol] if keep[at] else other[at])
                text.append(SYMBOLS[symbol])
            text.insert(int(chance.integers(LENGTH)), NAMES[domain])
            yield {"domain": NAMES[domain], "text": "".join(text)}

    def _successors(self) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """int64 [domains, symbols]; no two corpora have the same."""
        chance = np.random.default_rng(self.count)
        return np.stack([chance.permutation(len(SYMBOLS)) for _ in range(self.count)])


def entropy() -> float:
    """Nats of a symbol to one who knows its domain and its predecessor: about the lowest loss that can be."""
    other = (1.0 - FOLLOWS) / len(SYMBOLS)
    likely = FOLLOWS + other
    return -likely * math.log(likely) - (len(SYMBOLS) - 1) * other * math.log(other)


def write_chains(folder: Path, *, documents: int, held_out: int) -> None:
    """Write FOLDER/NAME and FOLDER/NAME-validation of `CHAINS`, with the names of domains as metadata.

    Args:
        documents, held_out: how many of either.
    """
    for name, count in CHAINS.items():
        domains = Domains(count)
        _write(folder / name, domains.documents(documents, TRAINED_SEED))
        _write(folder / f"{name}-validation", domains.documents(held_out, HELD_OUT_SEED))


def _write(prefix: Path, documents: Iterator[Record]) -> None:
    text = prefix.with_suffix(".jsonl")
    write_records(text, documents)
    metadata = MetadataOptions("domain", "{}")
    prepare(PrepareOptions((str(text),), output=str(prefix), tokenizer=TOKENIZER, metadata=metadata))
