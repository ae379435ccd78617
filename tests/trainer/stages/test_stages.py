"""Stages: how a run file becomes several, where each begins, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.corpora import ragged, write_tokens
from trainer.config import schedule
from trainer.stages.check import check_stages
from trainer.stages.load_stages import load_stages, planned_anchor
from trainer.stages.plan import takeover
from trainer.stages.stage import Stage

BASE = """\
[run]
name = "story"
dir = "{folder}/story"

[model]
num_layers = 2
hidden_size = 32
num_attention_heads = 4
max_position_embeddings = 128

[data]
sequence_length = 32

[[data.sources]]
name = "prose"
path = "{folder}/prose"

[optimizer]
lr = 1e-3
min_lr = 1e-5

[train]
global_batch = 4
precision = "fp32"
"""
FIRST = """
[[stage]]
name = "first"
steps = 10
schedule = { kind = "cosine", warmup_steps = 2 }
"""
SECOND = """
[[stage]]
name = "second"
tokens = 1000
start = { policy = "rewarm" }
layout = { tensor = 2 }
rope = { theta = 50000.0 }
schedule = { kind = "linear", warmup_steps = 2 }
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "prose", [[t % 250 for t in one] for one in ragged(60, seed=1, longest=50)])
    return tmp_path


def stages(folder: Path, *texts: str, overrides: tuple[str, ...] = ()) -> list[Stage]:
    path = folder / "run.toml"
    path.write_text(BASE.format(folder=folder) + "".join(texts))
    return load_stages(path, overrides)


def problems(folder: Path, *texts: str) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_and_check(folder, *texts)
    return str(caught.value)


def load_and_check(folder: Path, *texts: str) -> None:
    found = stages(folder, *texts)
    check_stages(found, [stage.config.parallel.model_parallel for stage in found], name="run.toml")


def test_a_run_file_without_stages_is_one(folder: Path) -> None:
    only = stages(folder, "steps = 7\n")[0]
    assert (only.name, only.first_step, only.last_step) == ("story", 0, 7)
    assert only.config.run.folder == only.run_folder


def test_steps_are_numbered_through_and_tokens_rounded_up(folder: Path) -> None:
    first, second = stages(folder, FIRST, SECOND)
    assert (first.first_step, first.last_step) == (0, 10)
    assert (second.first_step, second.last_step) == (10, 10 + 8)


def test_each_stage_has_its_folder_and_starts_from_the_one_before(folder: Path) -> None:
    first, second = stages(folder, FIRST, SECOND)
    assert first.config.run.folder == folder / "story" / "first"
    assert second.config.checkpoint.load == first.config.run.checkpoints
    assert second.waits


def test_short_names_go_where_they_belong_and_tables_are_merged(folder: Path) -> None:
    first, second = stages(folder, FIRST, SECOND)
    assert (second.config.parallel.tensor, second.config.model.rope_theta) == (2, 50000.0)
    assert second.config.model.hidden_size == first.config.model.hidden_size == 32
    assert (second.config.schedule.kind, second.config.schedule.warmup_steps) == ("linear", 2)


def test_set_reaches_a_stage(folder: Path) -> None:
    assert stages(folder, FIRST, SECOND, overrides=("stage.0.steps=20",))[1].first_step == 20


def test_a_stage_branches_off_a_step_of_an_earlier_one(folder: Path) -> None:
    third = '[[stage]]\nname = "third"\nsteps = 3\nstart = { from = "first@5", policy = "rewarm" }\n'
    stage = stages(folder, FIRST, SECOND, third)[2]
    assert (stage.first_step, stage.last_step) == (5, 8)
    assert str(stage.config.checkpoint.load).endswith("first/checkpoints/step-00000005")


def test_until_the_learning_rate_has_fallen(folder: Path) -> None:
    text = FIRST.replace("steps = 10", "until = { lr_below = 2e-4 }").replace("warmup", "steps = 100, warmup")
    first, second = stages(folder, text, SECOND)
    assert 60 < first.last_step < 100
    assert 2e-4 < planned_anchor(second, [first, second]).lr < 2.3e-4, "of the last update before it"


def test_the_plan_says_what_is_kept_and_why(folder: Path) -> None:
    found = stages(folder, FIRST, SECOND)
    rows = {row.field: row for row in takeover(found[1], found).rows}
    assert (rows["moments"].verdict, rows["moments"].reason) == ("kept", "policy rewarm")
    assert rows["schedule"].verdict == "re-anchored"
    assert (rows["layout"].verdict, rows["rope"].verdict) == ("changed", "changed")
    assert takeover(found[0], found).origin == ""


def test_a_kept_schedule_that_jumps_is_ambiguous(folder: Path) -> None:
    text = SECOND.replace('start = { policy = "rewarm" }', "").replace("linear", "cosine")
    assert "a kept schedule needs the same [schedule]" in problems(folder, FIRST, text)


