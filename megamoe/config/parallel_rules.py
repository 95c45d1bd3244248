"""Rules about how a run is spread over ranks; see :mod:`megamoe.config.rules`.

Every refusal names the two fields that do not go together, the arithmetic behind it, and a legal value nearby.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megamoe.config import derive
from megamoe.config.problems import Problem, nearest_divisor, nearest_multiple
from megamoe.config.routers import ResonanceRouterConfig
from megamoe.config.run import RunConfig
from megamoe.config.stages import most_stages


def misfit(degree: str, ranks: int, whole: str, size: int, *related: str) -> Iterator[Problem]:
    """The problem that the ranks of the field `degree` do not divide the size that the field `whole` gives."""
    if size % ranks:
        nearby = f"use {nearest_divisor(size, ranks)}, or {whole} {nearest_multiple(ranks, size)}"
        what = f"{ranks} does not divide {whole} {size}: {size} % {ranks} = {size % ranks}; {nearby}"
        yield Problem(degree, what, (whole, *related))


def _token_ranks(config: RunConfig) -> int:
    """Ranks over which the tokens of one micro-batch are spread."""
    return config.parallel.tp * config.parallel.cp


def _spread(config: RunConfig) -> str:
    """Those ranks in words."""
    parallel = config.parallel
    return f"parallel.tp {parallel.tp} * parallel.cp {parallel.cp} = {_token_ranks(config)}"


def tp_divides_heads(config: RunConfig) -> Iterator[Problem]:
    yield from misfit("parallel.tp", config.parallel.tp, "model.num_heads", config.model.num_heads)


def tp_fits_kv_heads(config: RunConfig) -> Iterator[Problem]:
    tp, heads, kv_heads = config.parallel.tp, config.model.num_heads, derive.num_kv_heads(config)
    if heads % tp or heads % kv_heads or kv_heads % tp == 0 or tp % kv_heads == 0:
        return  # `tp_divides_heads` and `kv_heads_divide_heads` report the first two
    fits = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    what = (
        f"{tp} neither divides model.num_kv_heads {kv_heads} ({kv_heads} % {tp} = {kv_heads % tp}) nor is a multiple "
        f"of it ({tp} % {kv_heads} = {tp % kv_heads}); use {min(fits, key=lambda n: (abs(n - tp), n))}, or "
        f"model.num_kv_heads {tp}"
    )
    yield Problem("parallel.tp", what, ("model.num_kv_heads", "model.num_heads"))


def tp_divides_vocabulary(config: RunConfig) -> Iterator[Problem]:
    rows, tp = derive.vocab_size(config), config.parallel.tp
    if rows % tp:  # rows can be added, not taken away: tokens need them
        what = (
            f"{tp} does not divide model.vocab_size {rows}: {rows} % {tp} = {rows % tp}; use "
            f"{nearest_divisor(rows, tp)}, or model.vocab_size {rows + tp - rows % tp}"
        )
        yield Problem("parallel.tp", what, ("model.vocab_size", "data.tokenizer.vocab_size"))


def tp_divides_dense_blocks(config: RunConfig) -> Iterator[Problem]:
    if derive.num_moe_layers(config) < config.model.num_layers:
        related = ("moe.first_k_dense", "moe.every_n_layers", "moe.num_experts")
        yield from misfit("parallel.tp", config.parallel.tp, "model.ffn_size", config.model.ffn_size, *related)


def cp_divides_heads(config: RunConfig) -> Iterator[Problem]:
    tp, cp, heads = config.parallel.tp, config.parallel.cp, config.model.num_heads
    if heads % tp == 0 and (mine := heads // tp) % cp:
        what = (
            f"{cp} does not divide model.num_heads {heads} / parallel.tp {tp} = {mine} heads, which its ranks share "
            f"in attention: {mine} % {cp} = {mine % cp}; use {nearest_divisor(mine, cp)}, or model.num_heads "
            f"{nearest_multiple(tp * cp, heads)}"
        )
        yield Problem("parallel.cp", what, ("model.num_heads", "parallel.tp"))


def sequences_divide_over_ranks(config: RunConfig) -> Iterator[Problem]:
    length, ranks = config.data.seq_length, _token_ranks(config)
    if length % ranks:
        what = (
            f"{length} tokens do not divide over {_spread(config)} ranks: {length} % {ranks} = {length % ranks}; use "
            f"{nearest_multiple(ranks, length)}"
        )
        yield Problem("data.seq_length", what, ("parallel.tp", "parallel.cp"))


def etp_needs_experts(config: RunConfig) -> Iterator[Problem]:
    if config.parallel.etp > 1 and config.moe.num_experts == 0:
        what = f"{config.parallel.etp} needs experts, but moe.num_experts is 0; use 1 for a dense model"
        yield Problem("parallel.etp", what, ("moe.num_experts",))


def etp_divides_experts(config: RunConfig) -> Iterator[Problem]:
    if config.moe.num_experts:
        size = config.moe.expert_ffn_size
        yield from misfit("parallel.etp", config.parallel.etp, "moe.expert_ffn_size", size, "moe.num_experts")


def stages_have_blocks(config: RunConfig) -> Iterator[Problem]:
    pp, most, blocks = config.parallel.pp, most_stages(config), derive.num_moe_layers(config)
    if pp <= most:
        return
    if blocks == 0:
        what = f"{pp} stages cannot each hold one of model.num_layers {most} blocks; use {most}"
        yield Problem("parallel.pp", what, ("model.num_layers",))
        return
    what = (
        f"{pp} stages cannot each hold one of the {blocks} MoE blocks of model.num_layers {config.model.num_layers} "
        f"(moe.first_k_dense {config.moe.first_k_dense}, moe.every_n_layers {config.moe.every_n_layers}), and "
        f"DeepSpeed waits for ever on a stage without experts; use {most}"
    )
    related = ("model.num_layers", "moe.first_k_dense", "moe.every_n_layers", "moe.num_experts")
    yield Problem("parallel.pp", what, related)


def pipelines_keep_gradients_and_weights_whole(config: RunConfig) -> Iterator[Problem]:
    pp, stage = config.parallel.pp, config.parallel.zero_stage
    if pp > 1 and stage > 1:
        what = (
            f"{stage} does not go with parallel.pp {pp}: DeepSpeed's pipeline keeps whole gradients and weights on "
            "every rank; use 1"
        )
        yield Problem("parallel.zero_stage", what, ("parallel.pp",))


def router_scope_is_whole_micro_batch(config: RunConfig) -> Iterator[Problem]:
    router = config.moe.router
    if isinstance(router, ResonanceRouterConfig) and router.scope != "micro_batch" and _token_ranks(config) > 1:
        what = (
            f"{router.scope} is not defined where the tokens of a micro-batch are spread over ranks "
            f"({_spread(config)}); use micro_batch, or 1 for both"
        )
        yield Problem("moe.router.scope", what, ("parallel.tp", "parallel.cp"))
    elif isinstance(router, ResonanceRouterConfig) and router.scope == "ep_group" and config.parallel.etp > 1:
        what = f"ep_group would leave out the tokens of parallel.etp {config.parallel.etp}; use micro_batch, or etp 1"
        yield Problem("moe.router.scope", what, ("parallel.etp",))


def conversations_stay_on_their_rank(config: RunConfig) -> Iterator[Problem]:
    if config.finetune is not None and config.parallel.cp > 1:
        what = (
            f"{config.parallel.cp} is not supported with finetune in this version, because the answers of a "
            "conversation would be scored in parts; use 1 (parallel.tp works)"
        )
        yield Problem("parallel.cp", what, ("finetune",))


def muon_sees_whole_matrices(config: RunConfig) -> Iterator[Problem]:
    if config.training.optimizer.type != "muon":
        return
    for axis in ("tp", "etp"):
        degree = getattr(config.parallel, axis)
        if degree > 1:
            what = (
                f"{degree} cuts matrices that training.optimizer.type muon orthogonalises as a whole; use 1, or adamw"
            )
            yield Problem(f"parallel.{axis}", what, ("training.optimizer.type",))


def padded_dispatch_needs_whole_micro_batches(config: RunConfig) -> Iterator[Problem]:
    if config.moe.dispatcher in ("padded", "push") and _token_ranks(config) > 1:
        what = (
            f"{config.moe.dispatcher} needs a bound on each rank's part of what an expert keeps, and there is none for "
            f"a part of a micro-batch ({_spread(config)}); use auto or all_to_all"
        )
        yield Problem("moe.dispatcher", what, ("parallel.tp", "parallel.cp"))


def offloading_follows_zero(config: RunConfig) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.offload_optimizer and parallel.zero_stage == 0:
        what = "true needs an optimizer that DeepSpeed shards, but parallel.zero_stage is 0; use 1, 2 or 3"
        yield Problem("parallel.offload_optimizer", what, ("parallel.zero_stage",))
    if parallel.offload_parameters and parallel.zero_stage < 3:
        what = f"true needs weights that DeepSpeed shards, but parallel.zero_stage is {parallel.zero_stage}; use 3"
        yield Problem("parallel.offload_parameters", what, ("parallel.zero_stage",))


def muon_accumulates_in_fp32(config: RunConfig) -> Iterator[Problem]:
    training, parallel = config.training, config.parallel
    if training.optimizer.type != "muon" or training.precision != "bf16":
        return
    if parallel.offload_optimizer:
        what = "true accumulates the bf16 gradients of training.optimizer.type muon in bf16; use false, or fp32"
        yield Problem("parallel.offload_optimizer", what, ("training.optimizer.type", "training.precision"))
    elif parallel.zero_stage == 1 and (config.moe.num_experts or parallel.pp > 1):
        what = "1 takes training.optimizer.type muon in bf16 for dense models without a pipeline only; " + (
            "use 2" if parallel.pp == 1 else "use adamw or training.precision fp32"
        )
        related = ("training.optimizer.type", "training.precision", "moe.num_experts", "parallel.pp")
        yield Problem("parallel.zero_stage", what, related)


PARALLEL_RULES: tuple[Callable[[RunConfig], Iterator[Problem]], ...] = (
    tp_divides_heads,
    tp_fits_kv_heads,
    tp_divides_vocabulary,
    tp_divides_dense_blocks,
    cp_divides_heads,
    sequences_divide_over_ranks,
    etp_needs_experts,
    etp_divides_experts,
    stages_have_blocks,
    pipelines_keep_gradients_and_weights_whole,
    router_scope_is_whole_micro_batch,
    conversations_stay_on_their_rank,
    muon_sees_whole_matrices,
    padded_dispatch_needs_whole_micro_batches,
    offloading_follows_zero,
    muon_accumulates_in_fp32,
)
