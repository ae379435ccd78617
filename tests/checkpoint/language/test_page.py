"""The reference page: all of its examples are read out of it, and the worked one puts a model together."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from checkpoint.language.arrange import arrange
from checkpoint.language.place import place
from checkpoint.language.rules import Rule
from checkpoint.language.spec import Spec, SpecError, parse_spec, shipped_specs
from tests.checkpoint.language.megatron_ranks import numbered
from tests.checkpoint.language.rebuild import Array, Stored, rebuild, same, store
from tests.checkpoint.language.test_arrange import shapes, write

PAGE = (Path(__file__).parents[3] / "docs" / "checkpoint-language.md").read_text()
EXAMPLES = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
KESTREL = re.search(r"<!-- example -->\n```toml\n(.*?)```", PAGE, flags=re.DOTALL)[1]  # type: ignore[index]
ERROR = re.search(r"<!-- error -->\n```\n(.*?)```", PAGE, flags=re.DOTALL)[1]  # type: ignore[index]

HIDDEN, HEADS, GROUPS, SIZE, EXPERTS, FFN, VOCAB, POSITIONS = 16, 4, 2, 4, 3, 6, 9, 5
FACTS = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "vocab_size": VOCAB}
STAGES = {(0, 0): (0, 1), (1, 0): (2,)}


def kestrel() -> dict[str, Array]:
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.embed_positions.weight": (POSITIONS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer in range(3):
        at = f"model.layers.{layer}"
        found[f"{at}.input_layernorm.weight"] = found[f"{at}.post_attention_layernorm.weight"] = (HIDDEN,)
        found[f"{at}.self_attn.q_proj.weight"] = (HEADS * SIZE, HIDDEN)
        found[f"{at}.self_attn.k_proj.weight"] = found[f"{at}.self_attn.v_proj.weight"] = (
            GROUPS * SIZE,
            HIDDEN,
        )
        found[f"{at}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * SIZE)
        found[f"{at}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            found[f"{at}.mlp.experts.{expert}.gate_proj.weight"] = (FFN, HIDDEN)
            found[f"{at}.mlp.experts.{expert}.up_proj.weight"] = (FFN, HIDDEN)
            found[f"{at}.mlp.experts.{expert}.down_proj.weight"] = (HIDDEN, FFN)
    return numbered(found)


def pairs(rows: Array) -> Array:
    """From halves to neighbours, head by head."""
    return rows.reshape(-1, 2, SIZE // 2, HIDDEN).swapaxes(1, 2).reshape(rows.shape)


def halves(array: Array, rank: int, axis: int) -> Array:
    return np.split(array, 2, axis=axis)[rank]


def layer_on(values: dict[str, Array], at: str, rank: int) -> dict[str, Array]:
    key, value = pairs(values[f"{at}.self_attn.k_proj.weight"]), values[f"{at}.self_attn.v_proj.weight"]
    experts = [f"{at}.mlp.experts.{expert}" for expert in range(EXPERTS)]
    ups = [[halves(values[f"{e}.{part}_proj.weight"].T, rank, 1) for part in ("gate", "up")] for e in experts]
    return {
        "norm1.scale": values[f"{at}.input_layernorm.weight"],
        "norm2.scale": values[f"{at}.post_attention_layernorm.weight"],
        "mix.query": halves(pairs(values[f"{at}.self_attn.q_proj.weight"]).T, rank, 1),
        "mix.keyval": np.concatenate([halves(each.T, rank, 1) for each in (key, value)], axis=1),
        "mix.out": halves(values[f"{at}.self_attn.o_proj.weight"].T, rank, 0),
        "mix.cache": np.zeros(3),
        "moe.pick": values[f"{at}.mlp.gate.weight"].T,
        "moe.win": np.stack([np.concatenate(each, axis=1) for each in ups]),
        "moe.wout": np.stack([halves(values[f"{e}.down_proj.weight"].T, rank, 0) for e in experts]),
    }


def kestrel_ranks(values: dict[str, Array]) -> Stored:
    padding = np.zeros((3, HIDDEN))
    stored: Stored = []
    for stage in range(2):
        for rank in range(2):
            held = {}
            for number, layer in enumerate(STAGES[stage, 0], start=1):
                each = layer_on(values, f"model.layers.{layer}", rank)
                held |= {f"blocks.{number}.{name}": array for name, array in each.items()}
            if stage == 0:
                table = np.concatenate([values["model.embed_tokens.weight"], padding])
                held["tok.table"] = halves(table, rank, 0)
                held["pos.table"] = values["model.embed_positions.weight"]
            else:
                held["final.scale"] = values["model.norm.weight"]
                held["head.kernel"] = halves(np.concatenate([values["lm_head.weight"], padding]).T, rank, 1)
            stored += [
                store(name, array, {"tensor": rank, "pipeline": stage}) for name, array in held.items()
            ]
    return stored


def spec(text: str) -> Spec:
    return parse_spec(text, "kestrel.toml")


def test_the_worked_example_puts_the_model_together() -> None:
    values = kestrel()
    stored = kestrel_ranks(values)
    placed = place(spec(KESTREL), [tensor for tensor, _ in stored], facts=FACTS, layers=STAGES)
    same(rebuild(placed, stored), values)


def test_the_worked_example_writes_as_well() -> None:
    values = kestrel()
    stored = write(arrange(spec(KESTREL), shapes(values), facts=FACTS | {"padded_vocab_size": 12}), values)
    arrays = {tensor.name: array for tensor, array in stored}
    assert arrays["head.kernel"].shape == (HIDDEN, 12)
    placed = place(spec(KESTREL), [tensor for tensor, _ in stored], facts=FACTS)
    same(rebuild(placed, stored), values)


def test_the_error_on_the_page_is_what_a_user_sees() -> None:
    text = KESTREL.replace("moe.pick", "moe.route")
    text = text[: text.rindex("[[rule]]")]
    tensors = [tensor for tensor, _ in kestrel_ranks(kestrel())]
    with pytest.raises(SpecError) as raised:
        place(spec(text), tensors, facts=FACTS, layers=STAGES)
    assert str(raised.value) == ERROR.rstrip("\n")


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_example_is_a_spec(text: str) -> None:
    parse_spec(text if text.startswith("name") else f'name = "x"\n{text}', "example.toml")


@pytest.mark.parametrize("key", [*Rule.model_fields, *Spec.model_fields])
def test_every_key_is_explained(key: str) -> None:
    if key not in ("placement", "rules"):  # not for files; called `[[rule]]` there
        assert re.search(rf"`\[*{key}\]*\b", PAGE), key


@pytest.mark.parametrize("name", shipped_specs())
def test_every_shipped_spec_is_listed(name: str) -> None:
    assert f"`{name}`" in PAGE
