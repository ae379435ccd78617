"""Text files to .bin/.idx."""

import errno
import fcntl
import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from tests.data.corpora import write_lines
from trainer.data import blocks, documents
from trainer.data.corpus import read_sidecar
from trainer.data.indexed import IndexedReader
from trainer.data.prepare import BadRecordError, PrepareOptions, PrepareReport, prepare
from trainer.data.tokenizer import BytesTokenizer

TEXTS = [f"document {n}\n" + "wörd " * (n * 7 % 23) for n in range(120)]


def run(tmp_path: Path, *inputs: str | Path, output: str = "out", **options: object) -> PrepareReport:
    names = tuple(map(str, inputs))
    return prepare(PrepareOptions(names, str(tmp_path / output), **options))  # type: ignore[arg-type]


def texts(prefix: Path) -> list[str]:
    """The documents as megatron-core reads them."""
    dataset = IndexedDataset(str(prefix))
    tokens = [dataset[i].tolist() for i in range(len(dataset))]
    assert all(one[-1] == 256 for one in tokens)
    return [BytesTokenizer().decode(one) for one in tokens]


@pytest.fixture
def lines(tmp_path: Path) -> str:
    return write_lines(tmp_path / "in.jsonl", TEXTS)


def cut_into(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the work come in pieces of this many bytes."""
    monkeypatch.setattr(documents, "CHUNK_BYTES", size)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
    monkeypatch.setattr(blocks, "COMPRESSED_BLOCK_BYTES", size)


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(256, monkeypatch)


@pytest.mark.parametrize("chunk", [1, 64, 1 << 20])
def test_megatron_reads_every_document(
    tmp_path: Path, lines: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into(chunk, monkeypatch)
    report = run(tmp_path, lines)
    assert texts(tmp_path / "out") == TEXTS
    size = sum(len(text.encode()) for text in TEXTS)
    assert (report.documents, report.text_bytes, report.tokens) == (120, size, size + 120)
    assert report.read_bytes == report.input_bytes == os.path.getsize(lines)


@pytest.mark.usefixtures("_small_chunks")
def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, lines: str) -> None:
    for workers in (1, 2, 3):
        (tmp_path / str(workers)).mkdir()
        run(tmp_path, lines, output=f"{workers}/out", workers=workers, validation_share=0.3)
    for name in ("out", "out-validation"):
        for suffix in (".bin", ".idx", ".json"):
            assert (
                len({(tmp_path / f"{workers}" / (name + suffix)).read_bytes() for workers in (1, 2, 3)}) == 1
            )


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_lines_read_the_same(tmp_path: Path, lines: str, suffix: str) -> None:
    plain = Path(lines).read_bytes()
    halves = plain[:1000], plain[1000:]  # two members or frames in one file, as concatenation leaves them
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    packed = tmp_path / f"packed.jsonl{suffix}"
    padding = b"\0" * 600  # more than one piece
    packed.write_bytes(pack(halves[0]) + padding + pack(halves[1]) + padding)
    report = run(tmp_path, packed)
    assert texts(tmp_path / "out") == TEXTS
    assert report.read_bytes == packed.stat().st_size


def test_folders_give_a_document_a_file_in_the_order_of_names(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("b.py", "a.txt", "sub/c.rs", ".git/x.py", "sub/__pycache__/y.py", "z.png", "sub/empty.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("" if "empty" in name else f"# {name}")
    (tree / "d.txt.gz").write_bytes(gzip.compress(b"# d.txt.gz"))
    report = run(tmp_path, tree)
    assert texts(tmp_path / "out") == ["# a.txt", "# b.py", "# d.txt.gz", "# sub/c.rs"]
    assert report.left_out == {"other kinds": 1, "empty files": 1}
    run(tmp_path, tree, output="py", suffixes=(".py",))
    assert texts(tmp_path / "py") == ["# b.py"]


BAD_LINES = {
    '{"text": "fine"': "invalid JSON",
    '{"txt": "x"}': "no key 'text'",
    '["text"]': "no key 'text'",
    '{"text": 3}': "not a string",
    '{"text": " "}': "empty",
    '{"text": "\\ud800"}': "invalid UTF-8",
}


@pytest.mark.usefixtures("_small_chunks")
def test_bad_records_are_counted_and_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    good = [json.dumps({"text": text}) for text in TEXTS]
    content = [good[0], "", *BAD_LINES, *good[1:]]
    path.write_bytes("\n".join(content).encode() + b'\n{"text": "\xff"}\n')
    report = run(tmp_path, path, workers=2)
    assert texts(tmp_path / "out") == TEXTS
    expected = dict.fromkeys(BAD_LINES.values(), 0) | {"invalid UTF-8": 1}
    for reason in BAD_LINES.values():
        expected[reason] += 1
    assert report.bad == expected
    for line, (example, reason) in enumerate(zip(report.bad_examples, BAD_LINES.values(), strict=False), 3):
        assert example.startswith(f"{path}:{line}: {reason}")
    sidecar = read_sidecar(str(tmp_path / "out"))
    assert sidecar is not None
    assert sidecar.bad_records == expected


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("line", BAD_LINES)
def test_strict_stops_at_the_first_and_leaves_nothing(tmp_path: Path, line: str, workers: int) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "x.jsonl"
    path.write_text('{"text": "one"}\n\n' + line + "\n[]\n")
    with pytest.raises(BadRecordError, match=f"x.jsonl:3: {BAD_LINES[line]}"):
        run(tmp_path, path, strict=True, workers=workers)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_stream_that_breaks_off_is_a_bad_record(tmp_path: Path, lines: str, suffix: str) -> None:
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    broken = tmp_path / f"broken.jsonl{suffix}"
    broken.write_bytes(pack(os.urandom(3000).hex().encode())[:-30] if suffix == ".gz" else b"not zstd at all")
    report = run(tmp_path, broken, lines)
    assert texts(tmp_path / "out") == TEXTS
    assert report.bad == {"unreadable file": 1}


def test_a_file_that_is_no_text_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xb1\n")
    (tmp_path / "b.txt").write_text("fine")
    report = run(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt")
    assert report.bad_examples[0].startswith(f"{tmp_path / 'a.txt'}:2: invalid UTF-8")


def test_held_out_documents_are_a_stable_share(tmp_path: Path, lines: str) -> None:
    report = run(tmp_path, lines, validation_share=0.25)
    train, held_out = texts(tmp_path / "out"), texts(tmp_path / "out-validation")
    assert sorted(train + held_out) == sorted(TEXTS)
    assert report.validation_documents == len(held_out)
    assert 15 <= len(held_out) <= 45  # 30 expected; the hash is fixed, so this never flickers
    write_lines(tmp_path / "reversed.jsonl", TEXTS[::-1])
    run(tmp_path, tmp_path / "reversed.jsonl", output="again", validation_share=0.25)
    assert texts(tmp_path / "again-validation") == held_out[::-1]


def test_existing_outputs_are_replaced_only_when_asked(tmp_path: Path, lines: str) -> None:
    run(tmp_path, lines)
    with pytest.raises(ValueError, match="already there"):
        run(tmp_path, lines)
    assert run(tmp_path, lines, overwrite=True).documents == 120


def test_what_was_held_out_is_not_trained_on_later(tmp_path: Path, lines: str) -> None:
    run(tmp_path, lines, validation_share=0.25)
    with pytest.raises(
        ValueError, match=r"out-validation\.\* was held out of the same inputs.*--validation-share"
    ):
        run(tmp_path, lines, overwrite=True)
    other = write_lines(tmp_path / "other.jsonl", ["x"])
    with pytest.raises(ValueError, match="was held out of the same inputs"):  # of the out that goes
        run(tmp_path, other, overwrite=True)
    run(tmp_path, lines, validation_share=0.5, overwrite=True)
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"out-validation{suffix}").unlink()
    assert run(tmp_path, lines, overwrite=True).documents == 120


def test_a_validation_set_of_its_own_making_may_stand_beside(tmp_path: Path, lines: str) -> None:
    run(tmp_path, write_lines(tmp_path / "other.jsonl", ["x"]), output="out-validation")
    run(tmp_path, lines)
    run(tmp_path, lines, overwrite=True)
    assert texts(tmp_path / "out-validation") == ["x"]


def test_somebody_elses_json_is_never_replaced(tmp_path: Path, lines: str) -> None:
    (tmp_path / "out.json").write_text("{}")
    with pytest.raises(ValueError, match="not written by ratoon"):
        run(tmp_path, lines, overwrite=True)
    assert (tmp_path / "out.json").read_text() == "{}"


def test_all_problems_with_the_options_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"validation share is 2.*workers is 0.*is a folder.*a.txt does not exist"
    ):
        prepare(PrepareOptions((str(tmp_path / "a.txt"),), f"{tmp_path}/", validation_share=2.0, workers=0))


def test_a_worker_that_dies_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(64, monkeypatch)
    lines = write_lines(tmp_path / "in.jsonl", TEXTS * 200)  # more than is done when the first is reported

    def kill_a_worker(report: PrepareReport) -> None:
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    with pytest.raises(ValueError, match=r"a worker was ended from outside.*in\.jsonl.*fewer --workers"):
        prepare(PrepareOptions((lines,), str(tmp_path / "out"), workers=2), kill_a_worker)
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_inputs_without_documents_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"no document in .*in.jsonl:1: empty"):
        run(tmp_path, path)


ENDED = """
import multiprocessing, os, sys
from trainer.data import blocks, documents
from trainer.data.prepare import PrepareOptions, prepare
documents.CHUNK_BYTES = 256
def end(report):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), int(sys.argv[3]))
prepare(PrepareOptions((sys.argv[1],), sys.argv[2], workers=2), end)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_leaves_no_output_and_no_worker(
    tmp_path: Path, lines: str, number: signal.Signals
) -> None:
    output = tmp_path / "done" / "out"
    command = [sys.executable, "-c", ENDED, lines, str(output), str(int(number))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == -number, ended.stderr
    visible = [name for name in os.listdir(output.parent) if not name.startswith(".")]
    assert visible == []
    if number == signal.SIGINT:
        assert os.listdir(output.parent) == []
    workers = [int(pid) for pid in ended.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}/cmdline") and _is_python(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    assert prepare(PrepareOptions((lines,), str(output))).documents == 120  # what was left is cleared
    assert sorted(os.listdir(output.parent)) == ["out.bin", "out.idx", "out.json"]


def _is_python(pid: int) -> bool:
    """Whether this is still a running process of ours, not a zombie that waits for its new parent."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def test_two_runs_for_one_output_do_not_mix(tmp_path: Path, lines: str) -> None:
    def second(report: PrepareReport) -> None:
        with pytest.raises(ValueError, match="another process is writing"):
            run(tmp_path, lines)

    prepare(PrepareOptions((lines,), str(tmp_path / "out")), second)
    assert len(IndexedReader(tmp_path / "out")) == 120


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, lines: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The refusal itself is put in its place: no file system here refuses."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert run(tmp_path, lines).documents == 120
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.bin", "out.idx", "out.json"]


def test_the_lock_is_on_a_file_open_for_writing(
    tmp_path: Path, lines: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS grants an exclusive lock on nothing else (flock(2), NFS details)."""
    real = fcntl.flock

    def as_nfs(file: BinaryIO, operation: int) -> None:
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    assert run(tmp_path, lines).documents == 120


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_cut_short_gives_what_came_before(tmp_path: Path, suffix: str) -> None:
    """Frames end behind each line here, so all lines but that of the last frame are whole."""
    written = [json.dumps({"text": os.urandom(30).hex()}).encode() + b"\n" for _ in range(50)]
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    broken = tmp_path / f"broken.jsonl{suffix}"
    broken.write_bytes(b"".join(map(pack, written))[:-10])
    report = run(tmp_path, broken)
    assert texts(tmp_path / "out") == [json.loads(line)["text"] for line in written[:-1]]
    (example,) = report.bad_examples
    assert example == f"{broken}:50: unreadable file (ends in the middle of a frame)"
    with pytest.raises(BadRecordError, match="ends in the middle of a frame"):
        run(tmp_path, broken, output="strict", strict=True)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_text_cut_short_is_no_document(tmp_path: Path, lines: str, suffix: str) -> None:
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    broken = tmp_path / f"broken.txt{suffix}"
    broken.write_bytes(pack(os.urandom(3000).hex().encode())[:-30])
    report = run(tmp_path, lines, broken)
    assert (report.documents, report.bad_examples) == (
        120,
        [f"{broken}: unreadable file (ends in the middle of a frame)"],
    )
