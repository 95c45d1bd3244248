"""A whole study through its command: two arms, two seeds, cost on two ranks, and a page with pictures."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from megamoe.testing.configs import TINY
from megamoe.testing.launches import command, launch, outcome, started
from megamoe.testing.runs import WORDS, Run, prepared_run
from megamoe.training.checkpoint import folder as folders

pytestmark = pytest.mark.slow

PLAN = """\
title: Small
question: Is it all there?
config: [base.yaml]
baseline: topk
arms:
  topk: {label: top-k, set: [moe.capacity.mode=static, moe.capacity.drop=position]}
  etr: {label: ETR, set: [moe.router.type=resonance, moe.capacity.mode=etr_success], why: ours}
seeds: [5, 6]
curves: [capacity, misranking]
cost: {ranks: 2, set: [parallel.ep=2], steps: 1, rounds: 2}
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("study")
    (folder / "base.yaml").write_text("parallel: {ep: 1, zero_stage: 0}\n")
    (folder / "study.yaml").write_text(PLAN)
    settings = [*TINY, *prepared_run(folder, "training.steps=4", "training.schedule.warmup_steps=1")]
    # The study gives each run a folder of its own.
    settings = [word for word in settings if not word.startswith("training.output_dir=")]
    return ["study", str(folder / "study.yaml"), "--runs", str(folder / "runs"), *settings]


def test_a_study_from_its_file_to_its_page(words: list[str]) -> None:
    done = launch("python", "megamoe/__main__.py", words, timeout=300)
    assert done.returncode == 0, done.output
    runs = Path(words[3])
    results = json.loads((runs / "results.json").read_text())
    assert results["missing"] == []
    etr = results["arms"]["etr"]
    assert etr["differences"]["validation_loss"]["seeds"] == 2
    assert etr["cost"]["step_time"]["median"] > 0
    # Two ranks swap rows: twice the slots of the experts elsewhere, with one weight each on the way there.
    assert etr["cost"]["metrics"]["sent_bytes"] > 0
    assert set(etr["curves"]) == {"capacity", "misranking"}
    assert results["arms"]["topk"]["means"]["calinski_harabasz"]["seeds"] == 2
    page = (runs / "results.md").read_text()
    for picture in ("differences", "cost_against_loss", "loss", "curve_capacity"):
        assert f"]({picture}.svg)" in page
        assert (runs / f"{picture}.svg").stat().st_size > 1000

    again = launch("python", "megamoe/__main__.py", [*words, "--phase", "train"], timeout=120)
    assert again.returncode == 0, again.output
    assert "4 runs, 4 of them complete already" in again.output

    other = launch("python", "megamoe/__main__.py", [*words, "moe.top_k=1", "--phase", "train"], timeout=120)
    assert other.returncode == 2, other.output
    assert "holds runs with other settings" in other.output


@pytest.mark.thorough
def test_a_study_that_fine_tunes(tmp_path: Path) -> None:
    """One model is pretrained and both arms start from it; with another start, what was made of it counts no more."""
    (tmp_path / "base.yaml").write_text("parallel: {ep: 1, zero_stage: 0}\n")
    lines = [{"prompt": f"{word}?", "completion": "yes" if len(word) > 4 else "no"} for word in WORDS]
    for name in ("learn", "ask"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    prepared = prepared_run(tmp_path, "training.steps=2", "training.schedule.warmup_steps=1")
    source = {"name": "words", "path": str(tmp_path / "learn.jsonl"), "validation": str(tmp_path / "ask.jsonl")}
    tuning = {"data": {"seq_length": 64}, "training": {"steps": 3, "micro_batch_size": 2, "global_batch_size": 4}}
    tuning |= {"parallel": {"zero_stage": 0}, "finetune": {"checkpoint": "set for each seed", "sources": [source]}}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(tuning))
    plan = {
        "title": "Small",
        "question": "Is it all there?",
        "start": {"config": ["base.yaml"], "set": [*TINY, *(w for w in prepared if "output_dir" not in w)]},
        "config": ["tune.yaml"],
        "baseline": "plain",
        "judge": "exact_match",
        "arms": {"plain": {"label": "plain"}, "gw": {"label": "GW-MoE", "set": ["moe.broadcast={max_share: 0.5}"]}},
        "seeds": [5],
        "measures": ["exact_match", "validation_loss", "broadcast_share", "sensitivity", "step_time"],
        "cost": {"ranks": 1, "steps": 1, "rounds": 2},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(plan))
    words = ["study", str(tmp_path / "study.yaml"), "--runs", str(tmp_path / "runs")]
    done = launch("python", "megamoe/__main__.py", words, timeout=300)
    assert done.returncode == 0, done.output
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    gw, page = results["arms"]["gw"], (tmp_path / "runs" / "results.md").read_text()
    for name in (
        "exact_match.words",
        "sensitivity",
        "sensitivity_random",
        "replaced_share",
        "agreement",
        "broadcast_share",
    ):
        assert gw["means"][name]["seeds"] == 1, name
    assert gw["means"]["broadcast_share"]["mean"] > 0
    assert gw["cost"]["step_time"]["median"] > 0
    assert "| words |" in page

    plan["start"]["set"].append("training.optimizer.lr=1e-3")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(plan))
    other = launch("python", "megamoe/__main__.py", [*words, "--phase", "train"], timeout=120)
    assert other.returncode == 2, other.output
    assert "runs/start/seed_5" in other.output


def test_a_failing_run_is_shown_and_the_others_go_on(words: list[str], tmp_path: Path) -> None:
    """One arm's folder cannot be written, because a file is in its place."""
    (tmp_path / "etr").write_text("in the way")
    arguments = [*words[:2], "--runs", str(tmp_path), *words[4:], "--seeds", "1", "--phase", "train"]
    failed = launch("python", "megamoe/__main__.py", arguments, timeout=120)
    assert failed.returncode == 1, failed.output
    assert "FAILED: etr seed 5: could not be started" in failed.output
    assert "topk seed 5 done" in failed.output


def test_an_interrupted_study_leaves_no_process_and_can_go_on(words: list[str], tmp_path: Path) -> None:
    """A run that would not end by itself saves and leaves when the study is asked to stop."""
    arguments = [*words[:2], "--runs", str(tmp_path / "runs"), *words[4:], "training.steps=100000"]
    arguments += ["training.checkpoint.every=0", "training.validation.every=0", "--jobs", "1", "--phase", "train"]
    run = Run((), tmp_path / "runs" / "topk" / "seed_5")
    with started(command("python", "megamoe/__main__.py", arguments), tmp_path / "out") as process:
        wait_until(lambda: len(run.metrics()) >= 3, process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        ended = outcome(process, tmp_path / "out", 90)
    assert ended.returncode == 130, ended.output
    assert [child for child in children if child.is_running() and "pretrain.py" in str(child.cmdline())] == []
    assert [path.name for path in folders.complete(run.folder)] == [folders.final_name(run.metrics()[-1]["step"])]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 90.0) -> None:
    """Look again and again, as long as the process lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the study ended by itself"
        assert time.monotonic() < deadline, f"nothing happened within {seconds} s"
        time.sleep(0.05)
