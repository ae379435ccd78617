"""A small trainer of stages without Ratoon: one process, fp32, torch, numpy and the standard library.

Everything that a staged run of Ratoon must agree with is written out here once more, in the plainest form and
not for speed: files, order of documents, dealing of the sources, packing, model, gradient norm, AdamW,
learning rate.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]
"""By the names of Hugging Face's Llama."""
MASK = 2**64 - 1
UNIT = Fraction(1, 2**32)
"""What shares are rounded to."""
NO_LABEL = -100
NORMS = ("input", "post_attention")


@dataclass(frozen=True)
class Llama:
    """Sizes of the model; the output layer is not tied to the embedding."""

    layers: int
    hidden: int
    inner: int
    heads: int
    groups: int
    vocabulary: int
    theta: float = 10_000.0
    epsilon: float = 1e-5

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every weight."""
        keys = self.hidden // self.heads * self.groups
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocabulary, self.hidden),
        }
        for layer in range(self.layers):
            stem = f"model.layers.{layer}"
            found |= {f"{stem}.{norm}_layernorm.weight": (self.hidden,) for norm in NORMS}
            found |= {f"{stem}.self_attn.{x}_proj.weight": (self.hidden, self.hidden) for x in "qo"}
            found |= {f"{stem}.self_attn.{x}_proj.weight": (keys, self.hidden) for x in "kv"}
            found |= {f"{stem}.mlp.{x}_proj.weight": (self.inner, self.hidden) for x in ("gate", "up")}
            found[f"{stem}.mlp.down_proj.weight"] = (self.hidden, self.inner)
        return found


@dataclass(frozen=True)
class Recipe:
    """What holds for all stages."""

    seed: int
    sequence: int
    batch: int
    peak: float
    floor: float
    decay: float
    clip: float
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8


@dataclass(frozen=True)
class Stage:
    """Steps that are dealt with the same shares.

    Attributes:
        shares: by source, adding up to 1.
        warmup, length: of the schedule, in steps from where it began.
        begins_schedule: at the learning rate reached so far; else the schedule before goes on.
    """

    steps: int
    shares: Mapping[str, float]
    warmup: int
    length: int
    begins_schedule: bool = True


def draw_weights(model: Llama, seed: int, spread: float = 0.1) -> Weights:
    """Normal matrices, norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * spread + (len(shape) == 1)
        for name, shape in model.shapes().items()
    }


def read_documents(prefix: Path) -> list[list[int]]:
    """The documents of a Megatron pair that has one sequence to a document."""
    index = prefix.with_suffix(".idx").read_bytes()
    magic, version, code, sequences, borders = struct.unpack_from("<9sQBQQ", index)
    if (magic, version, borders) != (b"MMIDIDX\0\0", 1, sequences + 1):
        raise ValueError(f"{prefix}.idx: no index with one sequence to a document")
    lengths = np.frombuffer(index, np.int32, sequences, struct.calcsize("<9sQBQQ"))
    tokens = np.fromfile(prefix.with_suffix(".bin"), {4: np.int32, 8: np.uint16}[code])
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


class Source:
    """The endless tokens of a source: its documents, each epoch in another order."""

    def __init__(self, name: str, documents: Sequence[Sequence[int]], seed: int) -> None:
        self._name, self._documents, self._seed = name, documents, seed
        self._epochs = self._at = 0
        self._tokens: list[int] = []
        self._numbers: list[int] = []  # of the document that a token belongs to; counts through all epochs

    def read(self, count: int) -> tuple[list[int], list[int]]:
        """Go on by `count` tokens; these, the one behind them, and the documents of all of them."""
        while len(self._tokens) <= self._at + count:
            for document in shuffled(len(self._documents), self._key()):
                number = self._numbers[-1] + 1 if self._numbers else 0
                self._tokens += self._documents[document]
                self._numbers += [number] * len(self._documents[document])
            self._epochs += 1
        here = slice(self._at, self._at + count + 1)
        self._at += count
        return self._tokens[here], self._numbers[here]

    def _key(self) -> int:
        text = f"{self._seed}/{self._epochs}/{self._name}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def shuffled(count: int, key: int) -> list[int]:
    """0, ..., count - 1 in another order: four turns of a Feistel network over a rectangle.

    Who lands outside walks on (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    rows = math.isqrt(count - 1) + 1
    columns = -(-count // rows)
    order = []
    for value in range(count):
        while True:
            high, low = divmod(value, columns)
            for turn in range(4):
                high = (high + mixed(low, key + 2 * turn)) % rows
                low = (low + mixed(high, key + 2 * turn + 1)) % columns
            value = high * columns + low
            if value < count:
                break
        order.append(value)
    return order


def mixed(value: int, key: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), 62 bits of it."""
    bits = (value + key * 0x9E3779B97F4A7C15) & MASK
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & MASK
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & MASK
    return (bits ^ bits >> 31) >> 2


