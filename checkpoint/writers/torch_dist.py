"""Megatron `torch_dist`: a folder that megatron-core's `dist_checkpointing.load` loads, on any layout.

It is the folder of an iteration, or of a release where nothing was trained yet, with the file beside it that
tells Megatron-LM which one to load. Weights have megatron-core's homogeneous keys, layers stacked, unless
layers differ; masters and moments the same shapes (`fully_reshardable`); groups and arguments are in
common.pt. Norms go by two keys with the same bytes: that of Transformer Engine's modules, which fuse them
with the linear layer behind, and that of a module of their own. The vocabulary is not padded: megatron-core
lets these tensors be shorter and fills them up with zeros.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from checkpoint.convert.output import WritePlan
from checkpoint.language.arrange import Arranged, arrange
from checkpoint.language.spec import load_spec
from checkpoint.readers.megatron_files import TRACKER
from checkpoint.writers.dcp_folder import DcpFolder
from checkpoint.writers.options import WriteOptions
from checkpoint.writers.torch_dist_args import SAMPLES, arguments, samples_seen, schedule
from checkpoint.writers.torch_dist_groups import Groups

if TYPE_CHECKING:
    from checkpoint.opening import Opened

SPEC = "megatron-core-gpt-dist"
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_RESHARDABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}
_STATES = {"master": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Our word for what megatron-core's optimizer keeps -> its own; it asks for all of them and nothing else."""
_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_LAYERS = "decoder.layers."
_OF_FILES = ("padded_vocab_size", "homogeneous_layers")
"""Facts about how a source's files are laid out."""
_WITH_EXTRA_STATE = (
    *("input_layernorm", "pre_mlp_layernorm", "self_attention.q_layernorm", "self_attention.k_layernorm"),
    *("self_attention.core_attention", "self_attention.linear_qkv", "self_attention.linear_proj"),
    *("mlp.linear_fc1", "mlp.linear_fc2"),
)
"""Modules of a layer that may ask for `_extra_state`, which is empty unless they compute in FP8."""
_EXPERTS = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


def plan(opened: Opened, options: WriteOptions) -> WritePlan:
    """The files of a torch_dist folder of a checkpoint of any format.

    Raises:
        SpecError: the naming spec cannot write this model.
    """
    writer = _Writer(opened, options)
    facts = _facts(opened, options, writer.shapes)
    targets = arrange(load_spec(options.spec or SPEC), writer.shapes, facts=facts)
    for target in targets:
        writer.write_weight(target)
    writer.write_optimizer(targets)
    writer.write_extra_states(facts)
    return writer.finish(facts)


