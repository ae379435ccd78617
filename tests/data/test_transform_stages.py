"""From a stage with metadata to one without and back: every document once an epoch, and an exact ledger."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_transforms import META, METADATA, Corpus, corpus, flat, hypothetical, read, stream
from trainer.data.caps import cap_problems
from trainer.data.dealing import CapsReachedError
from trainer.data.ledger import Ledger

__all__ = ["corpus"]  # a fixture

stages = st.lists(
    st.tuples(st.booleans(), st.integers(0, 12), st.sampled_from([5, 16])), min_size=2, max_size=6
)
"""with metadata or not, steps, sequence length"""


def play(
    corpus: Corpus, history: list[tuple[bool, int, int]], **source: Any
) -> tuple[list[int], list[dict[str, Any]]]:
    """The tokens read by stages that go on from each other, and the state behind each."""
    state, step, tokens, states = None, 0, list[int](), list[dict[str, Any]]()
    for number, (metadata, steps, length) in enumerate(history):
        config = corpus.config(sequence_length=length, transforms=METADATA if metadata else [])
        here = stream(config, state=state, first_step=step, stage=f"stage {number}")
        tokens += flat(read(here, steps, first=step), "tokens") if steps else []
        step += steps
        state = json.loads(json.dumps(here.state(step)))
        states.append(state)
    return tokens, states


@given(history=stages)
@hypothetical
def test_documents_once_an_epoch_whatever_they_are_read_with(
    corpus: Corpus, history: list[tuple[bool, int, int]]
) -> None:
    tokens, states = play(corpus, history)
    texts = [token for token in tokens if token < META]
    whole = sorted(t for text in corpus.texts for t in text)
    for first in range(0, len(texts) - len(whole) + 1, len(whole)):
        assert sorted(texts[first : first + len(whole)]) == whole
    rest = texts[len(texts) // len(whole) * len(whole) :]
    assert len(set(rest)) == len(rest)
    ledger = Ledger.of(states[-1])
    (entry,) = ledger.sources
    assert (entry.tokens, entry.fed) == (len(texts), len(tokens))
    assert entry.epochs == len(texts) / len(whole)
    assert sum(one.sequences * one.length for one in ledger.segments) == len(tokens)
    seen = Counter(texts)
    for times in (1, 2):
        expected = [n for n, text in enumerate(corpus.texts) if min(seen[t] for t in text) >= times]
        assert ledger.documents_read("web", times=times).tolist() == expected


@given(history=stages)
@hypothetical
def test_metadata_is_before_every_document_that_begins_with_it(
    corpus: Corpus, history: list[tuple[bool, int, int]]
) -> None:
    """Also of the one under way at the border, if nothing of its text had been read."""
    before_of = {text[0]: before for text, before in zip(corpus.texts, corpus.metadata, strict=True)}
    tokens, _ = play(corpus, history)
    at = 0
    for metadata, steps, length in history:
        part = tokens[at : at + steps * length * 4]
        for place, token in enumerate(part):
            before = before_of.get(token)
            if before and metadata and place >= len(before):
                assert part[place - len(before) : place] == before
            if not metadata:
                assert token < META
        at += len(part)


@given(history=stages)
@hypothetical
def test_a_restart_between_two_stages_leaves_no_trace(
    corpus: Corpus, history: list[tuple[bool, int, int]]
) -> None:
    _, states = play(corpus, history)
    metadata, _, length = history[-1]
    config = corpus.config(sequence_length=length, transforms=METADATA if metadata else [])
    last = f"stage {len(history) - 1}"
    again = stream(config, state=states[-1], stage=last)
    assert json.loads(json.dumps(again.state(states[-1]["step"]))) == states[-1]


def test_a_source_that_is_left_out_keeps_what_it_was_fed(corpus: Corpus) -> None:
    both = corpus.config(sources="both")
    state = stream(both, stage="a").state(9)
    only_prose = corpus.config(sources=[both.sources[1].model_dump()], transforms=[])
    between = stream(only_prose, state=state, stage="b").state(12)
    kept = Ledger.of(between).source("web")
    assert kept.metadata > 0
    before = Ledger.of(state).source("web")
    assert (kept.tokens, kept.fed) == (before.tokens, before.fed)
    back = stream(both, state=between, stage="c").state(12)
    assert Ledger.of(back).source("web").fed == kept.fed
    assert Ledger.of(back).source("web").tokens == kept.tokens


def test_another_seed_starts_over(corpus: Corpus) -> None:
    state = stream(corpus.config(), stage="a").state(9) | {"seed": 4}
    entry = Ledger.of(stream(corpus.config(), state=state, stage="b").state(9)).source("web")
    assert (entry.tokens, entry.fed) == (0, 0)


def test_other_texts_start_over(corpus: Corpus) -> None:
    state = stream(corpus.config(), stage="a").state(9)
    state["sources"][0]["epoch_tokens"] += 1
    for transforms in (METADATA, []):
        entry = Ledger.of(
            stream(corpus.config(transforms=transforms), state=state, stage="b").state(9)
        ).source("web")
        assert (entry.tokens, entry.fed) == (0, 0)


def test_another_template_goes_on_in_the_same_document(corpus: Corpus) -> None:
    """Metadata that were prepared again, with other lengths."""
    state = stream(corpus.config(), stage="a").state(9)
    state["sources"][0]["view"]["epoch_tokens"] += 5
    again = stream(corpus.config(), state=state, stage="a")
    assert Ledger.of(again.state(9)).source("web").tokens == Ledger.of(state).source("web").tokens
    assert again.state(9)["mixture_step"] == 9  # a new segment


def test_a_cap_counts_passes_over_documents(corpus: Corpus) -> None:
    """With metadata an epoch has more tokens, and so takes more steps."""
    texts, metadata = (sum(map(len, one)) for one in (corpus.texts, corpus.metadata))
    capped = [{"name": "web", "path": str(corpus.folder / "web"), "max_epochs": 1.0}]
    for transforms, tokens in ((METADATA, texts + metadata), ([], texts)):
        config = corpus.config(sources=capped, transforms=transforms)
        last = tokens // 64
        read(stream(config), last)
        assert not problems(config, 0, last)
        assert problems(config, 0, last + 1)
        try:
            stream(config).plan(last)
        except CapsReachedError:
            continue
        raise AssertionError("the cap was not kept")


def test_a_cap_counts_what_an_earlier_stage_has_read(corpus: Corpus) -> None:
    capped = [{"name": "web", "path": str(corpus.folder / "web"), "max_epochs": 1.0}]
    state = stream(corpus.config(sources=capped), stage="a").state(4)
    config = corpus.config(sources=capped, transforms=[])
    left = sum(map(len, corpus.texts)) - state["sources"][0]["tokens"]
    assert not problems(config, 4, 4 + left // 64, state)
    assert problems(config, 4, 5 + left // 64, state)


def problems(config: Any, first: int, last: int, state: dict[str, Any] | None = None) -> list[str]:
    return cap_problems(config, seed=3, global_batch=4, first_step=first, last_step=last, state=state)
