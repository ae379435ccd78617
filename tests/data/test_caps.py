"""Sources that may be read only so often."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.corpora import ragged, write_tokens, write_words
from trainer.data import caps
from trainer.data.caps import cap_problems
from trainer.data.config import DataConfig
from trainer.data.dealing import CapsReachedError
from trainer.data.ledger import Ledger
from trainer.data.stream import TokenStream
from trainer.stages.check import check_stages
from trainer.stages.load_stages import load_stages

LENGTH, BATCH = 8, 4
RUN = """\
[run]
dir = "{folder}/run"
[model]
num_layers = 1
hidden_size = 8
num_attention_heads = 1
vocab_size = 10000
[data]
tokenizer = "{folder}/words.json"
sequence_length = 8
[[data.sources]]
name = "prose"
path = "{folder}/prose"
max_epochs = 1
[train]
global_batch = 4
precision = "fp32"
[[stage]]
name = "general"
steps = 10
[[stage]]
name = "more"
start = {{ schedule = "anchor" }}
steps = {steps}
"""


@pytest.fixture
def entries(tmp_path: Path) -> dict[str, Any]:
    sources = [
        {"name": name, "path": write_tokens(tmp_path / name, ragged(30, first=2000 * n, seed=n))}
        for n, name in enumerate(("prose", "code", "law"))
    ]
    return {"tokenizer": write_words(tmp_path), "sequence_length": LENGTH, "sources": sources}


def build(entries: dict[str, Any], *max_epochs: float | None, **more: Any) -> DataConfig:
    capped = [one | {"max_epochs": most} for one, most in zip(entries["sources"], max_epochs, strict=True)]
    return DataConfig.model_validate(entries | {"sources": capped} | more)


def open_stream(config: DataConfig, state: dict[str, Any] | None = None) -> TokenStream:
    return TokenStream(config, seed=1, global_batch=BATCH, state=state)


def test_a_source_leaves_at_the_border_before_it_would_exceed_its_cap(entries: dict[str, Any]) -> None:
    config = build(entries, None, 0.5, None)
    stream, size = open_stream(config), 0
    for step in range(60):
        stream.plan(step)
    before, after = Ledger.of(stream.state(60)).segments
    code = Ledger.of(stream.state(60)).source("code")
    size = code.epoch_tokens
    assert size // 2 - BATCH * LENGTH < code.tokens <= size // 2
    assert after.step == before.steps
    assert "code" not in after.dealt
    shares = stream.weights_at(60)
    assert shares["code"] == 0
    assert shares["prose"] == pytest.approx(shares["law"])


@pytest.mark.parametrize("restarted", [False, True])
def test_a_source_that_left_stays_out_of_what_a_controller_asks(
    entries: dict[str, Any], restarted: bool
) -> None:
    config = build(entries, None, 0.5, None)
    stream = open_stream(config)
    stream.plan(60)
    if restarted:
        stream = open_stream(config, json.loads(json.dumps(stream.state(61))))
    stream.set_weights(61, {"prose": 0.25, "code": 0.5, "law": 0.25})
    assert stream.weights_at(61) == {"prose": 0.5, "code": 0.0, "law": 0.5}
    assert len(Ledger.of(stream.state(90)).segments) == 2


def test_a_cap_that_is_raised_brings_the_source_back(entries: dict[str, Any]) -> None:
    stream = open_stream(build(entries, None, 0.5, None))
    state = json.loads(json.dumps(stream.state(60)))
    read = Ledger.of(state).source("code").tokens
    more = open_stream(build(entries, None, 2, None), state)
    assert more.weights_at(60)["code"] > 0
    assert Ledger.of(more.state(70)).source("code").tokens > read


def asked(config: DataConfig, last_step: int, **more: Any) -> list[str]:
    return cap_problems(config, seed=1, global_batch=BATCH, first_step=0, last_step=last_step, **more)


def reached(config: DataConfig) -> int:
    """The step at which the dealing itself ends."""
    stream = open_stream(config)
    for step in range(1000):
        try:
            stream.plan(step)
        except CapsReachedError:
            return step
    return 1000


def test_a_stage_that_is_too_long_is_refused_before_it_runs(entries: dict[str, Any]) -> None:
    config = build(entries, 1, 0.5, 1.5)
    last = reached(config)
    with pytest.raises(
        CapsReachedError, match=r"every source has reached its max_epochs \(prose, code, law\)"
    ):
        open_stream(config).plan(last)
    assert asked(config, last) == []
    (problem,) = asked(config, last + 1)
    assert f"enough to step {last};" in problem


def test_a_long_stage_is_never_accepted_in_vain(
    entries: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caps, "EXACT_SEQUENCES", 0)
    config = build(entries, 1, 0.5, 1.5)
    accepted = max(step for step in range(1, 1000) if not asked(config, step))
    assert reached(config) - 3 <= accepted <= reached(config)


def test_what_was_read_before_counts(entries: dict[str, Any]) -> None:
    config = build(entries, 1, 0.5, 1.5)
    last, state = reached(config), open_stream(config).state(10)
    assert cap_problems(config, seed=1, global_batch=BATCH, first_step=10, last_step=last, state=state) == []
    assert cap_problems(config, seed=1, global_batch=BATCH, first_step=10, last_step=last + 1, state=state)


@pytest.mark.parametrize("open_ended", [(None, 1, 1), (None, None, None)])
def test_a_source_without_a_cap_never_runs_out(
    entries: dict[str, Any], open_ended: tuple[float | None, ...]
) -> None:
    assert asked(build(entries, *open_ended), 10**9) == []


def test_an_uncapped_source_of_weight_zero_does_not_help(entries: dict[str, Any]) -> None:
    assert asked(build(entries, None, 1, 1, mixture={"weights": {"prose": 0}}), 10**6)


def test_a_run_file_is_refused_for_a_stage_of_it(entries: dict[str, Any], tmp_path: Path) -> None:
    steps = sum(map(len, ragged(30))) // (LENGTH * BATCH)
    (tmp_path / "run.toml").write_text(RUN.format(folder=tmp_path, steps=steps))
    check_stages(load_stages(tmp_path / "run.toml", []), [1, 1], name="run.toml")
    (tmp_path / "run.toml").write_text(RUN.format(folder=tmp_path, steps=steps + 1))
    with pytest.raises(ValueError, match=rf"stage more: .*steps 10 to {steps + 11} take"):
        check_stages(load_stages(tmp_path / "run.toml", []), [1, 1], name="run.toml")
