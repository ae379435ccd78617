"""The run file as a whole: composes the sections, finds what is wrong with them, writes them back.

Every section is a frozen model beside the code that it configures. Nothing here imports torch, so that a
wrong run file is refused at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from checkpoint.config import CheckpointConfig
from parallel.layout import Layout
from parallel.settings import Settings
from trainer.config_problems import explain, report
from trainer.controllers.config import ControllerConfig
from trainer.controllers.opening import controller_problems
from trainer.data.config import DataConfig
from trainer.data.mixture_config import batch_problems
from trainer.losses.config import AuxLossConfig, loss_problems
from trainer.model.architecture import Architecture
from trainer.model.config import ModelConfig
from trainer.model.parameters import logical_parameters
from trainer.optimizer import OptimizerConfig
from trainer.precision import PrecisionConfig, fp8_problems
from trainer.run_config import EvalConfig, MetricsConfig, RunSettings, TrainConfig
from trainer.run_file import RunFile, apply_overrides, read_run_file, to_toml
from trainer.schedule import Schedule, ScheduleConfig
from trainer.stages.anchoring import anchor_of
from trainer.stages.decisions import Decision, Held, decide, keep_all
from trainer.stages.start_config import StartConfig
from trainer.updates.config import SlowWeightsConfig, UpdatesConfig
from trainer.updates.selection import update_problems

if TYPE_CHECKING:
    from checkpoint.opening import Opened

HUGGING_FACE = "Hugging Face"  # how the format of such a folder begins


class RunConfig(Settings):
    """Everything that a run file says."""

    run: RunSettings = RunSettings()
    model: ModelConfig
    parallel: Layout = Layout()
    data: DataConfig
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    start: StartConfig = StartConfig()
    controller: ControllerConfig = ControllerConfig()
    losses: tuple[AuxLossConfig, ...] = ()
    updates: UpdatesConfig = UpdatesConfig()
    slow_weights: SlowWeightsConfig = SlowWeightsConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    metrics: MetricsConfig = MetricsConfig()

    @property
    def tokens_per_step(self) -> int:
        """Token positions of one global batch."""
        return self.train.global_batch * self.data.sequence_length

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches that each data-parallel rank runs in one step."""
        return self.train.global_batch // (self.train.micro_batch * self.parallel.data(world_size))


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run file, with `--set` overrides applied.

    Raises:
        ValueError: listing every unknown, missing or ill-typed key with its line.
    """
    return parse_config(apply_overrides(read_run_file(path), overrides or []))


def parse_config(run_file: RunFile) -> RunConfig:
    """The frozen configuration of what a run file says. Raises ValueError as `load_config` does."""
    try:
        return RunConfig.model_validate(run_file.values)
    except ValidationError as error:
        problems = explain(error, run_file, RunConfig)
    raise ValueError(report(run_file.name, problems))


def resolve(config: RunConfig) -> RunConfig:
    """The same run with the model spelled out: it no longer depends on a preset, config.json or tokenizer.

    Raises:
        ValueError: when the model cannot be resolved; `validate` names the reasons among the others.
    """
    fields = architecture(config).model_dump()
    return config.model_copy(update={"model": ModelConfig(**fields)})


def architecture(config: RunConfig) -> Architecture:
    """The complete architecture, its vocabulary taken from the tokenizer where the model says none."""
    from trainer.data.tokenizer import load_tokenizer  # brings numpy, which no wrong key needs

    return config.model.resolve(load_tokenizer(config.data.tokenizer, config.data.eod).vocab_size)


def schedule(config: RunConfig) -> Schedule:
    """The learning rate of this run as a function of the step."""
    return Schedule(config.schedule, config.optimizer.lr, config.optimizer.min_lr, config.train.steps)


def starting_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that the run starts from, its own before `checkpoint.load`; None for a new run.

    Raises:
        ValueError: there is no complete checkpoint at `checkpoint.load`, or none of a known format.
    """
    from checkpoint.folder import find_latest, is_ratoon
    from checkpoint.folder import resolve as resolve_folder

    own = find_latest(config.run.checkpoints) if config.checkpoint.resume else None
    if own is not None or config.checkpoint.load is None:
        return own
    path = config.checkpoint.load
    if is_ratoon(path):
        return resolve_folder(path)
    from checkpoint.readers import recognise

    recognise(path)
    return path


