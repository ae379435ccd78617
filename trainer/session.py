"""Everything that a run holds while it trains, made from its configuration and its checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.save import Saved, Saver
from parallel.engine import Engine
from parallel.forward import gather_texts
from parallel.fp8_state import get_fp8_state, set_fp8_state
from parallel.mesh import Mesh, build_mesh
from parallel.random_state import get_random_state, set_random_state
from trainer.build import build_engine, execution_here
from trainer.config import RunConfig, architecture, schedule, starting_checkpoint
from trainer.data.batch import MicroBatch
from trainer.data.replay.opening import StageFolder
from trainer.data.stream import TokenStream
from trainer.hooks.hooks import Beginning, Hooks
from trainer.hooks.opening import make_hooks
from trainer.model.architecture import Architecture
from trainer.model.parameters import logical_parameters
from trainer.model.transformer import Execution
from trainer.optimizer import settings_by_group
from trainer.precision import accelerator_here, fp8_refusal
from trainer.schedule import Anchor, Schedule
from trainer.start import Start, begin, start_from


@dataclass(frozen=True)
class StepBatches:
    """A data rank's share of a global batch, and the sum of the loss weights of the whole of it.

    That sum is None where it has to be counted over the data ranks.
    """

    micro_batches: list[MicroBatch]
    tokens: float | None


@dataclass
class Session:
    """The parts of a run, and how far it is.

    Attributes:
        first_step: steps that were done before this stage.
        step: optimizer steps done, those before a resume included.
        anchor: where the schedule began; with the step it decides every learning rate.
        lr: learning rate of the last update.
        resumed: whether it goes on from a checkpoint of its own, rather than begins.
        lineage: the checkpoints that this run has started from, oldest first.
    """

    config: RunConfig
    mesh: Mesh
    model: Architecture
    execution: Execution
    engine: Engine
    stream: TokenStream
    hooks: Hooks
    schedule: Schedule
    anchor: Anchor
    saver: Saver
    first_step: int
    step: int
    lr: float
    resumed: bool
    lineage: list[dict[str, Any]]

    def batches(self, step: int) -> StepBatches:
        """This data rank's micro-batches of `step`, and the tokens of all ranks'."""
        micro_batches = self.stream.micro_batches(
            step,
            data_rank=self.mesh.data_rank,
            data_size=self.mesh.data,
            micro_batch=self.config.train.micro_batch,
        )
        return StepBatches(micro_batches, self.stream.weight_of(step))

    def save(self) -> None:
        """Save a checkpoint of the steps done so far, in the background where the run file allows it."""
        rank_state = get_random_state() | get_fp8_state(self.engine.chunks, self.engine.config)
        self.saver.save(self.step, self.engine.slices(), self._state(), rank_state)

    def _state(self) -> dict[str, Any]:
        """All that decides the next step and is no tensor: JSON, the same on every rank."""
        return {
            "step": self.step,
            "first_step": self.first_step,
            "scalars": {"updates": self.engine.updates, "lr": self.lr},
            "schedule": {
                "anchor": self.anchor.to_json(),
                "phase": self.schedule.phase(max(0, self.step - 1), self.anchor),
                "form": self.config.schedule.model_dump(mode="json"),
            },
            "data": self.stream.state(self.step),
            "parameter_groups": self.config.optimizer.model_dump(mode="json"),
            "hooks": self.hooks.state(),
            "groups": settings_by_group(self.config.optimizer, logical_parameters(self.model), self.lr),
            "model": self.model.model_dump(mode="json"),
            "config": self.config.model_dump(mode="json"),
            "layout": layout_facts(self.mesh),
            "lineage": self.lineage,
        }


def layout_facts(mesh: Mesh) -> dict[str, Any]:
    """The layout as a checkpoint keeps it."""
    return {**dataclasses.asdict(mesh.layout), "world_size": mesh.world_size}


def open_session(config: RunConfig) -> tuple[Session, list[str]]:
    """Build mesh, engine and data, and go on from a checkpoint where there is one.

    Returns:
        The session, and sentences about what was found and chosen, for whoever watches the run.

    Raises:
        ValueError: this machine cannot do what the run file asks, or the checkpoint does not fit.
    """
    if config.run.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.run.seed)
    model, execution = architecture(config), _execution(config)
    mesh = build_mesh(config.parallel, seed=config.run.seed)
    path = _agreed_checkpoint(config)
    length, seed = config.data.sequence_length, config.run.seed if path is None else None
    engine = build_engine(mesh, model, config.optimizer, execution, sequence_length=length, seed=seed)
    notes = [f"{engine.backend.kind} modules: {engine.backend.reason}; {_optimizer_name(engine)}"]
    if execution.transformer_engine and config.parallel.context > 1 and config.data.document_mask:
        notes.append("portable attention: Transformer Engine takes no documents under context parallelism")
    hooks = make_hooks(config, engine, model)
    plan = schedule(config)
    start = begin(plan)
    if path is not None:
        start, more = start_from(config, engine, path, layout_facts(mesh))
        notes += more
    stream = _open_stream(config, start)
    notes += hooks.begin(Beginning(config, model, engine, stream, start, path))
    session = Session(
        config=config,
        mesh=mesh,
        model=model,
        execution=execution,
        engine=engine,
        stream=stream,
        hooks=hooks,
        schedule=plan,
        anchor=start.anchor,
        saver=_open_saver(config, mesh, run_id=start.run_id),
        first_step=start.first_step,
        step=start.step,
        lr=start.lr,
        resumed=start.resumed,
        lineage=start.lineage,
    )
    engine.updates = start.updates
    if start.rank_state:
        set_random_state(dict(start.rank_state))
        set_fp8_state(engine.chunks, engine.config, start.rank_state)
    return session, notes


def _agreed_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint to start from, which every rank must see: some would load while others begin anew."""
    path = starting_checkpoint(config)
    seen = dict.fromkeys(gather_texts(str(path)))
    if len(seen) > 1:
        raise ValueError(
            f"the ranks see different checkpoints to start from: {', '.join(seen)}. run.dir and "
            "checkpoint.load must lie on a file system that all machines share"
        )
    return path


