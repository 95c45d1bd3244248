"""LocMoE's exchange by groups under tensor parallelism (arXiv 2401.13920), in our layout of the ranks."""

from __future__ import annotations

from megamoe.moe.dispatch.hierarchical import HierarchicalDispatcher


class GroupwiseDispatcher(HierarchicalDispatcher):
    """The hierarchical exchange with tensor-parallel groups for nodes.

    In the paper each rank of a tensor-parallel group carries a slice of the group's tokens to the expert-parallel
    ranks, and the slices are gathered inside the group afterwards, over its fast links. Here sequence parallelism has
    every rank hold its slice of the tokens anyway, and the ranks of a tensor-parallel group hold different experts. So
    the first exchange is the paper's: between ranks of equal place, across the groups. In place of the gather, the
    second one brings each row, inside the group, to those of its ranks that have experts for it (ours: a gather would
    bring it to all of them).

    A row thus crosses to another tensor-parallel group once, whatever number of ranks there it is for. The groups are
    those of the expert-parallel group's ranks that share a tensor-parallel group; see
    :func:`megamoe.parallel.nodes.tensor_parallel_groups`.
    """

    name = "groupwise"
    where = (" between tensor-parallel groups", " inside the tensor-parallel group")