def resumes_itself(config: RunConfig, path: Path) -> bool:
    """Whether the checkpoint that the run starts from is its own, so that whatever it decided stays."""
    return config.checkpoint.resume and path.parent == config.run.checkpoints


def start_decisions(config: RunConfig, opened: "Opened", *, same_run: bool) -> dict[str, Decision]:
    """What the run keeps of the checkpoint that it starts from, field by field.

    Raises:
        ValueError: as `trainer.stages.decisions.decide`.
    """
    if same_run:
        return keep_all("the run's own checkpoint")
    states = frozenset(tensor.state for tensor in opened.manifest.tensors)
    state = opened.manifest.state
    origin = str(state.get("format", ""))  # of what was converted from such a folder too
    held = Held.of(opened.format, states, state, weights_format=origin.startswith(HUGGING_FACE))
    return decide_start(config, held)


def decide_start(config: RunConfig, held: Held) -> dict[str, Decision]:
    """What the run keeps of another run's checkpoint that holds this. Raises ValueError as `decide` does."""
    decisions = decide(config.start, held)
    if config.schedule.kind == "anneal":
        decisions["schedule"] = Decision("anchor", "an anneal begins where it branches off")
    return decisions


def config_toml(config: RunConfig) -> str:
    """The run file that loads as `config`."""
    return to_toml(config.model_dump(mode="json", exclude_none=True))


def validate(config: RunConfig, world_size: int) -> list[str]:
    """Everything that keeps `config` from running on `world_size` ranks, as far as can be known before.

    Looks at the sections together, at files, at the tokenizer, and into the indices of the corpora. Changes
    nothing and starts nothing.
    """
    from trainer.data.corpus import data_problems  # brings numpy, which no wrong key needs
    from trainer.data.transforms.opening import opening_problems

    problems = data_problems(config.data)
    if not problems:
        problems += opening_problems(config.data)
    problems += batch_problems(config.data.mixture, config.data.sources, config.train.global_batch)
    problems += controller_problems(config.controller, config.data, eval_every=config.eval.every)
    model: Architecture | None = None
    if not any(problem.startswith("data.tokenizer") for problem in problems):
        try:
            model = architecture(config)
        except ValueError as error:
            problems += str(error).splitlines()
    if model is not None:
        problems += config.parallel.problems(world_size, **_layout_facts(config, model))
        problems += _length_problems(config, model)
        problems += loss_problems(
            config.losses,
            config.data.sources,
            vocab_size=model.vocab_size,
            global_batch=config.train.global_batch,
            world_size=world_size,
            layout_facts=_layout_facts(config, model),
        )
        problems += update_problems(config.updates, list(logical_parameters(model)), config.data)
        if model.attention_dropout and config.parallel.context > 1:
            problems.append(
                f"model.attention_dropout = {model.attention_dropout} with parallel.context = "
                f"{config.parallel.context}: the context ranks would draw different masks; set one to 0 or 1"
            )
    problems += _batch_problems(config, world_size)
    problems += _step_problems(config)
    return problems + fp8_problems(config.precision.fp8, config.train.precision)


def check_config(config: RunConfig, world_size: int, *, name: str) -> None:
    """Raise one ValueError with all that `validate` finds wrong in the run file `name`."""
    if problems := validate(config, world_size):
        raise ValueError(report(name, problems))


