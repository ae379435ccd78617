"""megatron-core's model chunks, gradient buffers and optimizer for one layout, behind one small class."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from parallel.chunks import build_chunks, with_hooks
from parallel.initialise import Draw, blank, initialise
from parallel.mesh import Mesh
from parallel.optimizer_state import get_step, prepare_state, set_step, state_slices
from parallel.shards import MainPiece, copy_main_to_model, main_pieces
from parallel.slices import TensorSlice
from parallel.specs import Backend, choose_backend
from parallel.transforms import SlowWeights, UpdateTransform, transformed_step


class Engine:
    """A GPTModel split over the ranks of a mesh, with its gradients and its optimizer.

    Attributes:
        mesh: process groups and this rank's place.
        config: megatron-core's configuration of the model.
        chunks: bare GPTModel chunks of this rank, one per virtual stage.
        wrapped: the same chunks with gradient buffers, as the pipeline schedules take them.
        named: every parameter of this rank with its logical blocks.
        pieces: the fp32 copies that this rank updates, by logical tensor.
        transforms: change every update, see `parallel.transforms`.
        slow_weights: act after them.
    """

    def __init__(
        self,
        mesh: Mesh,
        config: TransformerConfig,
        model: Mapping[str, Any],
        *,
        vocab_size: int,
        optimizer: OptimizerConfig,
        decays: Callable[[str], bool],
        portable: bool = False,
        overlap: bool | None = None,
    ) -> None:
        """Build chunks and optimizer; `initialise` or a checkpoint must fill the weights.

        Args:
            model: further arguments of GPTModel (padded vocab_size, max_sequence_length, rotary_base, ...).
            vocab_size: of the tokenizer, without padding.
            decays: whether the logical parameter of that name has weight decay.
            portable: use the portable modules even where Transformer Engine is present.
            overlap: reduce gradients during the backward pass and gather weights during the forward pass,
                which changes no number; None is where there are streams to do it on, on CUDA.
        """
        self.mesh = mesh
        self.config = with_hooks(config)
        self.vocab_size = vocab_size
        self.tied = bool(model.get("share_embeddings_and_output_weights", False))
        self.backend: Backend = choose_backend(portable=portable, fp32=not config.bf16)
        self._overlap = mesh.device.type == "cuda" if overlap is None else overlap
        self.chunks, self.named = build_chunks(
            mesh, self.config, model, backend=self.backend, vocab_size=vocab_size
        )
        self.wrapped = [self._wrap(chunk, index) for index, chunk in enumerate(self.chunks)]
        if self._overlap:
            self._time_reductions()
        self.optimizer = self._build_optimizer(optimizer, decays)
        self._clip = optimizer.clip_grad
        self.pieces: list[MainPiece] = list(main_pieces(self.named, self.optimizer, mesh))
        self.transforms: list[UpdateTransform] = []
        self.slow_weights: SlowWeights | None = None
        self._added: dict[str, set[str]] = {}

    def initialise(self, seed: int, draw: Draw) -> None:
        """Draw the initial weights, the same in every layout; masters follow."""
        initialise(self.named, seed, draw)
        self.weights_changed()

    def weights_changed(self) -> None:
        """Copy the weights into the optimizer's masters, after weights were written from outside."""
        self.optimizer.reload_model_params()

    def blank(self) -> None:
        """Zero the weights, which a checkpoint is about to fill, and masters: nothing fills their padding."""
        blank(self.named)
        self.weights_changed()

    def slices(self) -> list[TensorSlice]:
        """Every box of every logical tensor and optimizer state that this rank holds. Call on every rank."""
        self.settle()  # else only the next forward pass would fetch what others updated
        return list(state_slices(self.named, self.optimizer, self.mesh, added=self._added))

    def add_state(self, key: str, has: Callable[[str], bool]) -> list[MainPiece]:
        """Keep a further fp32 state of the logical tensors that `has` accepts, zero at first.

        It is saved, loaded and resharded like a moment, so it must be added before a checkpoint is loaded.

        Returns:
            This rank's pieces that have it; those without a state of that name before get it now.
        """
        pieces = [piece for piece in self.pieces if has(piece.name)]
        for piece in pieces:
            piece.add_state(key)
        self._added.setdefault(key, set()).update(piece.name for piece in pieces)
        return pieces

    @property
    def added_states(self) -> frozenset[str]:
        """States that were added, which a checkpoint may lack."""
        return frozenset(self._added)

    def settle(self) -> None:
        """Wait until every weight is what its main copy was last copied to. Call it on every rank."""
        if self._overlap and self.mesh.layout.distributed_optimizer:
            for chunk in self.wrapped:
                chunk.start_param_sync(force_sync=True)

    @torch.no_grad()
    def main_changed(self) -> None:
        """Let the model's weights follow main copies that were written, after `settle`, from outside.

        Call it on every rank.
        """
        self._copy_main()
        self.settle()

    def _copy_main(self) -> None:
        copy_main_to_model(self.optimizer)
        if self.mesh.layout.distributed_optimizer and not self._overlap:  # else the forward pass gathers
            for chunk in self.wrapped:
                chunk.start_param_sync()

    @property
    def updates(self) -> int:
        """Optimizer updates made so far."""
        return get_step(self.optimizer)

    @updates.setter
    def updates(self, step: int) -> None:
        set_step(self.optimizer, step)

    def scale_loss(self, scale: float) -> None:
        """Multiply every loss of the next backward passes, auxiliary ones included, by `scale`."""
        self.config.grad_scale_func = lambda loss: loss * scale

    def zero_grad(self) -> None:
        """Clear gradients and gradient buffers before the first micro-batch of a step."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def ready_gradients(self) -> None:
        """Hand the reduced gradients to the optimizer, where `pieces` show them. Call once a step."""
        self.optimizer.prepare_grads()

    def gradient_norm(self) -> float:
        """The 2-norm of the whole model's gradient, over the whole mesh. Call once, before `update`."""
        self.ready_gradients()
        return float(self.optimizer.get_grad_norm())

    def update(self, lr: float, gradient_norm: float) -> None:
        """Clip by the norm of the whole mesh and make one optimizer update at learning rate `lr`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
        if self._clip > 0.0:
            for part in self.optimizer.chained_optimizers:
                parameters = part.get_parameters()
                if parameters:
                    clip_grad_by_total_norm_fp32(parameters, max_norm=self._clip, total_norm=gradient_norm)
        if not self.transforms and self.slow_weights is None:
            self.optimizer.step_with_ready_grads()
            return
        transformed_step(self.optimizer, self.transforms, self.slow_weights, lr=lr)
        self._copy_main()

    @contextlib.contextmanager
    def without_reduction(self) -> Iterator[None]:
        """Backward passes inside leave in the gradient buffers what this rank's micro-batches alone make."""
        config = self.config
        hooks = (config.finalize_model_grads_func, config.grad_sync_func)
        config.finalize_model_grads_func = lambda *_, **__: None
        config.grad_sync_func = None
        try:
            with contextlib.ExitStack() as stack:
                for chunk in self.wrapped:
                    stack.enter_context(chunk.no_sync())
                yield
        finally:
            config.finalize_model_grads_func, config.grad_sync_func = hooks

    def non_finite_gradients(self) -> list[str]:
        """Logical names of this rank's parameters whose gradient has a NaN or an infinity, each once."""
        found = dict.fromkeys(
            block.name
            for entry in self.named
            for block in entry.blocks
            if not torch.isfinite(block.view(entry.parameter.main_grad)).all()  # type: ignore[attr-defined]
        )
        return list(found)

    def _wrap(self, chunk: GPTModel, index: int) -> DistributedDataParallel:
        distributed = self.mesh.layout.distributed_optimizer
        module = Float16Module(self.config, chunk) if self.config.bf16 else chunk
        return DistributedDataParallel(
            config=self.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=distributed,
                overlap_grad_reduce=self._overlap,
                overlap_param_gather=self._overlap and distributed,
            ),
            module=module,
            # Later chunks begin their backward first: overlapping their reduction would hold up the first.
            disable_bucketing=index > 0,
            pg_collection=self.mesh.groups,
        )

    def _time_reductions(self) -> None:
        """Tell the pipeline schedules to reduce gradients after the last micro-batch only.

        Under a pipeline they also choose the moment, when all stages are in the same phase.
        """
        no_sync = [chunk.no_sync for chunk in self.wrapped]
        start = [chunk.start_grad_sync for chunk in self.wrapped]
        single = len(self.wrapped) == 1
        self.config.no_sync_func = no_sync[0] if single else no_sync
        self.config.grad_sync_func = start[0] if single else start

    def _build_optimizer(self, config: OptimizerConfig, decays: Callable[[str], bool]) -> Any:
        for entry in self.named:
            verdicts = {decays(block.name) for block in entry.blocks}
            assert len(verdicts) <= 1, f"{entry.local_name} fuses tensors with and without weight decay"
            entry.parameter.no_weight_decay = verdicts == {False}  # type: ignore[attr-defined]
        optimizer = get_megatron_optimizer(
            config,
            self.wrapped,
            use_gloo_process_groups=False,
            config_overrides={ParamKey(attr="no_weight_decay"): {"wd_mult": 0.0, "weight_decay": 0.0}},
        )
        prepare_state(optimizer)
        for part in optimizer.chained_optimizers:
            if isinstance(part.optimizer, torch.optim.AdamW):
                for group in part.optimizer.param_groups:
                    group.update(fused=True, foreach=False)  # one pass over memory, on CPU too
        return optimizer
