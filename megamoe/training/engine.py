"""The adapter to DeepSpeed's engine.

Several settings that look harmless elsewhere train wrong numbers there without a message: `workarounds` has what is
done about each, for the versions that it names; others are refused.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
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
from megamoe.training.checkpoint.by_rank import by_rank, load_states, save_states
from megamoe.training.grad_norm import clip_gradients
from megamoe.training.optimizer import parameter_groups, set_lr
from megamoe.training.workarounds import (
    attributes,
    check_version,
    failing_at_the_end,
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
        if config.parallel.zero_stage == 0:
            self.optimizer.register_step_pre_hook(self._clip)
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
    ) -> float:
        """One optimizer step. Returns the global gradient norm before clipping.

        With Muon under ZeRO it is the norm after orthogonalisation, the only one that DeepSpeed computes.

        Args:
            batches: this rank's micro-batches, as many on every rank.
            lr_factor: share of the peak learning rate.
            observe: gets what each micro-batch gave, without its graph being kept.
            before_step: called once the gradients are complete (`full_gradients`), before they are clipped.
        """
        for number, batch in enumerate(batches, start=1):
            observe(self._micro_step(batch, last=number == len(batches)))
        before_step()
        return self._optimizer_step(lr_factor)

    def _micro_step(self, batch: Batch, *, last: bool) -> ModelOutput:
        self._engine.set_gradient_accumulation_boundary(last)
        output: ModelOutput = self._engine(*batch)
        self._engine.backward(output.loss)
        return output

    def _optimizer_step(self, lr_factor: float) -> float:
        set_lr(self.optimizer, lr_factor)
        self._engine.step()
        return self._norm()

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

    def save(self, folder: Path, tag: str) -> None:
        """Write weights and optimizer state for the same layout: DeepSpeed's checkpoint where that holds everything.
        Collective.

        Raises:
            OSError, RuntimeError: this rank could not write. Raised after the last collective, so no other one waits.
        """
        if by_rank(self.groups):
            save_states(folder / tag, self._engine, self.model, self.groups, self.config.parallel.zero_stage)
            return
        with failing_at_the_end(self._engine), self._frozen_parts():
            self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Read what `save` wrote. Collective.

        Raises:
            OSError, RuntimeError, KeyError: there is none, or one of something else.
        """
        if by_rank(self.groups):
            with contextlib.redirect_stdout(None):  # DeepSpeed prints which function it is in, on every rank
                load_states(folder / tag, self._engine, self.model, self.groups, self.config.parallel.zero_stage)
            return
        with self._frozen_parts(), contextlib.redirect_stdout(None):
            path, _ = self._engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
        if path is None:
            raise FileNotFoundError(f"DeepSpeed finds no checkpoint {tag} in {folder}")

    @contextlib.contextmanager
    def _frozen_parts(self) -> Iterator[None]:
        """Let DeepSpeed's checkpoints hold frozen parameters of every rank, while it writes or reads one."""
        stage = self.config.parallel.zero_stage
        values: dict[str, Any] = {}
        if stage == 2:
            # Frozen parameters are among the weights already. Rank 0 would write its own a second time, and all ranks
            # read these last: every rank would go on with the experts of rank 0.
            values["_get_zero_frozen_param_attributes"] = lambda attribute: None
        if stage == 3 and any(is_expert(p) and not p.requires_grad for p in self.model.parameters()):
            # The format for MoE layers refuses frozen experts; the ordinary one keeps every rank's part of them.
            values["has_moe_layers"] = False
        with attributes(self._engine, values):
            yield

    def close(self) -> None:
        """Release what DeepSpeed holds."""
        self._engine.destroy()

    def _clip(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # DeepSpeed's ZeRO-0 clips by a norm that does not add up the experts of other ranks; its clipping is off there
        # (config/deepspeed) and ours runs right before the optimizer's step.
        self._clipped_norm = clip_gradients(
            self._engine.module.parameters(), self.config.training.gradient_clipping, self.groups
        )

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
