"""The adapter to DeepSpeed's engine.

Several settings that look harmless elsewhere train wrong numbers there without a message: `workarounds` has what is
done about each, for the versions that it names; others are refused.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from megamoe.common.errors import ConfigError
from megamoe.config.deepspeed import deepspeed_config
from megamoe.config.run import RunConfig
from megamoe.data.batch import Batch
from megamoe.model.decoder import Decoder, ModelOutput
from megamoe.moe.layer import MoELayer
from megamoe.moe.marker import is_expert
from megamoe.moe.routers.base import Router
from megamoe.parallel.groups import Groups
from megamoe.parallel.mpu import ModelParallelUnit
from megamoe.training.exact_sums import GradientSums
from megamoe.training.grad_norm import clip_gradients
from megamoe.training.optimizer import parameter_groups, set_lr
from megamoe.training.workarounds import (
    check_version,
    forget_gradients,
    momentum_held_back,
    no_expert_group_asked_of_zero,
    no_memory_report,
    norm_of_experts_alone,
    prepare_deepspeed,
    reduce_in_fp64,
    register_expert_groups,
)


class Engine:
    """A model and its optimizer inside DeepSpeed.

    Args:
        config: the run.
        model: this rank's shard in fp32, already initialised; the engine takes it over and gives it its precision.
        groups: the process groups of the run.
    """

    def __init__(self, config: RunConfig, model: Decoder, groups: Groups) -> None:
        import deepspeed

        check_version(importlib.metadata.version("deepspeed"))
        prepare_deepspeed()
        register_expert_groups(groups)
        if config.training.precision == "fp64":
            model.double()
        self.config, self.groups = config, groups
        self.optimizer = _build_optimizer(model, config)
        self._clipped_norm: Tensor | None = None
        self._accept: Callable[[float], bool] = math.isfinite
        self._accepted: bool | None = None
        # On the object, whose class DeepSpeed looks at.
        self.optimizer.step = self._if_accepted(self.optimizer.step)  # type: ignore[assignment, method-assign]
        with no_expert_group_asked_of_zero(model), no_memory_report():
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.optimizer,
                config=deepspeed_config(config, groups.topology.world_size),
                # A pipeline's module brings one of its own.
                mpu=ModelParallelUnit(groups) if groups.tp.size > 1 and groups.pp.size == 1 else None,
                dist_init_required=False,
            )
        if config.training.precision == "fp64":
            reduce_in_fp64(self._engine)
        norm_of_experts_alone(self._engine.optimizer)
        self._sums = self._exact_sums(model)
        self._move_momentum = momentum_held_back(self._engine.optimizer)
        # The engine writes curves of its own over samples; Weights & Biases then refuses ours, which are over steps.
        self._monitor, self._engine.monitor = self._engine.monitor, SimpleNamespace(enabled=False)
        self._check_moe_seen(model)

    @property
    def model(self) -> Decoder:
        """The model inside. Under ZeRO-3 its parameters are empty outside of a forward or backward pass."""
        module: Decoder = self._engine.module
        return module

    def parameter(self, name: str) -> nn.Parameter:
        """This rank's part of a parameter, by the name that `full_weights` gives it."""
        return self.model.get_parameter(name)

    def routers(self) -> dict[int, Router]:
        """The routers of this rank's blocks, by the block's number."""
        blocks = enumerate(self.model.blocks)
        return {index: block.ffn.router for index, block in blocks if isinstance(block.ffn, MoELayer)}

    def train(
        self,
        batches: Sequence[Batch],
        lr_factor: float,
        observe: Callable[[ModelOutput], None],
        before_step: Callable[[], None] = lambda: None,
        accept: Callable[[float], bool] = math.isfinite,
    ) -> float:
        """One optimizer step. Returns the global gradient norm before clipping; infinity may stand for NaN.

        With Muon under ZeRO it is the norm after orthogonalisation, the only one that DeepSpeed computes.

        Args:
            batches: this rank's micro-batches, as many on every rank.
            lr_factor: share of the peak learning rate.
            observe: gets what each micro-batch gave, without its graph being kept.
            before_step: called once the gradients are complete (`full_gradients`), before they are clipped.
            accept: whether a step of this norm is to be done; the same answer on every rank. If not (`rejected`), no
                weight and no state of the optimizer changes. DeepSpeed does not ask where it knows of infinity or NaN.
        """
        self._accept, self._accepted = accept, None
        for number, batch in enumerate(batches, start=1):
            observe(self._micro_step(batch, last=number == len(batches)))
        if self._sums is not None:
            self._sums.give()
        before_step()
        return self._optimizer_step(lr_factor)

    def _micro_step(self, batch: Batch, *, last: bool) -> ModelOutput:
        self._engine.set_gradient_accumulation_boundary(last)
        output: ModelOutput = self._engine(*batch)
        self._engine.backward(output.loss)
        if self._sums is not None:
            self._sums.take()
        return output

    def _optimizer_step(self, lr_factor: float) -> float:
        set_lr(self.optimizer, lr_factor)
        self._engine.step()
        return self._stepped()

    def _stepped(self) -> float:
        """What is left to do after a step. Returns its norm."""
        if self._accepted is None:
            forget_gradients(self._engine.optimizer)
        return self._norm()

    @property
    def rejected(self) -> bool:
        """Whether the last step changed nothing."""
        return not self._accepted  # None: DeepSpeed left before it came to the optimizer

    def _norm(self) -> float:
        """The gradient norm of the last step."""
        norm = self._clipped_norm if self.config.parallel.zero_stage == 0 else self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def evaluate(self, batch: Batch, *, each: bool = False) -> ModelOutput:
        """Forward pass only, inside `evaluating`; `each`: score every label by itself."""
        output: ModelOutput = self._engine(*batch, each=each)
        return output

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """Pass (name, value, step) to DeepSpeed's monitors, on rank 0 and where one is enabled."""
        if self._monitor.enabled and self.groups.rank == 0:
            self._monitor.write_events(events)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of this rank in full precision, gathered over ZeRO shards one at a time.

        Collective: all ranks iterate to the end. Experts come as this rank's stack [L, ...]. The tensors of ZeRO-0 and
        fp32 are views of the live weights, so copy what is kept.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.model.named_parameters():
            if self.config.parallel.zero_stage == 0:
                yield name, parameter.detach()
            elif parameter.requires_grad:
                yield name, safe_get_full_fp32_param(parameter)
            else:
                yield name, self._frozen_weight(parameter)

    def _frozen_weight(self, parameter: nn.Parameter) -> Tensor:
        """A frozen parameter has no fp32 master, so DeepSpeed's functions do not find it."""
        import deepspeed

        if self.config.parallel.zero_stage < 3:
            return parameter.detach().float()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()

    def full_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The averaged gradient of every parameter that is trained, in `before_step` of `train`, as `full_weights`."""
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.config.parallel.zero_stage == 0:
                assert parameter.grad is not None
                yield name, parameter.grad
            else:
                yield name, safe_get_full_grad(parameter)

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's optimizer around ours, which it is itself at ZeRO-0."""
        return self._engine.optimizer

    def is_copy(self, parameter: nn.Parameter) -> bool:
        """Whether another stage of the pipeline holds the same under the same name, as the original."""
        return False

    @torch.no_grad()
    def masters_changed(self) -> None:
        """Take over master weights of ZeRO-3 that somebody wrote: weights follow from them. Collective."""
        if self.config.parallel.zero_stage < 3:
            return
        zero = self.zero_optimizer
        for weights, masters in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
            weights.copy_(masters)
        kept = zero.persistent_parameters  # small ones, which stay together between steps
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def close(self) -> None:
        """Release what DeepSpeed holds."""
        self._engine.destroy()

    def _if_accepted(self, step: Callable[[], Any]) -> Callable[[], None]:
        """The optimizer's `step`, and nothing in place of one that is not accepted.

        DeepSpeed knows the norm by then, and calls it for each group of parameters in places. What it does around it
        gives the weights that were there: they follow from the masters, which stay.
        """

        def judged() -> None:
            if self._accepted is None:
                self._accepted = self._accept(self._norm_in_step())
                if self._accepted:
                    self._move_momentum()
            if self._accepted:
                step()

        return judged

    def _norm_in_step(self) -> float:
        if self.config.parallel.zero_stage > 0:
            return float(self._engine.optimizer._global_grad_norm)
        self._clip()
        return self._norm()

    def _clip(self) -> None:
        # DeepSpeed's ZeRO-0 clips by a norm that does not add up the experts of other ranks; its clipping is off there
        # (config/deepspeed) and ours runs right before the optimizer's step.
        self._clipped_norm = clip_gradients(
            self._engine.module.parameters(), self.config.training.gradient_clipping, self.groups
        )

    def _exact_sums(self, model: Decoder) -> GradientSums | None:
        if not self.config.training.rank_invariant:
            return None
        self._engine.enable_backward_allreduce = False
        return GradientSums(model.parameters(), self.groups)

    def _check_moe_seen(self, model: nn.Module) -> None:
        has_experts = any(is_expert(parameter) for parameter in model.parameters())
        if has_experts and not self._engine.has_moe_layers:
            raise ConfigError(
                "The model has experts, but the DeepSpeed engine did not recognise any MoE layer.",
                got=f"deepspeed {importlib.metadata.version('deepspeed')} with has_moe_layers = False",
                expected="an engine that reduces expert gradients over the expert-data-parallel group",
                todo="install the deepspeed version of docker/constraints.txt; training on would average all experts",
            )


def _build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    settings = config.training.optimizer
    groups = parameter_groups(model, settings)
    if settings.type == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    if not torch.cuda.is_available():
        # Its updates are marked for torch.compile, which on a CPU takes longer (40 s a rank) than many steps save.
        torch.compiler.set_stance("force_eager")
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(groups)
    return optimizer
