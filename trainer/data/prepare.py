"""Text files to Megatron's .bin/.idx in parallel processes: the same bytes for any number of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainer.data.corpus import read_sidecar
from trainer.data.documents import BadRecord, Chunk, Document, parse, read_chunks
from trainer.data.indexed import token_dtype
from trainer.data.inputs import Inputs, find_inputs
from trainer.data.metadata import FILE_PATH, METADATA, MetadataOptions
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.data.writer import Making, OutputFolder, PairWriter

EXAMPLES = 5
VALIDATION = "-validation"


class BadRecordError(ValueError):
    """The first bad record of a strict run."""


@dataclass(frozen=True)
class PrepareOptions:
    """What `ratoon data prepare` is told."""

    inputs: tuple[str, ...]
    output: str
    """prefix of the files to write"""
    tokenizer: str = "bytes"
    eod: str | None = None
    text_key: str = "text"
    suffixes: tuple[str, ...] = ()
    workers: int = 1
    strict: bool = False
    validation_share: float = 0.0
    """Share of the documents, chosen by a hash of their text, that goes to PREFIX-validation instead."""
    overwrite: bool = False
    metadata: MetadataOptions | None = None
    """Also write PREFIX.meta, what stands before each document when it is trained on with its metadata."""


@dataclass
class PrepareReport:
    """How far it is, and in the end what came of it. Counts are over both outputs."""

    input_bytes: int = 0
    """of all inputs, as they are on disk"""
    read_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    validation_documents: int = 0
    validation_tokens: int = 0
    with_metadata: int = 0
    """documents, of both outputs"""
    metadata_tokens: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    bad_examples: list[str] = field(default_factory=list)
    """the first few, as `file:line: reason`"""
    left_out: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    outputs: list[str] = field(default_factory=list)
    """prefixes that were written"""

    @property
    def tokens_per_second(self) -> float:
        """Over the whole time so far, the start of the workers included."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Part:
    """Documents of one chunk that go to the same output."""

    tokens: NDArray[Any]
    """[total], every document closed by its EOD, in the type of the file"""
    lengths: NDArray[np.int32]
    """[documents]"""
    text_bytes: int
    metadata: Part | None = None
    """what stands before each of the documents, without EOD; many have nothing"""


@dataclass(frozen=True)
class Encoded:
    """What a worker makes of a chunk."""

    consumed: int
    train: Part
    validation: Part
    bad: list[BadRecord]


class Encoder:
    """Turns chunks into tokens; each process has its own."""

    def __init__(self, tokenizer: Tokenizer, options: PrepareOptions) -> None:
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._text_key = options.text_key
        self._threshold = int(options.validation_share * 2**64)
        self._metadata = options.metadata

    def __call__(self, chunk: Chunk) -> Encoded:
        """Parse, split and encode."""
        train: list[Document] = []
        validation: list[Document] = []
        bad: list[BadRecord] = []
        for record in parse(chunk, self._text_key, self._metadata):
            if isinstance(record, BadRecord):
                bad.append(record)
            elif self._threshold and xxhash.xxh3_64_intdigest(record.text.encode()) < self._threshold:
                validation.append(record)
            else:
                train.append(record)
        return Encoded(chunk.consumed, self._encode(train), self._encode(validation), bad)

    def _encode(self, documents: list[Document]) -> Part:
        texts = [document.text for document in documents]
        ids, lengths = self._tokenizer.encode_batch(texts)
        closed = np.insert(ids, np.cumsum(lengths), self._tokenizer.eod_id)
        size = sum(len(text.encode()) for text in texts)
        metadata = None if self._metadata is None else self._encode_metadata(self._metadata, documents)
        return Part(closed.astype(self._dtype), (lengths + 1).astype(np.int32), size, metadata)

    def _encode_metadata(self, options: MetadataOptions, documents: list[Document]) -> Part:
        written = [options.render(document.metadata) for document in documents]
        ids, some = self._tokenizer.encode_batch([text for text in written if text])
        lengths = np.zeros(len(written), dtype=np.int32)
        lengths[[bool(text) for text in written]] = some
        return Part(ids.astype(self._dtype), lengths, sum(len(text.encode()) for text in written))


def prepare(
    options: PrepareOptions, on_progress: Callable[[PrepareReport], None] = lambda report: None
) -> PrepareReport:
    """Write PREFIX.bin, .idx and .json, PREFIX-validation and PREFIX.meta when asked for; all or nothing.

    Raises:
        BadRecordError: a record is bad and the run is strict.
        ValueError: inputs, output or tokenizer do not fit; lists what and how to mend it.
    """
    started = time.monotonic()
    inputs = _check(options)
    tokenizer = load_tokenizer(options.tokenizer, options.eod)
    report = PrepareReport(input_bytes=sum(file.size for file in inputs.files), left_out=inputs.left_out)
    _count_bad(inputs.bad, report, strict=options.strict)
    prefixes = [options.output] + [options.output + VALIDATION] * (options.validation_share > 0)
    beside = [prefix + METADATA for prefix in prefixes] if options.metadata else []
    with OutputFolder([*prefixes, *beside], overwrite=options.overwrite) as folder:
        kind = token_dtype(tokenizer.vocab_size)
        writers = [PairWriter(folder.path, prefix, kind) for prefix in prefixes]
        metadata_writers = [PairWriter(folder.path, prefix, kind) for prefix in beside]
        work = _encode_all(Encoder(tokenizer, options), options, read_chunks(inputs.files))
        with closing(work):
            for encoded in work:
                _count(encoded, report)
                _count_bad(encoded.bad, report, strict=options.strict)
                parts = (encoded.train, encoded.validation)[: len(writers)]
                for writer, part in zip(writers, parts, strict=True):
                    writer.add(part.tokens, part.lengths, part.text_bytes)
                for writer, part in zip(metadata_writers, parts, strict=False):
                    assert part.metadata is not None, "the encoder has the same options"
                    writer.add(part.metadata.tokens, part.metadata.lengths, part.metadata.text_bytes)
                report.seconds = time.monotonic() - started
                on_progress(report)
        for writer in writers:
            if not writer.documents:
                raise ValueError(_nothing_for(writer.prefix, report, options))
        if options.metadata and not report.with_metadata:
            raise ValueError(_no_metadata(options.metadata, report))
        made = Making(options.tokenizer, options.eod, tokenizer, list(options.inputs), dict(report.bad))
        for writer in writers:
            writer.finish(made)
        for writer in metadata_writers:
            assert options.metadata is not None
            writer.finish(made, options.metadata.pattern)
        folder.publish()
    report.outputs = prefixes
    report.seconds = time.monotonic() - started
    return report


