"""All of `[updates]` and `[slow_weights]` on the engine of a run: made before a load, begun after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from parallel.engine import Engine
from parallel.shards import MainPiece
from trainer.updates.anchors import (
    ANCHOR,
    IMPORTANCE,
    PATH,
    Missing,
    PathIntegral,
    Pull,
    consolidate,
    mean_importance,
    set_anchor,
)
from trainer.updates.config import AnchorConfig, SlowWeightsConfig, UpdatesConfig
from trainer.updates.fisher import Sequences, add_fisher
from trainer.updates.freeze import Freeze
from trainer.updates.selection import anchored_names, frozen_names
from trainer.updates.slow_weights import Counted, Ema, Reptile, swapped

Draw = Callable[[AnchorConfig], Iterable[Sequences]]
"""Makes the sequences that the Fisher matrix of an anchor is measured on."""


class Anchoring:
    """An anchor on an engine, with the importance of its kind."""

    def __init__(self, engine: Engine, config: AnchorConfig, names: set[str]) -> None:
        """Add the states of the parameters `names`, empty, and the pull."""
        self._engine, self._config = engine, config
        self._pieces = engine.add_state(ANCHOR, names.__contains__)
        self.pull = Pull(self._pieces, config.strength, weighted=config.kind != "l2")
        engine.transforms.append(self.pull)
        if config.kind != "l2":
            engine.add_state(IMPORTANCE, names.__contains__)
        if config.kind == "si":
            engine.add_state(PATH, names.__contains__)
            engine.transforms.append(PathIntegral(self._pieces))

    def begin(
        self, missing: Missing, *, new_stage: bool, scale: float | None, draw: Draw, document_mask: bool
    ) -> list[str]:
        """As `Updates.begin`; `scale` is that of the checkpoint. Call it on every rank."""
        anew = new_stage and not self._config.keep
        notes, measured = [], False
        if self._config.kind == "si" and anew:
            consolidate(self._pieces, missing, xi=self._config.xi)
        if self._config.kind == "ewc":
            wanting = [p for p in self._pieces if anew or (p.name, IMPORTANCE) in missing]
            measured = self._on_any_rank(bool(wanting))
            if measured:
                notes.append(self._measure(wanting, missing, draw, document_mask))
        set_anchor(p for p in self._pieces if anew or (p.name, ANCHOR) in missing)
        if self._config.kind != "l2" and self._config.normalise:
            if scale is None or new_stage or measured:
                mean = mean_importance(self._pieces, self._engine.mesh.device)
                scale = 1.0 / mean if mean else 0.0
            self.pull.scale = scale
            if scale == 0.0:
                notes.append(
                    "nothing has importance yet, and nothing is pulled: no earlier stage had this anchor"
                )
        return notes

    def _measure(
        self, wanting: Sequence[MainPiece], missing: Missing, draw: Draw, document_mask: bool
    ) -> str:
        config = self._config
        for piece in wanting:
            retained = 0.0 if (piece.name, IMPORTANCE) in missing else config.retain
            piece.state(IMPORTANCE).mul_(retained)
        count = add_fisher(self._engine, wanting, IMPORTANCE, draw(config), document_mask=document_mask)
        return f"measured the Fisher matrix on {count} gradients of {', '.join(config.sources)}"

    def _on_any_rank(self, here: bool) -> bool:
        seen = torch.tensor(float(here), device=self._engine.mesh.device)
        torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
        return bool(seen)


class Updates:
    """What changes the updates of one stage.

    Order of use: make it, load a checkpoint into `engine.slices()`, then `begin`.
    """

    def __init__(
        self, engine: Engine, config: UpdatesConfig, slow: SlowWeightsConfig, *, names: Sequence[str]
    ) -> None:
        """Add the states to the engine, empty, and what acts on them.

        Args:
            names: logical names of the whole model.
        """
        self._engine, self._slow = engine, slow
        self._frozen = frozen_names(config, names)
        if self._frozen:
            engine.transforms.append(Freeze([p for p in engine.pieces if p.name in self._frozen]))
        self._anchoring: Anchoring | None = None
        if config.anchor is not None:
            self._anchoring = Anchoring(engine, config.anchor, anchored_names(config, names))
        self._counted = self._add_slow_weights()

    def begin(
        self,
        missing: Missing | None,
        *,
        new_stage: bool,
        state: Mapping[str, Any] | None,
        draw: Draw,
        document_mask: bool = True,
    ) -> list[str]:
        """Fill the states that the checkpoint has not filled, and those that a new stage begins again.

        Call it on every rank, with the weights to start from in place.

        Args:
            missing: (logical name, state) pairs that were not loaded: `LoadedState.absent`; None for a run
                that starts from nothing.
            new_stage: whether the run begins a stage here, rather than goes on in its middle.
            state: what `state` returned when the checkpoint was saved.
            draw: called for the Fisher matrix, when it has to be measured.

        Returns:
            Sentences about what was done, for whoever watches the run.
        """
        if missing is None:
            missing = {(p.name, key) for p in self._engine.pieces for key in self._engine.added_states}
        found = state or {}
        notes = [f"frozen: {len(self._frozen)} parameters"] if self._frozen else []
        if self._anchoring is not None:
            notes += self._anchoring.begin(
                missing,
                new_stage=new_stage,
                scale=found.get("importance_scale"),
                draw=draw,
                document_mask=document_mask,
            )
        if self._counted is not None:
            anew = new_stage and self._slow.reset
            self._counted.begin(missing, anew=anew, since=found.get(self._counted.state_key))
        return notes

    def state(self) -> dict[str, Any]:
        """What is not a tensor: JSON, the same on every rank."""
        found: dict[str, Any] = {}
        if self._anchoring is not None:
            found["importance_scale"] = self._anchoring.pull.scale
        if self._counted is not None:
            found[self._counted.state_key] = self._counted.since
        return found

    @property
    def evaluates_average(self) -> bool:
        """Whether evaluations report the losses of the average too."""
        return self._slow.evaluate

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """The model computes with the average of its weights inside. All ranks enter and leave together."""
        assert isinstance(self._counted, Ema), "only kind = ema keeps an average"
        return swapped(self._engine, self._counted.pieces, self._counted.state_key)

    def _add_slow_weights(self) -> Counted | None:
        engine, slow = self._engine, self._slow
        if slow.kind is None:
            return None
        made: Counted
        if slow.kind == "ema":
            assert slow.decay is not None, "checked by SlowWeightsConfig"
            made = Ema(engine.add_state(Ema.state_key, lambda _: True), slow.every, slow.decay)
        else:
            assert slow.epsilon is not None, "checked by SlowWeightsConfig"
            pieces = engine.add_state(Reptile.state_key, lambda name: name not in self._frozen)
            made = Reptile(pieces, slow.every, slow.epsilon)
        engine.slow_weights = made
        return made
