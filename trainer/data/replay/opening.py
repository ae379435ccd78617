"""From the run file and the ledger of a checkpoint to the replay sources of a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.data.config import DataConfig, SourceConfig
from trainer.data.corpus import open_corpus
from trainer.data.indexed import IndexedReader
from trainer.data.ledger import Ledger
from trainer.data.mixture_config import nearest, takes_part
from trainer.data.reader import Documents
from trainer.data.replay.config import ReplayConfig
from trainer.data.replay.reservoir import Reservoir
from trainer.data.replay.seen import Seen, SeenDocuments
from trainer.data.replay.source import Replay, ReplaySet, TokensRead
from trainer.data.tokenizer import Tokenizer

NO_LEDGER = (
    "there is nothing to replay, since this stage starts without the ledger of a checkpoint: it is the first "
    'one, or its start resets the data (policy = "weights" does). Start it from a checkpoint with data = '
    '"keep" (policy = "rewarm" with moments = "reset" begins Adam anew and keeps the data), or leave the '
    "source out: data.mixture.weights.{name} = 0"
)


@dataclass(frozen=True)
class StageFolder:
    """Where a stage keeps what it makes of its data.

    Attributes:
        path: of the stage, on a file system that all ranks share.
        writes: whether this rank writes there; one does.
        new_stage: the stage begins now, whatever the stage of the data position is called.
    """

    path: Path
    writes: bool = True
    new_stage: bool = False


@dataclass(frozen=True)
class ReplaySetting:
    """What replay sources are opened with.

    Attributes:
        corpora: the other sources of the stage, by name.
        state: the data position that the run goes on from; None where there is none.
    """

    config: DataConfig
    tokenizer: Tokenizer
    corpora: Mapping[str, Documents]
    seed: int
    stage: str
    state: Mapping[str, Any] | None
    folder: StageFolder | None
    opened: dict[str, Documents] = field(default_factory=dict)

    def open_parts(
        self, seen: Sequence[Seen], counted: Sequence[Sequence[int]] | None = None
    ) -> list[SeenDocuments]:
        """As `OpenParts`: a source of this stage where it is the same, else the files it was read from."""
        known = counted if counted is not None else [None] * len(seen)
        return [
            SeenDocuments(one, self._documents(one), numbers)
            for one, numbers in zip(seen, known, strict=True)
        ]

    def held(self, name: str, config: ReplayConfig) -> Mapping[str, Any] | None:
        """What the state keeps of a replay source, where the run goes on in the middle of a stage with it."""
        found = (self.state or {}).get("replay", {}).get(name)
        if not found or not self._goes_on() or found["config"] != config.model_dump(mode="json"):
            return None
        present = self.present()
        as_before = all(
            _goes_on(one, present[one.name])
            for one in ReplaySet.from_json(found["set"]).seen
            if config.refresh_every is not None and one.name in present
        )
        return found if as_before else None

    def was_empty(self, name: str) -> bool:
        """Whether the run goes on in the middle of a stage that began with nothing for `name` to replay."""
        state = self.state or {}
        had = name in {one[0] for one in state.get("mixture", ())}
        return had and name not in state.get("replay", {}) and self._goes_on()

    def _goes_on(self) -> bool:
        """In the middle of a stage, with the orders that it had."""
        begins = self.folder is not None and self.folder.new_stage
        here = (self.stage, self.seed)
        return self.state is not None and not begins and (self.state["stage"], self.state["seed"]) == here

    def present(self) -> dict[str, Seen]:
        """The sources of the stage that have files, as if nothing of them had been read."""
        paths = {source.name: source.path or "" for source in self.config.sources}
        return {
            name: Seen(name, paths[name], self.seed, corpus.num_tokens, 0)
            for name, corpus in self.corpora.items()
        }

    def _documents(self, seen: Seen) -> Documents:
        here = self.corpora.get(seen.name)
        if here is not None and here.num_tokens == seen.epoch_tokens:
            return here
        if seen.name not in self.opened:
            self.opened[seen.name] = self._read_again(seen)
        return self.opened[seen.name]

    def _read_again(self, seen: Seen) -> Documents:
        remedy = (
            f"; to replay source {seen.name!r}, put its files back, or name where they lie now: a "
            f"[[data.sources]] of that name with the path, and data.mixture.weights.{seen.name} = 0"
        )
        if not seen.path:
            raise ValueError(f"the checkpoint does not say where source {seen.name!r} was read from{remedy}")
        try:
            corpus = open_corpus(seen.path, self.tokenizer)
        except ValueError as error:
            raise ValueError(f"{error}{remedy}") from None
        if corpus.num_tokens != seen.epoch_tokens:
            raise ValueError(
                f"{seen.path} has {corpus.num_tokens} tokens, source {seen.name!r} was read from "
                f"{seen.epoch_tokens}: other documents by now{remedy}"
            )
        return corpus


def open_replays(setting: ReplaySetting, step: int, tokens_read: TokensRead) -> dict[str, Replay]:
    """The replay sources of a stage that goes on from `step`, by name.

    One that is left out of the mixture is missing where there is nothing to replay.

    Args:
        step: of the data position.
        tokens_read: before this step and later ones.

    Raises:
        ValueError: lists every source that has nothing to replay or whose documents cannot be read.
    """
    problems, found = [], {}
    for source in setting.config.sources:
        if source.replay is None:
            continue
        needed = takes_part(setting.config.mixture, source)
        if not needed and setting.was_empty(source.name):
            continue  # or a controller could do after a restart what it could not do before
        try:
            found[source.name] = _open(setting, source, step, tokens_read)
            if needed:
                found[source.name].begin(step)
        except ValueError as error:
            if needed:
                problems.append(f"data.sources {source.name!r}: {error}")
    if problems:
        raise ValueError("the data cannot be read:\n" + "\n".join(f"- {problem}" for problem in problems))
    return found


def replay_problems(config: DataConfig, state: Mapping[str, Any] | None, *, seed: int) -> list[str]:
    """What keeps a stage that starts from this data position from replaying; reads no document."""
    problems: list[str] = []
    for source in config.sources:
        if source.replay is None or not takes_part(config.mixture, source):
            continue
        present = {
            one.name: Seen(one.name, one.path, seed, IndexedReader(one.path).num_tokens, 0)
            for one in config.sources
            if one.path is not None and one.name in source.replay.of
        }
        try:
            past(source.name, source.replay, state, present)
        except ValueError as error:
            problems.append(f"data.sources {source.name!r}: {error}")
    return problems


def past(
    name: str, config: ReplayConfig, state: Mapping[str, Any] | None, present: Mapping[str, Seen]
) -> tuple[Seen, ...]:
    """How far the sources that `name` replays had been read, in the order of `of`.

    Args:
        present: sources of the stage that begins, as if nothing of them had been read.

    Raises:
        ValueError: there is no ledger, or one of them is not in it; or a reservoir is to be refreshed from a
            source that goes on in another order or with other documents.
    """
    if state is None or not state.get("sources"):
        raise ValueError(NO_LEDGER.format(name=name))
    ledger, replayed = Ledger.of(state), state.get("replay", {})
    read = {
        one.name: Seen(one.name, one.path, ledger.seed, one.epoch_tokens, one.tokens)
        for one in ledger.sources
        if one.name not in replayed
    }
    problems = []
    if name in read and read[name].tokens:
        problems.append("the checkpoint has a source of this name that was read from files; choose another")
    for one in config.of:
        here, before = present.get(one), read.get(one)
        if config.refresh_every is None and (before is None or not before.tokens):
            problems.append(_unread(one, name, [known for known, seen in read.items() if seen.tokens]))
        elif before is None and here is None:
            problems.append(
                f"replay.of: no source is named {one!r}{nearest(one, read.keys() | present.keys())}"
            )
        elif (
            config.refresh_every is not None
            and before
            and before.tokens
            and here
            and not _goes_on(before, here)
        ):
            problems.append(
                f"refresh_every samples source {one!r} while it is read on, but it has other documents or "
                "another run.seed than before; set them back, or leave refresh_every out"
            )
    if not problems and not any(read[one].tokens for one in config.of if one in read):
        problems.append(
            _unread(", ".join(config.of), name, [known for known, seen in read.items() if seen.tokens])
        )
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(_of_both(read.get(one), present.get(one)) for one in config.of)


def _unread(source: str, name: str, known: list[str]) -> str:
    return (
        f"replay.of: nothing of source {source!r} has been read before this stage{nearest(source, known)}; "
        f"name what has been read, or leave the replay out: data.mixture.weights.{name} = 0"
    )


def _goes_on(before: Seen, here: Seen) -> bool:
    return (before.seed, before.epoch_tokens) == (here.seed, here.epoch_tokens)


def _of_both(before: Seen | None, here: Seen | None) -> Seen:
    seen = before if before is not None and (before.tokens or here is None) else here
    assert seen is not None, "one that nobody knows has been refused"
    return seen


def _open(setting: ReplaySetting, source: SourceConfig, step: int, tokens_read: TokensRead) -> Replay:
    config = source.replay
    assert config is not None, "others are no replay"
    held = setting.held(source.name, config)
    if held is not None:
        first = ReplaySet.from_json(held["set"])
    else:
        begin = tokens_read(step)[source.name]
        first = ReplaySet(step, begin, past(source.name, config, setting.state, setting.present()))
    reservoir = None
    if config.reservoir_tokens is not None:
        if setting.folder is None:
            raise ValueError("reservoir_tokens needs the folder of a run to keep the sample in")
        reservoir = Reservoir(
            setting.folder.path / "replay",
            source.name,
            tokens=config.reservoir_tokens,
            seed=setting.seed,
            open_parts=setting.open_parts,
            writes=setting.folder.writes,
        )
    return Replay(
        source.name,
        config,
        first,
        seed=setting.seed,
        tokens_read=tokens_read,
        open_parts=setting.open_parts,
        reservoir=reservoir,
        held=held,
    )
