"""How the checkpoint of this folder was made: megatron-core 0.13.1 itself, TP2 x DP3, bf16, on CPU.

The format `fully_sharded_model_space` was the default up to megatron-core 0.13; 0.15 and later can neither
write nor read it. Not run by the tests; to make it again, from the repository root, with torch 2.13:

    pip download megatron-core==0.13.1 --no-deps -d old && unzip -q old/*.whl -d old/unpacked
    PYTHONPATH=old/unpacked:. python -m tests.foreign.model_space.make
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.foreign.model_space.values import FFN, GROUPS, HEADS, HIDDEN, LAYERS, PADDED_VOCAB, STEP, value

TENSOR, WORLD = 2, 6
ARCHIVE = Path(__file__).parent / "checkpoint.tar.xz"
NAME = f"iter_{STEP:07}"
TO_KEY = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def _without_cuda() -> None:
    """megatron-core 0.13 asks for CUDA by name; the host has to do."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None
    create = torch.tensor

    def on_host(*args: Any, **kwargs: Any) -> torch.Tensor:
        return create(*args, **(kwargs | {"device": "cpu"}))

    torch.tensor = on_host  # type: ignore[assignment]
    name_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = name_type(self, *args, **kwargs)
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        named = isinstance(found, str) and caller.startswith("megatron.")
        return found.replace("torch.", "torch.cuda.", 1) if named else found

    np.product = np.prod  # numpy 2 has it no longer
    torch.Tensor.type = cuda_type  # type: ignore[assignment,method-assign]


def _cut(name: str, shape: torch.Size, state: str, rank: int) -> torch.Tensor:
    """What tensor rank `rank` holds of the planted values of its parameter `name`."""
    layer, below = None, name
    if name.startswith("decoder.layers."):
        layer, below = int(name.split(".")[2]), name.split(".", 3)[3]
        for local, key in TO_KEY.items():
            below = below.replace(local, key)
        below = "decoder.layers." + below
    whole = torch.from_numpy(value(below, state))
    whole = whole if layer is None else whole[layer]
    if below.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(TENSOR)[rank] for half in whole.chunk(2)])
    for axis, size in enumerate(shape):
        if size != whole.shape[axis]:
            return whole.chunk(TENSOR, axis)[rank]
    return whole


def _save(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    _without_cuda()
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(TENSOR, create_gloo_process_groups=False)
    tensor_parallel.random.initialize_rng_tracker()
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS,
        num_query_groups=GROUPS, kv_channels=3, tensor_model_parallel_size=TENSOR, bf16=True,
        params_dtype=torch.bfloat16, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, normalization="RMSNorm", use_cpu_initialization=True,
        gradient_accumulation_fusion=False, bias_dropout_fusion=False,
    )  # fmt: skip
    model = GPTModel(
        config=config, transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=PADDED_VOCAB, max_sequence_length=8, position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )  # fmt: skip
    wrapped = DistributedDataParallel(
        config, DistributedDataParallelConfig(use_distributed_optimizer=True), Float16Module(config, model)
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=0.0, weight_decay=0.1, bf16=True, params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
        ),
        [wrapped], use_gloo_process_groups=False,
    )  # fmt: skip
    inner = optimizer.chained_optimizers[0]
    for group in inner.optimizer.param_groups:
        for main in group["params"]:
            main.grad = torch.zeros_like(main)
    inner.optimizer.step()  # torch's Adam makes its state then
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in model.named_parameters():
        whole = {
            state: _cut(name, parameter.shape, state, tensor_rank)
            for state in ("master", "exp_avg", "exp_avg_sq")
        }
        parameter.data.copy_(whole["master"])
        if parameter not in inner.model_param_group_index_map:
            continue
        group, order = inner.model_param_group_index_map[parameter]
        main = inner.optimizer.param_groups[group]["params"][order]
        held = inner._get_model_param_range_map(parameter)["param"]
        main.data.copy_(whole["master"].reshape(-1)[held.start : held.end])
        state = inner.optimizer.state[main]
        state["step"].fill_(STEP)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment].copy_(whole[moment].reshape(-1)[held.start : held.end])
    content = {
        "args": argparse.Namespace(num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN,
            num_attention_heads=HEADS, num_query_groups=GROUPS, group_query_attention=True, kv_channels=3,
            padded_vocab_size=PADDED_VOCAB, tensor_model_parallel_size=TENSOR, pipeline_model_parallel_size=1,
            untie_embeddings_and_output_weights=True, bf16=True, use_distributed_optimizer=True, swiglu=True),
        "checkpoint_version": 3.0,
        "iteration": STEP,
        "model": model.sharded_state_dict(),
    }  # fmt: skip
    content["optimizer"] = optimizer.sharded_state_dict(
        {"model": content["model"]}, sharding_type="fully_sharded_model_space"
    )
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    dist_checkpointing.save(
        content, f"{folder}/{NAME}", TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, NAME).mkdir()
        mp.spawn(_save, (folder,), WORLD)
        with tarfile.open(ARCHIVE, "w:xz") as archive:
            archive.add(Path(folder, NAME), NAME)
