"""The base class that makes the DeepSpeed engine treat a module as an MoE layer. The one file here that imports it.

DeepSpeed 0.19.8 recognises MoE layers by class. Its own `MoE` loses stacked experts on save, and parameter flags alone
make ZeRO-1 average the experts of different ranks into one; a subclass of `AutoEPMoELayer` is the one way that trains
and saves right in every ZeRO stage. Nothing of that class's computation is used.
"""

from __future__ import annotations

import torch
from torch import nn

from megamoe.common import env

# DeepSpeed picks its accelerator while it is imported, and without this prints in every process that it guessed.
env.set_default("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from deepspeed.checkpoint import autoep_affine  # noqa: E402
from deepspeed.checkpoint.constants import DS_AUTOEP_UC_META  # noqa: E402
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer  # noqa: E402


class ExpertParallelMarker(AutoEPMoELayer):
    """Subclasses call `mark` once their experts exist, and never `super().__init__`."""

    def __init__(self) -> None:
        # Not the parent's: it builds a layer of its own out of a Hugging Face module.
        nn.Module.__init__(self)

    def mark(self, experts: nn.Module, num_experts: int, ep_size: int, ep_rank: int) -> None:
        """Tell the engine which parameters are experts and which of them this rank holds.

        Args:
            experts: holds stacked parameters w1, w2, w3 of shape [L, ...], experts ep_rank*L ... of E.
        """
        num_local = num_experts // ep_size
        self.num_experts, self.num_local_experts = num_experts, num_local
        self.ep_size, self.ep_rank = ep_size, ep_rank
        self.ep_group_name = group_name(ep_size)
        placement = autoep_affine.legacy_uniform_autoep_placement_descriptor(num_experts, num_local, ep_size)
        self.expert_placement_descriptor = placement
        for parameter in experts.parameters():
            shape = [num_experts, *parameter.shape[1:]]
            tags = {
                # Gradients are reduced over the expert-data group instead of the data-parallel group.
                "allreduce": False,
                # Counted in the gradient's norm on every rank of a tensor-parallel group, not on the first only.
                "model_parallel": True,
                "group_name": self.ep_group_name,
                # ZeRO-3 trains wrongly, without a message, where these two are missing.
                "ds_zero_placement_family": "autoep_expert",
                "ds_zero_partition_group_name": self.ep_group_name,
                # Read when a checkpoint is saved.
                DS_AUTOEP_UC_META: {
                    "expert_placement": placement,
                    "affine_map": autoep_affine.autoep_placement_to_affine_map(placement, shape).to_dict(),
                    "logical_shape": shape,
                    "ep_rank": ep_rank,
                    "local_experts": list(autoep_affine.autoep_experts_for_rank(placement, ep_rank)),
                },
            }
            for name, value in tags.items():
                setattr(parameter, name, value)

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, folding_group_handles: object = None
    ) -> None:
        """Called by the engine. Nothing to do: the groups exist already (training/engine registers ours)."""
        return None


def group_name(ep_size: int) -> str:
    """DeepSpeed's name for the expert-parallel group of that size."""
    return f"ep_size_{ep_size}"


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether the parameter belongs to routed experts, which differ between the ranks of an expert-parallel group."""
    return getattr(parameter, "allreduce", True) is False
