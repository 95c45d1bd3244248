"""Where this rank keeps weights, master weights and the optimizer's state, as parts of the whole model.

DeepSpeed's ZeRO keeps them flat, many parameters one after the other, cut wherever a rank's share ends. What it
holds of one parameter is a range of it, here called a fragment; a checkpoint holds it as the rectangles of which the
range consists (`checkpoint/boxes.py`). Nothing travels between ranks for it, to save or to load. Ours; that flat
ranges make few rectangles is also what ByteCheckpoint (arXiv 2407.20143, section 3.2) builds on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megamoe.common.errors import CheckpointError
from megamoe.moe.marker import is_expert
from megamoe.parallel import collectives
from megamoe.parallel.axis import axis_of
from megamoe.parallel.groups import Groups, RankGroup
from megamoe.parallel.shards import place_of, shards_of
from megamoe.training.checkpoint.boxes import Box, boxes_of_range
from megamoe.training.checkpoint.pieces import STATISTIC, WEIGHT, Piece, tensor_name
from megamoe.training.checkpoint.reader import Reader
from megamoe.training.checkpoint.weights import running_statistics
from megamoe.training.engine import Engine

MOMENTUM = "momentum_buffer"
"""Muon's, by its name for it."""


@dataclass(frozen=True)
class Fragment:
    """What this rank holds of one parameter.

    Attributes:
        name: of the parameter, the same on every layout.
        start: place of the first element in this rank's part of the parameter, counted flat.
        values: by kind, each flat and of the same length: views of the live tensors.
        written: whether this rank is the one to write it, among those that hold the same.
    """

    name: str
    parameter: nn.Parameter
    start: int
    values: Mapping[str, Tensor]
    written: bool


def fragments(engine: Engine) -> Iterator[Fragment]:
    """Everything that this rank holds, in the order of the parameters. Optimizer state is left out as long as there
    is none, which is before the first step."""
    stage, groups = engine.config.parallel.zero_stage, engine.groups
    flats = _Flats(engine)
    for number, (name, parameter) in enumerate(engine.model.named_parameters()):
        if engine.is_copy(parameter):
            holders, once = groups.replica, False
        else:
            holders, once = _holders(parameter, groups), _first_of_the_rest(parameter, groups)
        if stage == 3:
            found = _of_stage_3(parameter, flats, holders)
        elif stage == 0 or not parameter.requires_grad:
            # Whole on all of them, so the parameters are written by turns.
            once = once and number % holders.size == holders.place
            found = 0, _of_plain(parameter, flats)
        else:
            found = _of_stage_1_or_2(parameter, flats)
        start, values = found
        if values:
            yield Fragment(name, parameter, start, values, once)
    yield from _momenta(engine, flats)


def pieces(engine: Engine, found: Iterable[Fragment]) -> Iterator[Piece]:
    """The rectangles that fragments consist of, as views of the live tensors."""
    for fragment in found:
        whole, offsets = _place(fragment.parameter, engine.groups)
        shape = _local_shape(fragment.parameter)
        for kind, flat in fragment.values.items():
            for box, position in boxes_of_range(shape, fragment.start, fragment.start + len(flat)):
                value = flat.narrow(0, position, box.volume).view(box.shape)
                yield Piece(tensor_name(kind, fragment.name), whole, box.shifted(offsets), value)


def pieces_to_write(engine: Engine) -> Iterator[Piece]:
    """What this rank writes of a checkpoint; all ranks together write everything once."""
    yield from pieces(engine, (fragment for fragment in fragments(engine) if fragment.written))
    if engine.groups.stage.place == 0:
        for name, buffer in running_statistics(engine.model).items():
            box = Box.of(buffer.shape)
            yield Piece(tensor_name(STATISTIC, name), box.shape, box, buffer)


