"""`python -m megamoe parity` as a user starts it: alone, under a launcher, with a wrong layout, with bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megamoe.cli import main
from megamoe.common.errors import MegamoeError
from megamoe.config.run import RunConfig
from megamoe.testing import parity
from megamoe.testing.launches import Outcome, launch, one_error
from megamoe.testing.parity_cases import Plan, Setting, Wanted, make_plan
from megamoe.testing.parity_judge import Measurement, finding_of
from megamoe.testing.parity_ranks import measure_on_this_rank, train_alone
from megamoe.testing.parity_topologies import parse
from megamoe.testing.ranks import run_ranks
from megamoe.training import engine

SHORT = ("--routers", "topk", "--steps", "2")
FP32 = Setting("topk", "dropless", "fp32")


def rows(outcome: Outcome) -> list[list[str]]:
    """The table's words by line, header first."""
    lines = outcome.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("layout"))
    body = [line.split() for line in lines[first + 1 :]]
    return [lines[first].split(), *(words for words in body if len(words) > 1 and words[1].isdigit())]


def test_alone_it_starts_the_ranks_itself(tmp_path: Path) -> None:
    words = ["megamoe", "parity", "--topologies", "dp2,ep2", "--zero", "0,1", "--capacity", "static", *SHORT]
    done = launch("python", "-m", [*words, "--output", str(tmp_path / "new" / "report.md")], timeout=300)
    assert done.returncode == 0, done.output
    header, *cases = rows(done)
    assert header[:3] == ["layout", "ranks", "zero"]
    assert [row[:3] for row in cases] == [[name, "2", zero] for name in ("dp2", "ep2") for zero in "01"]
    assert {row[header.index("verdict")] for row in cases} == {"equal"}
    assert done.stdout.splitlines()[-2] == "4 equal"
    assert "4/4  ep2, zero 1, topk, static, fp32: equal" in done.stderr
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["conditions"]["packages"]["torch"] == torch.__version__
    assert report["clipped_steps"] == {"topk, static, fp32": 2}
    errors = report["results"][0]["errors"]
    assert errors.keys() == {*parity.Tolerance().bounds()}
    assert all(0 <= error["value"] <= error["bound"] for error in errors.values())
    # Rounding, but never exactly nothing: it was another order of sums that was compared.
    assert errors["weight"]["value"] > 0
    assert errors["exp_avg_sq"]["where"]
    assert "| layout | ranks |" in (tmp_path / "new" / "report.md").read_text()


@pytest.mark.slow
def test_under_a_launcher_it_uses_its_ranks() -> None:
    """Two layouts one after the other, on the same ranks; a layout of more ranks is left out."""
    words = ["megamoe", "parity", "--topologies", "tp2,ep4,cp2-ep2", *SHORT]
    done = launch("torchrun", "-m", words, 2, timeout=300)
    assert done.returncode == 0, done.output
    header, *cases = rows(done)
    assert [row[0] for row in cases] == ["tp2", "cp2-ep2"]
    assert {row[header.index("verdict")] for row in cases} == {"equal"}
    assert "left out, because 2 ranks are there: ep4 (4 ranks)" in done.stdout


def test_a_layout_that_trains_another_model_misses() -> None:
    """Experts that choose among the tokens of all ranks choose others when there are more ranks."""
    words = ["megamoe", "parity", "--topologies", "ep2,dp2", "--routers", "resonance", "--capacity", "static"]
    done = launch("python", "-m", [*words, "--steps", "1", "moe.router.scope=ep_group"], timeout=300)
    assert done.returncode == 1, done.output
    assert [line for line in done.stdout.splitlines() if line.startswith("miss: ep2")]
    assert "no near tie" in done.stdout
    assert done.stdout.splitlines()[-1] == "1 miss, 1 equal"


def wrong_norm(config: RunConfig, steps: int, reference: parity.ParityRun) -> Measurement:
    """A layout whose rank 1 clips by a norm of its own, as DeepSpeed's ZeRO-0 does."""
    clip = engine.clip_gradients

    def clip_by_another(*args: object) -> torch.Tensor:
        norm = clip(*args)  # type: ignore[arg-type]
        for parameter in args[0]:  # type: ignore[attr-defined]
            parameter.grad.mul_(1.001 if torch.distributed.get_rank() == 1 else 1.0)
        return norm

    engine.clip_gradients = lambda parameters, *more: clip_by_another(list(parameters), *more)  # type: ignore[assignment]
    return measure_on_this_rank(config, steps, reference, True)


def test_a_defect_on_one_rank_is_found_and_named() -> None:
    plan: Plan = make_plan(Wanted([parse("dp2")], [0], [FP32], 3))
    [case] = plan.runnable()
    reference = run_ranks(train_alone, 1, plan.references[FP32], 3)[0]
    measurement = run_ranks(wrong_norm, 2, case.config, 3, reference)[0]
    finding = finding_of(case, measurement, {FP32: reference})
    assert finding.verdict == "miss"
    assert finding.errors["exp_avg"].value > 1e-4
    assert finding.errors["exp_avg"].where.endswith("rank 1")
    assert "exp_avg " in finding.note


BAD_INPUT = [
    (["--topologies", "tp2-xp4"], "'xp4'"),
    (["--topologies", "dp3-ep2"], "3 % 2 = 1"),
    (["--routers", "topk,best"], "--routers does not know 'best'"),
    (["--zero", "4"], "--zero does not know '4'"),
    (["--capacity", ""], "--capacity does not know ''"),
    (["--precision", "fp16"], "--precision does not know 'fp16'"),
    (["--steps", "0"], "at least 1"),
    (["--device", "cuda"], "started by a launcher"),
    (["training.stepz=3"], "did you mean training.steps?"),
    (["--config", "nowhere.yaml"], "no file nowhere.yaml"),
    (["--zero", "0", "--precision", "bf16"], "every case is refused"),
]


@pytest.mark.parametrize("words, says", BAD_INPUT, ids=[" ".join(words) for words, _ in BAD_INPUT])
def test_bad_input(words: list[str], says: str) -> None:
    with pytest.raises(MegamoeError) as refusal:
        main(["parity", *words])
    assert says in str(refusal.value)


def test_bad_input_ends_with_exit_code_2() -> None:
    text = one_error(launch("python", "-m", ["megamoe", "parity", "--topologies", "etpp2"], timeout=60))
    assert "did you mean etp?" in text
