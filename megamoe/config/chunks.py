"""In how many chunks a rank's experts should take their rows: a model of one layer's time (ours).

The link carries one exchange after the other and computation goes on beside it, as `moe/dispatch/chunked.py` has it:
the rows of all chunks leave at once, a chunk is worked on when it is here, its results queue up behind. More chunks
begin the work earlier and leave less of the last results to wait for; each costs a latency of the link and launches,
and its products have fewer rows. `python -m megamoe plan` has a finer model for the rates of a given cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.config import derive
from megamoe.config.memory import WIDTH
from megamoe.config.run import RunConfig


@dataclass(frozen=True)
class Rates:
    """What a rank can do.

    Attributes:
        bytes_per_second: that it sends to other ranks while all do.
        latency: seconds of an exchange, however small.
        flops_per_second: of large products.
        half_rows: rows of a chunk with which products reach half of that.
        launches: seconds of a chunk in one pass that do not depend on its rows.
    """

    bytes_per_second: float
    latency: float = 0.0
    flops_per_second: float = 1e12
    half_rows: float = 0.0
    launches: float = 0.0


@dataclass(frozen=True)
class Layer:
    """What a rank does in a layer.

    Attributes:
        rows: that its experts work on.
        width, ffn: D, and F of an expert.
        value_bytes: of one number.
        elsewhere: share of the rows that come from other ranks.
        beside_flops: forward, of what needs nothing of the exchange (shared experts); backward takes twice as many.
    """

    rows: float
    width: int
    ffn: int
    value_bytes: int
    elsewhere: float
    beside_flops: float = 0.0


ON_ONE_NODE = Rates(360e9, 25e-6, 790e12, 512, 60e-6)
"""Of a GPU beside its node's others: NVLink and products of an H200 as in `configs/hardware/h200_node.yaml`; of chunks,
half the rate at 512 rows and ten launches of 6 us, assumed."""
BETWEEN_NODES = Rates(45e9, 40e-6, 790e12, 512, 60e-6)
"""The same, with a port of 400 Gb/s for each GPU."""


def seconds(layer: Layer, rates: Rates, chunks: int) -> float:
    """Forward and backward pass of one layer; 1 chunk: nothing beside an exchange."""
    exchange = layer.rows / chunks * layer.elsewhere * layer.width * layer.value_bytes / rates.bytes_per_second
    exchange += rates.latency
    rows = layer.rows / chunks
    flops = rates.flops_per_second * (rows / (rows + rates.half_rows) if rows else 1.0)
    work = (
        6.0 * rows * layer.width * layer.ffn / flops + rates.launches
    )  # forward, gradients of rows, of weights: alike
    beside = layer.beside_flops / rates.flops_per_second
    if chunks == 1:
        return 4 * exchange + 3 * work + 3 * beside
    forward = _pass(chunks, exchange, work, before=beside)
    return forward + _pass(chunks, exchange, work, after=2 * beside + chunks * work)


def _pass(chunks: int, exchange: float, work: float, before: float = 0.0, after: float = 0.0) -> float:
    """All chunks there, through their experts and home.

    Args:
        exchange, work: seconds of a chunk, one way and through its experts.
        before, after: seconds of other work, which is done first or last.
    """
    computed, carried = before, chunks * exchange
    for chunk in range(chunks):
        computed = max(computed, (chunk + 1) * exchange) + work
        carried = max(carried, computed) + exchange
    return max(carried, computed + after)


def best(layer: Layer, rates: Rates, most: int) -> int:
    """The number of chunks with the shortest time, the smallest of several.

    Args:
        most: experts of a rank.
    """
    return min(range(1, most + 1), key=lambda chunks: seconds(layer, rates, chunks))


def obstacle(config: RunConfig) -> tuple[str, tuple[str, ...]] | None:
    """Why rows cannot go in chunks, and the fields that it rests on; None: they can."""
    moe, parallel, ffn = config.moe, config.parallel, config.ops.expert_ffn
    if moe.dispatcher not in ("auto", "padded", "all_to_all"):
        return f"an exchange that goes in chunks, which {moe.dispatcher} does not", ("moe.dispatcher",)
    if parallel.ep == 1 or parallel.etp > 1:
        what = f"experts on other ranks, whole ones (parallel.ep {parallel.ep}, etp {parallel.etp})"
        return what, ("parallel.ep", "parallel.etp")
    if ffn in ("reference", "grouped_mm", "by_source"):
        return f"weight gradients that can wait, which {ffn} has not", ("ops.expert_ffn",)
    return None


def best_for(config: RunConfig, on_gpu: bool, ranks_per_node: int) -> int:
    """`moe.chunks: auto`: by the rates above. 1 on CPUs, where the processors that compute carry the rows as well."""
    if not on_gpu or obstacle(config) is not None:
        return 1
    rates = ON_ONE_NODE if config.parallel.ep <= ranks_per_node else BETWEEN_NODES  # its ranks are consecutive ones
    return best(layer_of(config), rates, derive.experts_per_rank(config))


def layer_of(config: RunConfig) -> Layer:
    """An MoE layer of one micro-batch, its rows spread evenly."""
    training, moe, parallel = config.training, config.moe, config.parallel
    tokens = training.micro_batch_size * config.data.seq_length / (parallel.tp * parallel.cp)
    return Layer(
        rows=tokens * min(moe.top_k, moe.num_experts),
        width=config.model.hidden_size,
        ffn=moe.expert_ffn_size,
        value_bytes=WIDTH[training.precision],
        elsewhere=1 - 1 / parallel.ep,
        beside_flops=6.0 * tokens * config.model.hidden_size * moe.num_shared_experts * moe.expert_ffn_size,
    )
