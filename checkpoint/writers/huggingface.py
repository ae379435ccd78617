"""Hugging Face folders that `from_pretrained` loads: weights, config.json, and what was carried along."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from checkpoint.convert.output import WritePlan
from checkpoint.language.arrange import arrange
from checkpoint.language.spec import load_spec
from checkpoint.manifest import LogicalTensor
from checkpoint.opening import Opened
from checkpoint.writers.carry import CONFIG, carried_files
from checkpoint.writers.huggingface_config import NAMING, config_of
from checkpoint.writers.huggingface_tokenizer import TOKENIZERS, end_of_document, run_tokenizer
from checkpoint.writers.options import WriteOptions
from checkpoint.writers.shards import Whole, index, shards
from checkpoint.writers.universal import tensor_dtype

GENERATION = "generation_config.json"
WEIGHT, MASTER = "weight", "master"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPUTED = (
    "rms_norm_eps",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts_per_tok",
    "norm_topk_prob",
)
"""Keys of config.json that no shape gives away."""


def plan(opened: Opened, options: WriteOptions) -> WritePlan:
    """What a Hugging Face folder of the checkpoint consists of: the weights, or masters where there are none.

    Raises:
        ValueError: the model's configuration is not known, no family has it, or it contradicts the weights.
    """
    tensors = opened.manifest.by_key()
    held = {name: WEIGHT if (name, WEIGHT) in tensors else MASTER for name in _parameters(tensors)}
    if not held:
        raise ValueError(f"{opened.folder} holds neither weights nor masters: there is no model to write")
    written = WritePlan("Hugging Face", carried=carried_files(opened, options.carry))
    dtype = options.dtype or Counter(tensor_dtype(tensors[key]) for key in held.items()).most_common(1)[0][0]
    config = _config(opened, written, dtype)
    shapes = {name: tensors[name, state].shape for name, state in held.items()}
    _refuse_contradiction(config, shapes, opened.manifest.state.get("model"))
    spec = load_spec(options.spec or _naming(config))
    facts = {**opened.manifest.state.get("facts", {}), **_facts(config), **options.facts}
    wholes = []
    for target in arrange(spec, shapes, facts=facts):
        states = {held[part.name] for part in target.parts}
        if len(states) > 1:
            raise ValueError(f"{target.name}: of its parts some have a weight and some only a master")
        wholes.append(Whole(target.name, dtype, target.shape, states.pop(), target.parts))
    files = shards("model", wholes, options.shard_bytes)
    written.files = files
    if len(files) > 1:
        written.small["model.safetensors.index.json"] = index(files)
    written.small[CONFIG] = json.dumps(config, indent=2).encode()
    written.carried.pop(CONFIG, None)
    written.lost = _lost(opened, set(held.items()))
    return written


def _parameters(tensors: Mapping[tuple[str, str], LogicalTensor]) -> list[str]:
    return list(dict.fromkeys(name for name, state in tensors if state in (WEIGHT, MASTER)))


def _config(opened: Opened, written: WritePlan, dtype: str) -> dict[str, Any]:
    """The one carried along, else one made of what a Ratoon checkpoint says; its tokenizer goes with it."""
    eod, model = _carry_tokenizer(opened, written), opened.manifest.state.get("model")
    if CONFIG in written.carried:
        config = json.loads(written.carried[CONFIG].read_text(encoding="utf-8"))
        config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    elif model is not None:
        config = config_of(model, dtype=dtype)
    else:
        raise ValueError(
            f"{opened.folder} ({opened.format}) does not say how its model computes (RoPE, norms, ...): give "
            "a folder with its config.json by --carry"
        )
    if model is None or "eos_token_id" in config:
        return config
    if eod is not None and GENERATION not in written.carried:
        written.small[GENERATION] = json.dumps({"eos_token_id": eod}, indent=2).encode()
    # said even where it is not known: transformers would take 1 and 2, whatever these are to the tokenizer
    return {"bos_token_id": None, **config, "eos_token_id": eod}


def _carry_tokenizer(opened: Opened, written: WritePlan) -> int | None:
    """See to a tokenizer: the one that goes along already, else the run's. The id that ends a document."""
    if any(name in written.carried for name in TOKENIZERS):
        path = written.carried.get("tokenizer.json")
        return None if path is None else end_of_document(path)[1]
    own = run_tokenizer(opened.manifest.state)
    if own is None:
        written.notes.append("no tokenizer goes along: --carry FOLDER takes one from there")
        return None
    written.carried |= {name: path for name, path in own.files.items() if name not in written.carried}
    written.small |= {name: text for name, text in own.made.items() if name not in written.carried}
    written.notes.append(own.sentence)
    return own.eod