def dealt(shares: Mapping[str, float], count: int) -> list[str]:
    """The source of each sequence of a stage, earliest deadline first.

    Occurrence i of a source of share w has the slots floor(i / w) to ceil((i + 1) / w) - 1 (Baruah, Cohen,
    Plaxton, Varvel 1996). Of equal deadlines the source that was named first comes first.
    """
    exact, times = rounded(shares), dict.fromkeys(shares, 0)
    chosen = []
    for slot in range(count):
        open_now = [name for name, share in exact.items() if math.floor(times[name] / share) <= slot]
        name = min(open_now, key=lambda one: math.ceil((times[one] + 1) / exact[one]))
        times[name] += 1
        chosen.append(name)
    return chosen


def rounded(shares: Mapping[str, float]) -> dict[str, Fraction]:
    """To whole units; those that rounding down leaves over go to the largest remainders."""
    total = sum(Fraction(share) for share in shares.values())
    wanted = {name: Fraction(share) / total / UNIT for name, share in shares.items()}
    units = {name: math.floor(one) for name, one in wanted.items()}
    over = int(1 / UNIT) - sum(units.values())
    for name in sorted(wanted, key=lambda one: units[one] - wanted[one])[:over]:
        units[name] += 1
    return {name: one * UNIT for name, one in units.items()}


