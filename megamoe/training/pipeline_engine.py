"""The adapter to DeepSpeed's pipeline engine: the engine of a run whose blocks are spread over stages.

Only hidden states travel between stages, [B, S, D] of the rank's positions; every stage reads the same batches. A
stage runs its forward passes in the order of the micro-batches, so it takes the next one each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megamoe.common.errors import ConfigError
from megamoe.config import derive
from megamoe.config.run import RunConfig
from megamoe.data.batch import Batch
from megamoe.model.decoder import ModelOutput, Scores, own_positions
from megamoe.model.pipeline import DecoderStage
from megamoe.moe.layer import MoELayer
from megamoe.moe.routers.base import Router
from megamoe.parallel import collectives
from megamoe.parallel.groups import Groups, ProcessGroup
from megamoe.training.engine import Engine
from megamoe.training.optimizer import parameter_groups, set_lr

# isort: split
# After ours, which says what accelerator DeepSpeed is to take before its first import.
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.schedule import OptimizerStep, ReduceTiedGrads
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

Observe = Callable[[ModelOutput], None]


class PipelineEngine(Engine):
    """As :class:`Engine`, for a stage of the model. All methods are collective over all stages.

    Args:
        config: the run.
        stage: this rank's stage in fp32, already initialised.
        groups: the process groups of the run.

    Raises:
        ConfigError: the stages do not all train the same kinds of parameters. On every rank.
    """

    def __init__(self, config: RunConfig, stage: DecoderStage, groups: Groups) -> None:
        _check_kinds(stage, config, groups)
        self._stage, self._before_step = stage, _nothing
        self._pipe = _Pipe(stage, groups, 1.0 / derive.accumulation_steps(config, groups.topology.world_size))
        self._shape: torch.Size | None = None
        super().__init__(config, self._pipe, groups)
        own = {ReduceTiedGrads: _add_up_copies, OptimizerStep: self._step}
        self._engine._INSTRUCTION_MAP = {**self._engine._INSTRUCTION_MAP, **own}

    @property
    def model(self) -> DecoderStage:  # type: ignore[override]
        """This rank's stage."""
        return self._stage

    def routers(self) -> dict[int, Router]:
        """The routers of this stage's blocks, by the block's number in the whole model."""
        blocks = self._stage.numbered_blocks().items()
        return {number: block.ffn.router for number, block in blocks if isinstance(block.ffn, MoELayer)}

    def train(
        self,
        batches: Sequence[Batch],
        lr_factor: float,
        observe: Observe,
        before_step: Callable[[], None] = lambda: None,
        accept: Callable[[float], bool] = math.isfinite,
    ) -> float:
        """As in :class:`Engine`. `observe` gets this stage's part of each micro-batch's output, in their order."""
        if len(batches) != self._engine.micro_batches or len({batch.tokens_BS.shape for batch in batches}) > 1:
            raise ValueError(f"the pipeline takes {self._engine.micro_batches} micro-batches of one shape per step")
        set_lr(self.optimizer, lr_factor)
        self._before_step = before_step
        self._accept, self._accepted = accept, None
        self._engine.train_batch(self._feed(batches, observe))
        return self._stepped()

    def evaluate(self, batch: Batch, *, each: bool = False) -> ModelOutput:
        """As in :class:`Engine`: this stage's part of the output, but the scores on every stage."""
        outputs: list[ModelOutput] = []
        data = self._feed([batch], outputs.append, each)
        self._engine.eval_batch(data, reduce_output=None, bcast_loss=False, num_micro_batches=1)
        (output,) = outputs
        return output._replace(scores=self._from_last(output.scores, batch)) if each else output

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """As in :class:`Engine`, of this stage; a tied embedding on the first stage only."""
        return self._once(super().full_weights())

    def full_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """As in :class:`Engine`, of this stage; a tied embedding on the first stage only."""
        return self._once(super().full_gradients())

    def is_copy(self, parameter: nn.Parameter) -> bool:
        """As in :class:`Engine`: of a tied embedding, the first stage has the original."""
        return _is_copy(self._stage, parameter)

    def _once(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if not self.is_copy(self.parameter(name)):
                yield name, tensor

    def _feed(self, batches: Sequence[Batch], observe: Observe, each: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the stage what it takes per forward pass; the first and last stage's engines also ask for (inputs,
        labels), which nobody looks at."""
        shape = batches[0].tokens_BS.shape
        if shape != self._shape:  # the same on every stage; the engine keeps buffers of the first shape it saw
            self._engine.reset_activation_shape()
            self._shape = shape
        self._pipe.take(batches, observe, each)
        return iter([(batch.tokens_BS, batch.labels_BS) for batch in batches])

    def _step(self, engine: Any, **arguments: Any) -> None:
        """The last instruction of an optimizer step, when gradients are reduced."""
        self._before_step()
        engine._exec_optimizer_step(**arguments)

    def _from_last(self, scores: Scores | None, batch: Batch) -> Scores:
        """The last stage's scores, on every stage."""
        if scores is None:  # every stage but the last
            labels_BS = own_positions(batch.labels_BS, self._stage.place.cp)
            parts = labels_BS.new_zeros(3, *labels_BS.shape, dtype=torch.float64)
        else:
            parts = torch.stack([part.double() for part in scores])
        losses, right, counted = collectives.all_reduce_sum(parts, self.groups.pp.handle)
        dtype = torch.float64 if self.config.training.precision == "fp64" else torch.float32
        return Scores(losses.to(dtype), right.bool(), counted.bool())

    def _check_moe_seen(self, model: nn.Module) -> None:
        collectives.together(lambda: super(PipelineEngine, self)._check_moe_seen(model))


class _Pipe(PipelineModule):
    """A stage as DeepSpeed's pipeline engine wants it: one layer, built by us."""

    def __init__(self, stage: DecoderStage, groups: Groups, loss_share: float) -> None:
        # Not the parent's: it builds layers out of specifications, makes process groups that we have already, with
        # time limits of their own, and prints.
        nn.Module.__init__(self)
        self.stage, self.loss_share = stage, loss_share
        self._grid = _Grid(groups)
        self._topo, self.global_rank = self._grid.topology(), groups.rank
        self.num_stages, self.stage_id = groups.pp.size, groups.pp.place
        numbers = list(stage.numbered_blocks())
        self._local_start, self._local_stop = numbers[0], numbers[-1] + 1
        self.forward_funcs, self.loss_fn, self.dynamic_shape = [stage], None, False
        self.activation_checkpoint_interval, self.activation_checkpoint_func = 0, None
        self.tied_comms: dict[str, dict[str, Any]] = {}
        self.tied_group = groups.ends.handle
        for parameter in stage.parameters():
            # Counted once in the norm.
            parameter.ds_pipe_replicated = _is_copy(stage, parameter)  # type: ignore[attr-defined]
        self._batches: Iterator[Batch] = iter(())
        self._observe: Observe = _nothing
        self._each = False

    def take(self, batches: Sequence[Batch], observe: Observe, each: bool) -> None:
        """What the next forward passes are of, one after the other."""
        self._batches, self._observe, self._each = iter(batches), observe, each

    def forward(self, inputs: Tensor) -> Tensor:
        """What the next stage gets, or the loss; called by the engine once per micro-batch."""
        hidden_BSD = None if self.stage.first else inputs
        result, output = self.stage(hidden_BSD, next(self._batches), self.loss_share, self._each)
        self._observe(output)
        return result

    def get_tied_weights_and_groups(self) -> list[tuple[Tensor, ProcessGroup]]:
        """Of which the engine adds up the gradients."""
        embedding = self.stage.embedding
        if not self.stage.tied or embedding is None or not embedding.weight.requires_grad:
            return []
        return [(embedding.weight, self.tied_group)]

    def _synchronize_tied_weights(self) -> None:
        """Nothing: both copies start equal and are stepped alike."""


class _Grid(PipelineParallelGrid):
    """Our groups under DeepSpeed's names. `data`: ranks with the same dense weights, `model`: tp."""

    def __init__(self, groups: Groups) -> None:
        # Not the parent's, which makes the same groups again.
        self.global_rank, self.world_size = groups.rank, groups.topology.world_size
        self._topo = PipeModelDataParallelTopology(groups.pp.size, groups.tp.size, groups.replica.size)
        self.data_parallel_size, self.data_parallel_id = groups.replica.size, groups.replica.place
        self.dp_group, self.dp_proc_group = list(groups.replica.ranks), groups.replica.handle
        self.pipe_parallel_size, self.stage_id = groups.pp.size, groups.pp.place
        self.pp_group, self.pp_proc_group = list(groups.pp.ranks), groups.pp.handle
        self.is_first_stage, self.is_last_stage = self.stage_id == 0, self.stage_id == self.pipe_parallel_size - 1
        self.model_parallel_size = self.slice_parallel_size = groups.tp.size
        self.slice_group, self.slice_proc_group = list(groups.tp.ranks), groups.tp.handle
        self.ds_model_rank, self.ds_model_world_size = groups.model.place, groups.model.size
        self.ds_model_proc_group = groups.model.handle


def _nothing(*_: Any) -> None:
    pass


def _add_up_copies(engine: Any) -> None:
    """Sum the gradients of a tied embedding over its stages.

    DeepSpeed's own instruction passes over gradients that its ZeRO accumulates in another dtype beside `grad`.
    """
    gradient_of = getattr(engine.optimizer, "get_param_gradient_attribute", None)
    if gradient_of is None:
        engine._exec_reduce_tied_grads()
        return
    for weight, group in engine.module.get_tied_weights_and_groups():
        collectives.all_reduce_sum(gradient_of(weight), group)


def _is_copy(stage: DecoderStage, parameter: nn.Parameter) -> bool:
    """Whether the parameter is the tied embedding on the last stage, of which the first has the original."""
    return stage.tied and stage.last and stage.embedding is not None and parameter is stage.embedding.weight


def _check_kinds(stage: DecoderStage, config: RunConfig, groups: Groups) -> None:
    """DeepSpeed adds up norms over stages once per parameter group, and waits for ever where one has fewer."""
    kinds = sorted(_kind(group) for group in parameter_groups(stage, config.training.optimizer))
    stages = collectives.gather_objects(kinds, groups.pp.handle)
    if all(other == kinds for other in stages):
        return
    found = (f"stage {number}: {', '.join(found) or 'none'}" for number, found in enumerate(stages))
    raise ConfigError(
        "The stages of the pipeline do not train the same kinds of parameters.",
        got="; ".join(found),
        expected="the same on every stage",
        todo="change parallel.pp, or training.trainable and training.frozen such that every stage trains each kind",
    )


def _kind(group: dict[str, Any]) -> str:
    where = "experts" if group.get("moe") else "dense"
    shape = "matrices" if group["params"][0].dim() > 1 else "vectors"
    return f"{where} {shape}{' by Muon' if group.get('use_muon') else ''}"