def _execution(config: RunConfig) -> Execution:
    refusal = fp8_refusal(config.precision.fp8, config.train.precision, accelerator_here())
    if refusal:
        raise ValueError(refusal)
    return execution_here(
        precision=config.train.precision,
        fp8=config.precision.fp8,
        recompute=config.train.recompute,
        deterministic=config.run.deterministic,
    )


def _open_saver(config: RunConfig, mesh: Mesh, *, run_id: str | None) -> Saver:
    """The saver; `run_id` says whose old checkpoints are its own to remove, None starts a new run."""
    return Saver(
        config.run.checkpoints,
        rank=mesh.rank,
        world_size=mesh.world_size,
        keep_last=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        keep_steps=config.checkpoint.at,
        background=config.checkpoint.background,
        run_id=run_id,
    )


def _open_stream(config: RunConfig, start: Start) -> TokenStream:
    folder = StageFolder(
        config.run.folder, writes=torch.distributed.get_rank() == 0, new_stage=not start.resumed
    )
    return TokenStream(
        config.data,
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        state=start.data,
        first_step=start.step,
        stage=config.run.stage,
        folder=folder,
    )


def _optimizer_name(engine: Engine) -> str:
    inner = type(engine.optimizer.chained_optimizers[0].optimizer)
    return f"optimizer {inner.__module__.split('.')[0]}.{inner.__name__}"


def saved_sentence(saved: Saved) -> str:
    """A finished save in words."""
    return (
        f"saved {saved.path.name} ({saved.num_bytes / 1e6:,.1f} MB by this rank, stall "
        f"{saved.stall_seconds:.2f} s, written in {saved.write_seconds:.2f} s)"
    )
