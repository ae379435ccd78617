"""Tokenizers behind one small protocol: built-in bytes, tokenizer.json, SentencePiece."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

COMMON_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")
"""End-of-document tokens that released tokenizers use, looked up in this order when none is declared."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def eod_id(self) -> int:
        """Id of the token that ends a document."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text: the end of a document, and whatever else the tokenizer declares."""

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly when they give the same ids, the end of documents included."""

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All ids of all texts, one after the other, and the number of ids of each. Adds no special token;
        text that spells a special token stays text."""

    def encode(self, text: str) -> NDArray[np.int64]:
        """The ids of one text."""

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of these ids; what is no valid text comes out as U+FFFD."""


class BytesTokenizer:
    """A token per UTF-8 byte, and 256 for the end of a document. Needs no file and fits every text."""

    vocab_size = 257
    eod_id = 256
    special_ids = frozenset({256})
    fingerprint = "bytes-257"

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `Tokenizer.encode_batch`."""
        encoded = [text.encode() for text in texts]
        ids = np.frombuffer(b"".join(encoded), dtype=np.uint8).astype(np.int64)
        return ids, np.fromiter(map(len, encoded), np.int64, len(encoded))

    def encode(self, text: str) -> NDArray[np.int64]:
        """See `Tokenizer.encode`."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """See `Tokenizer.decode`; the end of a document has no text."""
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")


class JsonTokenizer:
    """A tokenizer.json, run by the tokenizers library."""

    def __init__(self, inner: tokenizers.Tokenizer, eod: str, origin: str) -> None:
        eod_id = inner.token_to_id(eod)
        if eod_id is None:
            raise ValueError(f"{origin}: no token {eod!r} to end documents with; name one of its own as eod")
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # a document that quotes "<|endoftext|>" must not end there
        self._inner = inner
        self.eod_id = int(eod_id)
        added = inner.get_added_tokens_decoder()
        self.special_ids = frozenset({self.eod_id, *(number for number, one in added.items() if one.special)})
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        definition = json.loads(inner.to_str())
        for key in ("truncation", "padding", "post_processor", "version"):  # none of these changes our ids
            definition.pop(key, None)
        self.fingerprint = _digest(json.dumps(definition, sort_keys=True).encode(), eod)

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `Tokenizer.encode_batch`."""
        encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return _flatten([one.ids for one in encoded])

    def encode(self, text: str) -> NDArray[np.int64]:
        """See `Tokenizer.encode`."""
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """See `Tokenizer.decode`."""
        return str(self._inner.decode([int(i) for i in ids], skip_special_tokens=False))


class SentencePieceTokenizer:
    """A SentencePiece .model."""

    def __init__(self, inner: sentencepiece.SentencePieceProcessor, eod: str | None, origin: Path) -> None:
        eod_id = inner.eos_id() if eod is None else inner.piece_to_id(eod)
        if eod_id < 0 or (eod is not None and eod_id == inner.unk_id()):
            what = "it declares no end of sentence" if eod is None else f"it has no piece {eod!r}"
            raise ValueError(f"{origin}: {what}; name one of its pieces as eod")
        self._inner = inner
        self.eod_id = int(eod_id)
        self.vocab_size = int(inner.vocab_size())
        self.special_ids = frozenset({self.eod_id, *filter(inner.is_control, range(self.vocab_size))})
        self.fingerprint = _digest(origin.read_bytes(), str(eod_id))

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `Tokenizer.encode_batch`."""
        return _flatten(self._inner.encode(list(texts), out_type=int, num_threads=1))

    def encode(self, text: str) -> NDArray[np.int64]:
        """See `Tokenizer.encode`."""
        return np.array(self._inner.encode(text, out_type=int), dtype=np.int64)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """See `Tokenizer.decode`."""
        return str(self._inner.decode([int(i) for i in ids]))


def load_tokenizer(spec: str, eod: str | None = None) -> Tokenizer:
    """The tokenizer that a run file names.

    Args:
        spec: `bytes`, a tokenizer.json or a folder that has one, or a SentencePiece .model.
        eod: the token that ends a document; None takes the one that the tokenizer declares.

    Raises:
        ValueError: there is no such file, it cannot be read, or it has no such token.
    """
    if spec == "bytes":
        if eod is not None:
            raise ValueError(
                f"eod is {eod!r}, but the bytes tokenizer ends documents with id 256; leave eod out"
            )
        return BytesTokenizer()
    path = _find(Path(spec))
    declared = None if path.suffix == ".model" else _declared_eod(path)
    return _load(path, eod or declared, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _load(path: Path, eod: str | None, written: int) -> Tokenizer:
    """Large ones take a second, and training, validation and the check of the run file each ask for
    theirs."""
    return _load_sentencepiece(path, eod) if path.suffix == ".model" else _load_json(path, eod)


def _find(path: Path) -> Path:
    """The file itself, or the tokenizer inside a folder."""
    candidates = [path / "tokenizer.json", path / "tokenizer.model"] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    where = (
        f"no tokenizer.json or tokenizer.model in the folder {path}" if path.is_dir() else f"no file {path}"
    )
    raise ValueError(f"tokenizer: {where}; expected 'bytes', a tokenizer.json or a SentencePiece .model")


def _load_json(path: Path, eod: str | None) -> Tokenizer:
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"tokenizer {path}: not a tokenizer.json ({error})") from error
    chosen = eod or next((t for t in COMMON_EOD if inner.token_to_id(t) is not None), None)
    if chosen is None:
        special = [token.content for token in inner.get_added_tokens_decoder().values() if token.special]
        raise ValueError(
            f"tokenizer {path}: cannot tell which token ends a document; name it as eod"
            f" (its special tokens are {special[:10]})"
        )
    return JsonTokenizer(inner, chosen, f"tokenizer {path}")


def _declared_eod(path: Path) -> str | None:
    """`eos_token` of the tokenizer_config.json beside a tokenizer.json, as transformers writes it."""
    beside = path.with_name("tokenizer_config.json")
    if not beside.is_file():
        return None
    try:
        token = json.loads(beside.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"tokenizer: {beside} is not a JSON object ({error})") from error
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _load_sentencepiece(path: Path, eod: str | None) -> Tokenizer:
    import sentencepiece

    try:
        inner = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"tokenizer {path}: not a SentencePiece model ({error})") from error
    return SentencePieceTokenizer(inner, eod, path)


def _flatten(ids: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum())), lengths


def _digest(content: bytes, eod: str) -> str:
    return hashlib.sha256(content + b"\0" + eod.encode()).hexdigest()[:32]
