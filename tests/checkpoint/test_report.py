"""Damage of every kind is found, named, and not loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint.boxes import Box
from checkpoint.folder import COMPLETE
from checkpoint.load import load
from checkpoint.manifest import LogicalTensor, Manifest, Piece
from checkpoint.opening import Opened
from checkpoint.verification.finding import Finding, Report
from checkpoint.verification.report import verify_checkpoint
from tests.checkpoint.models import Grid, Key, empty_slices, make_tensors, rewrite, save_all_ranks

EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
Saved = tuple[Path, Manifest]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return save_all_ranks(tmp_path, make_tensors(0), Grid(2, 1, 2))


def edit(saved: Saved, key: Key, change: Callable[[LogicalTensor], LogicalTensor]) -> Path:
    path, manifest = saved
    tensors = tuple(change(t) if (t.name, t.state) == key else t for t in manifest.tensors)
    rewrite(path, replace(manifest, tensors=tensors))
    return path


def only(path: Path | Opened, check: str, **options: object) -> Finding:
    """The one finding, which is an error."""
    report = verify_checkpoint(path, **options)  # type: ignore[arg-type]
    assert not report.is_sound
    (finding,) = report.findings
    assert (finding.severity, finding.check) == ("error", check)
    return finding


def is_refused(path: Path | Opened) -> str:
    """A full verification refuses to load, and the model's memory stays as it was."""
    slices = empty_slices(make_tensors(0), Grid(), 0)
    with pytest.raises(ValueError, match="The model has not been touched") as caught:
        load(path, slices, verify="full")
    assert all(bool((piece.data == 7).all()) for piece in slices)
    return str(caught.value)


def overwrite(path: Path, piece: Piece, content: bytes, at: int = 0) -> None:
    with open(path / piece.file, "r+b") as file:
        file.seek(piece.start + at)
        file.write(content)


def test_a_sound_checkpoint_and_what_was_compared(saved: Saved) -> None:
    report = verify_checkpoint(saved[0])
    assert report.is_sound
    assert report.findings == []
    pieces = sum(len(tensor.pieces) for tensor in saved[1].tensors)
    assert report.checks["hash"] == f"{pieces} of {pieces} pieces have a recorded hash"
    assert report.checks["rounding"] == "9 masters must round to their weights"
    assert (report.num_tensors, report.step) == (36, 100)
    assert json.loads(json.dumps(report.to_json()))["sound"] is True


