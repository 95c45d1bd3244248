"""Adam's moments of every parameter, whatever ZeRO did with them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from megamoe.training.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
"""First and second, by torch's names."""


def full_moments(engine: Engine) -> Iterator[tuple[str, str, Tensor]]:
    """(parameter, moment, value) of what this rank trains with AdamW, gathered over ZeRO shards one at a time.

    Collective: all ranks iterate to the end, after at least one optimizer step. Names, order and parts are those of
    `Engine.full_weights`. The tensors of ZeRO-0 are the optimizer's own, so copy what is kept. Matrices that Muon
    trains are left out.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    stage = engine.config.parallel.zero_stage
    if stage in (1, 2):
        _link_all_groups(engine)
    for name, _ in engine.full_weights():
        parameter = engine.parameter(name)
        if not parameter.requires_grad or getattr(parameter, "use_muon", False):
            continue
        for moment in MOMENTS:
            if stage == 0:
                yield name, moment, engine.optimizer.state[parameter][moment]
            else:
                yield name, moment, safe_get_full_optimizer_state(parameter, moment)


def _link_all_groups(engine: Engine) -> None:
    """ZeRO-1 and -2 link states to parameters after the step of the first group: those of later ones stay unknown."""
    optimizer = engine._engine.optimizer
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()
