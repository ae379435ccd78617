"""Hugging Face folders: genuine ones are read bit for bit, and what is missing or damaged is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint import save as save_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from checkpoint.boxes import Box, cover_fault
from checkpoint.manifest import LogicalTensor
from checkpoint.plan import plan
from checkpoint.read import read_copies
from checkpoint.readers.huggingface import read, recognise
from checkpoint.source import Source, SourceTensor
from tests.foreign.huggingface import differences, save, save_bin
from tests.foreign.oracle import Oracle
from tests.ranks import run_ranks

DENSE = Oracle(layers=2)
TIED = Oracle(layers=2, hidden=256, tied=True, precision="bf16")
EXPERTS = Oracle(layers=2, experts=4, precision="bf16")
ORACLES = pytest.mark.parametrize("oracle", [DENSE, TIED, EXPERTS], ids=["dense", "tied", "experts"])


def value(tensor: SourceTensor) -> torch.Tensor:
    """The tensor's elements, by the loader's own reading."""
    assert cover_fault(tensor.shape, [piece.box for piece in tensor.pieces]) is None
    dtype = tensor.pieces[0].dtype
    logical = LogicalTensor(tensor.name, tensor.state, tensor.shape, dtype, tensor.pieces)
    target = torch.empty(logical.numel, dtype=getattr(torch, dtype))
    whole = Box((0,) * len(tensor.shape), tensor.shape)
    assert not read_copies(Path("/"), plan(logical, [(0, whole)]), [target]).problems
    return target.reshape(tensor.shape)


def check(source: Source, oracle: Oracle, twice: tuple[str, ...] = ()) -> None:
    """That the source holds the oracle's weights, and those `twice` under another name."""
    assert source.problems == []
    found = {tensor.name: tensor for tensor in source.tensors}
    assert set(found) == {*oracle.shapes(), *twice}
    assert {tensor.state for tensor in source.tensors} == {"weight"}
    for name in oracle.shapes():
        assert torch.equal(value(found[name]), oracle.value(name, "weight")), name


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("shards"), DENSE, shard_size="3MB")


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    """A copy of the sharded folder, to be damaged."""
    shutil.copytree(shards, tmp_path / "copy")
    return tmp_path / "copy"


@ORACLES
@pytest.mark.parametrize("size", ["50GB", "1MB"], ids=["one file", "shards"])
def test_what_transformers_saves_is_read(tmp_path: Path, oracle: Oracle, size: str) -> None:
    folder = save(tmp_path, oracle, shard_size=size)
    assert recognise(folder)
    source = read(folder)
    check(source, oracle)
    model = oracle.architecture()
    sizes = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "head_dim",
    )
    for fact in (*sizes, "vocab_size", "tie_word_embeddings"):
        assert source.facts[fact] == getattr(model, fact), fact
    for fact in ("num_experts", "experts_per_token", "moe_ffn_hidden_size") if oracle.experts else ():
        assert source.facts[fact] == getattr(model, fact), fact
    assert source.model_config == json.loads((folder / "config.json").read_text())
    assert differences(folder, oracle) == []


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("oracle", [DENSE, TIED], ids=["dense", "tied"])
def test_files_of_torch_save_are_read(tmp_path: Path, oracle: Oracle, shards: int, zipped: bool) -> None:
    """Where the output layer is tied, these hold it twice."""
    folder = save_bin(tmp_path, oracle, shards=shards, zipped=zipped)
    source = read(folder)
    check(source, oracle, twice=("lm_head.weight",) if oracle.tied else ())
    assert source.facts["tie_word_embeddings"] == oracle.tied
    assert differences(folder, oracle) == []


def test_one_file_or_one_index_may_be_given(shards: Path) -> None:
    check(read(shards / "model.safetensors.index.json"), DENSE)
    one = sorted(shards.glob("*.safetensors"))[0]
    assert {tensor.name for tensor in read(one).tensors} == set(load_file(one))
    assert read(one).problems == []


