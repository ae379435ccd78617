"""From configuration to an engine with its initial weights."""

from __future__ import annotations

import dataclasses

import torch

from parallel.engine import Engine
from parallel.initialise import normal_draw
from parallel.mesh import Mesh
from parallel.specs import choose_backend
from trainer.model.architecture import Architecture
from trainer.model.transformer import Execution, Recompute, gpt_arguments, transformer_config
from trainer.optimizer import OptimizerConfig, megatron_optimizer_config, weight_decay
from trainer.precision import FP8


def execution_here(
    *,
    precision: str,
    fp8: FP8 = "off",
    recompute: Recompute = "none",
    deterministic: bool = False,
    portable: bool = False,
) -> Execution:
    """How this machine carries out the arithmetic: with CUDA and Transformer Engine where they are."""
    return Execution(
        precision=precision,  # type: ignore[arg-type]
        fp8=fp8,
        recompute=recompute,
        cuda=torch.cuda.is_available(),
        transformer_engine=choose_backend(portable=portable, fp32=precision == "fp32").kind
        == "transformer_engine",
        deterministic=deterministic,
    )


def build_engine(
    mesh: Mesh,
    model: Architecture,
    optimizer: OptimizerConfig,
    execution: Execution,
    *,
    sequence_length: int,
    seed: int | None,
    overlap: bool | None = None,
) -> Engine:
    """The model on this rank's part of the mesh, initialised from the seed: the same in every layout.

    Args:
        seed: None leaves the weights zero, for a checkpoint to fill.
        overlap: as in Engine.
    """
    engine = Engine(
        mesh,
        transformer_config(model, mesh.layout, execution),
        dataclasses.asdict(gpt_arguments(model, mesh.layout, execution, sequence_length=sequence_length)),
        vocab_size=model.vocab_size,
        optimizer=megatron_optimizer_config(optimizer, execution, mesh.layout),
        decays=lambda name: weight_decay(optimizer, name) > 0,
        portable=not execution.transformer_engine,
        overlap=overlap,
    )
    if seed is None:
        engine.blank()
    else:
        engine.initialise(seed, normal_draw(model.init_std, model.num_layers))
    return engine
