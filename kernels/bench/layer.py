"""The MoE layer, forward and backward, as a multiple of its grouped products alone, measured in the same run.

python -m kernels.bench.layer --out FOLDER [--smoke]
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.bench import cases, draw
from kernels.bench.model import Shape, grouped_flops
from kernels.bench.results import write_part
from kernels.bench.run import device_of, missing_library, parser
from kernels.bench.timing import Timed, measure
from megamoe.config.moe import MoEConfig
from megamoe.config.ops import OpsConfig
from megamoe.config.routers import BalancedRouterConfig, RouterConfig, TopKRouterConfig
from megamoe.moe.experts import Experts
from megamoe.moe.layer import MoELayer
from megamoe.moe.placement import ExpertParallel

ROUTERS: dict[str, Callable[[], RouterConfig]] = {"natural": TopKRouterConfig, "balanced": BalancedRouterConfig}
REPEATS = 20
OFFSET = 0.3
"""Of the mean of all rows, in standard deviations of a feature."""
LIMIT = 1.25
"""What the project promises: the layer takes at most this many times as long as its grouped products."""


def measure_layer(
    device: torch.device, case: cases.Case, routing: str, implementation: str, profile: Path | None = None
) -> dict[str, Any]:
    """One row: times of the layer and of its grouped products, ratio, rate, memory.

    Args:
        profile: folder for a table of the kernels of one pass.
    """
    shape = case.shape
    layer = build(shape, routing, device, IMPLEMENTATIONS[implementation]())
    streams = [draw.generator(device, number) for number in range(draw.SETS)]
    inputs = [(tokens(shape, stream), draw.rows(shape.tokens, shape.hidden, stream)) for stream in streams]
    counts = [rows_per_expert(layer, x) for x, _ in inputs]
    passes = [partial(forward_backward, layer, x, grad) for x, grad in inputs]
    products = [products_alone(layer, shape, stream, c) for stream, c in zip(streams, counts, strict=True)]
    before = memory(device, reset=True)
    timed = measure({"layer": passes, "products": products}, device, REPEATS)
    if profile and device.type == "cuda":
        write_profile(passes, profile / f"profile_{routing}_{implementation.replace(' ', '_')}.txt")
    return row(case, routing, implementation, timed, torch.stack(counts), memory(device) - before)


def plain_ops() -> OpsConfig:
    """torch's own ops: the reference of everything that the library has, and torch's grouped product."""
    choices = {name: get_args(field.annotation) for name, field in OpsConfig.model_fields.items()}
    plain = {name: "reference" for name, words in choices.items() if "kernels" in words}
    return OpsConfig.model_validate(plain | {"expert_ffn": "grouped_mm"})


IMPLEMENTATIONS: dict[str, Callable[[], OpsConfig]] = {"auto": OpsConfig, "plain torch": plain_ops}


def build(shape: Shape, routing: str, device: torch.device, ops: OpsConfig) -> MoELayer:
    """The layer in bf16, dropless, with all experts."""
    config = MoEConfig(
        num_experts=shape.experts, top_k=shape.top_k, expert_ffn_size=shape.ffn, router=ROUTERS[routing]()
    )
    torch.manual_seed(draw.SEED)
    with torch.device(device):
        layer = MoELayer(config, shape.hidden, ExpertParallel(), ops)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.02)
    return layer.to(torch.bfloat16).train()


def tokens(shape: Shape, stream: torch.Generator) -> Tensor:
    """[T, D], with a mean that all rows share, as hidden states have: some experts then get more rows than others."""
    mean_1D = OFFSET * draw.rows(1, shape.hidden, draw.generator(stream.device))
    return (draw.rows(shape.tokens, shape.hidden, stream) + mean_1D).requires_grad_()


def products_alone(layer: MoELayer, shape: Shape, stream: torch.Generator, counts_E: Tensor) -> partial[None]:
    """`grouped_products` on random rows, as many for each expert as the layer's."""
    rows_RD = draw.rows(shape.rows, shape.hidden, stream)
    hidden_RF = draw.rows(shape.rows, shape.ffn, stream)
    return partial(grouped_products, layer.experts, rows_RD, hidden_RF, counts_E.cumsum(0).to(torch.int32))


