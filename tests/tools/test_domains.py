"""The table's chains are what its rows on paces and metadata need them to be."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tools.continual_table.domains import (
    CHAINS,
    LENGTH,
    MIXED,
    NAMES,
    SYMBOLS,
    Domains,
    entropy,
    write_chains,
)
from trainer.data.indexed import IndexedReader
from trainer.data.metadata import METADATA


def test_a_document_names_its_domain_once() -> None:
    for record in Domains(16).documents(200, 3):
        assert len(record["text"]) == LENGTH
        assert [one for one in record["text"] if one not in SYMBOLS] == [record["domain"]]


def test_pairs_of_symbols_tell_the_domain_and_symbols_alone_do_not() -> None:
    pairs: dict[str, Counter[tuple[str, str]]] = {name: Counter() for name in NAMES}
    symbols: dict[str, Counter[str]] = {name: Counter() for name in NAMES}
    for record in Domains(16).documents(3000, 3):
        text = record["text"].replace(record["domain"], "")
        pairs[record["domain"]].update(pairwise(text))
        symbols[record["domain"]].update(text)
    for name in NAMES:
        likely = sum(count for _, count in pairs[name].most_common(len(SYMBOLS)))
        assert likely / pairs[name].total() == pytest.approx(0.8 + 0.2 / 32, abs=0.02)
        assert max(symbols[name].values()) / symbols[name].total() < 2 / len(SYMBOLS)


def test_the_lowest_loss_is_that_of_one_who_knows_the_chain() -> None:
    follows: dict[str, Counter[str]] = {symbol: Counter() for symbol in SYMBOLS}
    for record in Domains(1).documents(4000, 3):
        for one, other in pairwise(record["text"].replace("A", "")):
            follows[one][other] += 1
    total = sum(seen.total() for seen in follows.values())
    measured = -sum(
        count * math.log(count / seen.total()) for seen in follows.values() for count in seen.values()
    )
    assert measured / total == pytest.approx(entropy(), abs=0.02)


def test_the_name_is_the_metadata_and_one_token(tmp_path: Path) -> None:
    write_chains(tmp_path, documents=20, held_out=5)
    for name in CHAINS:
        assert len(IndexedReader(str(tmp_path / f"{name}-validation"))) == 5
    text, names = IndexedReader(str(tmp_path / MIXED)), IndexedReader(f"{tmp_path / MIXED}{METADATA}")
    assert (len(text), text.num_tokens, names.num_tokens) == (20, 20 * (LENGTH + 1), 20)
    for number in range(20):
        (name,) = np.asarray(names[number]).tolist()
        assert name in np.asarray(text[number])
