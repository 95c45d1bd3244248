"""The layers that are measured: ours, a dense one of the same active FLOPs, and those of other projects.

Every builder gives a module that maps rows [T, D] to (rows [T, D], auxiliary losses), with SwiGLU experts of width F,
top-K softmax routing and a balance loss where the implementation computes one inside the layer.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamoe.config.moe import BroadcastConfig, MoEConfig
from megamoe.moe.ffn import FeedForward
from megamoe.moe.layer import MoELayer
from megamoe.moe.placement import ExpertParallel

INSTALL = "pip install 'megamoe[bench]'"
DENSE, OURS, BROADCASTING = "dense", "megamoe", "megamoe broadcasting"
BROADCAST_SHARE = 0.05
"""Of the tokens, those that the layer called `BROADCASTING` sends to all experts."""


@dataclass(frozen=True)
class LayerShape:
    """Size of one layer: D, F, E, K."""

    hidden: int
    ffn: int
    experts: int
    top_k: int


Layer = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


@dataclass(frozen=True)
class Contestant:
    """One implementation.

    Attributes:
        build: makes the layer as a module; its weights are filled by the caller.
        package: the module it needs; empty: none beyond our own.
        about: the settings that matter.
    """

    name: str
    build: Callable[[LayerShape], nn.Module]
    package: str
    about: str

    def missing(self) -> bool:
        """Whether its package is not installed."""
        return bool(self.package) and importlib.util.find_spec(self.package) is None


class Dense(nn.Module):
    """One SwiGLU of width K * F: what the active experts of a token cost, without routing."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.ffn = FeedForward(shape.hidden, shape.top_k * shape.ffn)

    def forward(self, rows_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.ffn(rows_TD), []


class Ours(nn.Module):
    """Our layer with its defaults: top-k router, dropless, local dispatch; or, with GW-MoE, those of highest entropy of
    the tokens sent to all experts."""

    def __init__(self, shape: LayerShape, broadcast_share: float = 0.0) -> None:
        super().__init__()
        config = MoEConfig(
            num_experts=shape.experts,
            top_k=shape.top_k,
            expert_ffn_size=shape.ffn,
            broadcast=BroadcastConfig(threshold="fixed", entropy=0.0, max_share=broadcast_share)
            if broadcast_share
            else None,
        )
        self.layer = MoELayer(config, shape.hidden, ExpertParallel())

    def forward(self, rows_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
        out_TD, aux = self.layer(rows_TD)
        return out_TD, list(aux.losses.values())


class DeepSpeedMoE(nn.Module):
    """deepspeed.moe.layer.MoE on one rank, without its optional noise and random token selection (they only cost)."""

    def __init__(self, shape: LayerShape, drop_tokens: bool) -> None:
        super().__init__()
        _init_deepspeed()
        layer = deepspeed_moe(shape, ep_size=1, drop_tokens=drop_tokens)
        layer.set_deepspeed_parallelism()
        self.layer = layer

    def forward(self, rows_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
        out_TD, balance_loss, _ = self.layer(rows_TD)
        return out_TD, [0.01 * balance_loss]


def deepspeed_moe(shape: LayerShape, ep_size: int, drop_tokens: bool) -> Any:
    """DeepSpeed's layer with our SwiGLU as its expert; with `drop_tokens` an expert takes 1.25 of the even share."""
    from deepspeed.moe.layer import MoE

    return MoE(
        shape.hidden,
        FeedForward(shape.hidden, shape.ffn),
        num_experts=shape.experts,
        ep_size=ep_size,
        k=shape.top_k,
        capacity_factor=1.25,
        drop_tokens=drop_tokens,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )


def _init_deepspeed() -> None:
    import deepspeed
    import deepspeed.ops

    # Otherwise compiled with the first process group; nothing here uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


class Mixtral(nn.Module):
    """transformers' Mixtral block. Its balance loss is computed by the model, not the layer, so it has none here."""

    def __init__(self, shape: LayerShape, experts_implementation: str) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
        )
        config._experts_implementation = experts_implementation
        self.layer = MixtralSparseMoeBlock(config)

    def forward(self, rows_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.layer(rows_TD[None])[0], []


class Megatron(nn.Module):
    """megatron-core's MoELayer: SequentialMLP, allgather dispatcher, no Transformer Engine."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is not installed for GPUs
            self.layer = _megatron_layer(shape)

    def forward(self, rows_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
        # The balance loss enters its backward pass by itself.
        return self.layer(rows_TD[:, None])[0][:, 0], []


def _megatron_layer(shape: LayerShape) -> nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    # Two places take a GPU for granted. This process only measures, so replacing them harms nobody.
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    moe_utils.te_general_gemm = None
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    settings: dict[str, Any] = {
        "num_layers": 1,
        "num_attention_heads": 1,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "moe_ffn_hidden_size": shape.ffn,
        "num_moe_experts": shape.experts,
        "moe_router_topk": shape.top_k,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "allgather",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "bias_activation_fusion": False,
        "add_bias_linear": False,
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": True,
    }
    spec = get_moe_module_spec(use_te=False, num_experts=shape.experts, moe_grouped_gemm=False)
    layer: nn.Module = build_module(spec, config=TransformerConfig(**settings))
    return layer


CONTESTANTS = (
    Contestant(DENSE, Dense, "", "one SwiGLU of width K * F"),
    Contestant(OURS, Ours, "", "top-k router, dropless, local dispatch"),
    Contestant(BROADCASTING, lambda s: Ours(s, BROADCAST_SHARE), "", "GW-MoE: 5 % of the tokens go to all experts"),
    Contestant("deepspeed no drop", lambda s: DeepSpeedMoE(s, False), "deepspeed", "drop_tokens=False"),
    Contestant("deepspeed capacity 1.25", lambda s: DeepSpeedMoE(s, True), "deepspeed", "capacity_factor=1.25"),
    Contestant("transformers eager", lambda s: Mixtral(s, "eager"), "transformers", "MixtralSparseMoeBlock"),
    Contestant("transformers grouped_mm", lambda s: Mixtral(s, "grouped_mm"), "transformers", "MixtralSparseMoeBlock"),
    Contestant("megatron-core", Megatron, "megatron", "MoELayer, SequentialMLP, allgather dispatcher"),
)
