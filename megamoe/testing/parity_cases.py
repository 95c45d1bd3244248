"""Which trainings `python -m megamoe parity` compares: layouts by ZeRO stages, routers, capacities and precisions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import lcm
from typing import Any, NamedTuple

from megamoe.common.errors import ConfigError, MegamoeError
from megamoe.config.load import load_config
from megamoe.config.rules import check_world_size
from megamoe.config.run import RunConfig
from megamoe.parallel.topology import Topology
from megamoe.testing.parity_topologies import Layout, degree_words

CONDITIONS = (
    # AdamW divides by the root of the second moment: with a tiny epsilon, rounding noise by rounding noise.
    "training.optimizer.eps=1e-5",
    # Weights move by full steps from the first one on.
    "training.schedule.type=constant",
    "training.schedule.warmup_steps=0",
)
"""Laid over the user's files and below their overrides."""


class Setting(NamedTuple):
    """What one process and a layout have in common."""

    router: str
    capacity: str
    precision: str

    @property
    def words(self) -> tuple[str, ...]:
        """The setting as overrides."""
        return (
            f"moe.router.type={self.router}",
            f"moe.capacity.mode={self.capacity}",
            f"training.precision={self.precision.split()[0]}",
        )


@dataclass(frozen=True)
class Case:
    """One training that is compared with one process."""

    layout: Layout
    zero_stage: int
    setting: Setting
    config: RunConfig | None
    """None: refused."""
    refusal: str = ""

    def __str__(self) -> str:
        return f"{self.layout.name}, zero {self.zero_stage}, {', '.join(self.setting)}"


@dataclass(frozen=True)
class Plan:
    """All of them, and what they are compared with."""

    cases: list[Case]
    references: dict[Setting, RunConfig]
    """Of one process, without ZeRO but for bf16, for which that is refused."""
    steps: int

    def runnable(self) -> list[Case]:
        """The cases that the configuration does not refuse."""
        return [case for case in self.cases if case.config is not None]


@dataclass(frozen=True)
class Wanted:
    """What the user asked for."""

    layouts: Sequence[Layout]
    zero_stages: Sequence[int]
    settings: Sequence[Setting]
    steps: int
    files: Sequence[str] = ()
    overrides: Sequence[str] = ()

    def config(self, *words: str) -> RunConfig:
        """Their model with more overrides."""
        base = {} if self.files else small_model(self.layouts)
        return load_config(self.files, [*CONDITIONS, *self.overrides, *words], base)


def make_plan(wanted: Wanted) -> Plan:
    """Every combination, with its configuration or the reason why that refuses it.

    Raises:
        ConfigError: the user's own files or overrides are wrong, with whatever they are combined.
    """
    references, refusals = _references(wanted)
    cases = [
        _case(wanted, layout, stage, setting, refusals.get(setting, ""))
        for layout, stage, setting in product(wanted.layouts, wanted.zero_stages, wanted.settings)
    ]
    needed = {case.setting for case in cases if case.config is not None}
    needed |= {each for setting in needed for each in (*one_process_of(setting), in_fp32(setting))}
    return Plan(cases, {setting: config for setting, config in references.items() if setting in needed}, wanted.steps)


def in_fp32(setting: Setting) -> Setting:
    """The same in fp32."""
    return setting._replace(precision="fp32")


BF16 = ("bf16", "bf16 at zero 2", "bf16 at zero 3")
"""One process three times, whose sums are rounded in other places: how far it is from fp32 is a matter of chance, since
rounding decides which tokens go elsewhere."""


def one_process_of(setting: Setting) -> list[Setting]:
    """The one process of a setting; in bf16 there are three."""
    return [setting._replace(precision=each) for each in BF16] if setting.precision == "bf16" else [setting]


def _references(wanted: Wanted) -> tuple[dict[Setting, RunConfig], dict[Setting, str]]:
    """One process for every setting, and the reasons of those that are refused."""
    configs: dict[Setting, RunConfig] = {}
    refusals: dict[Setting, str] = {}
    errors: list[MegamoeError] = []
    settings = (each for setting in wanted.settings for each in (in_fp32(setting), *one_process_of(setting)))
    for setting in dict.fromkeys(settings):
        stage = BF16.index(setting.precision) + 1 if setting.precision in BF16 else 0
        alone = (*degree_words(Topology(1)), f"parallel.zero_stage={stage}", "parallel.offload_optimizer=false")
        try:
            configs[setting] = wanted.config(*setting.words, *alone, "parallel.offload_parameters=false")
        except MegamoeError as error:
            refusals[setting] = reason(error)
            errors.append(error)
    if not configs:
        raise ConfigError(errors[0].what, todo="correct the files or overrides, or choose another router or capacity")
    return configs, refusals


def _case(wanted: Wanted, layout: Layout, stage: int, setting: Setting, refusal: str) -> Case:
    if refusal:
        return Case(layout, stage, setting, None, refusal)
    try:
        config = wanted.config(*setting.words, *degree_words(layout.topology), f"parallel.zero_stage={stage}")
        check_world_size(config, layout.ranks)
    except MegamoeError as error:
        return Case(layout, stage, setting, None, reason(error))
    return Case(layout, stage, setting, config)


def reason(error: MegamoeError) -> str:
    """A refusal as one line: its problems without the heading that counts them."""
    heading, *problems = error.what.splitlines()
    # Without their numbers, and without the place where the value was set: by us.
    said = (re.sub(r"^\s*\d+\. | \([\w.]+=[^()]*\)$", "", problem) for problem in problems)
    return "; ".join(said) or heading


def small_model(layouts: Sequence[Layout]) -> dict[str, Any]:
    """Values of a model that every kind of parallelism has something to cut of, and that trains in a blink.

    A dense block, then MoE blocks with a shared expert, at least one for each pipeline stage; grouped-query attention;
    a tied embedding. All widths divide by 8 and by the degrees of the layouts, and so do the micro-batches by dp.
    """
    topologies = [layout.topology for layout in layouts]
    parts = lcm(8, *(t.tp * t.cp for t in topologies), *(t.etp for t in topologies))
    experts = lcm(8, *(t.ep for t in topologies))
    head_size = 4 * -(-experts // (8 * parts))  # a model at least as wide as it has experts
    model = {
        "num_layers": 1 + max(2, *(t.pp for t in topologies)),
        "hidden_size": 2 * parts * head_size,
        "num_heads": 2 * parts,
        "num_kv_heads": parts,
        "ffn_size": 8 * parts,
        "vocab_size": 40 * parts,
    }
    moe = {
        "num_experts": experts,
        "expert_ffn_size": 3 * parts,
        "first_k_dense": 1,
        "num_shared_experts": 1,
        # So that bounds which follow training do so within a few steps.
        "capacity": {"momentum": 0.5, "tile": 4},
    }
    training = {
        "micro_batch_size": 2,
        "global_batch_size": 2 * lcm(4, *(t.dp for t in topologies)),
        # Below the norm of this model's gradients, so that clipping is active.
        "gradient_clipping": 0.3,
        "timeout_minutes": 2.0,
    }
    data = {"seq_length": 4 * parts, "tokenizer": {"vocab_size": 40 * parts}}
    return {"model": model, "moe": moe, "training": training, "data": data}


def list_settings(routers: Sequence[str], capacities: Sequence[str], precisions: Sequence[str]) -> list[Setting]:
    """Every router with every capacity and precision."""
    return list(dict.fromkeys(Setting(*each) for each in product(routers, capacities, precisions)))
