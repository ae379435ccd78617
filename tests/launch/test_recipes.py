"""The recipes: each is planned on the real demo corpora and, with few steps, trained on them."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import trainer.loop  # noqa: F401  # so that what is forked from here is warm
from launch import cli
from launch.demo.corpora import demo_corpora
from launch.recipe_cli import papers, recipe_names, recipe_text, summary
from launch.train_command import train
from trainer.run_file import read_run_file
from trainer.stages.load_stages import load_stages

DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"
RECIPES = recipe_names()
QUICK = ("infinite-three-corpora", "kl-to-start")
STEPS = 3
OVERRIDE = r"--set\s+([\w.-]+=(?:'[^']*'|[^\s,;:)]*))"


def ratoon(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), env={"TERMINAL_WIDTH": "100"})


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All demo corpora, once."""
    folder = tmp_path_factory.mktemp("recipes") / "demo-data"
    demo_corpora(folder)
    return folder


@pytest.fixture
def here(demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with demo-data in it, as its user has it."""
    (tmp_path / "demo-data").symlink_to(demo_data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(name: str) -> Path:
    """The recipe as `ratoon recipe` writes it into the current folder."""
    result = ratoon("recipe", name, "--out", f"{name}.toml")
    assert result.exit_code == 0, result.output
    return Path(f"{name}.toml")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_run_as_it_stands(here: Path, name: str) -> None:
    path = written(name)
    for command in ("check", "plan-resume"):
        result = ratoon(command, str(path))
        assert result.exit_code == 0, result.output
    assert "nothing is ambiguous" in result.output


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_whom_it_follows_and_what_to_watch(name: str) -> None:
    text = recipe_text(name)
    head = text.partition("\n\n")[0]
    assert papers(head)
    for word in ("# Paper: ", "# Ours: ", "# Watch: ", "# Real data: "):
        assert head.count(word) == 1, word
    assert len(summary(text)) <= 80
    assert tomllib.loads(text)["run"]["name"] == name
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_suggests_to_set_can_run(here: Path, name: str) -> None:
    path, head = written(name), recipe_text(name).partition("\n\n")[0].replace("\n#", "")
    for together in re.finditer(rf"(?:{OVERRIDE}\s*)+", head):
        found = re.findall(OVERRIDE, together[0])
        overrides = [word for one in found for word in ("--set", one.replace("'", "").rstrip("."))]
        result = ratoon("plan-resume", str(path), *overrides)
        assert result.exit_code == 0, (overrides, result.output)


def test_the_list_names_each(here: Path) -> None:
    result = ratoon("recipe")
    assert result.exit_code == 0
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    for name in RECIPES:
        assert name in result.output
        number = papers(recipe_text(name))[0]
        assert any(line.startswith(f"| `{name}` |") and number in line for line in lines), name


def test_a_recipe_is_printed_as_it_lies_in_the_package() -> None:
    assert ratoon("recipe", RECIPES[0]).output == recipe_text(RECIPES[0])


def test_an_unknown_recipe_is_refused_and_a_file_is_not_replaced(here: Path) -> None:
    refused = ratoon("recipe", "cooking")
    assert refused.exit_code == 2
    written(RECIPES[0])
    again = ratoon("recipe", RECIPES[0], "--out", f"{RECIPES[0]}.toml")
    assert again.exit_code == 2
    assert ratoon("recipe", "--out", "x.toml").exit_code == 2


def shortened(path: Path) -> list[str]:
    """`--set` overrides that leave of every stage a few steps: enough for documents to end."""
    values = read_run_file(path).values
    overrides = ["model.preset=tiny", "train.global_batch=4", "train.micro_batch=2", "eval.batches=1"]
    overrides += ["data.sequence_length=256", "eval.dense_batches=1", "metrics.every=1"]
    for key in ("warmup_steps", "cooldown_steps"):
        overrides += [f"schedule.{key}=1"] * (key in values.get("schedule", {}))
        overrides += [
            f"stage.{number}.schedule.{key}=1"
            for number, stage in enumerate(values["stage"])
            if key in stage.get("schedule", {})
        ]
    overrides += [f"stage.{number}.steps={STEPS}" for number in range(len(values["stage"]))]
    return overrides


def assert_it_trains(name: str) -> None:
    path = written(name)
    overrides = shortened(path)
    stages = load_stages(path, overrides)
    train(path, overrides, ranks=1)
    for stage in stages:
        lines = map(json.loads, (stage.config.run.folder / "metrics.jsonl").read_text().splitlines())
        assert [line["step"] for line in lines if line["kind"] == "step"][-1] == stage.last_step
    report = json.loads((stages[0].run_folder / "forgetting.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == [stage.name for stage in stages]


@pytest.mark.parametrize("name", QUICK)
def test_some_recipes_train(here: Path, name: str) -> None:
    assert_it_trains(name)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in QUICK])
def test_every_other_recipe_trains_too(here: Path, name: str) -> None:
    assert_it_trains(name)
