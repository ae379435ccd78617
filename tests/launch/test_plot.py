"""`ratoon plot schedule`: what is drawn is the schedule, in eighty columns, through a pipe, and as a PNG."""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from launch.cli import app
from launch.plot_command import run_curves
from launch.plot_curves import Axis, StageCurve, main_sources, shares_by_name, stage_curve
from launch.plot_picture import DPI, HEIGHT, WIDTH, write_picture
from launch.plot_terminal import LABEL, learning_rate_lines, print_curves, share_lines
from tests.data.corpora import write_tokens
from tests.proof.runs import checkpoint, run, run_config, write_corpora
from tests.ranks import run_ranks
from tests.trainer.test_config import GOOD
from trainer.config import RunConfig, config_toml
from trainer.schedule import Anchor, Schedule, ScheduleConfig

PEAK, CONSTANT, FLOOR = 2e-3, 8e-4, 1e-5
TRUNK: dict[str, Any] = {
    "kind": "infinite",
    "warmup_steps": 60,
    "cooldown_steps": 300,
    "constant_lr": CONSTANT,
}


def curve(name: str, steps: range, weights: dict[str, float] | None = None, **fields: Any) -> StageCurve:
    """A stage that is anchored at 0, an anneal at its first step."""
    plan = Schedule(ScheduleConfig(**fields), PEAK, FLOOR, steps.stop)
    anchor = Anchor(steps.start, CONSTANT) if fields.get("kind") == "anneal" else Anchor()
    return stage_curve(name, plan, anchor, steps=steps, weights=weights or {"prose": 1.0})


def run_of_three() -> list[StageCurve]:
    """Prose, then code with replay, then an anneal that goes back to the end of the prose."""
    return [
        curve("prose", range(1200), {"prose": 3, "web": 1}, **TRUNK),
        curve("code", range(1200, 2000), {"code": 0.7, "replay": 0.3}, **TRUNK),
        curve("anneal", range(1200, 1500), {"textbooks": 1}, kind="anneal"),
    ]