@torch.no_grad()
def restore(engine: Engine, reader: Reader, updates: int, tick: Callable[[], None] = lambda: None) -> None:
    """Fill everything that this rank holds from a checkpoint of any layout. Collective.

    Args:
        updates: steps that the optimizer had done.
        tick: told as long as any rank gets on.

    Raises:
        CheckpointError: a tensor is missing or damaged. On every rank.
    """

    def read(progress: Callable[[], None]) -> None:
        if updates:
            _check_states(reader)
            _make_states(engine, updates, reader)
        if engine.config.parallel.zero_stage < 3:  # there they follow from the masters
            for name, parameter in engine.model.named_parameters():
                parameter.copy_(reader.read(tensor_name(WEIGHT, name), _whole_box(parameter, engine.groups)))
                progress()
        for piece in pieces(engine, fragments(engine)):
            reader.read_into(piece.tensor, piece.box, piece.value)
            progress()
        for name, buffer in running_statistics(engine.model).items():
            reader.read_into(tensor_name(STATISTIC, name), Box.of(buffer.shape), buffer)

    collectives.together_at_length(read, tick)
    engine.masters_changed()


def _check_states(reader: Reader) -> None:
    if not any(reader.names(kind) for kind in ("exp_avg", MOMENTUM)):
        raise CheckpointError(
            f"checkpoint {reader.folder} was written without the optimizer's state",
            got="weights alone",
            expected="a checkpoint that training wrote",
            todo="go on from the original, or fine-tune from this one (finetune.checkpoint)",
        )


def _make_states(engine: Engine, updates: int, reader: Reader) -> None:
    """Give the optimizer the state that it would make in its first step, of zeros, to be filled."""
    optimizer, flats = _base_optimizer(engine), _Flats(engine)
    # The optimizer's own groups are empty under ZeRO-3, but in a step.
    of_stage_3 = [{"params": flats.tensors}]
    for group in of_stage_3 if engine.config.parallel.zero_stage == 3 else optimizer.param_groups:
        for tensor in group["params"]:
            _make_state(optimizer, group, tensor, updates, flats.whole_momenta)
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    for flat, parameters in flats.muon_groups():
        size = sum(parameter.numel() for parameter in parameters)
        # It has the dtype that gradients had.
        dtype = reader.dtype(tensor_name(MOMENTUM, names[id(parameters[0])]))
        optimizer.state[flat].setdefault(MOMENTUM, torch.zeros(size, dtype=dtype, device=flat.device))


def _make_state(optimizer: Any, group: Mapping[str, Any], tensor: Tensor, updates: int, whole_momenta: bool) -> None:
    if group.get("use_muon"):
        if not whole_momenta:
            optimizer.state[tensor].setdefault(MOMENTUM, torch.zeros_like(tensor))
        return
    state = optimizer.state[tensor]
    for name in ("exp_avg", "exp_avg_sq"):
        state.setdefault(name, torch.zeros_like(tensor))
    # As torch's AdamW counts; Muon's has a plain number.
    state["step"] = updates if "use_muon" in group else torch.tensor(float(updates), dtype=torch.float32)


class _Flats:
    """The flat tensors of DeepSpeed's optimizer: their masters, by its numbers for them, and their state."""

    def __init__(self, engine: Engine) -> None:
        stage, zero = engine.config.parallel.zero_stage, engine.zero_optimizer
        self.zero, self.state = zero, _base_optimizer(engine).state
        # Not where the optimizer is offloaded, nor in bf16 at ZeRO-1: there momenta lie as the masters do.
        self.whole_momenta = hasattr(zero, "params_in_partition") and not getattr(zero, "cpu_offload", False)
        self.tensors: list[Tensor] = []
        if stage == 3:
            self.tensors = zero.fp32_partitioned_groups_flat
        elif stage > 0:
            own = getattr(zero, "single_partition_of_fp32_groups", None)
            self.tensors = zero.fp32_groups_flat_partition if own is None else own

    def values(self, index: int, start: int, numel: int) -> dict[str, Tensor]:
        """What lies at `start` ... of a flat tensor and of all state that lies alike."""
        flat = self.tensors[index]
        found = {WEIGHT: flat, **self.state.get(flat, {})}
        alike = {kind for kind, value in found.items() if isinstance(value, Tensor) and value.shape == flat.shape}
        if self.whole_momenta:
            alike.discard(MOMENTUM)  # see `muon_groups`
        return {kind: value.detach().narrow(0, start, numel) for kind, value in found.items() if kind in alike}

    def muon_groups(self) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
        """(flat tensor, parameters of which this rank has a part) of what ZeRO-1 and -2 train with Muon: there every
        rank keeps the whole momentum of a matrix of which it has a part, one after the other."""
        of_tensors = self.zero.params_in_partition if self.whole_momenta else ()
        for flat, parameters in zip(self.tensors, of_tensors, strict=False):
            if parameters and getattr(parameters[0], "use_muon", False):
                yield flat, parameters


