"""Training a byte-level BPE tokenizer: no text is ever out of its vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.folder import write_durably
from trainer.data.documents import BadRecord, parse, read_chunks
from trainer.data.inputs import find_inputs

EOD = "<|endoftext|>"
BYTE_ALPHABET = 256


@dataclass
class TokenizerReport:
    """What a tokenizer was trained on, and what came of it."""

    input_bytes: int = 0
    """of all inputs, as they are on disk"""
    read_bytes: int = 0
    documents: int = 0
    text_bytes: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    vocab_size: int = 0


def train_bpe(
    inputs: Sequence[str],
    output: str,
    *,
    vocab_size: int,
    text_key: str = "text",
    suffixes: Sequence[str] = (),
    on_progress: Callable[[TokenizerReport], None] = lambda report: None,
) -> TokenizerReport:
    """Train a byte-level BPE on documents and write it as a tokenizer.json, whole or not at all.

    Args:
        vocab_size: ids in all, the 256 bytes and the end of a document included; fewer come out where the
            text
            has no more pairs to merge.

    Raises:
        ValueError: the inputs hold no document, or the vocabulary is too small.
    """
    if vocab_size <= BYTE_ALPHABET:
        raise ValueError(
            f"vocabulary size is {vocab_size}; expected at least {BYTE_ALPHABET + 1}: 256 bytes and {EOD}"
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    report = TokenizerReport()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = _texts(inputs, text_key, suffixes, report, on_progress)
    tokenizer.train_from_iterator(texts, trainer)
    if not report.documents:
        bad = ", ".join(f"{count} {reason}" for reason, count in report.bad.items())
        raise ValueError(f"no document in {', '.join(inputs)}" + (f" ({bad})" if bad else ""))
    report.vocab_size = tokenizer.get_vocab_size()
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_durably(Path(output), tokenizer.to_str(pretty=True).encode())
    return report


def _texts(
    inputs: Sequence[str],
    text_key: str,
    suffixes: Sequence[str],
    report: TokenizerReport,
    on_progress: Callable[[TokenizerReport], None],
) -> Iterator[list[str]]:
    """The documents in batches, counted as they pass."""
    found = find_inputs(inputs, suffixes, text_key=text_key)
    report.input_bytes = sum(file.size for file in found.files)
    report.bad.update(record.reason for record in found.bad)
    for chunk in read_chunks(found.files):
        texts: list[str] = []
        for record in parse(chunk, text_key):
            if isinstance(record, BadRecord):
                report.bad[record.reason] += 1
            else:
                texts.append(record.text)
        report.read_bytes += chunk.consumed
        report.documents += len(texts)
        report.text_bytes += sum(len(text.encode()) for text in texts)
        on_progress(report)
        yield texts
