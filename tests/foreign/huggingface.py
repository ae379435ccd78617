"""Genuine Hugging Face folders of the oracle, made and checked by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from tests.foreign.oracle import Oracle


def build_model(oracle: Oracle) -> transformers.PreTrainedModel:
    """transformers' model of the oracle's sizes, holding the oracle's weights."""
    model = transformers.AutoModelForCausalLM.from_config(config(oracle), dtype=dtype(oracle))
    state = {name: oracle.value(name, "weight") for name in oracle.shapes()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name] if name in state else _stacked(name, state, parameter.shape))
    return model


def config(oracle: Oracle) -> transformers.PretrainedConfig:
    """Llama's, or Qwen3-MoE's with experts."""
    kind = transformers.Qwen3MoeConfig if oracle.experts else transformers.LlamaConfig
    return kind(**oracle.huggingface_config(), dtype=dtype(oracle))


def dtype(oracle: Oracle) -> torch.dtype:
    return torch.bfloat16 if oracle.precision == "bf16" else torch.float32


def save(folder: Path, oracle: Oracle, *, shard_size: str = "50GB") -> Path:
    """A folder as transformers saves it, in shards of at most `shard_size`; returns `folder`."""
    build_model(oracle).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def save_bin(folder: Path, oracle: Oracle, *, shards: int = 1, zipped: bool = True) -> Path:
    """A folder of torch.save files, as transformers before 5 wrote with safe_serialization=False.

    Args:
        zipped: False gives the format of torch before 1.6.
    """
    model = build_model(oracle)
    model.config.save_pretrained(folder)
    state = {name: oracle.value(name, "weight") for name in oracle.shapes()}
    if oracle.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    names = [f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin" for n in range(shards)]
    names = names if shards > 1 else ["pytorch_model.bin"]
    where = {name: names[number % shards] for number, name in enumerate(state)}
    for file in names:
        held = {name: tensor for name, tensor in state.items() if where[name] == file}
        torch.save(held, folder / file, _use_new_zipfile_serialization=zipped)
    if shards > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": where}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def differences(folder: Path, oracle: Oracle) -> list[str]:
    """What transformers loads from a folder, and that is not the oracle's, bit for bit; a line each.

    fp32 weights of a bf16 model are masters, and have to round to its weights.
    """
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    lines = [f"{kind}: {sorted(names)}" for kind, names in report.items() if names]
    wanted = dict(build_model(oracle).state_dict())
    found = dict(model.state_dict())
    lines += [f"{name}: only on one side" for name in sorted(wanted.keys() ^ found.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        if found[name].dtype not in (wanted[name].dtype, torch.float32):
            lines.append(f"{name}: {found[name].dtype}, should be {wanted[name].dtype}")
        elif not torch.equal(wanted[name], found[name].to(wanted[name].dtype)):
            lines.append(f"{name}: other numbers")
    return lines


def _stacked(name: str, state: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """What transformers 5 holds of all experts together: [expert, out, in], gate above up."""
    prefix, _, kind = name.rpartition(".")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
    experts = [
        torch.cat([state[f"{prefix}.{expert}.{part}.weight"] for part in parts]) for expert in range(shape[0])
    ]
    return torch.stack(experts)