def test_the_format_is_said_in_words(shards: Path, tmp_path: Path) -> None:
    count = len(list(shards.glob("*.safetensors")))
    assert read(shards).format == f"Hugging Face safetensors, {count} files, llama"
    assert read(save_bin(tmp_path, DENSE)).format == "Hugging Face torch.save, 1 file, llama"


def test_a_missing_shard_is_named(folder: Path) -> None:
    gone = sorted(folder.glob("*.safetensors"))[1]
    held = len(load_file(gone))
    gone.unlink()
    (problem,) = read(folder).problems
    assert problem == f"{gone}: is missing; model.safetensors.index.json puts {held} tensors there"


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_damaged_shard_is_named_and_the_rest_is_read(folder: Path, keep: int) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    held = len(load_file(file))
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    source = read(folder)
    (problem,) = source.problems
    assert str(file) in problem
    assert len(source.tensors) == len(DENSE.shapes()) - held


def test_a_tensor_that_is_not_where_the_index_says_is_named(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    state = load_file(file)
    name = next(iter(state))
    state.pop(name)
    save_file(state, file)
    assert read(folder).problems == [f"{name}: the index puts it in {file.name}, where it is not"]


def test_a_tensor_in_two_files_is_named(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    assert read(folder).problems == [
        f"{name}: is in {first.name} and {second.name}; the index puts it in {first.name}"
    ]


def test_files_that_nothing_refers_to_are_noted(folder: Path) -> None:
    save_file({"x": torch.ones(1)}, folder / "consolidated.safetensors")
    source = read(folder)
    check(source, DENSE)
    assert source.notes == ["not read, since nothing refers to them: consolidated.safetensors"]


def test_an_index_may_not_leave_its_folder(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}}))
    with pytest.raises(
        ValueError, match=r"index\.json: names '\.\./\.\./x\.safetensors', which is no file of"
    ):
        read(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"x": 1}'])
def test_a_damaged_index_is_named(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: is no index of weights"):
        read(folder)


@pytest.mark.parametrize("text", ["", "[1]"])
def test_a_damaged_config_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: (is no JSON|holds list)"):
        read(folder)


def test_without_config_facts_are_asked_for(folder: Path) -> None:
    (folder / "config.json").unlink()
    source = read(folder)
    check(source, DENSE)
    assert "tie_word_embeddings" not in source.facts
    assert source.notes == ["no config.json lies beside: give what the model's spec needs as facts"]


def test_a_missing_output_layer_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, DENSE)
    state = load_file(folder / "model.safetensors")
    state.pop("lm_head.weight")
    save_file(state, folder / "model.safetensors")
    assert read(folder).problems == [
        "lm_head.weight: is in no file, but config.json has tie_word_embeddings = false"
    ]


def test_a_model_without_an_output_layer_and_config_is_tied(tmp_path: Path) -> None:
    folder = save(tmp_path, TIED)
    (folder / "config.json").unlink()
    assert read(folder).facts == {"tie_word_embeddings": 1}


