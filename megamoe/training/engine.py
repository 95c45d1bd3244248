"""The adapter to DeepSpeed's engine, and the one place that knows its ways.

Written against the versions in `SUPPORTED` and refused on others: several settings that look harmless elsewhere train
wrong numbers there without a message, and each line below that works around one says which.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
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
from megamoe.moe.marker import group_name, is_expert
from megamoe.parallel.groups import Groups
from megamoe.training.grad_norm import clip_gradients
from megamoe.training.optimizer import parameter_groups, set_lr

SUPPORTED = ("0.19.8", "0.20")
"""First version that is supported, and first that is not."""


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
        _prepare_deepspeed()
        register_expert_groups(groups)
        if config.training.precision == "fp64":
            model.double()
        self.config, self.groups = config, groups
        self.optimizer = _build_optimizer(model, config)
        self._clipped_norm: Tensor | None = None
        if config.parallel.zero_stage == 0:
            self.optimizer.register_step_pre_hook(self._clip)
        with _no_expert_group_asked_of_zero(model):
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.optimizer,
                config=deepspeed_config(config, groups.topology.world_size),
                dist_init_required=False,
            )
        if config.training.precision == "fp64":
            _reduce_in_fp64(self._engine)
        _norm_of_experts_alone(self._engine.optimizer)
        # The engine writes curves of its own over samples; Weights & Biases then refuses ours, which are over steps.
        self._monitor, self._engine.monitor = self._engine.monitor, SimpleNamespace(enabled=False)
        self._check_moe_seen(model)

    @property
    def model(self) -> Decoder:
        """The model inside. Under ZeRO-3 its parameters are empty outside of a forward or backward pass."""
        module: Decoder = self._engine.module
        return module

    def micro_step(self, batch: Batch, *, last: bool) -> ModelOutput:
        """Forward and backward pass of one micro-batch; gradients are averaged over micro-batches and ranks.

        Args:
            last: whether it is the last of its optimizer step; the gradients are then reduced.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        output: ModelOutput = self._engine(*batch)
        self._engine.backward(output.loss)
        return output

    def optimizer_step(self, lr_factor: float) -> float:
        """Clip, step, clear the gradients. Returns the global gradient norm before clipping.

        With Muon under ZeRO it is the norm after orthogonalisation, the only one that DeepSpeed computes.
        """
        set_lr(self.optimizer, lr_factor)
        self._engine.step()
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
        """The averaged gradient of every parameter that is trained, between the last `micro_step` and
        `optimizer_step`, as `full_weights`."""
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
        """Write DeepSpeed's checkpoint, weights and optimizer state, for the same layout. Collective.

        Raises:
            OSError, RuntimeError: this rank could not write. Raised after the last collective, so no other one waits.
        """
        with _failing_at_the_end(self._engine), self._frozen_parts():
            self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Read what `save` wrote. Collective.

        Raises:
            FileNotFoundError: DeepSpeed found no checkpoint there.
        """
        with self._frozen_parts():
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
        with _attributes(self._engine, values):
            yield

    def close(self) -> None:
        """Release what DeepSpeed holds."""
        self._engine.destroy()

    def _clip(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # DeepSpeed's ZeRO-0 clips every rank by the norm of its own experts, so replicas drift apart; its clipping is
        # off there (config/deepspeed) and ours runs right before the optimizer's step.
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


@contextlib.contextmanager
def _failing_at_the_end(engine: Any) -> Iterator[None]:
    """Let DeepSpeed go through all of a save's collectives although a file could not be written; then raise."""
    writer = engine.checkpoint_engine
    failures: list[Exception] = []

    def kept(write: Callable[..., Any]) -> Callable[..., None]:
        def attempt(*args: Any, **kwargs: Any) -> None:
            try:
                if not failures:
                    write(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                failures.append(error)

        return attempt

    # Its scripts that gather ZeRO shards are left out: a checkpoint has the gathered weights beside them.
    replaced = {"save": kept(writer.save), "makedirs": kept(writer.makedirs)}
    with _attributes(writer, replaced), _attributes(engine, {"_copy_recovery_script": lambda folder: None}):
        yield
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _no_expert_group_asked_of_zero(model: nn.Module) -> Iterator[None]:
    """Let ZeRO-1 and -2 start where no expert is trained: for MoE layers they insist on a group of expert parameters.

    The engine itself goes on to know the layers; otherwise it would save the experts of rank 0 only.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def without_experts(optimizer: Any) -> None:
        optimizer.has_moe_layers = False

    none_trained = not any(is_expert(p) and p.requires_grad for p in model.parameters())
    values = {"_configure_moe_settings": without_experts} if none_trained else {}
    with _attributes(BF16_Optimizer, values), _attributes(DeepSpeedZeroOptimizer, values):
        yield


def _norm_of_experts_alone(optimizer: Any) -> None:
    """The optimizer of bf16 at ZeRO-1 fails to add up the norm of an empty list where only experts are trained."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if not isinstance(optimizer, BF16_Optimizer):
        return
    original = optimizer.get_grads_for_norm

    def with_a_zero(for_clipping: bool = False) -> Any:
        gradients = original(for_clipping)
        if for_clipping or gradients[0]:
            return gradients
        return [torch.zeros(1, device=optimizer.fp32_groups_gradients_flat[0].device)], gradients[1]

    optimizer.get_grads_for_norm = with_a_zero


@contextlib.contextmanager
def _attributes(target: Any, values: dict[str, Any]) -> Iterator[None]:
    """Lay `values` over the attributes of an object or class for the duration."""
    own = {name: vars(target)[name] for name in values if name in vars(target)}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name in values:
            delattr(target, name)
        for name, value in own.items():
            setattr(target, name, value)


def check_version(installed: str) -> None:
    """Refuse versions of DeepSpeed that the adapter was not written for."""
    from packaging.version import Version

    first, beyond = (Version(text) for text in SUPPORTED)
    if not first <= Version(installed) < beyond:
        raise ConfigError(
            "This version of DeepSpeed is not supported.",
            got=f"deepspeed {installed}",
            expected=f"at least {first} and below {beyond}",
            todo="install the version of docker/constraints.txt",
        )


def register_expert_groups(groups: Groups) -> None:
    """Give DeepSpeed our expert groups under its name for them, before it makes its own with other ranks."""
    from deepspeed.utils import groups as registry

    name = group_name(groups.ep.size)
    registry._EXPERT_PARALLEL_GROUP[name] = groups.ep.handle
    registry._EXPERT_PARALLEL_GROUP_RANKS[name] = list(groups.ep.ranks)
    registry._EXPERT_DATA_PARALLEL_GROUP[name] = groups.edp.handle
    registry._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(groups.edp.ranks)


def _prepare_deepspeed() -> None:
    import deepspeed.ops

    # Compiled with the first process group (22 s), used by inference only; a process killed meanwhile leaves a lock
    # behind that makes every later start wait for ever without a message.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _reduce_in_fp64(engine: Any) -> None:
    """DeepSpeed would refuse fp64 gradients, which its accelerators do not list, and reduce them in fp32."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    listed = accelerator.supported_dtypes()
    if torch.float64 not in listed:  # listed twice, they would be reduced twice
        accelerator.supported_dtypes = lambda: [*listed, torch.float64]
    engine.communication_data_type = torch.float64


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