def printed(curves: list[StageCurve], width: int, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    print_curves(curves, Console(file=file, width=width, highlight=False), "run.toml")
    file.flush()
    return raw.getvalue().decode(encoding)


def heights(lines: list[str]) -> list[int]:
    """Height of the highest star in every column of a chart in ASCII, from the bottom; -1 without any."""
    rows = [line[LABEL + 2 :] for line in lines if line[LABEL + 1 : LABEL + 2] == "|"][:-1]
    columns = [[row[i : i + 1] for row in reversed(rows)] for i in range(max(len(row) for row in rows))]
    return [max((i for i, mark in enumerate(column) if mark == "*"), default=-1) for column in columns]


def test_phases_have_their_first_and_last_steps() -> None:
    prose, code, anneal = run_of_three()
    assert prose.phases == {"warmup": (0, 59), "cooldown": (60, 359), "stable": (360, 1199)}
    assert code.phases == {"stable": (1200, 1999)}
    assert anneal.phases == {"annealed": (1200, 1499)}


def test_shares_add_up_to_one() -> None:
    assert run_of_three()[0].shares == {"prose": 0.75, "web": 0.25}


def test_a_long_stage_is_drawn_by_few_points_and_all_borders() -> None:
    long = curve("long", range(3_000_000), **TRUNK, anneal_steps=7)
    points = dict(long.points)
    assert len(points) < 5_000
    assert set(points) >= {0, 59, 60, 359, 360, 2_999_992, 2_999_993, 2_999_999}
    assert long.peak == points[60] == PEAK
    assert long.phases["annealed"] == (2_999_993, 2_999_999)


def test_every_stage_begins_at_its_own_step_number() -> None:
    axis = Axis(run_of_three())
    assert axis.starts == [0, 1200, 2000, 2300]
    assert {(0, 0), (1200, 1200), (2000, 1200), (2300, 1500)} <= set(axis.ticks(9))


def test_ticks_keep_apart() -> None:
    curves = [curve(f"stage {n}", range(100 * n, 100 * n + 100)) for n in range(40)]
    positions = [position for position, _ in Axis(curves).ticks(8)]
    assert 3 <= len(positions) <= 14
    assert min(b - a for a, b in pairwise(positions)) >= 0.6 * 4000 / 8


def test_the_largest_sources_are_named_and_the_others_added_up() -> None:
    one = curve("one", range(10), {f"s{n}": 1 / (n + 1) for n in range(30)})
    other = curve("other", range(10, 20), {"s29": 1.0})
    names, others = main_sources([one, other], 4)
    assert (names, others) == (["s0", "s1", "s29"], 27)
    for stage in (one, other):
        shares = shares_by_name(stage.shares, names, others)
        assert list(shares) == [*names, "27 others"]
        assert sum(shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_it_fits_the_terminal(width: int, encoding: str) -> None:
    text = printed(run_of_three(), width, encoding)
    assert max(len(line) for line in text.splitlines()) <= width


def test_forty_stages_with_long_names_fit_eighty_columns() -> None:
    stages = [
        curve(f"a stage with a long name {n}", range(7 * n, 7 * n + 7), {f"source {n}": 1}) for n in range(40)
    ]
    text = printed(stages, 80)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "33 others" in text


def test_the_drawn_heights_are_the_learning_rates() -> None:
    """A straight fall from the peak to nothing over as many steps as there are columns."""
    columns = 80 - LABEL - 2
    plan = Schedule(ScheduleConfig(kind="linear"), PEAK, 0.0, columns + 1)
    line = stage_curve("line", plan, Anchor(), steps=range(columns + 1), weights={"prose": 1})
    drawn = heights(learning_rate_lines([line], 80, ascii_only=True))
    top = drawn[0]
    assert drawn == sorted(drawn, reverse=True)
    assert all(abs(height - top * (1 - i / columns)) <= 1 for i, height in enumerate(drawn))


def test_a_plateau_is_level_across_the_border_of_stages() -> None:
    drawn = heights(learning_rate_lines(run_of_three(), 80, ascii_only=True))
    plateau = drawn[len(drawn) * 400 // 2300 : len(drawn) * 2000 // 2300]
    assert len(set(plateau)) == 1
    assert plateau[0] == pytest.approx(max(drawn) * CONSTANT / PEAK, abs=1)


def test_every_stage_has_its_share_of_every_source() -> None:
    lines = share_lines(run_of_three(), 100, ascii_only=True)
    found = {line.split()[0]: [part.strip("= ") for part in line.split("|")[1:]] for line in lines[1:]}
    assert found == {
        "prose": ["75%", "0%", "0%"],
        "web": ["25%", "0%", "0%"],
        "code": ["0%", "70%", "0%"],
        "replay": ["0%", "30%", "0%"],
        "textbooks": ["0%", "0%", "100%"],
    }


def test_the_picture_is_a_png_of_its_size(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "run.png"
    write_picture(run_of_three(), path, "run.toml")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (WIDTH * DPI, HEIGHT * DPI)


def test_names_may_be_anything(tmp_path: Path) -> None:
    """Dollars and braces are no formula, and an underscore in front hides nothing."""
    odd = [curve("$x_{", range(9), {"_web": 1, "$\\frac{": 2, "[red]": 3})]
    plain = [curve("$x_{", range(9), {"web": 1, "frac": 2, "red": 3})]
    for number, curves in enumerate((odd, plain)):
        write_picture(curves, tmp_path / f"{number}.png", "$run_{.toml")
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()
    assert all(name in printed(odd, 80) for name in ("_web", "$\\frac{", "[red]", "$x_{"))


def test_the_picture_shows_the_schedule(tmp_path: Path) -> None:
    """The same run gives the same picture, another shape of its anneal another one."""
    drawn = []
    for number, style in enumerate(("linear", "linear", "cosine")):
        curves = [*run_of_three()[:2], curve("anneal", range(1200, 1500), kind="anneal", decay_style=style)]
        write_picture(curves, tmp_path / f"{number}.png", "run.toml")
        drawn.append((tmp_path / f"{number}.png").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_parts_of_a_stage_have_bars_of_their_own() -> None:
    changing = replace(curve("one", range(40)), shares={"a": 1.0}, changes=((20, {"a": 0.25, "b": 0.75}),))
    lines = share_lines([changing], 60, ascii_only=True)
    found = {line.split()[0]: [part.strip("= ") for part in line.split("|")[1:]] for line in lines[1:]}
    assert found == {"a": ["100%", "25%"]}
    named = replace(changing, shares={"a": 1.0, "b": 0.0})
    assert share_lines([named], 60, ascii_only=True)[2].split("|")[2].strip("= ") == "75%"


def test_parts_too_narrow_for_a_number_are_left_out_on_the_terminal() -> None:
    steps = tuple((step, {"a": step / 100, "b": 1 - step / 100}) for step in range(1, 100))
    changing = replace(curve("one", range(100)), shares={"a": 0.0, "b": 1.0}, changes=steps)
    assert all("%" in part for part in share_lines([changing], 60, ascii_only=True)[1].split("|")[1:])


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("run.toml")
    path.write_text(GOOD.format(path="prose"))  # there is no such corpus: none is read
    return path


def ratoon(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})


def test_the_command_draws_here_and_beside_the_run_file(run_file: Path) -> None:
    result = ratoon("plot", "schedule", "run.toml", "--set", "schedule.warmup_steps=4")
    assert result.exit_code == 0, result.output
    assert max(len(line) for line in result.output.splitlines()) <= 80
    assert [line.split()[:4] for line in result.output.splitlines() if " warmup " in line] == [
        ["run", "warmup", "0", "4"]
    ]
    assert "wrote run-schedule.png" in result.output
    assert sorted(path.name for path in Path().iterdir()) == ["run-schedule.png", "run.toml"]


@pytest.mark.parametrize("arguments", [("--help",), ("schedule", "--help")])
def test_help_fits_eighty_columns(arguments: tuple[str, ...]) -> None:
    result = ratoon("plot", *arguments)
    assert result.exit_code == 0
    assert max(len(line) for line in result.output.splitlines()) <= 80


def test_shares_follow_the_mixture(run_file: Path) -> None:
    """A temperature of 2 makes nine times the tokens three times the share; groups keep theirs."""
    for name, count in (("prose", 90), ("web", 10)):
        write_tokens(Path(name), [[1] * count])
    mixture = "data.mixture.temperature=2"
    more = 'data.sources.1={name = "web", path = "web"}'
    (found,) = run_curves(run_file, [more, mixture])
    assert found.shares == pytest.approx({"prose": 0.75, "web": 0.25})
    groups = ["data.mixture.groups={a = 0.4, b = 0.6}", "data.sources.0.group=a", "data.sources.1.group=b"]
    (found,) = run_curves(run_file, [more, mixture, *groups])
    assert found.shares == pytest.approx({"prose": 0.4, "web": 0.6})


TWO = ['data.sources.1={name = "web", path = "web"}', "train.steps=20", "schedule.warmup_steps=4"]
TIMETABLE = [
    *TWO,
    "controller.kind=schedule",
    "controller.points=[{step = 0, weights = {prose = 1}}, {step = 10, weights = {prose = 1, web = 3}}]",
]


def test_shares_that_a_timetable_changes_are_drawn(run_file: Path) -> None:
    (found,) = run_curves(run_file, TIMETABLE)
    assert found.shares == {"prose": 1.0, "web": 0.0}
    assert found.changes == ((10, {"prose": 0.25, "web": 0.75}),)
    assert found.note == "controller schedule changes the shares at step 10"


def test_shares_between_points_are_drawn_at_every_call(run_file: Path) -> None:
    line = [*TIMETABLE, "controller.interpolate=true", "controller.every=5"]
    (found,) = run_curves(run_file, line)
    assert found.changes == ((5, {"prose": 0.625, "web": 0.375}), (10, {"prose": 0.25, "web": 0.75}))


def test_of_another_controller_it_is_said_that_it_changes_the_shares(run_file: Path) -> None:
    plugin = [*TWO, "controller.kind=plugin", "controller.plugin=mine:Own", "controller.every=5"]
    options = [word for text in plugin for word in ("--set", text)]
    result = ratoon("plot", "schedule", "run.toml", *options)
    assert result.exit_code == 0, result.output
    said = "note: controller plugin changes the shares as it runs; drawn are those it begins with"
    assert said in " ".join(result.output.split())


def test_the_picture_shows_changes_of_the_shares(run_file: Path) -> None:
    drawn = []
    for number, options in enumerate(([*TIMETABLE[:-1], TIMETABLE[-1].replace("10", "12")], TIMETABLE)):
        write_picture(run_curves(run_file, options), Path(f"{number}.png"), "run.toml")
        drawn.append(Path(f"{number}.png").read_bytes())
    assert drawn[0] != drawn[1]


def test_the_picture_goes_where_it_is_asked_for(run_file: Path) -> None:
    assert ratoon("plot", "schedule", "run.toml", "--out", "pictures/one.png").exit_code == 0
    assert Path("pictures/one.png").is_file()
    assert not Path("run-schedule.png").exists()


def test_a_picture_that_cannot_be_written_is_one_clear_error(run_file: Path) -> None:
    result = ratoon("plot", "schedule", "run.toml", "--out", "run.toml/one.png")
    assert result.exit_code == 2
    assert "cannot write the picture" in result.output
    assert "Traceback" not in result.output


def test_contradictions_come_before_any_picture(run_file: Path) -> None:
    options = ["--set", "schedule.kind=cyclic", "--set", "schedule.constant_lr=1e-5"]
    result = ratoon("plot", "schedule", "run.toml", *options)
    assert result.exit_code == 2
    assert "run.toml: 2 problems" in result.output
    assert not Path("run-schedule.png").exists()


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Six steps that warm up for two and keep their learning rate of 1e-3; checkpoints every two."""
    folder = tmp_path_factory.mktemp("runs")
    write_corpora(folder)
    schedule = {"kind": "constant", "warmup_steps": 2}
    config = run_config(folder, run__name="trunk", checkpoint__every=2, schedule=schedule)
    run_ranks(run, 1, config)
    return config


def branch(trunk: RunConfig, name: str, **schedule: Any) -> RunConfig:
    """Four more steps from the trunk's checkpoint of step 4."""
    return run_config(
        trunk.run.folder.parent,
        run__name=name,
        schedule=schedule,
        start={"policy": "rewarm"},
        optimizer={"lr": 2e-3, "min_lr": 1e-4},
        checkpoint={"every": 2, "load": checkpoint(trunk, 4)},
        train__steps=8,
    )


def drawn(config: RunConfig, folder: Path) -> StageCurve:
    path = folder / f"{config.run.name}.toml"
    path.write_text(config_toml(config), encoding="utf-8")
    (found,) = run_curves(path, [])
    return found


def test_a_branch_is_drawn_from_the_learning_rate_of_its_checkpoint(trunk: RunConfig, tmp_path: Path) -> None:
    found = drawn(branch(trunk, "anneal", kind="anneal", decay_style="linear"), tmp_path)
    assert dict(found.points) == pytest.approx({4: 1e-3, 5: 7e-4, 6: 4e-4, 7: 1e-4})
    assert found.shares == pytest.approx({"prose": 2 / 3, "code": 1 / 3})


def test_what_was_drawn_is_what_runs_and_is_drawn_again(trunk: RunConfig, tmp_path: Path) -> None:
    config = branch(trunk, "rewarmed", kind="linear", warmup_steps=2)
    before = drawn(config, tmp_path)
    records = run_ranks(run, 1, config)[0]
    assert before.points == tuple((record.step - 1, record.lr) for record in records.steps)
    assert drawn(config, tmp_path) == before


def test_a_run_without_a_step_left_is_refused(trunk: RunConfig, tmp_path: Path) -> None:
    config = branch(trunk, "done", kind="constant")
    short = config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})})
    with pytest.raises(ValueError, match=r"starts at step 4 and train.steps is 4: raise"):
        drawn(short, tmp_path)


