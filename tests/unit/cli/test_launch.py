"""The command line that the training scripts share."""

import pytest

from megamoe.cli.launch import launch
from megamoe.config.load import load_config
from megamoe.config.run import RunConfig
from megamoe.testing.configs import TINY


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], ()),
        (["--trace", "5"], (5,)),
        (["--trace", "5", "training.steps=20", "--trace", "7"], (5, 7)),
        (["training.trace_steps=[3]"], (3,)),
        (["training.trace_steps=[3]", "--trace", "5"], (5,)),
    ],
)
def test_steps_to_trace(words: list[str], expected: tuple[int, ...]) -> None:
    started: list[RunConfig] = []

    def start(config: RunConfig, world_size: int) -> int:
        started.append(config)
        return 0

    assert launch("about", load_config, start, [*TINY, *words]) == 0
    assert started[0].training.trace_steps == expected


def test_a_step_is_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launch("about", load_config, lambda config, world_size: 0, ["--trace", "last"])
    assert "argument --trace: invalid int value: 'last'" in capsys.readouterr().err