def rewrite(folder: Path, config: dict[str, Any], **tensors: torch.Tensor) -> Source:
    """The folder with more keys in its config and more tensors."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | tensors, weights)
    return read(folder)


def test_quantised_weights_are_no_parameters(tmp_path: Path) -> None:
    source = rewrite(
        save(tmp_path, DENSE),
        {"quantization_config": {"quant_method": "gptq"}},
        **{f"model.layers.{n}.mlp.up_proj.qweight": torch.ones(2, 2, dtype=torch.int32) for n in range(2)},
        **{"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(2)},
    )
    assert [problem.split(":")[0] for problem in source.problems] == [
        "config.json says that the weights are quantised (gptq)",
        "1 tensors of dtype float32 are parts of quantised parameters, the first is "
        "model.layers.0.mlp.up_proj.weight_scale_inv",
        "2 tensors of dtype int32 are parts of quantised parameters, the first is "
        "model.layers.0.mlp.up_proj.qweight",
    ]
    assert {tensor.name for tensor in source.tensors} == set(DENSE.shapes())


def test_tables_of_old_versions_are_left_out(tmp_path: Path) -> None:
    tables = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
    }
    source = rewrite(save(tmp_path, DENSE), {}, **tables)
    check(source, DENSE)
    assert sorted(source.left_out) == sorted(
        f"{name}: a table that the model computes itself" for name in tables
    )


def test_other_state_beside_is_listed(tmp_path: Path) -> None:
    folder = save(tmp_path, DENSE)
    torch.save({}, folder / "optimizer.pt")
    assert read(folder).left_out == ["optimizer.pt: not read"]


def save_shards(folder: str, consolidated: bool) -> None:
    """Shards of two ranks, as torch's DCP writes them in Hugging Face's format; uneven, on either axis."""
    mesh = init_device_mesh("cpu", (2,))
    state = {
        name: distribute_tensor(DENSE.value(name, "weight"), mesh, [Shard(len(shape) - 1)])
        for name, shape in DENSE.shapes().items()
    }
    writer = HuggingFaceStorageWriter(folder, save_distributed=True, enable_consolidation=consolidated)
    save_distributed(state, storage_writer=writer)


def test_shards_of_torch_are_joined(tmp_path: Path) -> None:
    run_ranks(save_shards, 2, str(tmp_path), False)
    assert recognise(tmp_path)
    source = read(tmp_path)
    check(source, DENSE)
    assert len(source.tensors[0].pieces) == 2
    assert "that the last one is there is not checked" in source.notes[0]


def test_what_torch_joined_itself_is_read(tmp_path: Path) -> None:
    run_ranks(save_shards, 2, str(tmp_path), True)
    check(read(tmp_path), DENSE)
    check(read(tmp_path / "sharded"), DENSE)


def test_a_missing_shard_of_torch_leaves_a_gap(tmp_path: Path) -> None:
    run_ranks(save_shards, 2, str(tmp_path), False)
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    for tensor in read(tmp_path).tensors:
        assert "gap" in str(cover_fault(tensor.shape, [piece.box for piece in tensor.pieces]))


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {"num_key_value_heads": 4}, {"head_dim": 8}),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2}, {"head_dim": 8}),
    "qwen3": (transformers.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16}, {"head_dim": 16}),
    "mistral": (transformers.MistralConfig, {"num_key_value_heads": 4}, {"head_dim": 8}),
    "mixtral": (
        transformers.MixtralConfig,
        {"num_key_value_heads": 4, "num_local_experts": 6},
        {"num_experts": 6, "experts_per_token": 2, "moe_ffn_hidden_size": 96},
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {"num_key_value_heads": 4, "num_experts": 6, "moe_intermediate_size": 40},
        {"num_experts": 6, "experts_per_token": 8, "moe_ffn_hidden_size": 40},
    ),
    "gpt_neox": (transformers.GPTNeoXConfig, {}, {"num_query_groups": 8, "head_dim": 8}),
    "olmo2": (transformers.Olmo2Config, {"num_key_value_heads": 4}, {"head_dim": 8}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sizes_of_every_family_are_known(tmp_path: Path, family: str) -> None:
    make, keys, facts = FAMILIES[family]
    config = make(**SMALL, **keys, vocab_size=99)
    config.save_pretrained(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    found = read(tmp_path).facts
    known = {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "vocab_size": 99,
    }
    groups = {"num_query_groups": keys.get("num_key_value_heads", 8)}
    assert {**found, **known, **groups, **facts} == found


def test_other_folders_are_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert not recognise(tmp_path)
    assert not recognise(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"no \*\.safetensors or pytorch_model\*\.bin is there"):
        read(tmp_path)
