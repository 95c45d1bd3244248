"""Linear layers of which this rank holds a part."""

from __future__ import annotations

from torch import Tensor, nn

from megamoe.common.errors import TopologyError
from megamoe.parallel.axis import Axis
from megamoe.parallel.shards import Shard, mark


class ColumnParallelLinear(nn.Linear):
    """y = x W^T without bias, outputs cut over ranks: weight [out/P, in].

    x [..., in] is whole and equal on all ranks, y [..., out/P] holds this rank's features. The gradient of x is this
    rank's partial sum; the `gather_sequence` that x came from adds the ranks' up.
    """

    def __init__(self, in_features: int, out_features: int, tp: Axis) -> None:
        super().__init__(in_features, share(out_features, tp, f"{out_features} output features"), bias=False)
        mark_part(self.weight, 0, tp)


class RowParallelLinear(nn.Linear):
    """y = x W^T without bias, inputs cut over ranks: weight [out, in/P].

    x [..., in/P] holds this rank's features, y [..., out] is this rank's partial sum, which the caller adds up
    (`reduce_scatter_sequence`).
    """

    def __init__(self, in_features: int, out_features: int, tp: Axis) -> None:
        super().__init__(share(in_features, tp, f"{in_features} input features"), out_features, bias=False)
        mark_part(self.weight, 1, tp)


def share(whole: int, axis: Axis, what: str, change: str = "the size or parallel.tp") -> int:
    """How many of `whole` things one rank holds.

    Args:
        what: all of them together, for the error.
        change: what to change where it does not fit.

    Raises:
        TopologyError: where the ranks cannot hold equally many.
    """
    if whole % axis.size:
        raise TopologyError(
            f"{what} cannot be cut into {axis.size} equal parts",
            got=f"{whole} % {axis.size} = {whole % axis.size}",
            expected=f"a multiple of {axis.size}",
            todo=f"change {change}",
        )
    return whole // axis.size


def mark_part(parameter: Tensor, dim: int, tp: Axis) -> None:
    """Say that a parameter is cut over tp: for ours (shards) and for DeepSpeed, which would count an unmarked parameter
    once per tp group when it forms the gradient's norm."""
    assert isinstance(parameter, nn.Parameter)
    mark(parameter, *([Shard(dim, "tp")] if tp.size > 1 else []))
    parameter.model_parallel = tp.size > 1  # type: ignore[attr-defined]
