"""How a model is split over ranks: the degrees of every parallelism, and what is wrong with them."""

from __future__ import annotations

from dataclasses import fields
from typing import Literal, get_args

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

ContextKind = Literal["p2p", "all_gather", "a2a"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Layout:
    """The degrees of `[parallel]`, in megatron-core's terms. Data parallelism is what remains of the world.

    Attributes:
        tensor: ranks that share every large matrix (TP).
        pipeline: ranks that share the layers (PP).
        virtual_pipeline: model chunks a pipeline rank holds, for the interleaved schedule (VPP).
        context: ranks that share every sequence (CP).
        expert: ranks that share the experts of a mixture-of-experts layer (EP).
        sequence_parallel: norms and residuals are split over the tensor ranks along the sequence (SP).
        distributed_optimizer: masters and moments are split over the data and context ranks (ZeRO-1).
        context_kind: how context ranks exchange keys and values: "p2p" (ring), "all_gather",
            "a2a" (Ulysses).
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    expert: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    context_kind: ContextKind = "p2p"

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one copy of the model and one sequence: TP x PP x CP."""
        return self.tensor * self.pipeline * self.context

    @property
    def chunks(self) -> int:
        """Model chunks per pipeline rank."""
        return self.virtual_pipeline or 1

    def data(self, world_size: int) -> int:
        """Data-parallel degree in a world of `world_size` ranks."""
        return world_size // self.model_parallel

    def describe(self, world_size: int) -> str:
        """The degrees in one line, such as "TP2 PP2 DP2 SP"."""
        parts = [f"TP{self.tensor}", f"PP{self.pipeline}"]
        parts += [f"VPP{self.virtual_pipeline}"] if self.virtual_pipeline else []
        parts += [f"CP{self.context} ({self.context_kind})"] if self.context > 1 else []
        parts += [f"EP{self.expert}"] if self.expert > 1 else []
        parts += [f"DP{self.data(world_size)}"]
        parts += ["SP"] if self.sequence_parallel else []
        parts += ["distributed optimizer"] if self.distributed_optimizer else []
        return " ".join(parts)

    def problems(
        self,
        world_size: int | None,
        *,
        num_layers: int,
        num_attention_heads: int,
        num_query_groups: int,
        ffn_hidden_size: int,
        num_experts: int | None = None,
        sequence_length: int | None = None,
    ) -> list[str]:
        """Everything that keeps this layout from running, each with both numbers and the remedy.

        Args:
            world_size: ranks in the run; None when it is not known yet.
            sequence_length: tokens a sequence, before any split.
        """
        found = self._degree_problems(world_size)
        if found:
            return found  # the checks below divide by the degrees
        found += self._tensor_problems(num_attention_heads, num_query_groups, ffn_hidden_size)
        found += self._pipeline_problems(num_layers)
        found += self._context_problems(num_attention_heads, sequence_length)
        found += self._expert_problems(world_size, num_experts)
        return found

    def _degree_problems(self, world_size: int | None) -> list[str]:
        found = []
        for field in fields(self):
            degree = getattr(self, field.name)
            if type(degree) is int and degree < 1:
                found.append(f"parallel.{field.name} = {degree}: a degree is at least 1")
        if not found and world_size is not None and world_size % self.model_parallel:
            found.append(
                f"tensor {self.tensor} x pipeline {self.pipeline} x context {self.context} = "
                f"{self.model_parallel} does not divide {world_size} ranks: start a multiple of "
                f"{self.model_parallel} ranks, or lower a degree"
            )
        return found

    def _tensor_problems(self, heads: int, groups: int, ffn: int) -> list[str]:
        found = []
        for name, value in (("num_attention_heads", heads), ("ffn_hidden_size", ffn)):
            if value % self.tensor:
                found.append(_indivisible(name, value, "parallel.tensor", self.tensor))
        if groups % self.tensor:
            found.append(_indivisible("num_query_groups", groups, "parallel.tensor", self.tensor))
        if self.sequence_parallel and self.tensor == 1:
            found.append(
                "parallel.sequence_parallel = true with tensor = 1: it splits over the tensor ranks; "
                "set tensor > 1 or sequence_parallel = false"
            )
        return found

    def _pipeline_problems(self, num_layers: int) -> list[str]:
        stages = self.pipeline * self.chunks
        found = []
        if num_layers % stages:
            found.append(
                f"num_layers = {num_layers} does not divide over {stages} stages (pipeline {self.pipeline} "
                f"x virtual_pipeline {self.chunks}): use a multiple of {stages} layers, or fewer stages"
            )
        if self.virtual_pipeline is not None and self.pipeline == 1:
            found.append(
                f"parallel.virtual_pipeline = {self.virtual_pipeline} with pipeline = 1: interleaving needs "
                "at least 2 pipeline ranks; raise pipeline or leave virtual_pipeline out"
            )
        if self.virtual_pipeline == 1:
            found.append(
                "parallel.virtual_pipeline = 1 interleaves nothing: leave it out, or use at least 2 chunks"
            )
        return found

    def _context_problems(self, heads: int, sequence_length: int | None) -> list[str]:
        found = []
        share, reasons = 1, []
        if self.context > 1:
            share *= 2 * self.context  # zig-zag
            reasons.append(f"2 chunks for each of parallel.context = {self.context} ranks")
        if self.sequence_parallel:
            share *= self.tensor
            reasons.append(f"sequence_parallel splits over parallel.tensor = {self.tensor}")
        if sequence_length is not None and sequence_length % share:
            found.append(
                f"data.sequence_length = {sequence_length} is not a multiple of {share} "
                f"({', '.join(reasons)}): use {-(-sequence_length // share) * share}"
            )
        problem = context_kind_problem(self.context_kind, heads // self.tensor, self.context)
        found += [problem] if problem else []
        return found

    def _expert_problems(self, world_size: int | None, num_experts: int | None) -> list[str]:
        found = []
        if num_experts is None:
            if self.expert > 1:
                found.append(
                    f"parallel.expert = {self.expert}, but the model has no experts: set model.num_experts "
                    "or expert = 1"
                )
            return found
        if num_experts % self.expert:
            found.append(_indivisible("num_experts", num_experts, "parallel.expert", self.expert))
        if world_size is not None:
            spread = world_size // (self.tensor * self.pipeline)
            if spread % self.expert:
                found.append(
                    f"parallel.expert = {self.expert} does not divide the {spread} data x context ranks that "
                    "experts are spread over: use a divisor, or more ranks"
                )
        if self.tensor > 1 and not self.sequence_parallel:
            found.append(
                f"experts with tensor = {self.tensor} need sequence_parallel = true: megatron-core "
                "dispatches each token from one tensor rank"
            )
        return found


def context_kind_problem(kind: str, heads: int, context: int) -> str | None:
    """Why this kind of context parallelism cannot run with so many query heads on a tensor rank, or None."""
    kinds = get_args(ContextKind)
    if kind not in kinds:
        return f"context_kind = {kind} is unknown: use one of {', '.join(kinds)}"
    if kind == "a2a" and heads % context:
        return (
            f"context_kind = a2a splits the {heads} heads of a tensor rank over context = {context}, "
            "which does not divide them: use context_kind = p2p or all_gather, or a divisor"
        )
    return None


def _indivisible(name: str, value: int, key: str, degree: int) -> str:
    return f"{name} = {value} is not divisible by {key} = {degree}: use a divisor of {value}"
