"""The table's domains are what its rows on metadata need them to be."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tools.continual_table.domains import DOMAINS, SYMBOLS, Chains, write_domains
from trainer.data.indexed import IndexedReader
from trainer.data.metadata import METADATA


def test_a_document_names_its_domain_once() -> None:
    for record in Chains().documents(200, 3):
        assert len(record["text"]) == 64
        assert [one for one in record["text"] if one not in SYMBOLS] == [record["domain"]]


def test_pairs_of_symbols_tell_the_domain_and_symbols_alone_do_not() -> None:
    pairs: dict[str, Counter[tuple[str, str]]] = {name: Counter() for name in DOMAINS}
    symbols: dict[str, Counter[str]] = {name: Counter() for name in DOMAINS}
    for record in Chains().documents(3000, 3):
        text = record["text"].replace(record["domain"], "")
        pairs[record["domain"]].update(pairwise(text))
        symbols[record["domain"]].update(text)
    for name in DOMAINS:
        likely = sum(count for _, count in pairs[name].most_common(len(SYMBOLS)))
        assert likely / pairs[name].total() == pytest.approx(0.8 + 0.2 / 32, abs=0.02)
        assert max(symbols[name].values()) / symbols[name].total() < 2 / len(SYMBOLS)


def test_the_name_is_the_metadata_and_one_token(tmp_path: Path) -> None:
    write_domains(tmp_path / "domains", documents=20, held_out=5)
    text, names = IndexedReader(str(tmp_path / "domains")), IndexedReader(f"{tmp_path / 'domains'}{METADATA}")
    assert (len(text), text.num_tokens, names.num_tokens) == (20, 20 * 65, 20)
    for number in range(20):
        (name,) = np.asarray(names[number]).tolist()
        assert name in np.asarray(text[number])
    assert len(IndexedReader(str(tmp_path / "domains-validation"))) == 5
