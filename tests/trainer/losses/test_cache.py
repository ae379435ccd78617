"""Targets that were written beforehand are those of the reference, on whatever layout they are read."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.ranks import RankError
from parallel.layout import Layout
from tests.marks import but_long
from tests.proof.runs import Records, run, run_config, write_corpora
from tests.ranks import run_ranks
from trainer.config import RunConfig, validate
from trainer.losses.cache import HEADER, CacheHeader
from trainer.losses.caching import cache_targets

KL = {"kind": "kl", "weight": 2.0, "sources": ["code"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache")
    write_corpora(path)
    return path


def config_of(folder: Path, name: str, layout: Layout | None = None, **loss: Any) -> RunConfig:
    return run_config(folder, layout, run__name=name, train__steps=4, losses=[{**KL, **loss}])


@pytest.fixture(scope="module")
def online(folder: Path) -> Records:
    return run_ranks(run, 1, config_of(folder, "online", top_k=8))[0]


def cache(config: RunConfig, folder: Path) -> CacheHeader:
    return cache_targets(config, "kl", folder)


@pytest.fixture(scope="module")
def cached(folder: Path) -> Path:
    """Written by two data ranks."""
    run_ranks(cache, 2, config_of(folder, "writes", top_k=8), folder / "targets")
    return folder / "targets"


READERS = {
    "one-rank": (1, Layout()),
    "DP2": (2, Layout()),
    "CP2": (2, Layout(context=2)),
    "TP2": (2, Layout(tensor=2)),
    "PP2": (2, Layout(pipeline=2)),
    "DP3": (3, Layout()),
}
LONG = {"one-rank", "DP3"}


@pytest.mark.parametrize("name", but_long(READERS, LONG))
def test_a_cached_reference_is_the_reference(online: Records, cached: Path, folder: Path, name: str) -> None:
    ranks, layout = READERS[name]
    found = run_ranks(run, ranks, config_of(folder, f"reads-{name}", layout, cache=str(cached)))[0]
    for a, b in zip(found.steps, online.steps, strict=True):
        # fp32 knows log-probabilities of 5.6, whose differences the divergence is, to 2.4e-7
        assert a.auxiliary["kl"] == pytest.approx(b.auxiliary["kl"], rel=1e-5, abs=2.4e-7)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)


WRITERS = {"CP2": (2, Layout(context=2)), "TP2-PP2": (4, Layout(tensor=2, pipeline=2))}


@pytest.mark.parametrize("name", but_long(WRITERS, {"TP2-PP2"}))
def test_every_layout_writes_the_same_targets(cached: Path, folder: Path, name: str) -> None:
    ranks, layout = WRITERS[name]
    other = folder / f"targets-{name}"
    run_ranks(cache, ranks, config_of(folder, f"writes-{name}", layout, top_k=8), other)
    for file in ("targets.json", "hashes.bin"):
        assert (other / file).read_bytes() == (cached / file).read_bytes()
    found = run_ranks(run, 1, config_of(folder, f"reads-from-{name}", cache=str(other)))[0]
    expected = run_ranks(run, 1, config_of(folder, f"reads-beside-{name}", cache=str(cached)))[0]
    for a, b in zip(found.steps, expected.steps, strict=True):
        assert a.auxiliary["kl"] == pytest.approx(b.auxiliary["kl"], rel=1e-5, abs=2.4e-7)


def test_other_data_than_the_targets_were_made_of_are_refused(cached: Path, folder: Path) -> None:
    config = config_of(folder, "other-data", cache=str(cached))
    config = config.model_copy(update={"run": config.run.model_copy(update={"seed": 8})})
    with pytest.raises(RankError, match="are not those that the targets were made of"):
        run_ranks(run, 2, config)


def test_steps_that_the_targets_do_not_cover_are_refused(cached: Path, folder: Path) -> None:
    config = config_of(folder, "longer", cache=str(cached))
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 5})})
    with pytest.raises(RankError, match="of the steps 1 to 4, not of step 5"):
        run_ranks(run, 1, config)


def test_another_temperature_is_refused(cached: Path, folder: Path) -> None:
    with pytest.raises(RankError, match=r"temperature is 1\.0 in the targets and 2\.0 in the run"):
        run_ranks(run, 1, config_of(folder, "warmer", cache=str(cached), temperature=2.0))


def test_targets_that_were_not_finished_are_refused(cached: Path, folder: Path) -> None:
    shutil.copytree(cached, folder / "unfinished")
    (folder / "unfinished" / HEADER).unlink()
    problems = validate(config_of(folder, "early", cache=str(folder / "unfinished")), 1)
    assert len(problems) == 1
    assert f"{HEADER} does not exist" in problems[0]


def test_a_header_reads_as_it_was_written(tmp_path: Path) -> None:
    header = CacheHeader(3, 4, 6, 32, 8, 2.0, 259, True, {"path": None, "seed": 7})
    header.save(tmp_path)
    assert dataclasses.asdict(CacheHeader.load(tmp_path)) == dataclasses.asdict(header)
