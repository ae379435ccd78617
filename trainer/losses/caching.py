"""Cached targets of a run: what the reference of one of its losses says about all of its steps."""

from __future__ import annotations

from pathlib import Path

from trainer.config import RunConfig
from trainer.losses.cache import CacheHeader, write_targets
from trainer.losses.hook import setting_of
from trainer.losses.opening import open_reference
from trainer.losses.targets import Reading, SameLayout
from trainer.session import open_session


def cache_targets(config: RunConfig, name: str, folder: Path) -> CacheHeader:
    """Write the likeliest tokens of the reference of the loss called `name`, for `cache` of that loss.

    Every rank calls it, on the layout of the run file or any other; it covers the steps from where the run
    stands to train.steps. It needs k x 8 + 4 bytes a token.

    Args:
        name: of a loss of kind kl with `top_k`.

    Raises:
        ValueError: there is no such loss, or its reference does not fit.
    """
    found = [one for one in config.losses if one.label == name and one.kind == "kl" and one.top_k is not None]
    if not found:
        raise ValueError(
            f"losses: none of kind kl with a top_k is called {name!r}: nothing to write targets of"
        )
    loss = found[0]
    assert loss.top_k is not None
    session, _ = open_session(config.model_copy(update={"losses": ()}))
    setting = setting_of(config, session.engine, session.model, lineage=session.lineage)
    model, identity = open_reference(loss, setting, session.mesh, None)
    reading = Reading(
        (True,) * len(config.data.sources), loss.temperature, loss.top_k, config.data.document_mask
    )
    header = CacheHeader(
        first_step=session.step,
        steps=config.train.steps - session.step,
        global_batch=config.train.global_batch,
        sequence_length=config.data.sequence_length,
        top_k=loss.top_k,
        temperature=loss.temperature,
        vocab_size=session.model.vocab_size,
        document_mask=config.data.document_mask,
        reference=identity,
    )
    source = SameLayout(model, reading, identity)
    write_targets(folder, source, header, lambda step: session.batches(step).micro_batches)
    session.saver.close()
    return header
