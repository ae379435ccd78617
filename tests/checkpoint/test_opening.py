"""What is recognised at a path, what it is called, and what is said when nothing is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint.folder import COMPLETE, MANIFEST, is_ratoon
from checkpoint.manifest import Manifest
from checkpoint.opening import UnreadableError, open_checkpoint
from tests.checkpoint.models import Grid, make_tensors, rewrite, save_all_ranks
from tests.foreign import huggingface
from tests.foreign.oracle import Oracle

ORACLE = Oracle(hidden=64, layers=2, vocab=131)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote."""
    return huggingface.save(tmp_path_factory.mktemp("llama"), ORACLE)


def test_every_way_to_name_ratoons_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    step, manifest = save_all_ranks(run / "checkpoints", make_tensors(0), Grid(2))
    for path in (run, run / "checkpoints", step, step / MANIFEST, str(run)):
        opened = open_checkpoint(path)
        assert (opened.folder, opened.manifest, opened.run_id) == (step, manifest, "test")
        assert opened.is_native
        assert opened.notes == (f"recognised Ratoon, 2 ranks: {step}",)


def test_an_index_points_into_the_files_of_another_folder(tmp_path: Path) -> None:
    step, manifest = save_all_ranks(tmp_path / "there", make_tensors(0), Grid(2))
    tensors = tuple(
        replace(t, pieces=tuple(replace(p, file=str(step / p.file)) for p in t.pieces))
        for t in manifest.tensors
    )
    index = tmp_path / "index"
    index.mkdir()
    rewrite(index, replace(manifest, tensors=tensors, state={"format": "X 1", "left_out": ["the rng"]}))
    opened = open_checkpoint(index)
    assert opened.is_native
    assert opened.format == "Ratoon, made of X 1"
    assert opened.left_out == ("the rng",)


def test_a_hugging_face_folder_in_logical_names(llama: Path) -> None:
    opened = open_checkpoint(llama)
    assert not opened.is_native
    assert {t.name: t.shape for t in opened.manifest.tensors} == ORACLE.shapes()
    assert opened.notes[0] == f"recognised {opened.format}: {llama}"
    assert opened.notes[1] == f"names read by the spec 'llama', which maps all {len(ORACLE.shapes())} names"
    assert opened.manifest.state["format"] == opened.format
    assert opened.manifest.state["model_config"]["hidden_size"] == 64


def test_the_manifest_of_another_trainers_checkpoint_survives_json(llama: Path) -> None:
    manifest = open_checkpoint(llama).manifest
    assert Manifest.from_json(manifest.to_json(), "x") == manifest


def test_a_spec_and_facts_as_given_are_named(llama: Path) -> None:
    opened = open_checkpoint(llama, spec="llama", facts={"num_layers": 2})
    assert "names read by the spec 'llama', as asked for" in opened.notes
    assert "facts as given: num_layers = 2" in opened.notes
    assert opened.manifest.state["facts"]["num_layers"] == 2


def test_a_spec_that_does_not_fit_names_what_it_does_not_know(llama: Path, tmp_path: Path) -> None:
    spec = tmp_path / "mine.toml"
    spec.write_text('name = "mine"\n[[rule]]\nmatch = "lm_head.weight"\nto = "lm_head.weight"\n')
    with pytest.raises(UnreadableError, match="names without a rule") as caught:
        open_checkpoint(llama, spec=spec)
    assert "model.norm.weight" in str(caught.value)


def test_a_damaged_header_says_which_format_it_was_taken_for(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnreadableError, match=r"model\.safetensors") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.format.startswith("Hugging Face safetensors")


def test_a_folder_with_nothing_known_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="no checkpoint is recognised") as caught:
        open_checkpoint(tmp_path)
    for word in ("notes.txt", "Ratoon", "DeepSpeed", "Megatron", "DCP", "safetensors"):
        assert word in str(caught.value)


def test_a_path_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    step, _ = save_all_ranks(tmp_path, make_tensors(0), Grid())
    with pytest.raises(ValueError, match="no such folder; the nearest complete one is") as caught:
        open_checkpoint(tmp_path / "step-00000101")
    assert str(step) in str(caught.value)


def test_step_folders_of_other_trainers_are_not_ratoons(tmp_path: Path) -> None:
    (tmp_path / "step-10").mkdir()
    (tmp_path / "step-10" / ".metadata").write_bytes(b"")
    assert not is_ratoon(tmp_path / "step-10")
    assert not is_ratoon(tmp_path)
    (tmp_path / "step-10" / MANIFEST).write_text('{"tensors": []}')
    assert not is_ratoon(tmp_path / "step-10" / MANIFEST.replace("json", "txt"))


@pytest.mark.parametrize("left", [COMPLETE, MANIFEST])
def test_an_unfinished_save_is_recognised_and_refused(left: str, tmp_path: Path) -> None:
    step, _ = save_all_ranks(tmp_path, make_tensors(0), Grid())
    (step / (COMPLETE if left == MANIFEST else MANIFEST)).unlink()
    with pytest.raises(UnreadableError, match=r"is incomplete|cannot be read"):
        open_checkpoint(step)


def test_the_digest_tells_checkpoints_apart_and_not_where_they_lie(llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in llama.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    other = huggingface.save(tmp_path / "other", replace(ORACLE, vocab=130))
    assert open_checkpoint(llama).digest == open_checkpoint(copy).digest
    assert open_checkpoint(llama).digest != open_checkpoint(other).digest
