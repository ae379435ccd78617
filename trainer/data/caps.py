"""Whether sources with a `max_epochs` last for the steps that a run file asks for, before they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.config import DataConfig
from trainer.data.dealing import CapsReachedError, Cursor, Dealer, Terms
from trainer.data.position import Position
from trainer.data.terms import groups_of, terms_of
from trainer.data.transforms.opening import sizes_of
from trainer.data.transforms.state import position_here

EXACT_SEQUENCES = 2_000_000
"""Up to so many sequences a stage is dealt for the answer, which takes seconds at most."""


def cap_problems(
    config: DataConfig,
    *,
    seed: int,
    global_batch: int,
    first_step: int,
    last_step: int,
    state: Mapping[str, Any] | None = None,
    stage: str = "",
) -> list[str]:
    """What keeps steps first_step, ..., last_step - 1 from being dealt; empty when nothing does.

    Only a mixture in which every source has a cap can run out. A short stage is dealt to see whether it does.
    Of a long one the steps are counted that are sure (`_surely`), so it may be refused for its last few.

    Args:
        config: of the stage; its files can be opened.
        seed: of the run.
        global_batch: sequences in a step.
        first_step: of the stage.
        last_step: the first one after it.
        state: data position that the stage starts from; None when it starts at the beginning of its sources,
            or when nobody knows yet.
        stage: its name.

    Raises:
        ValueError: as `resolve_weights` and `Position.resume`.
    """
    if not any(source.max_epochs for source in config.sources):
        return []
    sizes = sizes_of(config)
    terms = terms_of(config, sizes, seed=seed, global_batch=global_batch, stage=stage)
    if any(weight and terms.caps[name] is None for name, weight in terms.weights.items()):
        return []
    if state is not None:
        state = position_here(config, state, seed=seed)
    start = _start(terms, first_step, state)
    if not _left(terms, start):
        return []  # what has a cap takes no part
    if (last_step - first_step) * global_batch <= EXACT_SEQUENCES:
        reached = _deal(Dealer(terms, start, groups_of(config)), last_step)
    else:
        reached = first_step + _surely(terms, start)
    if reached >= last_step:
        return []
    wanted = (last_step - first_step) * global_batch * config.sequence_length
    left = sum(_left(terms, start)) * config.sequence_length
    return [
        f"data.sources max_epochs: steps {first_step} to {last_step} take {wanted:,} tokens, but every "
        f"source has a cap, and together they have {left:,} left, enough to step {reached}; raise a "
        f"max_epochs, add a source without one, or end at step {reached}"
    ]


def _start(terms: Terms, first_step: int, state: Mapping[str, Any] | None) -> Cursor:
    if state is None:
        return Cursor.beginning(terms, first_step, {})
    return Position.begin(terms, tokenizer=str(state.get("tokenizer", "")), paths={}).resume(state).start


def _deal(dealer: Dealer, last_step: int) -> int:
    """The step that the dealing comes to, at most `last_step`."""
    for step in range(dealer.start.step, last_step):
        try:
            dealer.deal(step)
        except CapsReachedError:
            return step
    return last_step


def _left(terms: Terms, start: Cursor) -> list[int]:
    """Whole sequences that may still be read of each source in the mixture."""
    return [
        max(0, cap - read) // terms.sequence_length
        for (name, cap), weight, read in zip(
            terms.caps.items(), terms.weights.values(), start.read, strict=True
        )
        if cap is not None and (weight or name in terms.fixed)
    ]


def _surely(terms: Terms, start: Cursor) -> int:
    """Steps that are dealt whatever the order of the sources.

    A source leaves when its next step takes more than is left of it. A step has global_batch sequences, so
    fewer are left then, and K steps are dealt with K x global_batch >= what all have left now - sources x
    (global_batch - 1). Sequences that a source without a cap has in every step do not count.
    """
    endless = sum(count for name, count in terms.fixed.items() if terms.caps[name] is None)
    left, batch = _left(terms, start), terms.global_batch - endless
    return max(0, -(-(sum(left) - len(left) * (batch - 1)) // batch))
