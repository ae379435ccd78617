"""The tokenizer of the run that saved a checkpoint, for the Hugging Face folder that is made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files of which a tokenizer has at least one."""
COMMON_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")
"""What ends a document where nothing declares it; in the order of trainer/data/tokenizer.py."""
_CONFIG = "tokenizer_config.json"
_BESIDE = (_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_BYTES, _BYTES_EOD = "bytes", 256


@dataclass(frozen=True)
class RunTokenizer:
    """What of it goes along.

    Attributes:
        files: name in the target -> where it lies.
        made: name in the target -> content.
        eod: id of the token that ends a document; None where it is not known.
        sentence: what a person is told.
    """

    sentence: str
    files: dict[str, Path] = field(default_factory=dict)
    made: dict[str, bytes] = field(default_factory=dict)
    eod: int | None = None


def run_tokenizer(state: Mapping[str, Any]) -> RunTokenizer | None:
    """The tokenizer that the state of a Ratoon checkpoint names; None where it names none."""
    data = state.get("config", {}).get("data", {})
    stated = data.get("tokenizer")
    if stated is None:
        return None
    if stated == _BYTES:
        sentence = "no tokenizer goes along: the run's is `bytes`, which no file of transformers' describes"
        return RunTokenizer(sentence, eod=_BYTES_EOD)
    path = _find(Path(stated))
    if path is None:
        return RunTokenizer(
            f"no tokenizer goes along: the run's, {stated}, is not there any more; --carry FOLDER takes one "
            "from there"
        )
    sentence = f"the run's tokenizer goes along: {path}"
    beside = {name: path.with_name(name) for name in _BESIDE if path.with_name(name).is_file()}
    if path.suffix == ".model":
        return RunTokenizer(sentence, {"tokenizer.model": path, **beside})
    token, eod = end_of_document(path, data.get("eod"))
    made = {} if _CONFIG in beside else {_CONFIG: _tokenizer_config(token)}
    return RunTokenizer(sentence, {"tokenizer.json": path, **beside}, made, eod)


def end_of_document(tokenizer: Path, stated: str | None = None) -> tuple[str | None, int | None]:
    """The token that ends a document and its id, of a tokenizer.json; None and None where it has none.

    Args:
        stated: by the run; None takes `eos_token` of the tokenizer_config.json beside it, or a common one.
    """
    ids = _ids(json.loads(tokenizer.read_text(encoding="utf-8")))
    declared = stated or _declared(tokenizer.with_name(_CONFIG))
    token = declared or next((token for token in COMMON_EOD if token in ids), None)
    return (token, ids[token]) if token in ids else (None, None)


def _find(path: Path) -> Path | None:
    candidates = [path / "tokenizer.json", path / "tokenizer.model"] if path.is_dir() else [path]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _ids(definition: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id; a Unigram vocabulary is a list of tokens and scores, the others are mappings."""
    vocab = definition.get("model", {}).get("vocab", {})
    ids = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in definition.get("added_tokens") or ()}


def _declared(config: Path) -> str | None:
    if not config.is_file():
        return None
    token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    return token.get("content") if isinstance(token, dict) else token


def _tokenizer_config(eod: str | None) -> bytes:
    """Without it, transformers takes the class that model_type usually has, which may cut text otherwise."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if eod is not None:
        config["eos_token"] = eod
    return json.dumps(config, indent=2).encode()