def _check(options: PrepareOptions) -> Inputs:
    problems: list[str] = []
    if not 0 <= options.validation_share < 1:
        problems.append(f"validation share is {options.validation_share}; expected at least 0 and below 1")
    if options.workers < 1:
        problems.append(f"workers is {options.workers}; expected at least 1")
    if not os.path.basename(options.output):
        problems.append(f"output {options.output} is a folder; add the name that the files begin with")
    inputs = Inputs()
    try:
        inputs = find_inputs(options.inputs, options.suffixes, text_key=options.text_key)
    except ValueError as error:
        problems.append(str(error))
    if not options.validation_share and _held_out_before(options):
        problems.append(
            f"{options.output}{VALIDATION}.* was held out of the same inputs, all of which would now be "
            "trained on; pass --validation-share to hold documents out again, or remove these files"
        )
    if not options.metadata and (stale := _metadata_before(options)):
        problems.append(
            f"{', '.join(stale)} belongs to what was prepared here before; pass --metadata again, or remove "
            "these files"
        )
    if problems:
        raise ValueError("; ".join(problems))
    return inputs


def _metadata_before(options: PrepareOptions) -> list[str]:
    prefixes = [options.output] + [options.output + VALIDATION] * (options.validation_share > 0)
    return [f"{prefix}{METADATA}.*" for prefix in prefixes if os.path.exists(f"{prefix}{METADATA}.idx")]


def _held_out_before(options: PrepareOptions) -> bool:
    """Whether the validation set beside the output shares inputs with it, as it was or as it will be."""
    held_out, replaced = read_sidecar(options.output + VALIDATION), read_sidecar(options.output)
    ours = [*options.inputs, *(replaced.inputs if replaced else ())]
    return held_out is not None and not set(map(os.path.abspath, ours)).isdisjoint(
        map(os.path.abspath, held_out.inputs)
    )


def _count(encoded: Encoded, report: PrepareReport) -> None:
    report.read_bytes += encoded.consumed
    for part in (encoded.train, encoded.validation):
        report.documents += len(part.lengths)
        report.tokens += len(part.tokens)
        report.text_bytes += part.text_bytes
        if part.metadata is not None:
            report.with_metadata += int(np.count_nonzero(part.metadata.lengths))
            report.metadata_tokens += len(part.metadata.tokens)
    report.validation_documents += len(encoded.validation.lengths)
    report.validation_tokens += len(encoded.validation.tokens)


def _count_bad(records: Sequence[BadRecord], report: PrepareReport, *, strict: bool) -> None:
    if records and strict:
        raise BadRecordError(str(records[0]))
    report.bad.update(record.reason for record in records)
    report.bad_examples += [str(record) for record in records[: EXAMPLES - len(report.bad_examples)]]


def _no_metadata(options: MetadataOptions, report: PrepareReport) -> str:
    return (
        f"none of the {report.documents} documents has the metadata {options.key!r}: it is a field of JSON "
        f"lines, with a text, number or boolean in it; text and source files have {FILE_PATH!r} only"
    )


def _nothing_for(prefix: str, report: PrepareReport, options: PrepareOptions) -> str:
    if report.documents:
        return (
            f"{prefix}: none of the {report.documents} documents fell there with a validation share of "
            f"{options.validation_share}; choose a share that fits so few documents"
        )
    bad = "; ".join(report.bad_examples)
    return f"{prefix}: no document in {', '.join(options.inputs)}" + (f"; bad records: {bad}" if bad else "")


def _encode_all(
    encoder: Encoder, options: PrepareOptions, chunks: Iterator[Chunk]
) -> Generator[Encoded, None, None]:
    """Encode every chunk, in order; a few chunks a worker are under way at any time."""
    if options.workers == 1:
        yield from map(encoder, chunks)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(options.workers, context, _start_worker, (options,))
    under_way: deque[tuple[str, Future[Encoded]]] = deque()  # with the last file of each: a large one is last
    try:
        for chunk in chunks:
            under_way.append((chunk.paths[-1], pool.submit(_work, chunk)))
            if len(under_way) >= 4 * options.workers:
                yield under_way[0][1].result()
                under_way.popleft()
        while under_way:
            yield under_way[0][1].result()
            under_way.popleft()
    except BrokenProcessPool as error:
        where = f", at {under_way[0][0]} or soon after" if under_way else ""
        raise ValueError(
            f"a worker was ended from outside, perhaps for want of memory{where}; nothing was written. Try "
            "fewer --workers; split a text of very many megabytes into several files, or into the lines of a "
            ".jsonl"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_encoder: Encoder | None = None


def _start_worker(options: PrepareOptions) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the work
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(load_tokenizer(options.tokenizer, options.eod), options)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(chunk: Chunk) -> Encoded:
    assert _encoder is not None, "the worker has not been started"
    return _encoder(chunk)