def _facts(opened: Opened, options: WriteOptions, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Numbers about the model; padding of the source's vocabulary and its keys are not the target's."""
    model = opened.manifest.state.get("model") or {}
    facts = {key: int(value) for key, value in model.items() if isinstance(value, int)}
    facts |= opened.manifest.state.get("facts", {})
    facts = {key: value for key, value in facts.items() if key not in _OF_FILES} | dict(options.facts)
    facts.setdefault("homogeneous_layers", int(_alike(shapes)))
    facts.setdefault("gated", int(any(name.endswith(".gate_proj.weight") for name in shapes)))
    layers = [int(match[1]) for name in shapes if (match := re.match(r"model\.layers\.(\d+)\.", name))]
    facts.setdefault("num_layers", max(layers, default=-1) + 1)
    experts = [int(match[1]) for name in shapes if (match := re.search(r"\.experts\.(\d+)\.", name))]
    if experts:
        facts.setdefault("num_experts", max(experts) + 1)
    embedding = shapes.get("model.embed_tokens.weight")
    if embedding:
        facts.setdefault("vocab_size", embedding[0])
        facts.setdefault("hidden_size", embedding[1])
        facts.setdefault("tie_word_embeddings", int("lm_head.weight" not in shapes))
    return facts


def _alike(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether all layers have the same tensors; megatron-core stacks no others."""
    layers: dict[str, set[str]] = {}
    for name in shapes:
        match = re.match(r"model\.layers\.(\d+)\.(.+)", name)
        if match:
            layers.setdefault(match[1], set()).add(match[2])
    return all(names == next(iter(layers.values())) for names in layers.values())


class _Writer:
    """Puts a checkpoint into a folder, tensor by tensor."""

    def __init__(self, opened: Opened, options: WriteOptions) -> None:
        self.plan = WritePlan("Megatron torch_dist")
        self._manifest, self._dtype = opened.manifest, options.dtype
        self._folder = DcpFolder(options.shard_bytes)
        self._tensors = self._manifest.by_key()
        found = sorted(self._tensors.values(), key=lambda tensor: tensor.state == "weight")
        self.shapes = {t.name: t.shape for t in found if t.state in ("weight", "master")}
        self._groups: Groups | None = None
        said = options.facts.get("expert_model_parallel_size") or options.layout.get("expert")
        self._expert_ranks = said or _expert_ranks(self._manifest.state)

    def write_weight(self, target: Arranged) -> None:
        """A tensor of the model; from its masters where a source has no weights."""
        state = self._common_state(target, ("weight", "master"))
        if state is None:
            self.plan.lost.append(f"{target.name}: a part of it has neither weights nor masters")
            return
        dtype = self._dtype or self._tensors[target.parts[0].name, state].dtype
        self._add(target.name, dtype, target, state)

    def write_optimizer(self, targets: Iterable[Arranged]) -> None:
        """Masters and moments, if megatron-core's optimizer could go on with them."""
        words = dict.fromkeys(t.state for t in self._manifest.tensors if t.state not in ("weight", "master"))
        moments = [state for state in _STATES if state != "master"]
        odd = [word for word in words if word not in moments]
        self.plan.lost += [
            f"{word}: megatron-core's distributed optimizer keeps {', '.join(moments)}" for word in odd
        ]
        trained = [
            t for t in targets if any((part.name, m) in self._tensors for part in t.parts for m in moments)
        ]
        incomplete = [t.name for t in trained if None in (self._common_state(t, (m,)) for m in moments)]
        if incomplete:
            self.plan.lost.append(
                f"masters and moments: megatron-core needs {' and '.join(moments)} of whole tensors, which "
                f"{len(incomplete)} lack ({', '.join(incomplete[:3])})"
            )
        if incomplete or not trained:
            self.plan.lost += self._precision_lost()
            return
        has_experts = any(".experts." in target.name for target in trained)
        self._groups = Groups(self._manifest, experts_apart=has_experts and self._expert_ranks != 1)
        for target in trained:
            for state, word in _STATES.items():
                held = self._common_state(target, (state, "weight") if state == "master" else (state,))
                if held is None:
                    continue
                self._add(f"optimizer.state.{word}.{target.name}", "float32", target, held)
            self._groups.add(target.name, list(dict.fromkeys(part.name for part in target.parts)))

    def _precision_lost(self) -> list[str]:
        """Where no optimizer is written, masters are not either."""
        masters = [name for name, state in self._tensors if state == "master"]
        lost = [f"masters of {len(masters)} tensors: without moments nobody reads them"] if masters else []
        finer = [t for t in self._tensors.values() if (t.state, t.dtype) == ("weight", "float32")]
        if finer and self._dtype not in (None, "float32"):
            lost.append(f"precision of {len(finer)} weights in float32: they are rounded to {self._dtype}")
        return lost

    def write_extra_states(self, facts: Mapping[str, int]) -> None:
        """What modules of megatron-core ask for, empty."""
        layers, experts = facts["num_layers"], facts.get("num_experts", 0)
        for layer in range(layers):
            stacked = facts["homogeneous_layers"]
            prefix = _LAYERS if stacked else f"{_LAYERS}{layer}."
            place, count = (f"{layer}", f"{layers}") if stacked else ("0", "1")
            for module in _WITH_EXTRA_STATE:
                self._item(f"{prefix}{module}._extra_state/shard_{place}_{count}")
            lead, leads = (f"{layer}.", f"{layers}.") if stacked else ("", "")
            for module, expert in itertools.product(_EXPERTS, range(experts)):
                self._item(f"{prefix}{module}._extra_state/shard_{lead}{expert}_{leads}{experts}")
        self._item("decoder.final_layernorm._extra_state/shard_0_1")

    def finish(self, facts: Mapping[str, int]) -> WritePlan:
        """All that is the same on all ranks, and the files."""
        samples = samples_seen(self._manifest, facts)
        common: dict[str, Any] = {
            "args": arguments(
                self._manifest, facts, self._dtypes(), expert_ranks=self._expert_ranks, samples=samples
            ),
            "checkpoint_version": 3.0,
            "iteration": self._manifest.step,
            "content_metadata": {
                **(_RESHARDABLE if self._groups else {}),
                **({} if facts["homogeneous_layers"] else {"non_homogeneous_layers": True}),
                **_CONTENT,
            },
        }
        if self._groups:
            common["optimizer"] = self._groups.state()
            self.plan.lost += self._groups.lost
            if samples is not None:
                settings = self._groups.settings()
                common["opt_param_scheduler"] = schedule(self._manifest, settings, samples)
        self.plan.notes += self._notes(facts, samples)
        held = io.BytesIO()
        torch.save(common, held)
        self._place({**self._folder.small(), "common.pt": held.getvalue()})
        return self.plan

    def _place(self, small: Mapping[str, bytes]) -> None:
        """Put all files into the folder that Megatron-LM looks for; older ones refuse an iteration 0."""
        step = self._manifest.step
        is_release = step == 0 and self._groups is None
        folder = "release" if is_release else f"iter_{step:07d}"

        def inside(files: Mapping[str, bytes]) -> dict[str, bytes]:
            return {f"{folder}/{name}": content for name, content in files.items()}

        self.plan.files = [replace(file, path=f"{folder}/{file.path}") for file in self._folder.files()]
        self.plan.small |= {**inside(small), TRACKER: (b"release" if is_release else str(step).encode())}
        self.plan.last = lambda _: inside(
            {**self._folder.index(), "metadata.json": json.dumps(_CONFIG).encode()}
        )

    def _add(self, name: str, dtype: str, target: Arranged, state: str) -> None:
        self._folder.add_tensor((name,), dtype, target.shape, state=state, parts=target.parts)
        for fused, apart in _NORMS.items():
            if fused in name:
                self._folder.add_alias((name.replace(fused, apart),), (name,))

    def _item(self, name: str) -> None:
        self._folder.add_item((name,), [None])

    def _common_state(self, target: Arranged, states: Iterable[str]) -> str | None:
        """The first of the states that all logical tensors of a target have in their own shapes."""
        for state in states:
            held = [self._tensors.get((part.name, state)) for part in target.parts]
            if all(tensor is not None and tensor.shape == self.shapes[tensor.name] for tensor in held):
                return state
        return None

    def _dtypes(self) -> set[str]:
        if self._dtype:
            return {self._dtype}
        return {tensor.dtype for tensor in self._manifest.tensors if tensor.state == "weight"}

    def _notes(self, facts: Mapping[str, int], samples: int | None) -> list[str]:
        notes = ["random states belong to a layout and are not written"]
        if self._groups is None:
            if self._manifest.step:
                notes.append("no state of an optimizer is written: load with --finetune or --no-load-optim")
            return notes
        source = self._manifest.state.get("source") or {}
        if samples is None:
            notes.append(
                "the source does not say how many sequences it has read, which Megatron-LM's scheduler "
                f"counts: give --fact {SAMPLES}=N; without it Megatron-LM itself, unlike megatron-core, "
                "loads no optimizer from here"
            )
        elif not source.get("opt_param_scheduler"):
            notes.append(
                "the source has no scheduler of Megatron-LM's: the one written keeps the last learning rate; "
                "load with --override-opt-param-scheduler for that of the command line, or "
                "--use-checkpoint-opt-param-scheduler for this one"
            )
        if not self._groups.is_said:
            notes.append(
                "the source says no settings of parameter groups: written are torch's defaults without "
                "weight decay"
            )
        if facts.get("num_experts"):
            notes.append(
                "experts "
                + (
                    "share one optimizer with the rest, as without expert parallelism; with it give "
                    "--fact expert_model_parallel_size=2 or more"
                    if self._expert_ranks == 1
                    else "have an optimizer of their own, as with expert parallelism of any degree; without "
                    "it give --fact expert_model_parallel_size=1"
                )
            )
        return notes


def _expert_ranks(state: Mapping[str, Any]) -> int | None:
    """The source's own degree; None where it does not say, and 1 in a dense model."""
    said = ((state.get("source") or {}).get("args") or {}).get("expert_model_parallel_size")
    layout = state.get("layout") or {}
    found = said or (state.get("degrees") or {}).get("expert") or layout.get("expert")
    return int(found) if found else None
