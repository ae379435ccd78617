"""Make a genuine checkpoint of every kind, for `python -m tools.convert_matrix`, and try what it converted.

    python -m tests.foreign --out DIR [--only NAME ...]
    python -m tests.foreign --serve

DIR/sources.json lists them; DIR/oracle-*.safetensors has what each must hold, as "NAME@STATE". `--serve`
reads a line of JSON for each converted folder, {"to", "folder", "oracle", "optimizer"}, lets the trainer of
that format load it and make one update, and answers with a line: what is wrong, [] where nothing is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoint.convert.run import convert, prepare
from checkpoint.writers.options import WriteOptions
from parallel.layout import Layout
from tests.foreign import (
    dcp,
    deepspeed,
    deepspeed_pipeline,
    deepspeed_tensor,
    huggingface,
    megatron,
    native,
    own_loaders,
)
from tests.foreign.megatron_model import Run
from tests.foreign.model_space import oracle as model_space
from tests.foreign.oracle import BETAS, EPS, LR, STATES, STEP, WEIGHT_DECAY, Oracle

BF16, FP32 = Oracle(precision="bf16"), Oracle()
TIED, EXPERTS = Oracle(precision="bf16", tied=True), Oracle(precision="bf16", experts=4)
ORACLES = {"bf16": BF16, "fp32": FP32, "tied": TIED, "experts": EXPERTS, "fp32-tied": Oracle(tied=True)}
ORACLES["0.13"] = model_space.ModelSpaceOracle()
WITHOUT_OPTIMIZER = {"torch_dist weights", "HF safetensors", "HF .bin tied", "HF experts"}
SETTINGS = {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY, "step": STEP}
TP2_PP2 = Run(Layout(tensor=2, pipeline=2), 4)
Z = deepspeed.Run


def _converted(folder: Path, oracle: Oracle, to: str) -> Path:
    """Ratoon's own that are no run's, of a run on three data ranks."""
    native.save(folder / "run", oracle, Run(Layout(), 3))
    return convert(prepare(folder / "run", to, WriteOptions()), folder / to).target


def _pipeline(folder: Path, oracle: Oracle) -> Path:
    deepspeed_pipeline.save_pipeline(folder, oracle, Z(1, 4))
    (folder / "spec.toml").write_text(deepspeed_pipeline.SPEC)
    return folder


def _universal(folder: Path, oracle: Oracle) -> Path:
    """What DeepSpeed's own `ds_to_universal` makes of a ZeRO-2 checkpoint."""
    from deepspeed.checkpoint.ds_to_universal import main

    made = deepspeed.save(folder / "zero2", oracle, Z(2)) / deepspeed.TAG
    main(_arguments(made, folder / "universal"))
    (folder / "latest_universal").write_text("universal")
    return folder


def _arguments(source: Path, target: Path) -> argparse.Namespace:
    return argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )


