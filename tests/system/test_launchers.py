"""One run under every launcher: the same numbers, the same run folder, and a terminal that shows the run alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megamoe.testing.launches import Launcher, Outcome, launch, run_script
from megamoe.testing.runs import TIMING, Run

PRETRAIN = "launch/pretrain.py"
# What cannot be equal in two runs: the clock.
MONITORS = ("training.monitor.tensorboard=true", "training.monitor.wandb.enabled=true")


@pytest.fixture(scope="module")
def launched(prepared: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[Launcher, tuple[Run, Outcome]]:
    """The same run under each launcher; alone as one process with monitors on, and the same global batch."""
    folder = tmp_path_factory.mktemp("launched")
    runs: dict[Launcher, tuple[Run, int]] = {
        "deepspeed": (prepared.elsewhere(folder / "deepspeed"), 2),
        "torchrun": (prepared.elsewhere(folder / "torchrun"), 2),
        "python": (prepared.elsewhere(folder / "python", "parallel.ep=1", *MONITORS), 1),
    }
    # `--deepspeed` is what scripts pass that were written for DeepSpeed; `--local_rank` comes from its launcher.
    results = {name: launch(name, PRETRAIN, ["--deepspeed", *run.words], ranks) for name, (run, ranks) in runs.items()}
    for name, result in results.items():
        assert result.returncode == 0, f"{name}:\n{result.output}"
    return {name: (runs[name][0], result) for name, result in results.items()}


def numbers(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMING} for line in run.metrics()]


def test_deepspeed_and_torchrun_give_the_same_bits(launched: dict[Launcher, tuple[Run, Outcome]]) -> None:
    one, other = (numbers(launched[name][0]) for name in ("deepspeed", "torchrun"))
    assert len(one) == 12, "ten steps and two validations"
    assert one == other


def test_one_process_trains_the_same_model(launched: dict[Launcher, tuple[Run, Outcome]]) -> None:
    """To fp32 rounding. Later a token near a tie may take another expert, so the last steps are given more room."""
    two, one = (numbers(launched[name][0]) for name in ("deepspeed", "python"))
    exact = ("loss", "cross_entropy", "balance_loss", "validation_loss")
    for names, steps, tolerance in ((exact, range(1, 6), 1e-6), (exact[:2], range(6, 11), 1e-5)):
        for name in names:
            expected = [line[name] for line in one if name in line and line["step"] in steps]
            assert expected
            found = [line[name] for line in two if name in line and line["step"] in steps]
            assert found == pytest.approx(expected, rel=tolerance), name
    for name in ("step", "consumed_samples", "consumed_tokens", "learning_rate"):
        assert [line.get(name) for line in two] == [line.get(name) for line in one], name


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "python"])
def test_the_run_folder(launched: dict[Launcher, tuple[Run, Outcome]], launcher: Launcher) -> None:
    run, _ = launched[launcher]
    assert sorted(path.name for path in run.folder.iterdir()) == [
        *("checkpoints", "config.json", "heartbeats", "logs", "metrics.jsonl", "status.json"),
    ]
    assert json.loads((run.folder / "config.json").read_text())["training"]["output_dir"] == str(run.folder)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_00000005", "step_00000010"]
    ranks = 1 if launcher == "python" else 2
    assert sorted(path.name for path in run.folder.glob("logs/*.log")) == [f"rank_{r}.log" for r in range(ranks)]


OURS = re.compile(
    r"step \d+/10  loss .* ETA \d+:\d\d"
    r"|step \d+: validation loss \d+\.\d+"
    r"|saved .*/checkpoints/step_\d+"
    r"|\d\d:\d\d:\d\d op \w+: .*"
    r"|slowest: rank \d on .*, \d+\.\d\d x the median of 2 ranks"
)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_the_terminal_shows_the_run_and_nothing_else(
    launched: dict[Launcher, tuple[Run, Outcome]], launcher: Launcher
) -> None:
    """DeepSpeed's launcher writes to standard output; standard error is the ranks' alone."""
    lines = launched[launcher][1].stderr.splitlines()
    assert len(lines) >= 14
    assert [line for line in lines if not OURS.fullmatch(line)] == []


def test_tensorboard_holds_the_curves(launched: dict[Launcher, tuple[Run, Outcome]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = launched["python"]
    events = EventAccumulator(str(run.folder / "logs" / "tensorboard")).Reload()
    expected = {line["step"]: line["cross_entropy"] for line in run.metrics() if "cross_entropy" in line}
    found = {event.step: event.value for event in events.Scalars("Train/cross_entropy")}
    assert found == pytest.approx(expected, rel=1e-6)
    assert [event.step for event in events.Scalars("Train/validation_loss")] == [5, 10]


def test_wandb_writes_below_the_run_folder(launched: dict[Launcher, tuple[Run, Outcome]]) -> None:
    run, result = launched["python"]
    (data,) = (run.folder / "logs" / "wandb").glob("offline-run-*/run-*.wandb")
    assert data.read_bytes().count(b"Train/cross_entropy") >= 10, "one value per step"
    assert "WARNING" not in result.stderr


def assert_describes(result: Outcome, run: Run, world_size: int) -> None:
    assert result.returncode == 0, result.output
    for title in ("Configuration", f"Topology of {world_size} rank", "Parameters", "Memory per rank", "DeepSpeed conf"):
        assert result.stdout.count(f"\n{title}") + result.stdout.startswith(title) == 1, (title, result.stdout)
    assert f'"output_dir": "{run.folder}"' in result.stdout
    assert '"train_micro_batch_size_per_gpu": 2' in result.stdout
    assert "active per token" in result.stdout
    assert not run.folder.exists()


def test_dry_run_with_plain_python_describes_the_fewest_ranks(prepared: Run, tmp_path: Path) -> None:
    """Launched alone it is told for as many ranks as the degrees need; nothing heavy is imported for it."""
    run = prepared.elsewhere(tmp_path / "run")
    result = launch("python", PRETRAIN, [*run.words, "--dry-run"], PYTHONPROFILEIMPORTTIME="1")
    assert_describes(result, run, 2)
    assert not re.findall(r"\| +(?:torch|deepspeed)$", result.stderr, re.MULTILINE)


def test_dry_run_under_deepspeed_speaks_once(prepared: Run, tmp_path: Path) -> None:
    run = prepared.elsewhere(tmp_path / "run")
    assert_describes(launch("deepspeed", PRETRAIN, ["--dry-run", *run.words], ranks=2), run, 2)


def test_overrides_may_stand_anywhere(prepared: Run, tmp_path: Path) -> None:
    """Also behind an option and mixed with files; the last one wins."""
    words = ["training.seed=1", "--config", "configs/tiny.yaml", "configs/moe/resonance.yaml", "training.seed=2"]
    words += ["--dry-run", "training.seed=3", "--local_rank=0", f"training.output_dir={tmp_path}"]
    (result,) = run_script(PRETRAIN, [*words, "parallel.ep=1"])
    assert result.returncode == 0, result.output
    assert '"type": "resonance"' in result.stdout
    assert '"seed": 3' in result.stdout