def test_progress_ends_with_all_bytes(saved: Saved) -> None:
    seen: list[tuple[int, int]] = []
    verify_checkpoint(saved[0], progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (5124 * 14, 5124 * 14)


@pytest.mark.parametrize("how", ["missing", "empty", "truncated"])
def test_a_file_that_lacks_bytes_is_named_once_with_its_tensors(how: str, saved: Saved) -> None:
    file = saved[0] / "rank-00001.safetensors"
    if how == "missing":
        file.unlink()
    else:
        with open(file, "r+b") as opened:
            opened.truncate(0 if how == "empty" else 9000)
    report = verify_checkpoint(saved[0])
    (finding,) = (found for found in report.errors if found.check == "file")
    assert finding.file == "rank-00001.safetensors"
    assert {"missing": "is missing", "empty": "is empty", "truncated": "has 9000 bytes"}[how] in finding.what
    held = {
        f"{t.name} ({t.state})"
        for t in saved[1].tensors
        if any(
            p.file == file.name and p.start + p.num_bytes > (9000 if how == "truncated" else 0)
            for p in t.pieces
        )
    }
    assert set(finding.tensors) == held
    assert "rank-00001.safetensors" in is_refused(saved[0])


@pytest.mark.parametrize("state", ["weight", "master", "exp_avg"])
def test_a_flipped_bit_has_another_hash(state: str, saved: Saved) -> None:
    piece = saved[1].by_key()[EMBED, state].pieces[0]
    content = (saved[0] / piece.file).read_bytes()
    byte = content[piece.start + 41]
    overwrite(saved[0], piece, bytes([byte ^ 1]), 41)
    report = verify_checkpoint(saved[0])
    (finding,) = (found for found in report.errors if found.check == "hash")
    assert (finding.tensor, finding.state, finding.file) == (EMBED, state, piece.file)
    assert "flipped bit" in str(finding)
    assert f"{EMBED} ({state}): {piece.file}: bytes" in is_refused(saved[0])


def test_a_master_changed_in_one_bit_without_hashes(tmp_path: Path) -> None:
    whole = make_tensors(0)
    bits = whole[NORM, "master"].view(torch.int32)
    bits[5] ^= 1 << 24
    finding = only(save_all_ranks(tmp_path, whole, Grid(2, 1, 2))[0], "rounding")
    assert (finding.tensor, finding.state) == (NORM, "master")
    assert "rounded, 1 of 24 numbers differ" in finding.what
    assert "first at [5]" in finding.what
    assert finding.cause == "a flipped bit in the master or the weight, which alone differ"


def test_a_shifted_master_is_recognised(tmp_path: Path) -> None:
    """As megatron-core before PR 5077 left it: every number 64 places further."""
    whole = make_tensors(0, shapes={"w": (40, 24)})
    whole["w", "master"] = whole["w", "master"].flatten().roll(64).view(40, 24)
    path, manifest = save_all_ranks(tmp_path, whole, Grid())
    finding = only(path, "rounding")
    assert "the master is shifted by -64 elements against the weight" in str(finding.cause)
    as_megatron = Opened(path, "Megatron torch_dist, fully_reshardable", manifest)
    assert "megatron-core before PR 5077" in str(only(as_megatron, "rounding").cause)


def test_masters_of_another_step(tmp_path: Path) -> None:
    whole = make_tensors(0)
    whole[EMBED, "master"] += 1
    assert "different steps or runs" in str(
        only(save_all_ranks(tmp_path, whole, Grid())[0], "rounding").cause
    )


def test_numbers_that_are_none_and_squares_below_zero_are_counted(tmp_path: Path) -> None:
    whole = make_tensors(0)
    whole[EMBED, "exp_avg"][3, 5:7] = torch.tensor([torch.nan, torch.inf])
    whole[NORM, "exp_avg_sq"][2] = -1e-3
    path, _ = save_all_ranks(tmp_path, whole, Grid(2, 1, 2))
    first, second = verify_checkpoint(path).errors
    assert (first.tensor, first.what) == (EMBED, "2 of 1200 numbers are not finite, first at [3, 5]")
    assert (second.tensor, second.what) == (NORM, "1 of 24 numbers are negative, first at [2]")


def with_replica(saved: Saved, key: Key, file: str = "replica.bin") -> tuple[Path, np.ndarray]:  # type: ignore[type-arg]
    """Give a tensor a copy in one piece of another file, which is returned to be changed."""
    path, manifest = saved
    tensor = manifest.by_key()[key]
    whole = make_tensors(0)[key].numpy()
    memory = np.memmap(path / file, np.float32, "w+", shape=whole.shape)
    memory[...] = whole
    copy = Piece(file, 0, "float32", Box((0,) * whole.ndim, whole.shape))
    edit(saved, key, lambda t: replace(tensor, replicas=((copy,),)))
    return path, memory


def test_equal_replicas(saved: Saved) -> None:
    path, _ = with_replica(saved, (EMBED, "exp_avg"))
    report = verify_checkpoint(path)
    assert report.is_sound
    assert report.checks["replicas"] == "1 tensors have copies, which must be equal"


def test_a_replica_and_a_piece_with_gaps_have_their_hashes_compared_too(saved: Saved) -> None:
    path, _ = with_replica(saved, (NORM, "exp_avg"))
    manifest = Manifest.from_json((path / "manifest.json").read_bytes(), "x")
    holes = Piece("replica.bin", 0, "float32", Box((0,), (12,)), "0" * 16, (2,))
    sparse = LogicalTensor("holes", "x", (12,), "float32", (holes,))

    def hashed(tensor: LogicalTensor) -> LogicalTensor:
        return replace(tensor, replicas=((replace(tensor.replicas[0][0], hash="1" * 16),),))

    tensors = tuple(
        hashed(t) if (t.name, t.state) == (NORM, "exp_avg") else t for t in (*manifest.tensors, sparse)
    )
    rewrite(path, replace(manifest, tensors=tensors))
    found = sorted(str(each) for each in verify_checkpoint(path).errors if each.check == "hash")
    assert [line.split(":")[0] for line in found] == ["holes (x)", f"{NORM} (exp_avg)"]
    assert all("the manifest records" in line for line in found)


def test_a_replica_that_drifted_is_named_with_its_largest_drift(saved: Saved) -> None:
    path, memory = with_replica(saved, (NORM, "exp_avg"))
    memory[7:10] += np.float32([0.25, 0.5, 0.125])
    memory.flush()
    finding = only(path, "replicas")
    assert (finding.tensor, finding.state, finding.file) == (NORM, "exp_avg", "replica.bin")
    assert finding.what.startswith("replica 1 of 1 differs in 3 of 24 numbers, by 0.5 at most; first at [7] ")
    assert "sequence parallelism" in str(finding.cause)
    assert "replica 1 of 1 differs" in is_refused(path)


def test_a_replica_with_one_flipped_bit(saved: Saved) -> None:
    path, memory = with_replica(saved, (EMBED, "exp_avg"))
    memory.view(np.uint32)[11, 3] ^= 1 << 9
    memory.flush()
    finding = only(path, "replicas")
    assert "differs in 1 of 1200 numbers" in finding.what
    assert "first at [11, 3]" in finding.what
    assert finding.cause == "one bit: a flip in storage or memory"


def test_copies_of_a_mean_may_differ(saved: Saved) -> None:
    path, memory = with_replica(saved, (NORM, "exp_avg"))
    memory += 1
    memory.flush()
    manifest = Manifest.from_json((path / "manifest.json").read_bytes(), "x")
    edit((path, manifest), (NORM, "exp_avg"), lambda t: replace(t, average=True))
    report = verify_checkpoint(path)
    assert report.is_sound
    (note,) = report.findings
    assert note.severity == "note"
    assert note.what.endswith("the mean is taken")


def test_a_gap_is_named_with_its_tensor(saved: Saved) -> None:
    path = edit(saved, (EMBED, "exp_avg"), lambda t: replace(t, pieces=t.pieces[1:]))
    finding = only(path, "coverage")
    assert finding.what.startswith("gap: no piece holds element [0, 0]")
    assert (finding.tensor, finding.state) == (EMBED, "exp_avg")


def state_of(path: Path, **state: object) -> list[Finding]:
    manifest = Manifest.from_json((path / "manifest.json").read_bytes(), "x")
    rewrite(path, replace(manifest, state={**manifest.state, **state}))
    return verify_checkpoint(path).findings


def test_steps_that_differ_are_listed(saved: Saved) -> None:
    steps = {name: 7 for name, state in make_tensors(0) if state == "weight"} | {NORM: 6}
    (finding,) = state_of(saved[0], per_parameter={"step": steps})
    assert (finding.severity, finding.check, finding.tensors) == ("warning", "steps", (NORM,))
    assert finding.what == f"8 parameters are at step 7, 1 are not: {NORM} at 6"


def test_a_parameter_in_two_groups_and_one_in_none(saved: Saved) -> None:
    names = sorted({name for name, _ in make_tensors(0)})
    groups = [
        {"names": names[:-1], "weight_decay": 0.1, "lr": 1.0},
        {"names": [EMBED], "weight_decay": 0.0, "lr": 1.0},
    ]
    error, warning = state_of(saved[0], groups=groups)
    assert str(error).startswith(
        f"{EMBED}: is in two parameter groups, which differ in weight_decay (0.0, 0.1)"
    )
    assert warning.what == f"1 parameters with optimizer state are in no group: {names[-1]}"


def test_shapes_against_the_model(saved: Saved) -> None:
    shapes = {name: tuple(whole.shape) for (name, _), whole in make_tensors(0).items()}
    assert verify_checkpoint(saved[0], expected=shapes).is_sound
    shapes[NORM] = (32,)
    shapes["lm_head.weight"] = shapes.pop(EMBED)
    report = verify_checkpoint(saved[0], expected=shapes)
    found = [str(finding) for finding in report.errors]
    assert f"{NORM} (master): the shape is [24], the model's [32]" in found
    assert "1 parameters of the model are missing: lm_head.weight" in found
    assert f"1 parameters are not the model's: {EMBED}" in found
    assert len(found) == 6


def test_facts_that_the_names_contradict(saved: Saved) -> None:
    found = [finding.what for finding in state_of(saved[0], model={"num_layers": 3, "vocab_size": 50})]
    assert found == ["2 layers, the model has num_layers = 3"]


def test_a_missing_layer(tmp_path: Path) -> None:
    shapes = {f"model.layers.{n}.mlp.up_proj.weight": (4, 4) for n in (0, 2, 3)}
    whole = make_tensors(0, shapes=shapes)
    assert "the layers 1 are missing" in only(save_all_ranks(tmp_path, whole, Grid())[0], "shapes").what


def test_a_layer_and_an_expert_that_lack_what_their_siblings_have(tmp_path: Path) -> None:
    shapes = {
        f"model.layers.{n}.mlp.experts.{e}.{part}.weight": (4, 4)
        for n in range(3)
        for e in range(4)
        for part in ("up_proj", "down_proj")
    } | {f"model.layers.{n}.input_layernorm.weight": (4,) for n in (0, 2)}
    del shapes["model.layers.2.mlp.experts.1.up_proj.weight"]
    path, _ = save_all_ranks(tmp_path, make_tensors(0, shapes=shapes), Grid())
    layer, expert = verify_checkpoint(path).errors
    assert layer.what == "model.layers.1 lacks what its siblings have: input_layernorm.weight"
    assert expert.what == "model.layers.2.mlp.experts.1 lacks what its siblings have: up_proj.weight"


def test_parameters_without_a_state_that_most_have(saved: Saved) -> None:
    manifest = saved[1]
    kept = tuple(t for t in manifest.tensors if (t.name, t.state) != (NORM, "exp_avg"))
    rewrite(saved[0], replace(manifest, tensors=kept))
    (finding,) = verify_checkpoint(saved[0]).findings
    assert (finding.severity, finding.what) == ("warning", f"1 of 9 parameters have no exp_avg: {NORM}")


def test_an_unfinished_save_is_a_finding_and_nothing_at_all_an_error(saved: Saved, tmp_path: Path) -> None:
    (saved[0] / COMPLETE).unlink()
    assert "is incomplete" in only(saved[0], "open").what
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no checkpoint is recognised"):
        verify_checkpoint(tmp_path / "empty")


def test_damage_that_the_reader_saw_is_an_error(saved: Saved) -> None:
    opened = Opened(saved[0], "x", saved[1], problems=("shard 3 is not there",))
    assert only(opened, "open").what == "shard 3 is not there"
    assert "shard 3 is not there" in is_refused(opened)


def test_one_number_of_workers_finds_what_another_does(tmp_path: Path) -> None:
    whole = make_tensors(0)
    for key in whole:
        if key[1] == "exp_avg":
            whole[key].view(-1)[3] = torch.nan
    path, _ = save_all_ranks(tmp_path, whole, Grid(2, 1, 3))

    def found(workers: int) -> Report:
        return replace(verify_checkpoint(path, workers=workers), seconds=0.0)

    assert len(found(1).findings) == 9
    assert found(1) == found(3)


def test_it_imports_no_torch(saved: Saved) -> None:
    program = (
        "import sys\nfrom checkpoint.verification.report import verify_checkpoint\n"
        "from checkpoint.verification.diff import diff_checkpoints\n"
        f"assert verify_checkpoint({str(saved[0])!r}).is_sound\n"
        f"assert all(d.is_equal for d in diff_checkpoints({str(saved[0])!r}, {str(saved[0])!r}))\n"
        "assert not {'torch', 'megatron', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


@pytest.mark.parametrize("megabytes", [56, 224])
def test_memory_is_bounded_whatever_the_size(megabytes: int, tmp_path: Path) -> None:
    """Anonymous memory of a process that verifies tensors, some larger than its limit of 128 MiB."""
    rows = megabytes * 1024 * 1024 // (256 * 14)
    tensors = {
        ("w", state): torch.ones(rows, 256).to(torch.bfloat16 if state == "weight" else torch.float32)
        for state in ("weight", "master", "exp_avg", "exp_avg_sq")
    }
    path, _ = save_all_ranks(tmp_path, tensors, Grid())
    program = (
        "from checkpoint.verification.report import verify_checkpoint\n"
        f"report = verify_checkpoint({str(path)!r})\n"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print(int(report.is_sound), int(status['VmHWM'].split()[0]) - int(status['RssFile'].split()[0]))"
    )
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    sound, kilobytes = map(int, ran.stdout.split())
    assert sound
    assert kilobytes < 128 * 1024
