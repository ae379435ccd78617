"""The diagonal of the Fisher matrix: the mean of squared gradients over data that shall not be forgotten."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from parallel.engine import Engine
from parallel.forward import run_micro_batches
from parallel.shards import MainPiece
from trainer.data.batch import MicroBatch
from trainer.data.config import DataConfig, SourceConfig
from trainer.data.stream import TokenStream
from trainer.loss import token_loss
from trainer.updates.config import AnchorConfig

Sequences = Sequence[MicroBatch]
"""Of one draw, a single sequence in each micro-batch; the same on every rank."""


def draws(
    data: DataConfig, names: Sequence[str], *, batches: int, sequences: int, seed: int
) -> Iterator[Sequences]:
    """`batches` draws of so many sequences from training or validation sets, alike from each of them."""
    paths = {one.name: one.path for one in data.validation} | {one.name: one.path for one in data.sources}
    chosen = tuple(SourceConfig(name=name, path=paths[name]) for name in names)
    own = DataConfig(
        tokenizer=data.tokenizer,
        eod=data.eod,
        sequence_length=data.sequence_length,
        sources=chosen,
        document_mask=data.document_mask,
    )
    stream = TokenStream(own, seed=seed, global_batch=sequences)
    for number in range(batches):
        yield stream.micro_batches(number, data_rank=0, data_size=1, micro_batch=1)


def drawing(data: DataConfig, seed: int) -> Callable[[AnchorConfig], Iterator[Sequences]]:
    """What `Updates.begin` takes for a run with these data: the sequences that an anchor asks for."""

    def draw(anchor: AnchorConfig) -> Iterator[Sequences]:
        return draws(data, anchor.sources, batches=anchor.batches, sequences=anchor.sequences, seed=seed)

    return draw


def add_fisher(
    engine: Engine, pieces: Sequence[MainPiece], key: str, drawn: Iterable[Sequences], *, document_mask: bool
) -> int:
    """Add the mean over the draws of the squared gradient of each draw's mean loss per token.

    The labels are the data's own: the empirical Fisher matrix. The gradient that is squared is that of a
    whole draw, summed over data, context and micro-batches: of single sequences when a draw has one. So the
    result does not depend on the layout; data ranks beyond the sequences of a draw compute with weight zero.
    Auxiliary losses of experts are left out. Leaves the gradients cleared, weights and moments as they were.

    Args:
        key: the state of `pieces` that the result is added to, fp32.

    Returns:
        How many draws there were.
    """
    sums = [torch.zeros_like(piece.value) for piece in pieces]
    count = 0
    with _without_auxiliary_losses(engine):
        for sequences in drawn:
            tokens = sum(float(one.loss_weights.sum()) for one in sequences)
            if tokens == 0:
                continue  # no label in it: nothing to learn from
            engine.zero_grad()
            engine.scale_loss(1.0 / tokens)
            run_micro_batches(
                engine,
                _share(engine, sequences),
                token_loss(_num_sources(sequences)),
                document_mask=document_mask,
            )
            engine.ready_gradients()
            for piece, total in zip(pieces, sums, strict=True):
                total.addcmul_(piece.gradient, piece.gradient)
            count += 1
    engine.zero_grad()
    if count == 0:
        raise ValueError("updates.anchor.sources: their sequences have no token with a label to predict")
    for piece, total in zip(pieces, sums, strict=True):
        piece.state(key).add_(total, alpha=1.0 / count)
    return count


def _num_sources(sequences: Sequences) -> int:
    return max(int(one.sources.max()) for one in sequences) + 1


def _share(engine: Engine, sequences: Sequences) -> list[MicroBatch]:
    """This data rank's sequences, and as many without weight as the others' number and the pipeline need."""
    mesh = engine.mesh
    mine = list(sequences[mesh.data_rank :: mesh.data])
    most = -(-len(sequences) // mesh.data)
    if mesh.layout.virtual_pipeline:  # interleaving takes multiples of the stages
        most += -most % mesh.layout.pipeline
    empty = dataclasses.replace(sequences[0], loss_weights=torch.zeros_like(sequences[0].loss_weights))
    return mine + [empty] * (most - len(mine))


@contextlib.contextmanager
def _without_auxiliary_losses(engine: Engine) -> Iterator[None]:
    config = engine.config
    held = (config.moe_aux_loss_coeff, config.moe_z_loss_coeff)
    config.moe_aux_loss_coeff, config.moe_z_loss_coeff = 0.0, None
    try:
        yield
    finally:
        config.moe_aux_loss_coeff, config.moe_z_loss_coeff = held