STAGES = """
[[data.sources]]
name = "code"
path = "code"
weight = 0.25

[optimizer]
lr = 2e-3
min_lr = 1e-5

[schedule]
kind = "infinite"
warmup_steps = 5
cooldown_steps = 15
constant_lr = 8e-4

[[stage]]
name = "prose"
steps = 50

[[stage]]
name = "code"
steps = 30
mixture = {weights = {code = 3}}

[[stage]]
name = "short"
steps = 11
start = {from = "prose"}
schedule = {kind = "anneal", decay_style = "linear"}

[[stage]]
name = "long"
steps = 21
start = {from = "prose"}
schedule = {kind = "anneal", decay_style = "linear"}
"""


@pytest.fixture
def staged(run_file: Path) -> Path:
    """A plateau over two mixtures, and two budgets that branch off the end of the first."""
    text = GOOD.format(path="prose").replace("steps = 20\n", "")
    run_file.write_text(text + STAGES)
    return run_file


def test_every_stage_is_drawn(staged: Path) -> None:
    found = run_curves(staged, [])
    assert [(one.name, one.first_step, one.steps) for one in found] == [
        ("prose", 0, 50),
        ("code", 50, 30),
        ("short", 50, 11),
        ("long", 50, 21),
    ]
    assert [one.shares["prose"] for one in found] == [0.8, 0.25, 0.8, 0.8]
    assert list(found[1].phases) == ["stable"]


