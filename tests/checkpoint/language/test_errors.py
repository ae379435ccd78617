"""What a user reads when a spec is wrong or does not fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from checkpoint.language.choose import choose_spec
from checkpoint.language.place import place
from checkpoint.language.sizes import Facts, UnknownFactError
from checkpoint.language.spec import SpecError, load_spec, parse_spec, shipped_specs
from checkpoint.language.template import Template
from checkpoint.source import Source, SourceTensor
from tests.checkpoint.language.megatron_ranks import Layout, logical, ranks


def tensor(name: str, *shape: int, **at: int) -> SourceTensor:
    return SourceTensor(name, "weight", shape, (), at)


def refusal(rules: str, *tensors: SourceTensor, **facts: int) -> str:
    with pytest.raises(SpecError) as raised:
        place(parse_spec(f'name = "x"\n{rules}', "x.toml"), tensors, facts=facts)
    return str(raised.value)


def test_everything_is_reported_at_once() -> None:
    message = refusal(
        '[[rule]]\nmatch = "layers.{i}.wq"\nto = "q.{i}"\n'
        '[[rule]]\nmatch = "layers.{i}.w{any:.}"\nto = "x.{i}.{any}"\n'
        '[[rule]]\nmatch = "layers.{i}.norm"\nto = "norm.{i}"\n',
        tensor("layers.0.wq", 2),
        tensor("layers.0.wv", 2),
        tensor("layer.0.norms", 2),
    )
    assert "names without a rule (1):" in message
    assert "layer.0.norms (nearest rule: layers.{i}.norm)" in message
    assert "layers.0.wq matches layers.{i}.wq and layers.{i}.w{any:.}" in message
    assert "the rule layers.{i}.norm matches nothing: mark it optional = true" in message


def test_long_lists_are_cut_and_counted() -> None:
    message = refusal(
        '[[rule]]\nmatch = "w"\nto = "w"', tensor("w", 1), *(tensor(f"v{i}", 1) for i in range(50))
    )
    assert "names without a rule (50):" in message
    assert "and 30 more" in message
    assert message.count("nearest rule") == 20


def test_a_rule_that_is_switched_off_is_named() -> None:
    message = refusal('[[rule]]\nmatch = "w"\nto = "w"\nwhen = "experts > 0"', tensor("w", 1), experts=0)
    assert "w (the rule w would match, but its condition 'experts > 0' does not hold)" in message


def test_one_of_several_spellings_must_be_there() -> None:
    rules = '[[rule]]\nmatch = "{a:x|y}"\nto = "{a}"\n'
    for name in ("p", "q"):
        rules += f'[[rule]]\nmatch = "{name}"\nto = "p"\nany_of = "norm"\n'
    assert "none of the rules for 'norm' matches anything: p, q" in refusal(rules, tensor("x", 1))
    place(parse_spec(f'name = "x"\n{rules}', "x.toml"), [tensor("x", 1), tensor("q", 1)])


def test_sizes_that_do_not_add_up_are_explained() -> None:
    message = refusal(
        '[facts]\nrows = "heads * 2"\n[[rule]]\nmatch = "w"\nto = "{part}"\n'
        'fused = { repeat = "heads", parts = { q = "rows", k = 1 } }',
        tensor("w", 29),
        heads=3,
    )
    assert "w: 29 rows are stored along the fused dimension, but `fused` says 3 x (q 6 + k 1) = 21" in message
    assert "(heads = 3, rows = 6)" in message


def test_a_missing_fact_is_named_with_the_remedy() -> None:
    message = refusal('[[rule]]\nmatch = "w"\nto = "w"\npadded = { size = "vocab_size" }', tensor("w", 8, 2))
    assert "w: the fact 'vocab_size' is not known: give it with --fact vocab_size=NUMBER" in message


def test_two_ranks_with_one_tensor_are_told_apart() -> None:
    message = refusal('[[rule]]\nmatch = "w"\nto = "w"', tensor("w", 8, tensor=0), tensor("w", 8, tensor=1))
    assert 'w: ranks (tensor 0) and (tensor 1) hold the same: say replicated = ["tensor"]' in message


def test_two_names_for_one_tensor_are_told_apart() -> None:
    message = refusal('[[rule]]\nmatch = "{any:.}"\nto = "w"', tensor("a", 8), tensor("b", 8))
    assert "b: holds the same as a: mark the rule of the copy tied = true" in message


@pytest.mark.parametrize(
    ("rule", "tensors", "message"),
    [
        ('sharded = { over = "tensor" }', [tensor("w", 4, tensor=t) for t in (0, 2)], "rank 1 of tensor"),
        ('sharded = { over = "tensor", dim = 1 }', [tensor("w", 4, tensor=0)], "`sharded` speaks of dim 1"),
        (
            'sharded = { over = "tensor", widths = [3, 4] }',
            [tensor("w", 4, tensor=0), tensor("w", 3, tensor=1)],
            "`widths` says [3, 4]",
        ),
        ('view = [3, 3]', [tensor("w", 8)], "`view` makes [3, 3] of the shape [8]"),
        ('padded = { size = 9 }', [tensor("w", 8)], "8 rows are stored, fewer than the 9"),
        ('interleaved = { block = 6 }', [tensor("w", 8)], "8 rows cannot be blocks of 6 interleaved rows"),
        (
            'replicated = "tensor"',
            [tensor("w", 4, tensor=0), tensor("w", 5, tensor=1)],
            "makes w [5], but w makes it [4]",
        ),
        (
            'sharded = { over = "tensor" }',
            [tensor("w", 4, tensor=0), tensor("w", 5, tensor=0, pipeline=1)],
            "holds 4 as well as 5",
        ),
    ],
)  # fmt: skip
def test_shapes_that_contradict_are_refused(rule: str, tensors: list[SourceTensor], message: str) -> None:
    assert message in refusal(f'[[rule]]\nmatch = "w"\nto = "w"\n{rule}', *tensors)


def test_layers_that_a_stage_does_not_hold() -> None:
    layout = Layout(stages=((0, 0, 2), (1, 0, 1)))
    tensors = [each for each, _ in ranks(layout, logical(layout))]
    with pytest.raises(SpecError, match=r"stage \(0, 0\) .* holds 1 layers, and this would be number 1"):
        place(
            load_spec("megatron-core-gpt"), tensors, facts=layout.facts(), layers={(0, 0): (0,), (1, 0): (1,)}
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('match = "w"', "rule 1 (w): give `to`"),
        ('to = "w"', "rule 1: give exactly one of match, regex and names"),
        ('match = "w"\nto = "{layer}"', "`to` names {layer}, which nothing gives"),
        ('match = "w"\nto = "w"\nshard = 1', "rule 1 (w): shard: Extra inputs are not permitted"),
        (
            'match = "w"\nto = "w"\nsharded = { over = "row" }',
            "rule 1 (w): sharded.0.over.0: Input should be 'tensor'",
        ),
        (
            'match = "w"\nto = "w"\nsharded = { over = "tensor", split = "each" }',
            'split = "each" is for fused',
        ),
        ('match = "w"\nto = "w"\npadded = { size = "__import__" }', None),
        ('match = "w"\nto = "w"\npadded = { size = "f(1)" }', "'f(1)' is not arithmetic over facts"),
        ('match = "{x"\nto = "w"', "the template '{x' has '{x' where {name}"),
        (
            'match = "w"\nto = "w"\nlocal = { layer = "stage" }',
            "`local` speaks of 'layer', which `match` does not",
        ),
        ("regex = '('\nto = \"w\"", "rule 1 ((): its regex is wrong"),
    ],
)
def test_a_wrong_spec_is_explained_by_rule(text: str, message: str | None) -> None:
    if message is None:
        parse_spec(f'name = "x"\n[[rule]]\n{text}', "x.toml")
        return
    with pytest.raises(SpecError, match=re.escape(message)):
        parse_spec(f'name = "x"\n[[rule]]\n{text}', "x.toml")


def test_a_spec_that_is_not_there() -> None:
    with pytest.raises(SpecError, match=r"there is no spec 'lama': give the path .*, or one of .*llama"):
        load_spec("lama")


def test_no_spec_fits() -> None:
    source = Source(
        "strange files", Path("."), tensors=[tensor("model.embed_tokens.weight", 8, 2), tensor("odd", 1)]
    )
    with pytest.raises(SpecError) as raised:
        choose_spec(source)
    message = str(raised.value)
    assert message.startswith("no spec fits this checkpoint (strange files); tried ")
    assert "--spec FILE" in message
    assert "odd (nearest rule" in message


@pytest.mark.parametrize("name", shipped_specs())
def test_shipped_specs_say_what_they_are_for(name: str) -> None:
    spec = load_spec(name)
    assert spec.name == name
    assert spec.about
    assert all(Template.parse(rule.to or "") for rule in spec.rules)


def test_facts_derive_from_facts() -> None:
    facts = Facts({"a": "b * 2 + 1", "b": "c // 2", "d": 7}, {"c": 9, "d": 5})
    assert facts.size("a") == 9
    assert facts.size("not d == 7 and a % 2 == 1") == 1
    assert facts.size("-(d - 6)") == 1
    with pytest.raises(UnknownFactError, match=r"'e' is not known \(needed for f\)"):
        Facts({"f": "e"}, {}).size("f")
    with pytest.raises(ValueError, match="a, b are defined by each other"):
        Facts({"a": "b", "b": "a"}, {}).size("a")
    with pytest.raises(ValueError, match="divides by zero"):
        Facts({}, {"a": 0}).size("4 // a")
