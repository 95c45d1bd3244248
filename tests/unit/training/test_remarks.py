"""What a run says once about its routing settings: legal, but perhaps not what was meant."""

from megamoe.model.decoder import Decoder
from megamoe.testing.configs import tiny_config
from megamoe.training.job import _remarks


def remarks(*overrides: str) -> list[str]:
    config = tiny_config(*overrides)
    return _remarks(config, Decoder(config, 320))


def test_nothing_to_say() -> None:
    assert remarks() == []
    assert remarks("moe.capacity={mode: static, factor: 1.2, drop: position}") == []
    assert remarks("moe.num_experts=0") == []


def test_settings_of_a_capacity_without_one() -> None:
    assert remarks("moe.capacity={factor: 1.2, drop: random}") == [
        "moe.capacity.drop: has no effect with mode dropless",
        "moe.capacity.factor: has no effect with mode dropless",
    ]


def test_locality_where_all_experts_are_on_one_node_and_choices_that_depend_on_the_layout() -> None:
    found = remarks("moe.router={type: resonance, locality_loss: 0.01, scope: local}")
    assert [line.split(":")[0].split(" local")[0] for line in found] == [
        "moe.router.locality_loss",
        "moe.router.scope",
    ]
