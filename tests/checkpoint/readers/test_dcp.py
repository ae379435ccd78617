"""Genuine checkpoints of FSDP: every state of every parameter, bit for bit, and damage named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from checkpoint.opening import Opened, UnreadableError, open_checkpoint
from checkpoint.readers.dcp import read, recognise
from checkpoint.whole import read_whole
from tests.foreign.dcp import HYBRID, TENSOR, Run, save
from tests.foreign.oracle import BETAS, LR, STEP, Oracle
from tests.marks import but_long

ORACLE = Oracle(layers=1)
FACTS = {"hidden_size": ORACLE.hidden, "num_attention_heads": 8}
MOMENTS = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
RUNS = {
    "two ranks": Run(),
    "three ranks, list of groups": Run(mesh=(3,), layout="nested"),
    "two by two, tensor parallel": Run(mesh=(2, 2), axes=TENSOR),
    "two by two, hybrid, app": Run(mesh=(2, 2), axes=HYBRID, layout="app"),
    "torchtitan": Run(mesh=(3,), layout="titan", titan_names=True),
    "torchtitan, tensor parallel": Run(mesh=(2, 2), axes=TENSOR, layout="titan", titan_names=True),
    "FSDP1": Run(wrapper="fsdp1", layout="nested"),
    "parameters by number": Run(layout="numbered"),
}


LONG = ("two by two, hybrid, app", "torchtitan, tensor parallel", "FSDP1")
CASES = but_long(RUNS, LONG)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by name, each made when a test first asks for it."""
    made: dict[str, Path] = _Made(tmp_path_factory.mktemp("dcp"))
    return made