def _naming(config: Mapping[str, Any]) -> str:
    kind = str(config.get("model_type"))
    if kind not in NAMING:
        raise ValueError(
            f"config.json is of model_type {kind!r}; the shipped specs name {', '.join(NAMING)}: give a "
            "naming by --names SPEC.toml"
        )
    return NAMING[kind]


def _facts(config: Mapping[str, Any]) -> dict[str, int]:
    from checkpoint.readers.huggingface_config import facts_of

    return facts_of(config)


def _refuse_contradiction(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], model: Mapping[str, Any] | None
) -> None:
    """A config.json of another model would load with random weights, compute something else, or not load.

    Args:
        model: what a checkpoint of Ratoon's own says of it.
    """
    facts, problems = _facts(config), []
    if _EMBEDDING not in shapes:
        raise ValueError(f"the checkpoint has no {_EMBEDDING}: it is part of a model, which nothing loads")
    rows, columns = shapes[_EMBEDDING]
    layers = {name.split(".")[2] for name in shapes if name.startswith("model.layers.")}
    for fact, found in (("vocab_size", rows), ("hidden_size", columns), ("num_layers", len(layers))):
        if facts.get(fact, found) != found:
            problems.append(f"{fact} is {facts[fact]} in config.json and {found} in the checkpoint")
    tied = bool(facts.get("tie_word_embeddings", 0))
    if "tie_word_embeddings" in facts and tied == (_HEAD in shapes):
        has = "has" if _HEAD in shapes else "lacks"
        problems.append(f"tie_word_embeddings is {tied} in config.json and the checkpoint {has} {_HEAD}")
    problems += _otherwise_computed(config, model) if model is not None else []
    if problems:
        raise ValueError("config.json is not of this model:\n  " + "\n  ".join(problems))


def _otherwise_computed(config: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    own = config_of(model, dtype="float32")
    pairs = {key: (config[key], own[key]) for key in _COMPUTED if config.get(key) is not None and key in own}
    there, here = _rope(config), _rope(own)
    pairs |= {key: (there[key], here[key]) for key in here}
    return [
        f"{key} is {stated} in config.json and {computed} in the checkpoint"
        for key, (stated, computed) in pairs.items()
        if stated != computed
    ]


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base, kind and factor, wherever the version of transformers that wrote it keeps them."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    usual = 1e6 if config.get("model_type") == "mixtral" else 1e4
    return {
        "rope_theta": rope.get("rope_theta") or config.get("rope_theta") or usual,
        "rope_type": rope.get("rope_type") or rope.get("type") or "default",
        "rope factor": rope.get("factor"),
    }


def _lost(opened: Opened, held: set[tuple[str, str]]) -> list[str]:
    """States that are not written."""
    counts = Counter(t.state for t in opened.manifest.tensors if (t.name, t.state) not in held)
    lost = [f"{state} of {count} parameters" for state, count in counts.items()]
    scalars = opened.manifest.state.get("per_parameter") or {}
    return lost + [f"{state}, a number of {len(values)} parameters" for state, values in scalars.items()]