def rows_per_expert(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """int64 [E] of one input."""
    with torch.no_grad():
        counts: Tensor = layer.router(x_TD).rows_per_expert_E
    return counts


def forward_backward(layer: nn.Module, x_TD: Tensor, grad_TD: Tensor) -> None:
    """One training pass with the auxiliary losses; gradients are put away as an optimizer would."""
    out_TD, aux = layer(x_TD)
    losses = list(aux.losses.values())
    torch.autograd.backward([out_TD, *losses], [grad_TD, *(None for _ in losses)])
    layer.zero_grad(set_to_none=True)
    x_TD.grad = None


def grouped_products(experts: Experts, rows_RD: Tensor, hidden_RF: Tensor, ends_E: Tensor) -> None:
    """The nine grouped products of a training pass on rows of the layer's numbers per expert, and nothing else."""
    w1, w2, w3 = experts.w1.detach(), experts.w2.detach(), experts.w3.detach()
    F.grouped_mm(rows_RD, w1.transpose(1, 2), offs=ends_E)
    F.grouped_mm(rows_RD, w3.transpose(1, 2), offs=ends_E)
    F.grouped_mm(hidden_RF, w2.transpose(1, 2), offs=ends_E)
    F.grouped_mm(rows_RD, w2, offs=ends_E)
    F.grouped_mm(hidden_RF, w1, offs=ends_E)
    F.grouped_mm(hidden_RF, w3, offs=ends_E)
    F.grouped_mm(hidden_RF.t(), rows_RD, offs=ends_E)
    F.grouped_mm(hidden_RF.t(), rows_RD, offs=ends_E)
    F.grouped_mm(rows_RD.t(), hidden_RF, offs=ends_E)


def memory(device: torch.device, reset: bool = False) -> int:
    """Largest number of bytes allocated on the device so far; 0 without a GPU."""
    if device.type != "cuda":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    return int(torch.cuda.max_memory_allocated())


def write_profile(passes: list[partial[None]], path: Path) -> None:
    """Kernels of one pass by their time on the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        for one in passes:
            one()
        torch.cuda.synchronize()
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{len(passes)} passes, forward and backward\n{table}\n", encoding="utf-8")


def row(
    case: cases.Case, routing: str, implementation: str, timed: dict[str, Timed], counts_NE: Tensor, extra: int
) -> dict[str, Any]:
    """A measurement with what follows from it."""
    layer, products = timed["layer"], timed["products"]
    flops = grouped_flops(case.shape)
    return {
        "case": case.name,
        "routing": routing,
        "shape": vars(case.shape),
        "implementation": implementation,
        "library": missing_library() or "loaded",
        "layer": layer.to_json(),
        "grouped_products": products.to_json(),
        "ratio": layer.best / products.best if layer.best and products.best else None,
        "limit": LIMIT,
        "flops": flops,
        "layer_flops_per_second": flops / (layer.best / 1e6) if layer.best else None,
        "products_flops_per_second": flops / (products.best / 1e6) if products.best else None,
        "fullest_expert_over_mean": float(counts_NE.max() / counts_NE.float().mean()),
        "peak_bytes_of_a_pass": extra if layer.best else None,
    }


def main() -> None:
    args = parser("Measure the MoE layer.").parse_args()
    device = device_of(args.smoke)
    case = cases.SMOKE_LAYER if args.smoke else cases.LAYER
    rows = []
    for routing, implementation in itertools.product(ROUTERS, IMPLEMENTATIONS):
        rows.append(measure_layer(device, case, routing, implementation, args.out))
        write_part(args.out, "layer", rows)
        _show(rows[-1])
        gc.collect()


def _show(found: dict[str, Any]) -> None:
    name = f"{found['routing']:<9} {found['implementation']:<12}"
    if found["ratio"] is None:
        print(f"{name} {found['layer']['status']}", flush=True)
        return
    layer, products = (min(found[name]["microseconds"]) / 1e3 for name in ("layer", "grouped_products"))
    rate = found["products_flops_per_second"] / 1e12
    print(
        f"{name} layer {layer:.2f} ms, grouped products {products:.2f} ms ({rate:.0f} TFLOP/s), "
        f"ratio {found['ratio']:.3f} (at most {LIMIT})",
        flush=True,
    )


if __name__ == "__main__":
    main()
