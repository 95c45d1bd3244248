"""Rules across sections: one small function each, named after what must hold.

A rule yields the problems it finds and never repairs. It is judged on fields that are valid one by one, so it
may divide by them. `RULES` holds for a configuration alone; `check_world_size` adds what the number of ranks
decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megamoe.common.errors import TopologyError
from megamoe.config.deepspeed import extra_problems
from megamoe.config.derive import head_size, num_kv_heads
from megamoe.config.moe_rules import MOE_RULES
from megamoe.config.parallel_rules import PARALLEL_RULES
from megamoe.config.problems import Problem, raise_all
from megamoe.config.rank_rules import RANK_RULES
from megamoe.config.run import RunConfig

Rule = Callable[[RunConfig], Iterator[Problem]]


def heads_divide_hidden_size(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    if model.head_size is None and model.hidden_size % model.num_heads:
        what = (
            f"{model.hidden_size} does not divide over model.num_heads {model.num_heads}; "
            "change one or give model.head_size"
        )
        yield Problem("model.hidden_size", what, ("model.num_heads", "model.head_size"))


def head_size_is_even(config: RunConfig) -> Iterator[Problem]:
    model, size = config.model, head_size(config)
    if model.head_size is None and model.hidden_size % model.num_heads:
        return  # there is no head size yet: `heads_divide_hidden_size` reports that
    if size % 2:
        what = f"heads of width {size} are odd; the rotary embedding rotates pairs"
        yield Problem("model.head_size", what, ("model.hidden_size", "model.num_heads"))


def kv_heads_divide_heads(config: RunConfig) -> Iterator[Problem]:
    heads, kv_heads = config.model.num_heads, num_kv_heads(config)
    if heads % kv_heads:
        what = f"{kv_heads} key/value heads do not divide model.num_heads {heads} into equal groups"
        yield Problem("model.num_kv_heads", what, ("model.num_heads",))


def vocabulary_holds_tokenizer(config: RunConfig) -> Iterator[Problem]:
    rows, tokens = config.model.vocab_size, config.data.tokenizer.vocab_size
    if rows is not None and rows < tokens:
        what = f"{rows} rows cannot hold data.tokenizer.vocab_size {tokens}; null takes the right number"
        yield Problem("model.vocab_size", what, ("data.tokenizer.vocab_size",))


def micro_batches_fill_global_batch(config: RunConfig) -> Iterator[Problem]:
    whole, micro = config.training.global_batch_size, config.training.micro_batch_size
    if whole % micro:
        what = f"no multiple of training.micro_batch_size {micro}: {whole} % {micro} = {whole % micro}"
        yield Problem("training.global_batch_size", what, ("training.micro_batch_size",))


def _length_is_known(config: RunConfig) -> bool:
    """Not where `finetune.epochs` decides it: then these rules are judged once the data has been read."""
    return config.finetune is None or config.finetune.epochs is None


def warmup_ends_before_training(config: RunConfig) -> Iterator[Problem]:
    warmup, steps = config.training.schedule.warmup_steps, config.training.steps
    if warmup >= steps and _length_is_known(config):
        what = f"{warmup} steps of warm-up do not end before training.steps {steps}"
        yield Problem("training.schedule.warmup_steps", what, ("training.steps",))


def wsd_phases_fit(config: RunConfig) -> Iterator[Problem]:
    schedule, steps = config.training.schedule, config.training.steps
    decay = schedule.decay_fraction * steps
    phases = schedule.type == "wsd" and _length_is_known(config)
    if phases and schedule.warmup_steps < steps < schedule.warmup_steps + decay:
        what = (
            f"the decay over {schedule.decay_fraction} of training.steps {steps} would begin before the "
            f"{schedule.warmup_steps} steps of warm-up end"
        )
        related = ("training.steps", "training.schedule.warmup_steps", "training.schedule.type")
        yield Problem("training.schedule.decay_fraction", what, related)


def stop_lies_within_steps(config: RunConfig) -> Iterator[Problem]:
    stop, steps = config.training.stop_after_step, config.training.steps
    if stop is not None and stop > steps and _length_is_known(config):
        yield Problem("training.stop_after_step", f"{stop} is after training.steps {steps}", ("training.steps",))


def traced_steps_lie_within_steps(config: RunConfig) -> Iterator[Problem]:
    steps = config.training.steps
    late = [step for step in config.training.trace_steps if step > steps]
    if late and _length_is_known(config):
        yield Problem("training.trace_steps", f"{late[0]} is after training.steps {steps}", ("training.steps",))


def kept_checkpoints_are_written(config: RunConfig) -> Iterator[Problem]:
    every, keep_every = config.training.checkpoint.every, config.training.checkpoint.keep_every
    if keep_every and (every == 0 or keep_every % every):
        what = f"checkpoints are written every {every} steps, so not at all multiples of {keep_every}"
        yield Problem("training.checkpoint.keep_every", what, ("training.checkpoint.every",))


def zero_0_runs_in_fp32(config: RunConfig) -> Iterator[Problem]:
    if config.parallel.zero_stage == 0 and config.training.precision == "bf16":
        what = "stage 0 accumulates bf16 gradients in bf16, visibly worse than DeepSpeed's other stages; use 1"
        yield Problem("parallel.zero_stage", what, ("training.precision",))


def fp64_keeps_its_digits(config: RunConfig) -> Iterator[Problem]:
    if config.training.precision != "fp64":
        return
    related, stage = ("training.precision",), config.parallel.zero_stage
    if stage > 0:
        yield Problem("parallel.zero_stage", f"{stage} keeps masters in fp32, so fp64 is lost there; use 0", related)
    if config.training.optimizer.type != "adamw":
        what = "muon orthogonalises in bf16, so fp64 is lost there; use adamw"
        yield Problem("training.optimizer.type", what, related)
    if "communication_data_type" in config.deepspeed_extra:
        what = "fp64 gradients are reduced in fp64, which DeepSpeed cannot be asked for here; leave it out"
        yield Problem("deepspeed_extra.communication_data_type", what, related)


def muon_needs_whole_matrices(config: RunConfig) -> Iterator[Problem]:
    if config.training.optimizer.type == "muon" and config.parallel.zero_stage == 3:
        what = 'stage 3 refuses muon ("Muon and reduce scatter cannot be used together"); use 1 or 2'
        yield Problem("parallel.zero_stage", what, ("training.optimizer.type",))


def muon_updates_are_not_clipped(config: RunConfig) -> Iterator[Problem]:
    clipping = config.training.gradient_clipping
    if config.training.optimizer.type == "muon" and clipping > 0:
        what = (
            f"must be 0 with muon, got {clipping}: DeepSpeed clips after the gradients were orthogonalised, "
            "when their norm no longer says how large they were, and would shrink every update"
        )
        yield Problem("training.gradient_clipping", what, ("training.optimizer.type",))


def spikes_stand_out(config: RunConfig) -> Iterator[Problem]:
    faults, optimizer = config.training.faults, config.training.optimizer.type
    field = "training.faults.spike_factor"
    if 0 < faults.spike_factor <= 1:
        yield Problem(field, f"{faults.spike_factor:g} would skip every other step; above 1, or 0 for off", ())
    if faults.spike_factor and optimizer == "muon":
        what = "needs the norm of gradients, and Muon's is known after orthogonalisation only; use 0"
        yield Problem(field, what, ("training.optimizer.type",))


def extra_leaves_our_keys(config: RunConfig) -> Iterator[Problem]:
    yield from extra_problems(config)


RULES: tuple[Rule, ...] = (
    *MOE_RULES,
    *PARALLEL_RULES,
    *RANK_RULES,
    heads_divide_hidden_size,
    head_size_is_even,
    kv_heads_divide_heads,
    vocabulary_holds_tokenizer,
    micro_batches_fill_global_batch,
    warmup_ends_before_training,
    wsd_phases_fit,
    stop_lies_within_steps,
    traced_steps_lie_within_steps,
    kept_checkpoints_are_written,
    zero_0_runs_in_fp32,
    fp64_keeps_its_digits,
    muon_needs_whole_matrices,
    muon_updates_are_not_clipped,
    spikes_stand_out,
    extra_leaves_our_keys,
)


def _must_divide(path: str, whole: str, whole_value: int, part: str, part_value: int) -> Iterator[Problem]:
    """The problem that `part` does not divide `whole`, with the numbers behind both and the nearest that fit."""
    if whole_value % part_value:
        rest = f"{whole_value} % {part_value} = {whole_value % part_value}"
        below, above = (whole_value // part_value + more for more in (0, 1))
        nearby = " or ".join(str(times * part_value) for times in (below, above) if times)
        what = f"{whole} = {whole_value} does not divide by {part} = {part_value}: {rest}; {nearby} would fit"
        yield Problem(path, what)


def _world_problems(config: RunConfig, world_size: int) -> list[Problem]:
    p, training = config.parallel, config.training
    if world_size < 1:
        return [Problem("", f"a run needs at least one rank, got world size {world_size}")]
    dense = p.tp * p.pp * p.cp
    dense_text = f"tp {p.tp} * pp {p.pp} * cp {p.cp}"
    problems = list(_must_divide("parallel", "world size", world_size, dense_text, dense))
    if problems:
        return problems  # there is no dp to go on with
    stage, expert, dp = world_size // p.pp, p.ep * p.etp, world_size // dense
    step = training.micro_batch_size * dp
    step_text = f"micro_batch_size {training.micro_batch_size} * dp {dp} (world size {world_size} / {dense})"
    batch = "training.global_batch_size"
    return [
        *_must_divide("parallel.ep", f"world size {world_size} / pp {p.pp}", stage, f"ep {p.ep} * etp {p.etp}", expert),
        *_must_divide(batch, "global_batch_size", training.global_batch_size, step_text, step),
    ]


def check_world_size(config: RunConfig, world_size: int) -> None:
    """Refuse a number of ranks that the degrees or the batch do not fit.

    Raises:
        TopologyError: with the arithmetic of every misfit.
    """
    todo = "start another number of ranks, or change parallel.* or the batch sizes"
    what = f"The configuration does not fit world size {world_size}:"
    raise_all(_world_problems(config, world_size), todo=todo, kind=TopologyError, title=what)
