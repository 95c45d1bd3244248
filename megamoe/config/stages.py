"""Which blocks each pipeline stage holds: the split whose slowest stage is fastest."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise

from megamoe.config import derive
from megamoe.config.run import RunConfig

Size = Callable[[int, int], int | None]
Split = tuple[int, tuple[int, ...]]
"""Size of the largest part, and the boundaries."""


def stage_bounds(config: RunConfig) -> tuple[int, ...]:
    """Boundaries b of `parallel.pp` stages: stage s holds blocks b[s] ... b[s + 1] - 1; b[0] = 0, b[pp] = num_layers.

    Of all splits into consecutive blocks, at least one per stage, that which minimises the FLOPs per token of the
    costliest stage (`stage_costs`), as the pipeline runs at the pace of that one; of several, that which minimises the
    weights of the fullest rank. If the model has MoE blocks, every stage gets one: DeepSpeed sums norms across stages
    once per group of parameters, and waits for ever on a stage without the group of the experts.

    Args:
        config: fit for its pp (`parallel_rules.stages_have_blocks`).

    Raises:
        ValueError: there are fewer blocks, or fewer MoE blocks, than stages.
    """
    stages = config.parallel.pp
    if stages > most_stages(config):
        raise ValueError(f"{stages} stages for {most_stages(config)} blocks that can be on stages of their own")
    cost, weights = _sums(stage_block_costs(config)), _sums(stage_block_weights(config))
    experts = _sums([int(derive.is_moe_layer(config, index)) for index in range(config.model.num_layers)])
    needed = min(1, experts[-1])

    def costs(first: int, end: int) -> int | None:
        return cost[end] - cost[first] if experts[end] - experts[first] >= needed else None

    fastest = max(costs(*part) or 0 for part in pairwise(_split(config.model.num_layers, stages, costs)))

    def weighs(first: int, end: int) -> int | None:
        time = costs(first, end)
        return weights[end] - weights[first] if time is not None and time <= fastest else None

    return _split(config.model.num_layers, stages, weighs)


def most_stages(config: RunConfig) -> int:
    """Stages that the model can be split into: its MoE blocks, or all blocks of a dense model."""
    return derive.num_moe_layers(config) or config.model.num_layers


def stage_costs(config: RunConfig) -> tuple[int, ...]:
    """FLOPs per token of each stage, forward and backward; their sum is `derive.flops_per_token`."""
    costs = stage_block_costs(config)
    return tuple(sum(costs[first:end]) for first, end in pairwise(stage_bounds(config)))


def stage_block_costs(config: RunConfig) -> list[int]:
    """FLOPs per token of each block, that of the head with the last one."""
    costs = [derive.block_flops(config, index) for index in range(config.model.num_layers)]
    costs[-1] += derive.head_flops(config)
    return costs


def stage_block_weights(config: RunConfig) -> list[int]:
    """Weights of each block on one of its ranks, with the embedding's at the first and the head's at the last."""
    blocks = range(config.model.num_layers)
    return [sum(derive.on_one_rank(config, stage_parameters(config, index, index + 1))) for index in blocks]


def stage_parameters(config: RunConfig, first: int, end: int) -> dict[str, derive.ParameterCount]:
    """Parameters by component of the stage that holds the blocks first ... end - 1, unpadded by any layout.

    A tied embedding counts on the first and on the last stage, as both need it.
    """
    model, blocks = config.model, [derive.block_parameters(config, index) for index in range(first, end)]
    counts = {name: derive.summed(block[name] for block in blocks) for name in blocks[0]}
    sizes = derive.vocab_size(config) * model.hidden_size, model.hidden_size
    table, norm = (derive.ParameterCount(size, size) for size in sizes)
    if first == 0:
        counts["embedding"] = table
    if end == model.num_layers:
        counts["norms"] = derive.summed([counts["norms"], norm])
        if first > 0 or not model.tie_embeddings:
            counts["head"] = table
    return counts


def _sums(values: list[int]) -> list[int]:
    """Sums of the first 0, 1, 2, ... values."""
    return list(accumulate(values, initial=0))


def _split(blocks: int, stages: int, size: Size) -> tuple[int, ...]:
    """The split of range(blocks) into `stages` parts with the smallest largest size.

    Dynamic programming over the number of parts: the best split of the first `end` blocks into one part more is the
    best, over the start of the last part, of the worse of that part and the best split before it.

    Args:
        size: of the part first ... end - 1; None where that is no legal part, which may be so of the shortest and of
            the longest parts.
    """
    best: dict[int, Split] = {0: (0, (0,))}
    for _ in range(stages):
        longer = {end: _with_last_part(best, end, size) for end in range(1, blocks + 1)}
        best = {end: split for end, split in longer.items() if split is not None}
    return best[blocks][1]


def _with_last_part(best: dict[int, Split], end: int, size: Size) -> Split | None:
    """The best of the splits `best` with one part more, which ends at `end`; None: there is none."""
    found: Split | None = None
    for first in range(end - 1, min(best, default=end) - 1, -1):
        part = size(first, end)
        if found is not None and (part is None or part >= found[0]):
            break  # parts that begin still earlier are larger
        if part is not None and first in best and (found is None or max(part, best[first][0]) < found[0]):
            found = (max(part, best[first][0]), (*best[first][1], end))
    return found