def test_a_kept_schedule_that_runs_on_is_not(folder: Path) -> None:
    long = FIRST.replace("warmup_steps", "steps = 18, warmup_steps")
    text = SECOND.replace('start = { policy = "rewarm" }', "").replace("linear", "cosine")
    load_and_check(folder, long, text.replace("warmup_steps", "steps = 18, warmup_steps"))


def test_what_is_to_stay_the_same_is_compared(folder: Path) -> None:
    text = SECOND.replace('policy = "rewarm"', 'policy = "rewarm", rope = "keep"')
    assert "stage second: start.rope is keep" in problems(folder, FIRST, text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 10", "step = 10", "step is not a key of a stage; did you mean steps?"),
        ("steps = 10", "", "needs exactly one of tokens, steps, until"),
        ("steps = 10", "steps = 0", "expected a whole number above 0"),
        ('name = "first"', "", "a stage needs a name"),
        ('name = "first"', 'name = "second"', "two stages are called 'second'"),
        ("cosine", "cosin", "schedule.kind"),
        ("steps = 10", "until = { lr_below = 1e-4 }", "set schedule.steps"),
        ("steps = 10", "until = { loss = 2 }", "expected until = { lr_below"),
    ],
)
def test_a_wrong_stage_is_named(folder: Path, old: str, new: str, message: str) -> None:
    assert message in problems(folder, FIRST.replace(old, new), SECOND)


def test_the_line_of_a_stages_key_is_given(folder: Path) -> None:
    text = FIRST.replace("schedule = {", "train = { micro_batch = 0 }\nschedule = {")
    line = (BASE + text).splitlines().index("train = { micro_batch = 0 }") + 1
    assert f"line {line}: " in problems(folder, text)


def test_the_envelope_of_peaks_counts_the_stages(folder: Path) -> None:
    falling = 'envelope = { kind = "exponential", factor = 0.5 }, warmup_steps'
    found = stages(folder, FIRST.replace("warmup_steps", falling), SECOND.replace("warmup_steps", falling))
    peaks = [schedule(stage.config).lr(stage.first_step + 2, planned_anchor(stage, found)) for stage in found]
    assert peaks == pytest.approx([1e-3, 5e-4])


TRUNK = """
[[stage]]
name = "trunk"
steps = 20
schedule = { kind = "wsd", warmup_steps = 2, decay_steps = 5 }
"""


def test_the_first_of_several_stages_is_evaluated_before_its_first_step(folder: Path) -> None:
    assert [stage.config.eval.at_start for stage in stages(folder, FIRST, SECOND)] == [True, None]


def test_a_run_of_one_stage_is_not(folder: Path) -> None:
    assert stages(folder, FIRST)[0].config.eval.at_start is None


def test_the_run_file_decides_whether_the_first_stage_is_evaluated_at_its_start(folder: Path) -> None:
    found = stages(folder, "[eval]\nat_start = false\n", FIRST, SECOND)
    assert [stage.config.eval.at_start for stage in found] == [False, False]


def test_the_next_stage_goes_on_from_before_the_anneal(folder: Path) -> None:
    """19 - 5 is the last step at the peak: steps 0 to 14 are done after it."""
    trunk, second = stages(folder, TRUNK, SECOND)
    plan, anchor = schedule(trunk.config), planned_anchor(trunk, [trunk])
    border = second.first_step
    assert (plan.phase(border - 1, anchor), plan.phase(border, anchor)) == ("stable", "annealed")
    assert trunk.config.checkpoint.at == (border,), "saved there, and kept"


def test_the_end_of_an_anneal_can_be_asked_for(folder: Path) -> None:
    found = stages(
        folder, TRUNK, SECOND.replace('policy = "rewarm"', 'from = "trunk@end", policy = "rewarm"')
    )
    assert found[1].first_step == 20


def test_a_branch_is_saved_and_kept(folder: Path) -> None:
    third = '[[stage]]\nname = "third"\nsteps = 3\nstart = { from = "first@7", policy = "rewarm" }\n'
    assert stages(folder, FIRST, SECOND, third)[0].config.checkpoint.at == (7,)


ANNEAL = """
[[stage]]
name = "anneal"
steps = 5
schedule = { kind = "anneal" }
"""


def test_an_anneal_needs_a_stable_checkpoint(folder: Path) -> None:
    middle = ANNEAL + 'start = { from = "first@5" }\n'
    assert "is in the phase 'decay' of its schedule: an anneal branches" in problems(folder, FIRST, middle)
    assert "start from a checkpoint of a stable phase" in problems(folder, FIRST, ANNEAL)
    load_and_check(folder, FIRST.replace('"cosine"', '"constant"'), ANNEAL)


@pytest.mark.parametrize("step", ["0", "11", "soon"])
def test_a_step_that_a_stage_does_not_have_is_refused(folder: Path, step: str) -> None:
    text = SECOND.replace('policy = "rewarm"', f'from = "first@{step}", policy = "rewarm"')
    assert "after @ stands a step of stage first, from 1 to 10, or end" in problems(folder, FIRST, text)