def _of_plain(parameter: nn.Parameter, flats: _Flats) -> dict[str, Tensor]:
    """The parameter itself, with the optimizer's state where it trains the parameter as it is."""
    state = flats.state.get(parameter, {})
    alike = {kind: value for kind, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}
    return {kind: value.detach().view(-1) for kind, value in {WEIGHT: parameter, **alike}.items()}


def _of_stage_1_or_2(parameter: nn.Parameter, flats: _Flats) -> tuple[int, dict[str, Tensor]]:
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:  # all of it is on other ranks
        return 0, {}
    own, place = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
    return int(own.start), flats.values(mapping.param_group_index, int(place.start), int(place.numel))


def _of_stage_3(parameter: nn.Parameter, flats: _Flats, holders: RankGroup) -> tuple[int, dict[str, Tensor]]:
    share = parameter.partition_numel()  # type: ignore[attr-defined]
    start = share * holders.place
    numel = min(share, parameter.ds_numel - start)  # type: ignore[attr-defined]
    if numel <= 0:  # the last ranks have nothing but padding of a small parameter
        return 0, {}
    if not parameter.requires_grad:
        return start, {WEIGHT: parameter.ds_tensor.detach().narrow(0, 0, numel)}  # type: ignore[attr-defined]
    index, place, _ = flats.zero.grad_position[flats.zero.get_param_id(parameter)]
    return start, flats.values(index, place, numel)


def _momenta(engine: Engine, flats: _Flats) -> Iterator[Fragment]:
    """Muon's momenta under ZeRO-1 and -2, of whole matrices; the rank that holds a matrix's beginning writes it."""
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    for flat, parameters in flats.muon_groups():
        momentum, place = flats.state.get(flat, {}).get(MOMENTUM), 0
        if momentum is None:
            continue
        for parameter in parameters:
            begins = parameter._hp_mapping.lp_fragment_address.start == 0  # type: ignore[attr-defined]
            value = momentum.narrow(0, place, parameter.numel())
            yield Fragment(names[id(parameter)], parameter, 0, {MOMENTUM: value}, begins)
            place += parameter.numel()


def _holders(parameter: nn.Parameter, groups: Groups) -> RankGroup:
    """The ranks among which ZeRO spreads the parameter: those that have the same part of it."""
    return groups.edp if is_expert(parameter) else groups.replica


def _first_of_the_rest(parameter: nn.Parameter, groups: Groups) -> bool:
    """Whether no rank before this one holds the same beside the holders: what is not cut over an axis is there on
    every rank of it."""
    axes = ("ep", "etp") if is_expert(parameter) else ("tp",)
    cut = {shard.axis for shard in shards_of(parameter)}
    return all(getattr(groups, axis).place == 0 for axis in axes if axis not in cut)


def _local_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of this rank's part; ZeRO-3 leaves none on the parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _place(parameter: nn.Parameter, groups: Groups) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of the whole, and where this rank's part begins in it."""
    axes = {axis: axis_of(getattr(groups, axis)) for axis in ("tp", "ep", "etp")}
    return place_of(parameter, _local_shape(parameter), axes)


def _whole_box(parameter: nn.Parameter, groups: Groups) -> Box:
    """The rectangle of the whole that this rank computes with."""
    return Box(_place(parameter, groups)[1], _local_shape(parameter))


def _base_optimizer(engine: Engine) -> Any:
    """torch's optimizer, inside of DeepSpeed's if there is one."""
    return engine.optimizer if engine.config.parallel.zero_stage == 0 else engine.zero_optimizer.optimizer
