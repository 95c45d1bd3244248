"""From a configuration and a cluster to what the model of a layer is told."""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.common.errors import ConfigError, TopologyError
from megamoe.config import chunks, derive
from megamoe.config.hardware import HardwareConfig
from megamoe.config.memory import WIDTH
from megamoe.config.routers import BalancedRouterConfig, HashRouterConfig
from megamoe.config.rules import check_world_size
from megamoe.config.run import RunConfig
from megamoe.config.traffic import capacity
from megamoe.parallel.topology import Topology
from megamoe.plan.exchange import WAYS, Place
from megamoe.plan.layer import LayerSize
from megamoe.plan.rates import BETWEEN, INSIDE


@dataclass(frozen=True)
class Cluster:
    """A configuration on the nodes of a cluster.

    Raises:
        ConfigError: the configuration has no experts, or the cluster no links between its nodes.
        TopologyError: the ranks of so many nodes do not fit the configuration.
    """

    config: RunConfig
    hardware: HardwareConfig
    nodes: int

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise TopologyError("A cluster has at least one node.", got=f"--nodes {self.nodes}")
        if self.nodes > 1 and self.hardware.between is None:
            raise ConfigError(
                f"The cluster {self.hardware.name} has no links between nodes.",
                got=f"--nodes {self.nodes}",
                expected="1, or a section `between` in its file",
            )
        check_world_size(self.config, self.world_size)
        if not derive.num_moe_layers(self.config):
            raise ConfigError(
                "There is no MoE layer to plan.",
                got=f"moe.num_experts {self.config.moe.num_experts}, model.num_layers {self.config.model.num_layers}",
                todo="choose a configuration with experts",
            )

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.nodes * self.hardware.ranks_per_node

    @property
    def topology(self) -> Topology:
        """The layout of the ranks."""
        parallel = self.config.parallel
        return Topology(self.world_size, parallel.tp, parallel.pp, parallel.ep, parallel.etp, parallel.cp)

    def place(self) -> Place:
        """Where the first expert-parallel group is."""
        topology, per_node = self.topology, self.hardware.ranks_per_node
        first = [rank * topology.stride("ep") for rank in range(topology.ep)]
        return Place(topology.ep, sum(rank < per_node for rank in first))

    def link_of(self, *axes: str) -> str:
        """The slowest class of links that the group of rank 0 along these axes uses."""
        last = sum((self.topology.degree(axis) - 1) * self.topology.stride(axis) for axis in axes)
        return INSIDE if last < self.hardware.ranks_per_node else BETWEEN

    def layer_size(self) -> LayerSize:
        """One MoE layer of one rank."""
        config, moe, parallel = self.config, self.config.moe, self.config.parallel
        tokens = self.tokens()
        choices = slots = float(tokens * min(moe.top_k, moe.num_experts))
        if moe.capacity.mode != "dropless":
            spread = parallel.tp * parallel.cp
            kept, padded = capacity(config, tokens * spread)
            choices = slots = min(choices, moe.num_experts * kept / spread)
            if self.padded:
                slots = float(moe.num_experts * padded)
        return LayerSize(
            tokens=tokens,
            width=config.model.hidden_size,
            ffn=moe.expert_ffn_size // parallel.etp,
            experts=moe.num_experts,
            chosen=min(moe.top_k, moe.num_experts),
            choices=choices,
            slots=slots,
            value_bytes=WIDTH[config.training.precision],
            shared_ffn=moe.num_shared_experts * moe.expert_ffn_size,
            routed=not isinstance(moe.router, HashRouterConfig | BalancedRouterConfig),
            part_ranks=parallel.etp,
        )

    def tokens(self) -> int:
        """Rows T of one rank between parallel matrices, of one micro-batch."""
        training, parallel = self.config.training, self.config.parallel
        return training.micro_batch_size * self.config.data.seq_length // (parallel.tp * parallel.cp)

    @property
    def padded(self) -> bool:
        """Whether the exchange holds the capacity's rows, so that nobody asks for their number."""
        moe, parallel = self.config.moe, self.config.parallel
        whole = parallel.tp * parallel.cp == 1
        return moe.capacity.mode != "dropless" and moe.dispatcher in ("auto", "padded") and whole

    @property
    def way(self) -> str:
        """The dispatcher of the configuration, as `plan/exchange.py` calls it; others send what all_to_all sends."""
        return self.config.moe.dispatcher if self.config.moe.dispatcher in WAYS else "all_to_all"

    def chunks(self) -> int:
        """Chunks in which a run with this configuration exchanges rows."""
        configured = self.config.moe.chunks
        if configured != "auto":
            return configured
        return chunks.best_for(self.config, self.hardware.launch.ahead, self.hardware.ranks_per_node)

    def most_chunks(self) -> int:
        """Chunks hold at least one expert of every rank."""
        return derive.experts_per_rank(self.config)
