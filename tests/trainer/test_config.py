"""The run file: what is wrong is said at once and exactly; what is right survives being written back."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.corpora import write_tokens
from trainer.config import config_toml, load_config, parse_config, resolve, validate
from trainer.run_file import RunFile, apply_overrides, key_lines, read_run_file, to_toml

GOOD = """\
[model]
preset = "tiny"

[data]
sequence_length = 128

[[data.sources]]
name = "prose"
path = "{path}"

[train]
steps = 20
global_batch = 8
precision = "fp32"
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(GOOD.format(path=write_tokens(tmp_path / "prose", [[1, 2, 3]])))
    return path


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ValueError, match="problem") as caught:
        load_config(path, list(overrides))
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]]


def test_the_resolved_config_loads_back_equal(run_file: Path, tmp_path: Path) -> None:
    overrides = ["model.preset=mixtral-8x7b", "run.name=größe", "schedule.kind=wsd", "parallel.tensor=2"]
    config = resolve(load_config(run_file, overrides))
    saved = tmp_path / "config.toml"
    saved.write_text(config_toml(config), encoding="utf-8")
    assert load_config(saved) == config
    assert resolve(config) == config


def test_a_good_config_has_no_problem(run_file: Path) -> None:
    assert validate(load_config(run_file), 4) == []


def test_every_problem_at_once_with_line_and_suggestion(run_file: Path) -> None:
    text = run_file.read_text()
    text = text.replace("preset", "preste").replace("steps = 20", 'steps = "ten"')
    text = text.replace("sequence_length = 128", "sequence_length = 0\nmicro_batch = 2")
    run_file.write_text(text + "[paralel]\ntensor = 2\n")
    assert problems_of(run_file) == [
        "line 2: model.preste is not a key of the run file; did you mean model.preset?",
        "line 5: data.sequence_length = 0: expected greater than 0",
        "line 6: data.micro_batch is not a key of the run file; did you mean train.micro_batch?",
        'line 13: train.steps = "ten": expected an integer, found a string',
        "line 16: paralel is not a key of the run file; did you mean parallel?",
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "parallel.tensr=2",
            "--set: parallel.tensr is not a key of the run file; did you mean parallel.tensor?",
        ),
        ("train.steps=20.5", "--set: train.steps = 20.5: expected an integer, found a number"),
        ("train.precision=fp16", "--set: train.precision = \"fp16\": expected 'fp32' or 'bf16'"),
        ("train.global_batch=", "--set: train.global_batch is missing: it has no default"),
        (
            "data.sources.1.name=code",
            "line 7: data.sources.1: 'code' needs a path or replay = { of = [...] }, one of the two",
        ),
        ("eval=3", "--set: eval = 3: expected a table, found an integer"),
    ],
)
def test_a_wrong_override_is_named(run_file: Path, override: str, problem: str) -> None:
    assert problems_of(run_file, override) == [problem]


def test_overrides_reach_lists_and_take_bare_strings(run_file: Path) -> None:
    config = load_config(
        run_file,
        ["data.sources.0.weight=2", "run.name=second-try", "optimizer.betas=[0.8, 0.9]"],
    )
    assert (config.data.sources[0].weight, config.run.name, config.optimizer.betas) == (
        2.0,
        "second-try",
        (0.8, 0.9),
    )


def test_an_empty_override_restores_the_default(run_file: Path) -> None:
    assert load_config(run_file, ["train.precision="]).train.precision == "bf16"


def test_overrides_that_cannot_be_applied_are_all_named(run_file: Path) -> None:
    wrong = ["steps", "train.steps.x=1", "data.sources.9.name=a", "optimizer.betas=[1"]
    with pytest.raises(ValueError, match="KEY=VALUE") as caught:
        load_config(run_file, wrong)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        f"--set {w}" for w in wrong
    ]


