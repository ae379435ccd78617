"""The data position of sources with metadata, as a checkpoint keeps it.

`tokens` and `epoch_tokens` of a source count its text alone, whatever it is read with: so a stage without
metadata goes on where one with metadata ended, in the same document, and the other way round, and whoever
asks which documents were read needs no metadata. Beside them stand

- `view`: the place that counts metadata as well, which may lie inside a document's metadata; only a run with
  the same metadata goes on from there,
- `fed`: the tokens that the model was fed, where they are not as many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.config import DataConfig
from trainer.data.indexed import IndexedReader
from trainer.data.transforms.opening import open_views
from trainer.data.transforms.places import Places


class Positions:
    """Translates between a checkpoint's data position and one whose places are those of the sources here."""

    def __init__(self, places: Mapping[str, Places]) -> None:
        """`places` are those of the sources that are read with metadata."""
        self._places = places
        self._extra: dict[str, int] = {}
        """by source, tokens fed but for those before its place"""

    def enter(self, state: Mapping[str, Any], texts: Mapping[str, int], *, seed: int) -> Mapping[str, Any]:
        """What a checkpoint kept, in the places of the sources here.

        Args:
            texts: tokens of the text of the sources that have files.
            seed: of the run; with another one than the checkpoint's every source starts over.
        """
        if not self._places and not any("view" in one or "fed" in one for one in state["sources"]):
            return state
        entries, changed = [], False
        for one in state["sources"]:
            name = one["name"]
            entry = {key: value for key, value in one.items() if key not in ("view", "fed")}
            goes_on = seed == state["seed"] and texts.get(name, one["epoch_tokens"]) == one["epoch_tokens"]
            places, view = self._places.get(name), one.get("view")
            if goes_on and places is not None:
                entry |= _entered(places, one)
                changed |= view is None or view["epoch_tokens"] != places.view.num_tokens
            elif name in texts:
                changed |= view is not None
            if goes_on and (extra := one.get("fed", one["tokens"]) - entry["tokens"]):
                self._extra[name] = extra
            entries.append(entry)
        return {**state, "sources": entries} | ({"mixture": []} if changed else {})  # a new segment begins

    def leave(self, state: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint keeps of a position here."""
        for entry in state["sources"]:
            fed = entry["tokens"] + self._extra.get(entry["name"], 0)
            places = self._places.get(entry["name"])
            if places is not None:
                entry |= _left(places, entry["tokens"])
            if fed != entry["tokens"]:
                entry["fed"] = fed
        return state


def position_here(config: DataConfig, state: Mapping[str, Any], *, seed: int) -> Mapping[str, Any]:
    """What a checkpoint kept, in the places of these sources; see `Positions.enter`.

    Raises:
        ValueError: files are missing or broken.
    """
    texts = {one.name: IndexedReader(one.path) for one in config.sources if one.path}
    views = open_views(config, texts)
    places = {name: Places(view, seed=seed, name=name) for name, view in views.items()}
    return Positions(places).enter(state, {name: one.num_tokens for name, one in texts.items()}, seed=seed)


def _entered(places: Places, one: Mapping[str, Any]) -> dict[str, Any]:
    view, size = one.get("view"), places.view.num_tokens
    if view is not None and view["epoch_tokens"] == size:
        tokens = view["tokens"]
        places.go_on(tokens, view["passed"])
    else:
        tokens = places.place_of(one["tokens"])
    return {"tokens": tokens, "epoch_tokens": size, "passed": list(places.passed(tokens)[:2])}


def _left(places: Places, tokens: int) -> dict[str, Any]:
    documents, _, text_before = passed = places.passed(tokens)
    view = {"epoch_tokens": places.view.num_tokens, "tokens": tokens, "passed": list(passed)}
    return {
        "tokens": places.text_before(tokens),
        "epoch_tokens": places.view.text.num_tokens,
        "passed": [documents, text_before],
        "view": view,
    }