# name -> (oracle, how it is made)
SOURCES: dict[str, tuple[str, Callable[[Path, Oracle], Path]]] = {
    "ratoon TP2 PP2": ("bf16", lambda f, o: native.save(f, o, TP2_PP2)),
    "ratoon EP2": ("experts", lambda f, o: native.save(f, o, Run(Layout(expert=2), 2))),
    "ratoon universal": ("fp32", lambda f, o: _converted(f, o, "universal")),
    "ratoon index": ("bf16", lambda f, o: _converted(f, o, "index")),
    "megatron torch TP2 PP2": ("bf16", lambda f, o: megatron.save_torch(f, o, TP2_PP2)),
    "megatron torch PP2 VPP2": (
        "tied",
        lambda f, o: megatron.save_torch(f, o, Run(Layout(pipeline=2, virtual_pipeline=2), 2)),
    ),
    "megatron torch EP2": ("experts", lambda f, o: megatron.save_torch(f, o, Run(Layout(expert=2), 2))),
    "megatron torch DP3": ("bf16", lambda f, o: megatron.save_torch(f, o, Run(Layout(), 3))),
    "megatron torch plain": (
        "bf16",
        lambda f, o: megatron.save_torch(f, o, Run(Layout(tensor=2, distributed_optimizer=False), 2)),
    ),
    "torch_dist dp_resh.": ("bf16", lambda f, o: megatron.save_torch_dist(f, o, TP2_PP2)),
    "torch_dist fully_resh.": (
        "tied",
        lambda f, o: megatron.save_torch_dist(f, o, TP2_PP2, megatron.Dist("fully_reshardable")),
    ),
    "torch_dist EP2": (
        "experts",
        lambda f, o: megatron.save_torch_dist(f, o, Run(Layout(expert=2), 2), megatron.Dist()),
    ),
    "torch_dist weights": (
        "bf16",
        lambda f, o: megatron.save_torch_dist(f, o, TP2_PP2, megatron.Dist(optimizer=False)),
    ),
    "torch_dist of 0.13": ("0.13", lambda f, o: model_space.unpack(f)),
    "deepspeed ZeRO-1 DP2": ("bf16", lambda f, o: deepspeed.save(f, o, Z(1))),
    "deepspeed ZeRO-2 DP3": ("fp32", lambda f, o: deepspeed.save(f, o, Z(2, 3))),
    "deepspeed ZeRO-3 DP3": ("bf16", lambda f, o: deepspeed.save(f, o, Z(3, 3))),
    "deepspeed ZeRO-1 TP2": ("bf16", lambda f, o: deepspeed_tensor.save_tensor_parallel(f, o, Z(1))),
    "deepspeed PP2 tied": ("fp32-tied", _pipeline),
    "deepspeed universal": ("bf16", _universal),
    "FSDP2 of 2": ("fp32", lambda f, o: dcp.save(f, o, dcp.Run())),
    "FSDP2 of 3": ("fp32", lambda f, o: dcp.save(f, o, dcp.Run((3,)))),
    "FSDP2 x TP 2x2": ("fp32", lambda f, o: dcp.save(f, o, dcp.Run((2, 2), dcp.TENSOR))),
    "HSDP 2x2": ("fp32", lambda f, o: dcp.save(f, o, dcp.Run((2, 2), dcp.HYBRID, "app"))),
    "FSDP1 of 2": ("fp32", lambda f, o: dcp.save(f, o, dcp.Run(wrapper="fsdp1", layout="nested"))),
    "torchtitan": ("fp32", lambda f, o: dcp.save(f, o, dcp.Run((3,), layout="titan", titan_names=True))),
    "HF safetensors": ("bf16", lambda f, o: huggingface.save(f, o, shard_size="3MB")),
    "HF .bin tied": ("tied", lambda f, o: huggingface.save_bin(f, o, shards=2)),
    "HF experts": ("experts", huggingface.save),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder to make checkpoints in")
    parser.add_argument("--only", nargs="*", help="names of sources; by default all")
    parser.add_argument("--serve", action="store_true", help="load converted folders that stdin names")
    given = parser.parse_args()
    if given.serve:
        serve()
    elif given.out is None:
        parser.error("--out DIR or --serve")
    else:
        make(given.out, given.only or list(SOURCES))


def make(out: Path, names: list[str]) -> None:
    """Write the checkpoints, their oracles, and the list of both."""
    out.mkdir(parents=True, exist_ok=True)
    if unknown := sorted(set(names) - SOURCES.keys()):
        raise SystemExit(f"no such sources: {', '.join(unknown)}; there are {', '.join(SOURCES)}")
    listed = [_make(out, name) for name in names]
    for key in {str(entry["oracle"]) for entry in listed}:
        _write_oracle(out / f"oracle-{key}.safetensors", ORACLES[key])
    (out / "sources.json").write_text(json.dumps(listed, indent=2))


def serve() -> None:
    """Answer on what was standard output; what trainers print there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        oracle = ORACLES[asked["oracle"]]
        found = own_loaders.faults(asked["to"], Path(asked["folder"]), oracle, optimizer=asked["optimizer"])
        print(json.dumps(found), file=answers, flush=True)


def _make(out: Path, name: str) -> dict[str, object]:
    key, save = SOURCES[name]
    folder = out / name.lower().replace(" ", "-").replace(".", "")
    oracle, model = ORACLES[key], ORACLES[key].architecture()
    path = save(folder, oracle)
    config = folder.with_suffix(".config")
    huggingface.config(oracle).save_pretrained(config)
    facts = {"vocab_size": oracle.vocab, "hidden_size": oracle.hidden}
    facts |= {"num_attention_heads": model.num_attention_heads, "num_query_groups": model.num_query_groups}
    spec = folder / "spec.toml"
    return {
        "name": name,
        "path": str(path),
        "oracle": key,
        "optimizer": name not in WITHOUT_OPTIMIZER,
        "loads": key != "0.13",  # its settings are not those that the trainers here step with
        "settings": model_space.SETTINGS if key == "0.13" else SETTINGS,
        "facts": facts,
        "spec": str(spec) if spec.exists() else None,
        "config": str(config),
    }


def _write_oracle(path: Path, oracle: Oracle) -> None:
    values = {
        f"{name}@{state}": oracle.value(name, state).contiguous()
        for name in oracle.shapes()
        for state in STATES
    }
    save_file(values, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