def _layout_facts(config: RunConfig, model: Architecture) -> dict[str, Any]:
    return {
        "num_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "ffn_hidden_size": model.mlp_size,
        "num_experts": model.num_experts or None,
        "sequence_length": config.data.sequence_length,
    }


def _length_problems(config: RunConfig, model: Architecture) -> list[str]:
    length, limit = config.data.sequence_length, model.max_position_embeddings
    if length <= limit:
        return []
    return [
        f"data.sequence_length = {length} is longer than the {limit} positions of the model: shorten the "
        f"sequences, or raise model.max_position_embeddings"
    ]


def _batch_problems(config: RunConfig, world_size: int) -> list[str]:
    data = config.parallel.data(world_size)
    if data == 0 or world_size % config.parallel.model_parallel:
        return []  # the layout's own problem
    share = config.train.micro_batch * data
    batch = config.train.global_batch
    if batch % share:
        up = -(-batch // share) * share
        down = f"{batch // share * share} or " if batch >= share else ""
        return [
            f"train.global_batch = {batch} is not a multiple of {share} (train.micro_batch "
            f"{config.train.micro_batch} x {data} data-parallel ranks): use {down}{up}"
        ]
    count, stages = batch // share, config.parallel.pipeline
    if config.parallel.virtual_pipeline and count % stages:
        return [
            f"{count} micro-batches a step do not divide over parallel.pipeline = {stages}, which the "
            f"interleaved schedule needs: use train.global_batch = {-(-count // stages) * stages * share}"
        ]
    return []


def open_start(config: RunConfig, path: Path) -> "Opened":
    """The checkpoint that the run starts from; `checkpoint.spec` and `facts` are about another run's."""
    from checkpoint.opening import open_checkpoint

    if resumes_itself(config, path):
        return open_checkpoint(path)
    return open_checkpoint(path, spec=config.checkpoint.spec, facts=config.checkpoint.facts)


def _start_problems(config: RunConfig, path: Path) -> list[str]:
    """What is wrong with going on from the checkpoint at `path`: its step and where the schedule begins."""
    same_run, opened = resumes_itself(config, path), open_start(config, path)
    decisions = start_decisions(config, opened, same_run=same_run)
    opened = opened.weights_alone() if decisions["moments"].verdict == "reset" else opened
    if opened.problems:
        return [f"checkpoint.load: {problem}" for problem in (*opened.problems, opened.remedy) if problem]
    step = opened.manifest.step if decisions["step"].verdict == "keep" else 0
    if same_run and step >= config.train.steps:
        return []  # done already, which is no fault
    if step >= config.train.steps:
        return [
            f"train.steps = {config.train.steps}, but {path} is at step {step} already: train.steps "
            'counts from the first run\'s beginning; raise it, or set start.policy = "weights"'
        ]
    plan = schedule(config)
    return plan.problems(anchor_of(config.start, plan, decisions, step=step, state=opened.manifest.state))


def _spec_problems(config: RunConfig) -> list[str]:
    """A spec that is not there or wrong is said once, and as what it is."""
    from checkpoint.language.spec import load_spec

    wanted = config.checkpoint.spec
    if wanted is None:
        return []
    if config.checkpoint.load is None:
        return [f"checkpoint.spec = {wanted} says what names of checkpoint.load mean, and there is no load"]
    try:
        load_spec(wanted)
    except ValueError as error:
        return [f"checkpoint.spec: {error}"]
    return []


def _step_problems(config: RunConfig) -> list[str]:
    problems = _spec_problems(config)
    try:
        path = starting_checkpoint(config)
        if not problems:
            problems = _start_problems(config, path) if path is not None else schedule(config).problems()
    except ValueError as error:
        problems.append(f"checkpoint.load: {error}")
    if config.eval.every and not config.data.validation:
        problems.append(
            f"eval.every = {config.eval.every}, but there is nothing to evaluate on: add a "
            "[[data.validation]] with name and path, or set eval.every = 0"
        )
    return problems
