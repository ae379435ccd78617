"""DeepSpeed universal folders that `load_universal` resumes under ZeRO 1, 2 and 3, on any number of ranks.

Every state of a parameter is a file of its own, whole; `checkpoint.readers.deepspeed_universal` has the
format. Names have to be those of the engine's module: transformers' for Llama and its kin, or those of the
naming spec that was asked for. What DeepSpeed 0.19.8 makes of a folder decides what is written:

- Settings of parameter groups are restored by their number: see `checkpoint.writers.deepspeed_settings`.
- A tied parameter is written once, whatever the pipeline stages that hold it.
- Parameters that are not trained get their `fp32.pt`, as from `ds_to_universal`, but `load_universal` leaves
  them as the engine has them.
- ZeRO 1 and 2 take any state that lies in a parameter's folder, ZeRO 3 Adam's only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from checkpoint.archive.pickle_writer import TensorRef, write_pickle
from checkpoint.archive.torch_writer import lay_out
from checkpoint.convert.output import OutputFile, Region, WritePlan
from checkpoint.language.arrange import Arranged, arrange
from checkpoint.language.spec import load_spec
from checkpoint.manifest import ITEM_SIZES, LogicalTensor
from checkpoint.opening import Opened
from checkpoint.writers.carry import carried_files
from checkpoint.writers.deepspeed_settings import Settings, model_states, optimizer_state, saved_step
from checkpoint.writers.options import WriteOptions

USUAL_SPEC = "logical"  # which are transformers' names for Llama and its kin
MOMENTS = {"exp_avg", "exp_avg_sq"}
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_ROW_PARALLEL = ("o_proj.weight", "down_proj.weight")


class _State(NamedTuple):
    """A state of a target tensor: the name of its file, and of the logical state it is made of."""

    file: str
    state: str


def plan(opened: Opened, options: WriteOptions) -> WritePlan:
    """What a universal folder of the checkpoint consists of.

    Raises:
        ValueError: the naming spec has no name for a parameter.
    """
    manifest = opened.manifest
    tensors = manifest.by_key()
    shapes = _parameter_shapes(manifest.tensors)
    spec = load_spec(options.spec or USUAL_SPEC)
    facts = {**manifest.state.get("facts", {}), **options.facts}
    targets = arrange(spec, shapes, facts=facts)
    settings = Settings.of(opened, {target.name: [p.name for p in target.parts] for target in targets})
    plan = WritePlan("DeepSpeed universal", carried=carried_files(opened, options.carry))
    folder = f"global_step{manifest.step}_universal"
    for target in targets:
        place = f"{folder}/zero/{target.name}"
        states = _states(target, tensors, options, plan.lost)
        if settings.has_muon:
            states = [state for state in states if state.file != "momentum_buffer"]
        plan.files += [_file(f"{place}/{file}.pt", target, state) for file, state in states]
        step = saved_step(settings, target.name)
        if step is not None and len(states) > 1:
            plan.small[f"{place}/step.pt"] = step
    plan.lost += settings.lost + [
        f"{name} ({state}): {list(tensor.shape)} is not the parameter's shape {list(shapes[name])}"
        for (name, state), tensor in tensors.items()
        if tensor.shape != shapes[name]
    ]
    plan.small[f"{folder}/zero/optimizer_state.pt"] = optimizer_state(settings)
    counters = model_states(settings, {target.name: target.shape for target in targets})
    plan.small[f"{folder}/mp_rank_00_model_states.pt"] = counters
    plan.small[f"{folder}/zero_pp_rank_0_mp_rank_00_model_states.pt"] = counters
    plan.small["latest_universal"] = folder.encode()
    plan.notes = [*settings.notes, *_notes(plan)]
    return plan


def _parameter_shapes(tensors: tuple[LogicalTensor, ...]) -> dict[str, tuple[int, ...]]:
    """Of every parameter; some optimizers keep states of other shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        if tensor.state in ("weight", "master") or tensor.name not in shapes:
            shapes[tensor.name] = tensor.shape
    return shapes


def _states(
    target: Arranged,
    tensors: Mapping[tuple[str, str], LogicalTensor],
    options: WriteOptions,
    lost: list[str],
) -> list[_State]:
    """The states that all logical tensors of a target have; the master is the weight where there is none."""
    names = list(dict.fromkeys(part.name for part in target.parts))
    shapes = {part.name: part.shape for part in target.parts}
    found: dict[str, set[str]] = {}
    for name in names:
        for state in {state for other, state in tensors if other == name}:
            if tensors[name, state].shape == shapes[name]:
                found.setdefault(state, set()).add(name)
    whole = [state for state, having in found.items() if len(having) == len(names)]
    lost += [
        f"{target.name} ({state}): only {', '.join(sorted(having))} have it"
        for state, having in found.items()
        if len(having) < len(names) and state not in ("weight", "master")
    ]
    fp32 = "master" if "master" in whole else "weight"
    others = [state for state in sorted(whole) if state not in ("weight", "master")]
    if options.states is not None:
        others = [state for state in others if state in options.states]
    return [_State("fp32", fp32), *(_State(state, state) for state in others)]


def _file(path: str, target: Arranged, state: str) -> OutputFile:
    """A torch.save archive of one tensor, with what DeepSpeed's tensor-parallel ranks need to cut it."""
    logical = target.parts[0].name if len(target.parts) == 1 else ""
    value: dict[str, Any] = {
        "param": TensorRef("0", "float32", target.shape),
        "cat_dim": int(logical.endswith(_ROW_PARALLEL)),
    }
    if logical in _VOCABULARY:
        value["vocab_tensor"] = True
    num_bytes = math.prod(target.shape) * ITEM_SIZES["float32"]
    layout = lay_out(write_pickle(value), [("0", num_bytes)])
    region = Region("0", layout.payloads["0"][0], "float32", target.shape, state, target.parts)
    return OutputFile(path, layout.num_bytes, (region,), layout.early, layout.late)


def _notes(plan: WritePlan) -> list[str]:
    """What DeepSpeed makes of states that are not Adam's."""
    held: dict[str, set[str]] = {}
    for file in plan.files:
        place, _, state = file.path.rpartition("/")
        held.setdefault(place, set()).add(state.removesuffix(".pt"))
    states = set().union(*held.values()) - {"fp32"} if held else set()
    if not states:
        return ["there is no optimizer state: load it with load_module_only=True"]
    notes = []
    if not MOMENTS <= states:
        notes.append(
            f"the optimizer's state is {', '.join(sorted(states))}: DeepSpeed takes it under ZeRO 1 and 2; "
            "its ZeRO 3 loads Adam's only"
        )
    elif others := states - MOMENTS:
        notes.append(f"{', '.join(sorted(others))}: DeepSpeed takes it under ZeRO 1 and 2 only")
    bare = sum(states == {"fp32"} for states in held.values())
    if bare:
        notes.append(
            f"{bare} parameters have no optimizer state: such as are not trained DeepSpeed's load_universal "
            "leaves as the engine has them"
        )
    return notes