def test_branches_of_a_trunk_begin_at_its_learning_rate(staged: Path) -> None:
    for stage in run_curves(staged, [])[2:]:
        rates = [rate for _, rate in stage.points]
        assert (rates[0], rates[-1]) == pytest.approx((CONSTANT, FLOOR), rel=1e-12)


def test_the_peaks_of_stages_follow_their_envelope(run_file: Path) -> None:
    stages = "".join(f'[[stage]]\nname = "s{n}"\nsteps = 20\n' for n in range(3))
    policy = '[start]\npolicy = "rewarm"\n[schedule]\nkind = "cosine"\nwarmup_steps = 2\n'
    envelope = '[schedule.envelope]\nkind = "exponential"\nfactor = 0.5\n'
    text = GOOD.format(path="prose").replace("steps = 20\n", "")
    run_file.write_text(f"{text}[optimizer]\nlr = 4e-3\n{policy}{envelope}{stages}")
    assert [one.peak for one in run_curves(run_file, [])] == pytest.approx([4e-3, 2e-3, 1e-3], rel=1e-12)


def test_the_stage_with_a_contradiction_is_named(staged: Path) -> None:
    staged.write_text(staged.read_text() + "\n[stage.optimizer]\nmin_lr = 1e-3\n")
    with pytest.raises(ValueError, match=r"stage long: 1 problem\n.*from a checkpoint of a stable phase"):
        run_curves(staged, [])