def mean_loss(weights: Weights, model: Llama, tokens: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the tokens whose next one is of the same document.

    tokens, documents: int64 [b, s + 1]; the last token is only a label.
    """
    same = documents[:, 1:] == documents[:, :-1]
    labels = tokens[:, 1:].masked_fill(~same, NO_LABEL)
    scores = logits(weights, model, tokens[:, :-1], documents[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL)


def logits(weights: Weights, model: Llama, tokens: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """[b, s, vocabulary]: attention inside each document, whose positions begin at 0.

    A document that an earlier sequence holds the beginning of begins anew.
    """
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    begins = torch.ones_like(tokens, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    positions = places - (places * begins).cummax(1).values
    seen = (documents[:, :, None] == documents[:, None, :]).tril()
    turn = angles(model, positions)
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(model.layers):
        stem = f"model.layers.{layer}"
        held = {name.removeprefix(f"{stem}."): one for name, one in weights.items() if f"{stem}." in name}
        y = normed(x, held["input_layernorm.weight"], model.epsilon)
        x = x + attention(held, model, y, turn, seen)
        y = normed(x, held["post_attention_layernorm.weight"], model.epsilon)
        gate, up = y @ held["mlp.gate_proj.weight"].T, y @ held["mlp.up_proj.weight"].T
        x = x + (F.silu(gate) * up) @ held["mlp.down_proj.weight"].T
    return normed(x, weights["model.norm.weight"], model.epsilon) @ weights["lm_head.weight"].T


def normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm (Zhang and Sennrich 2019)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def angles(model: Llama, positions: torch.Tensor) -> torch.Tensor:
    """Of the rotary embedding, [b, 1, s, head size / 2]."""
    size = model.hidden // model.heads
    rates = model.theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    return (positions[:, None, :, None] * rates).float()


def attention(
    weights: Weights, model: Llama, x: torch.Tensor, turn: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """Grouped-query attention; seen: bool [b, s, s]."""
    query, key, value = (
        (x @ weights[f"self_attn.{name}_proj.weight"].T).view(*x.shape[:2], count, -1).transpose(1, 2)
        for name, count in (("q", model.heads), ("k", model.groups), ("v", model.groups))
    )
    shared = model.heads // model.groups
    key = rotated(key, turn).repeat_interleave(shared, 1)
    value = value.repeat_interleave(shared, 1)
    scores = rotated(query, turn) @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    heads = scores.softmax(-1) @ value
    return heads.transpose(1, 2).flatten(2) @ weights["self_attn.o_proj.weight"].T


def rotated(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """The first half of a head's numbers turned against the second (Su et al. 2021)."""
    first, second = x.chunk(2, -1)
    sine, cosine = turn.sin(), turn.cos()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


class AdamW:
    """Loshchilov and Hutter 2019 after clipping by the global norm; norms and the embedding do not decay."""

    def __init__(self, recipe: Recipe, weights: Weights) -> None:
        self._recipe, self._weights, self._updates = recipe, weights, 0
        self._means = {name: torch.zeros_like(one) for name, one in weights.items()}
        self._squares = {name: torch.zeros_like(one) for name, one in weights.items()}

    @torch.no_grad()
    def update(self, gradients: Weights, lr: float) -> None:
        recipe, (beta, beta2) = self._recipe, self._recipe.betas
        norm = math.sqrt(sum(float(one.double().square().sum()) for one in gradients.values()))
        clip = min(1.0, recipe.clip / (norm + 1e-6))
        self._updates += 1
        for name, weight in self._weights.items():
            gradient = gradients[name] * clip
            if weight.dim() == 2 and "embed" not in name:
                weight *= 1 - lr * recipe.decay
            mean = self._means[name].lerp_(gradient, 1 - beta)
            square = self._squares[name].lerp_(gradient.square(), 1 - beta2)
            spread = (square / (1 - beta2**self._updates)).sqrt() + recipe.epsilon
            weight -= lr * mean / (1 - beta**self._updates) / spread


def learning_rate(recipe: Recipe, stage: Stage, start: float, elapsed: int) -> float:
    """Straight from `start` to the peak, then half a cosine to the floor at the schedule's last step."""
    if elapsed < stage.warmup:
        return start + (recipe.peak - start) * elapsed / stage.warmup
    done = min(1.0, (elapsed - stage.warmup) / (stage.length - 1 - stage.warmup))
    return recipe.floor + (recipe.peak - recipe.floor) * (1 + math.cos(math.pi * done)) / 2


def run_stages(
    recipe: Recipe,
    model: Llama,
    weights: Weights,
    stages: Sequence[Stage],
    corpora: Mapping[str, Sequence[Sequence[int]]],
) -> list[float]:
    """The loss of every step before its update; `weights` stay as they are."""
    weights = {name: one.clone().requires_grad_() for name, one in weights.items()}
    sources = {name: Source(name, documents, recipe.seed) for name, documents in corpora.items()}
    optimizer, losses = AdamW(recipe, weights), list[float]()
    anchor, lr_then, lr = 0, 0.0, 0.0
    for stage in stages:
        if stage.begins_schedule:
            anchor, lr_then = len(losses), lr
        order = dealt(stage.shares, stage.steps * recipe.batch)
        for step in range(stage.steps):
            names = order[step * recipe.batch :][: recipe.batch]
            rows = torch.tensor([sources[name].read(recipe.sequence) for name in names])
            loss = mean_loss(weights, model, rows[:, 0], rows[:, 1])
            gradients = torch.autograd.grad(loss, list(weights.values()))
            lr = learning_rate(recipe, stage, lr_then, len(losses) - anchor)
            optimizer.update(dict(zip(weights, gradients, strict=True)), lr)
            losses.append(float(loss.detach()))
    return losses
