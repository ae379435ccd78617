"""A controller in a run: what it is told, when it is asked, and what is done with its answer."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.controllers.config import ControllerConfig
from trainer.controllers.opening import left_alone, open_controller
from trainer.controllers.protocol import Call, Evaluation, History, KeepWeightsError, as_json
from trainer.controllers.shares import checked, smoothed, with_frozen
from trainer.controllers.timetable import Timetable
from trainer.controllers.window import DECIMALS, Window
from trainer.data.config import DataConfig
from trainer.data.stream import TokenStream
from trainer.metrics.json_lines import supersede, valid_json


@dataclass(frozen=True)
class Answer:
    """What the first rank sends to all: weights that sum to 1, the controller's state, and how it went.

    Attributes:
        kept: why the weights stay as they were; empty where they are the controller's.
    """

    weights: dict[str, float]
    state: dict[str, Any]
    seconds: float
    kept: str = ""


class Driver:
    """Keeps the history on every rank, asks the controller on the first, and sets the weights on all.

    Only the first rank's answer counts, so that ranks cannot diverge. Every call is a line of JSON in the
    log.
    """

    def __init__(
        self,
        config: ControllerConfig,
        data: DataConfig,
        stream: TokenStream,
        *,
        steps: range,
        log: Path,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a stage, or go on in one.

        Args:
            steps: of the stage, as steps done before each.
            log: where the calls are written.
            state: what `state` returned; None at the beginning of a stage.

        Raises:
            ValueError: as `open_controller`, or a point gives weight to what has nothing to replay.
        """
        found: Mapping[str, Any] = state or {}
        self._config, self._stream, self._steps, self._log = config, stream, steps, log
        self._sources = stream.source_names
        self._calls = [Call(step, weights) for step, weights in found.get("calls", ())]
        self._evaluations = [Evaluation(step, losses) for step, losses in found.get("evaluations", ())]
        self._window = Window(self._sources, found.get("window"))
        self._state: dict[str, Any] = dict(found.get("controller", {}))
        self._controller = open_controller(
            config,
            data,
            first_step=steps.start,
            last_step=steps.stop,
            state=self._state if state is not None else None,
        )
        self._sets = {entry.name for entry in data.validation}
        self._alone = left_alone(config, data)
        if config.kind == "replay_log":  # what is in a log has been through this
            self._alone = ()
        elif config.kind == "schedule":  # whose points are the run file's own
            _check_points(config, stream.nothing_to_replay)
        else:
            self._alone = tuple(dict.fromkeys([*self._alone, *stream.nothing_to_replay]))

    def open_log(self, *, after: int) -> None:
        """Set aside what the log has of later steps than `after`: they are about to be made again."""
        if torch.distributed.get_rank() == 0 and self._log.exists():
            supersede(self._log, after=after)

    def reinstate(self, step: int) -> bool:
        """Set the controller's newest weights again where dealing has begun anew in the middle of a stage.

        It has where the run file asks for another global batch, other caps or other weights than before a
        restart at `step`. Returns whether it has.
        """
        if not self._calls or self._stream.state(step)["mixture_step"] < step:
            return False
        self._stream.set_weights(step, self._calls[-1].weights)
        return True

    def add_step(self, by_source: Sequence[tuple[float, float]]) -> None:
        """Note a training step: (mean loss, tokens) by source, over the whole mesh."""
        self._window.add(by_source)

    def add_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Note an evaluation; of all sets that are read to their end, not of averages of the weights."""
        known = {
            name: round(loss, DECIMALS)
            for name, loss in losses.items()
            if name in self._sets and math.isfinite(loss)
        }
        if known:
            self._evaluations.append(Evaluation(step, known))

    def is_border(self, step: int) -> bool:
        """Whether the weights may change before `step`, so that nobody can know yet what it is made of."""
        every = self._config.every
        if isinstance(self._controller, Timetable) and self._controller.begins_at(step):
            return True
        return every is not None and step % every == 0

    def reweigh(self, step: int) -> str | None:
        """At a border, ask the controller and set what it says from `step` on. Every rank calls it.

        The first call of a stage comes before its first step, whether that is a border or not.

        Returns:
            Why the weights stay, where the controller did not say.

        Raises:
            ValueError: all sources that get a weight have reached their cap.
        """
        if self._calls and (self._calls[-1].step >= step or not self.is_border(step)):
            return None
        answer = self._ask(step)
        self._state = answer.state
        if not answer.kept:
            self._stream.set_weights(step, answer.weights)
        self._write(step, answer)
        self._calls.append(Call(step, answer.weights))
        self._window.clear()
        return f"the weights stay as they are: {answer.kept}" if answer.kept else None

    def state(self) -> dict[str, Any]:
        """All that decides the next call: JSON, the same on every rank."""
        return {
            "kind": self._config.kind,
            "plugin": self._config.plugin,
            "sources": list(self._sources),
            "calls": [[call.step, dict(call.weights)] for call in self._calls],
            "evaluations": [[one.step, dict(one.losses)] for one in self._evaluations],
            "window": self._window.state(),
            "controller": self._state,
        }

    def _in_force(self) -> dict[str, float]:
        """What was asked for last: the stream rounds to whole units, and drops sources at their cap."""
        return dict(self._calls[-1].weights) if self._calls else self._stream.weights

    def _ask(self, step: int) -> Answer:
        """The answer of the first rank, on all of them."""
        answers: list[Answer | None] = [self._answer(step) if torch.distributed.get_rank() == 0 else None]
        torch.distributed.broadcast_object_list(answers, src=0)
        (answer,) = answers
        assert answer is not None, "the first rank has sent one"
        return answer

    def _answer(self, step: int) -> Answer:
        began, held = time.monotonic(), self._in_force()
        history = History(
            step=step,
            first_step=self._steps.start,
            last_step=self._steps.stop,
            weights=held,
            calls=tuple(self._calls),
            losses=self._window.means(),
            tokens=self._window.tokens(),
            evaluations=tuple(self._evaluations),
        )
        kept, weights = "", held
        try:
            found = checked(self._controller.weights(history), self._sources)
            free = [name for name in self._sources if name not in self._alone]
            weights = smoothed(with_frozen(found, held, self._alone), self._config.smoothing, free)
        except KeepWeightsError as error:
            kept = str(error)
        state = as_json(self._controller.state())
        return Answer(weights, state, time.monotonic() - began, kept)

    def _write(self, step: int, answer: Answer) -> None:
        if torch.distributed.get_rank() != 0:
            return
        line = {
            "kind": self._config.kind,
            "step": step,
            "seconds": round(answer.seconds, 6),
            "weights": answer.weights,
            "losses": self._window.means(),
            "tokens": self._window.tokens(),
            "evaluation": vars(self._evaluations[-1]) if self._evaluations else None,
            "kept": answer.kept or None,
        }
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(valid_json(line), allow_nan=False, ensure_ascii=False) + "\n")


def _check_points(config: ControllerConfig, empty: Sequence[str]) -> None:
    """Refuse at the start what would only be refused at a later point's step."""
    for number, point in enumerate(config.points):
        if given := [name for name in empty if point.weights.get(name)]:
            raise ValueError(
                f"controller.points[{number}] gives weight to {', '.join(map(repr, given))}, which had "
                "nothing to replay when the stage began; take it out, or let the stage start from one that "
                "has read what is to be replayed"
            )