def test_overrides_leave_the_file_as_it_was(run_file: Path) -> None:
    read = read_run_file(run_file)
    apply_overrides(read, ["train.steps=1", "data.sources.0.name=x"])
    assert read == read_run_file(run_file)


@pytest.mark.parametrize(
    ("overrides", "world_size", "part"),
    [
        (["train.global_batch=6"], 4, "global_batch = 6 is not a multiple of 4"),
        (["train.micro_batch=3"], 1, "use 6 or 9"),
        (["parallel.tensor=8"], 8, "num_query_groups = 4 is not divisible by parallel.tensor = 8"),
        (["parallel.tensor=2"], 3, "does not divide 3 ranks"),
        (["parallel.context=2", "data.sequence_length=126"], 2, "is not a multiple of 4"),
        (["data.sequence_length=4096"], 1, "longer than the 2048 positions"),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.global_batch=9"],
            2,
            "global_batch = 10",
        ),
        (["eval.every=5"], 1, "nothing to evaluate on"),
        (["precision.fp8=delayed"], 1, "needs bf16"),
        (["schedule.warmup_steps=50"], 1, "schedule.warmup_steps is 50"),
        (["data.sources.0.path=nowhere"], 1, "nowhere.bin and nowhere.idx do not exist"),
        (["checkpoint.load=nowhere"], 1, "checkpoint.load: nowhere: there is nothing"),
        (["data.tokenizer=nowhere.json"], 1, "data.tokenizer: nowhere.json does not exist"),
        (["model.vocab_size=100"], 1, "the tokenizer has 257"),
        (["model.preset=tyni"], 1, "did you mean tiny"),
    ],
)
def test_contradictions_between_sections(
    run_file: Path, overrides: list[str], world_size: int, part: str
) -> None:
    problems = validate(load_config(run_file, overrides), world_size)
    assert len(problems) == 1, problems
    assert part in problems[0]


def test_data_that_cannot_be_read_are_named(run_file: Path) -> None:
    (run_file.parent / "prose.bin").write_bytes(b"")
    (problem,) = validate(load_config(run_file), 1)
    assert "data.sources 'prose': " in problem
    assert "0 bytes, its index says 12" in problem


def test_independent_contradictions_come_together(run_file: Path) -> None:
    config = load_config(run_file, ["train.global_batch=7", "data.sequence_length=4096", "eval.every=1"])
    assert len(validate(config, 2)) == 3


@pytest.mark.parametrize("text", ["[run\n", "a = 1\na = 2\n", "\udcff"])
def test_text_that_is_no_toml_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"broken\.toml"):
        load_config(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the run file .*nothing\.toml"):
        load_config(tmp_path / "nothing.toml")


def test_a_file_that_lacks_required_sections() -> None:
    with pytest.raises(ValueError, match="3 problems") as caught:
        parse_config(RunFile("empty.toml", {}))
    assert [key in str(caught.value) for key in ("model", "data", "train")] == [True] * 3


def test_toml_writer_survives_awkward_values() -> None:
    import tomllib

    values = {
        "text": 'quotes " and \\ and\nnewline \x7f ü',
        "floats": [1e-5, 1e22, 0.1, float("inf"), -0.0],
        "none": [],
        "dotted key": {"a.b": {"deep": True}},
        "tables": [{"x": 1, "inner": {"y": 2}}, {}, {"many": [{"z": 3}]}],
    }
    assert tomllib.loads(to_toml(values)) == values


def test_line_numbers_of_repeated_tables() -> None:
    lines = key_lines('a = 1\n[[t.s]]\nx = 1\n\n[[t.s]]  # two\n"x" = 2\n')
    assert lines["a",] == 1
    assert lines["t", "s", 0, "x"] == 3
    assert lines["t", "s", 1, "x"] == 6


def test_a_wrong_run_file_is_refused_without_importing_torch(run_file: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from trainer.config import load_config, validate\n"
        f"assert validate(load_config(Path({str(run_file)!r})), 1) == []\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