class _Made(dict[str, Path]):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __missing__(self, name: str) -> Path:
        self[name] = save(self._folder / str(len(self)), ORACLE, RUNS[name])
        return self[name]


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint of two ranks to damage."""
    return Path(shutil.copytree(folders["two ranks"], tmp_path / "damaged"))


def differing(opened: Opened, oracle: Oracle, states: dict[str, str]) -> list[tuple[str, str]]:
    """Logical tensors that are not there or not bit for bit the oracle's; `states`: word -> oracle's word."""
    tensors = opened.manifest.by_key()
    wanted = {(name, word): state for name in oracle.shapes() for word, state in states.items()}
    assert set(tensors) == set(wanted)
    return [
        key
        for key, state in wanted.items()
        if not torch.equal(read_whole(opened.folder, tensors[key]), oracle.value(key[0], state))
    ]


@pytest.mark.parametrize("name", CASES)
def test_every_state_is_bit_for_bit_the_oracles(folders: dict[str, Path], name: str) -> None:
    opened = open_checkpoint(folders[name], facts=FACTS if RUNS[name].titan_names else None)
    assert opened.problems == ()
    assert differing(opened, ORACLE, {"weight": "weight", **MOMENTS}) == []


@pytest.mark.parametrize("name", CASES)
def test_steps_and_group_settings_are_carried(folders: dict[str, Path], name: str) -> None:
    opened = open_checkpoint(folders[name], facts=FACTS if RUNS[name].titan_names else None)
    state = opened.manifest.state
    assert opened.manifest.step == STEP
    assert state["scalars"] == {"updates": STEP, "lr": LR}
    settings = {n: group for group in state["groups"] for n in group["names"]}
    assert {n: settings[n]["weight_decay"] for n in ORACLE.shapes()} == {
        n: ORACLE.weight_decay(n) for n in ORACLE.shapes()
    }
    assert all(tuple(group["betas"]) == BETAS for group in settings.values())


def test_other_optimizers_keep_their_own_words(tmp_path: Path) -> None:
    opened = open_checkpoint(save(tmp_path / "sgd", ORACLE, Run(optimizer="sgd")))
    assert differing(opened, ORACLE, {"weight": "weight", "momentum_buffer": "exp_avg"}) == []
    assert opened.manifest.state["groups"][0]["momentum"] == 0.9


def test_weights_alone_are_a_checkpoint(tmp_path: Path) -> None:
    opened = open_checkpoint(save(tmp_path / "checkpoint-12", ORACLE, Run(layout="weights")))
    assert differing(opened, ORACLE, {"weight": "weight"}) == []


@pytest.mark.parametrize("layout", ["ranks", "shards"])
def test_what_ranks_saved_for_themselves_is_one_checkpoint(
    tmp_path: Path, layout: Literal["ranks", "shards"]
) -> None:
    opened = open_checkpoint(save(tmp_path / "c", ORACLE, Run(layout=layout)))
    assert differing(opened, ORACLE, {"weight": "weight"}) == []


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "c", ORACLE, Run(layout="shards"))
    shard = folder / "shard-00002-model-00001-of-00001.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)
    assert str(shard) in "".join(open_checkpoint(folder).problems)


@pytest.mark.parametrize("config", [True, False])
def test_a_tied_embedding_is_one_tensor(tmp_path: Path, config: bool) -> None:
    tied = Oracle(layers=1, tied=True)
    folder = save(tmp_path / "tied", tied, Run())
    if config:
        (folder / "config.json").write_text(json.dumps(tied.huggingface_config()))
    assert differing(open_checkpoint(folder), tied, {"weight": "weight", **MOMENTS}) == []


def test_what_is_no_tensor_of_the_model_is_state_or_named(folders: dict[str, Path]) -> None:
    source = read(folders["torchtitan"])
    assert source.state["train_state.ntokens_seen"] == 1 << 20
    assert source.state["lr_scheduler.base_lrs"] == [LR, LR]
    assert any(line.startswith("dataloader.dp_rank_0") for line in source.left_out)


def test_accelerates_two_folders_are_one_checkpoint(tmp_path: Path) -> None:
    states = torch.arange(6.0).reshape(2, 3)
    _write(tmp_path / "checkpoint-30/pytorch_model_fsdp_0", {"model": {"w": states}})
    _write(
        tmp_path / "checkpoint-30/optimizer_0",
        {"optimizer": {"state": {"w": {"exp_avg": states}}, "param_groups": [{"lr": 0.1, "params": ["w"]}]}},
    )
    assert recognise(tmp_path / "checkpoint-30")
    source = read(tmp_path / "checkpoint-30")
    assert {(tensor.name, tensor.state) for tensor in source.tensors} == {("w", "weight"), ("w", "exp_avg")}
    assert source.step == 30
    assert all(Path(tensor.pieces[0].file).is_file() for tensor in source.tensors)


def test_an_average_of_the_weights_is_a_state_of_its_own(tmp_path: Path) -> None:
    weights = {"w": torch.ones(2, 3), "v": torch.ones(4)}
    _write(tmp_path / "c", {"model": weights, "ema": {name: 2 * w for name, w in weights.items()}})
    assert {(tensor.name, tensor.state) for tensor in read(tmp_path / "c").tensors} == {
        *(("w", "weight"), ("v", "weight"), ("w", "ema"), ("v", "ema"))
    }


def test_masters_that_an_optimizer_keeps_are_masters(tmp_path: Path) -> None:
    optimizer = {
        "state": {"w": {"exp_avg": torch.ones(2), "master_param": torch.ones(2), "step": 3}},
        "param_groups": [{"lr": 0.1, "params": ["w"]}],
    }
    _write(tmp_path / "c", {"model": {"w": torch.ones(2, dtype=torch.bfloat16)}, "optim": optimizer})
    source = read(tmp_path / "c")
    assert {tensor.state for tensor in source.tensors} == {"weight", "master", "exp_avg"}
    assert source.scalars == {"step": {"w": 3}}


def test_a_choice_between_parameter_numbers_is_refused(tmp_path: Path) -> None:
    states = {number: {"exp_avg": torch.ones(2)} for number in range(2)}
    groups = [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}]
    weights = {"v": torch.ones(2), "w": torch.ones(2)}
    _write(tmp_path / "c", {"model": weights, "optim": {"state": states, "param_groups": groups}})
    assert "get_optimizer_state_dict" in "".join(read(tmp_path / "c").problems)


def test_flat_parameters_are_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = save(tmp_path / "local", ORACLE, Run(wrapper="fsdp1-local"))
    with pytest.raises(UnreadableError, match=r"_flat_param.*SHARDED_STATE_DICT"):
        open_checkpoint(folder)


def test_a_save_that_was_not_finished_says_so(copied: Path) -> None:
    (copied / ".metadata").unlink()
    with pytest.raises(UnreadableError, match=r"\.metadata: missing.*not finished"):
        open_checkpoint(copied)


def test_a_missing_file_is_named_with_its_tensors(copied: Path) -> None:
    (copied / "__1_0.distcp").unlink()
    problems = "\n".join(open_checkpoint(copied).problems)
    assert "__1_0.distcp: No such file or directory" in problems
    assert "model.embed_tokens.weight" in problems


def test_an_empty_file_is_named(copied: Path) -> None:
    (copied / "__0_0.distcp").write_bytes(b"")
    assert "__0_0.distcp: is empty (0 bytes)" in "\n".join(open_checkpoint(copied).problems)


def test_a_truncated_file_is_named_with_what_it_lacks(copied: Path) -> None:
    file = copied / "__1_0.distcp"
    os.truncate(file, file.stat().st_size - 1000)
    problems = "\n".join(open_checkpoint(copied).problems)
    assert "__1_0.distcp: has" in problems
    assert "truncated and lacks rng" in problems


def test_a_damaged_header_is_named_with_its_tensor(copied: Path) -> None:
    piece = next(t for t in read(copied).tensors if t.name == "lm_head.weight").pieces[0]
    with open(piece.file, "r+b") as file:
        file.seek(piece.start - 700)
        file.write(b"\0" * 64)
    problems = "\n".join(read(copied).problems)
    assert "lm_head.weight" in problems
    assert piece.file in problems


def test_a_chunk_that_the_index_lacks_is_named(copied: Path) -> None:
    metadata = pickle.loads((copied / ".metadata").read_bytes())
    lost = next(key for key in metadata.storage_data if key.fqn == "model.lm_head.weight")
    del metadata.storage_data[lost]
    (copied / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "model.lm_head.weight [" in "\n".join(read(copied).problems)


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def test_a_hostile_index_is_refused_by_name(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied)
    (copied / ".metadata").write_bytes(pickle.dumps(_Hostile()))
    with pytest.raises(UnreadableError, match=r"posix\.system"):
        open_checkpoint(copied)
    assert not (copied / "executed").exists()


def test_a_hostile_item_is_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "c", {"model": {"w": torch.ones(2)}, "dataloader": _Hostile()})
    assert any("posix.system" in line for line in read(tmp_path / "c").left_out)
    assert not (tmp_path / "executed").exists()


def test_an_index_that_leads_outside_is_refused(copied: Path) -> None:
    metadata = pickle.loads((copied / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    (copied / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"\.\./\.\./secret, outside"):
        read(copied)


def test_transformed_bytes_are_refused_by_the_transforms_name(tmp_path: Path) -> None:
    from torch.distributed.checkpoint._extension import ZStandard

    writer = FileSystemWriter(tmp_path / "c", _extensions=[ZStandard()])
    _write(tmp_path / "c", {"model": {"w": torch.ones(2)}}, writer)
    assert "stream.zstd" in "\n".join(read(tmp_path / "c").problems)


def test_a_strange_folder_is_not_recognised(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not recognise(tmp_path)


def _write(folder: Path, states: dict[str, Any], writer: FileSystemWriter | None = None) -> None:
    save_dcp(states, checkpoint_id=folder, storage_writer=writer or FileSystemWriter(folder), no_dist=True)
