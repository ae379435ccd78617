"""Documents of domains that a text gives away slowly: what metadata conditioning needs, in small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch.demo.texts import Record, write_records
from trainer.data.metadata import MetadataOptions
from trainer.data.prepare import PrepareOptions, prepare

DOMAINS = "ABCDEFGHIJKLMNOP"
SYMBOLS = "abcdefghijklmnopqrstuvwxyz012345"
TOKENIZER = "bytes"
"""One token for a symbol, and one for the name of a domain."""
CHAINS_SEED, TRAINED_SEED, HELD_OUT_SEED = 7, 1, 2


@dataclass(frozen=True)
class Chains:
    """A Markov chain over `SYMBOLS` for every domain.

    Attributes:
        length: characters of a document.
        follows: probability that a symbol is followed by its successor in the domain, a permutation of the
            symbols; any symbol follows else. All symbols are equally frequent in all domains, so that only
            pairs of neighbours tell which domain it is.
    """

    length: int = 64
    follows: float = 0.8

    def documents(self, count: int, seed: int) -> Iterator[Record]:
        """Documents with "domain" and "text".

        The name of its domain stands once in each, anywhere, as a page mentions its site: what comes before
        it has to be told from the symbols, what comes behind it need not.
        """
        successors = self._successors()
        chance = np.random.default_rng(seed)
        for _ in range(count):
            domain, symbol = int(chance.integers(len(DOMAINS))), int(chance.integers(len(SYMBOLS)))
            keep = chance.random(self.length) < self.follows
            other = chance.integers(len(SYMBOLS), size=self.length)
            text = [SYMBOLS[symbol]]
            for at in range(1, self.length - 1):
                symbol = int(successors[domain, symbol] if keep[at] else other[at])
                text.append(SYMBOLS[symbol])
            text.insert(int(chance.integers(self.length)), DOMAINS[domain])
            yield {"domain": DOMAINS[domain], "text": "".join(text)}

    def _successors(self) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """int64 [domains, symbols]; the same for every corpus."""
        chance = np.random.default_rng(CHAINS_SEED)
        return np.stack([chance.permutation(len(SYMBOLS)) for _ in DOMAINS])


def write_domains(prefix: Path, *, documents: int, held_out: int) -> None:
    """Write PREFIX and PREFIX-validation, prepared, the name of its domain as the metadata of each document.

    Args:
        documents, held_out: how many of either.
    """
    for path, count, seed in (
        (prefix, documents, TRAINED_SEED),
        (prefix.with_name(f"{prefix.name}-validation"), held_out, HELD_OUT_SEED),
    ):
        text = path.with_suffix(".jsonl")
        write_records(text, Chains().documents(count, seed))
        prepare(
            PrepareOptions(
                inputs=(str(text),),
                output=str(path),
                tokenizer=TOKENIZER,
                metadata=MetadataOptions("domain", "{}"),
            )
        )
