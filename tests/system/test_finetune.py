"""`launch/finetune.py` from a trained run: learns answers, on any layout the same, with GW-MoE and without."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.config.load import load_config
from megamoe.model.decoder import Decoder
from megamoe.testing import assert_equal_bits
from megamoe.testing.launches import one_error, run_script
from megamoe.testing.runs import TIMING, WORDS, Run
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.reader import Reader
from megamoe.training.checkpoint.weights import load_weights

FINETUNE, PRETRAIN, EVALUATE, GENERATE = (f"launch/{n}.py" for n in ("finetune", "pretrain", "evaluate", "generate"))
BROADCAST = "moe.broadcast={quantile: 0.8, max_share: 0.2}"


def conversations(folder: Path) -> tuple[Path, Path]:
    """Two files: which word follows (prompt and completion), and the same in several turns, and plain text."""
    after = dict(pairwise(WORDS))
    pairs = [{"prompt": f"{word} then?", "completion": follower} for word, follower in after.items()]
    turns = [
        {
            "messages": [
                {"role": "system", "content": "short"},
                {"role": "user", "content": f"{word}?"},
                {"role": "assistant", "content": follower},
                {"role": "user", "content": "again?"},
                {"role": "assistant", "content": follower},
            ]
        }
        for word, follower in after.items()
    ]
    folder.mkdir()
    for name, lines in (("pairs", pairs * 3), ("chat", [*turns, {"text": " ".join(WORDS[:6])}])):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder / "pairs.jsonl", folder / "chat.jsonl"


@pytest.fixture
def tuned(trained: Run, tmp_path: Path) -> Run:
    """A fine-tuning run that is not started yet."""
    pairs, chat = conversations(tmp_path / "conversations")
    words = (
        f"finetune.checkpoint={trained.folder}",
        f"finetune.sources=[{{name: pairs, path: {pairs}}}, {{name: chat, path: {chat}}}]",
        "finetune.validation_fraction=0.2",
        "data.seq_length=64",
        "training.steps=6",
        "training.micro_batch_size=2",
        "training.global_batch_size=4",
        "training.optimizer.eps=1e-5",
        "training.validation.every=3",
        "training.checkpoint.every=3",
        "training.timeout_minutes=1",
        "parallel.zero_stage=0",
        f"training.output_dir={tmp_path / 'tuned'}",
    )
    return Run(words, tmp_path / "tuned")


def start(run: Run, *more: str, ranks: int = 2) -> list[dict[str, Any]]:
    outcomes = run_script(FINETUNE, [*run.words, f"parallel.ep={ranks}", *more], ranks=ranks)
    assert [outcome.returncode for outcome in outcomes] == [0] * ranks, outcomes
    return run.metrics()


def steps(metrics: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in metrics if name in line]


def weights(run: Run) -> dict[str, torch.Tensor]:
    reader = Reader(folders.complete(run.folder)[-1])
    return {name: reader.read(f"{kind}/{name}") for kind in ("weight", "statistic") for name in reader.names(kind)}


@pytest.mark.parametrize(
    "more",
    [
        ("moe.broadcast=null",),
        (BROADCAST,),
        (BROADCAST, "moe.capacity={mode: static, factor: 1.0, tile: 1}", "training.recompute=full"),
    ],
    ids=["plain", "broadcast", "broadcast_capacity_recomputed"],
)
def test_two_ranks_learn_what_one_does(tuned: Run, tmp_path: Path, more: tuple[str, ...]) -> None:
    """In fp64, where only rounding is left between layouts: losses over all answers, gradients, thresholds."""
    more = (*more, "training.precision=fp64")
    alone = tuned.elsewhere(tmp_path / "alone")
    one, two = start(alone, *more, ranks=1), start(tuned, *more, ranks=2)
    for name in ("cross_entropy", "gradient_norm", "validation_loss", "exact_match"):
        assert steps(two, name) == pytest.approx(steps(one, name), rel=1e-9), name
    assert steps(one, "validation_loss")[-1] < steps(one, "cross_entropy")[0], "nothing was learnt"
    if "moe.broadcast=null" in more:
        return
    assert steps(two, "layers.0.broadcast_share") == pytest.approx(steps(one, "layers.0.broadcast_share"), rel=1e-6)
    assert any(steps(one, "layers.0.broadcast_share"))
    assert min(steps(two, "layers.0.sent_bytes")) > 0


GW_WITH_CAPACITY = (BROADCAST, "moe.capacity={mode: static, factor: 1.0, tile: 1}")


@pytest.mark.parametrize(
    "more, layout, within",
    [
        ((*GW_WITH_CAPACITY, "training.precision=fp64"), ("parallel.tp=2", "training.recompute=full"), 1e-9),
        pytest.param(
            GW_WITH_CAPACITY,
            ("parallel.tp=2", "parallel.ep=1", "parallel.etp=2", "parallel.zero_stage=3"),
            1e-5,
            marks=pytest.mark.thorough,
        ),
        ((BROADCAST,), ("parallel.pp=2", "parallel.ep=1", "parallel.zero_stage=1"), 1e-5),
    ],
    ids=["tp2_ep2_recomputed", "tp2_etp2_zero3", "pp2"],
)
def test_every_layout_learns_what_one_rank_does(
    tuned: Run, tmp_path: Path, more: tuple[str, ...], layout: tuple[str, ...], within: float
) -> None:
    """Weights to start from are cut as the layout asks; rows of a conversation are on both ranks, or blocks are."""
    one = start(tuned.elsewhere(tmp_path / "alone"), *more, ranks=1)
    two = start(tuned, *more, *layout, ranks=2)
    for name in ("cross_entropy", "gradient_norm", "validation_loss", "exact_match"):
        assert steps(two, name) == pytest.approx(steps(one, name), rel=within), name
    for name in ("layers.0.broadcast_share", "layers.1.broadcast_share"):
        assert any(steps(one, name))
        assert steps(two, name) == pytest.approx(steps(one, name), rel=1e-6)


@pytest.mark.parametrize("layout", [("parallel.zero_stage=1",), ("parallel.zero_stage=3", "training.precision=bf16")])
def test_resuming_equals_the_straight_run(tuned: Run, tmp_path: Path, layout: tuple[str, ...]) -> None:
    straight = tuned.elsewhere(tmp_path / "straight")
    more = (BROADCAST, *layout)
    start(straight, *more)
    start(tuned, *more, "training.stop_after_step=3")
    start(tuned, *more)
    one, other = (
        [{k: v for k, v in line.items() if k not in TIMING} for line in r.metrics()] for r in (tuned, straight)
    )
    assert one == other
    resumed, expected = weights(tuned), weights(straight)
    for name, tensor in expected.items():
        assert_equal_bits(resumed[name], tensor, name=name)
    assert any("broadcast.threshold" in name and 0 < float(tensor) < 1 for name, tensor in expected.items())


def test_routers_stay_as_they_were_and_experts_do_not(trained: Run, tuned: Run) -> None:
    start(tuned, BROADCAST)
    before, after = weights(trained), weights(tuned)
    for name, tensor in after.items():
        if ".router." in name and "broadcast" not in name:
            assert_equal_bits(tensor, before[name], name=name)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert sum(".experts." in name for name in changed) == sum(".experts." in name for name in before)


def test_evaluation_and_generation_never_hear_of_it(tuned: Run, tmp_path: Path) -> None:
    """Bit for bit what the same weights give in a model that was never told to broadcast."""
    start(tuned, BROADCAST)
    checkpoint = folders.complete(tuned.folder)[-1]
    size = folders.read_manifest(checkpoint).architecture["model.vocab_size"]
    tokens = torch.randint(0, size, (3, 40), generator=torch.Generator().manual_seed(1))
    outputs = []
    for words in ((), ("moe.broadcast=null",)):
        model = Decoder(load_config([checkpoint / "config.json"], ["parallel.ep=1", *words]), size)
        load_weights(checkpoint, model)
        scores = model.eval()(tokens[:, :-1], tokens[:, 1:], each=True).scores
        outputs.append((scores.losses_BS, model.logits(tokens, model.new_caches())))
    for with_it, without in zip(*outputs, strict=True):
        assert_equal_bits(with_it, without)
    scores = []
    for words in ((), ("moe.broadcast=null",)):
        out = tmp_path / "scores.json"
        assert run_script(EVALUATE, ["--checkpoint", str(checkpoint), "--out", str(out), *words])[0].returncode == 0
        scores.append(out.read_text())
    assert scores[0] == scores[1]


def test_a_fine_tuned_model_answers(trained: Run, tuned: Run, tmp_path: Path) -> None:
    """At temperature 0 it writes what validation counts as an exact match."""
    answer, path = {word: "yes" if len(word) > 4 else "no" for word in WORDS}, tmp_path / "asked.jsonl"
    lines = ({"prompt": f"{word} then?", "completion": text} for word, text in answer.items())
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    same = shutil.copyfile(path, tmp_path / "asked_again.jsonl")
    source = f"finetune.sources=[{{name: pairs, path: {path}, validation: {same}, repeat: 4}}]"
    start(tuned, source, "moe.broadcast=null", "training.steps=40", "training.optimizer.lr=1e-2", ranks=1)
    known = tuned.metrics()[-1]["exact_match.pairs"]
    words = ["--checkpoint", str(tuned.folder), "--chat", "--temperature", "0", "--max-new-tokens", "12"]
    (outcome,) = run_script(GENERATE, [*words, *(part for word in answer for part in ("--prompt", f"{word} then?"))])
    answers = [part.rpartition("then?")[2].strip() for part in outcome.stdout.split("--- ")[1:]]
    right = [given == expected for given, expected in zip(answers, answer.values(), strict=True)]
    assert sum(right) / len(right) == pytest.approx(known)
    assert known > 0
    text = one_error(*run_script(GENERATE, ["--checkpoint", str(trained.folder), "--chat"]))
    assert "knows no conversations" in text


def test_epochs_decide_the_steps(tuned: Run) -> None:
    words = [word for word in tuned.words if not word.startswith("training.steps")]
    run = Run((*words, "finetune.epochs=2", "moe.broadcast=null"), tuned.folder)
    start(run, ranks=1)
    config = json.loads((run.folder / "config.json").read_text())
    rows = json.loads((run.folder / "data" / "sft.json").read_text())["summary"]["train"]["rows"]
    assert config["training"]["steps"] == -(-2 * rows // 4)
    assert run.metrics()[-1]["step"] == config["training"]["steps"]


def test_it_starts_from_the_checkpoint(trained: Run, tuned: Run) -> None:
    """At a learning rate of almost nothing, the model stays the one it starts from."""
    start(tuned, "moe.broadcast=null", "training.optimizer.lr=1e-30", "training.optimizer.weight_decay=0.0", ranks=1)
    before = {n.partition(":")[2]: t for n, t in weights(trained).items() if n.startswith("dense")}
    after = {n.partition(":")[2]: t for n, t in weights(tuned).items() if n.startswith("dense")}
    for name, tensor in before.items():
        assert_equal_bits(after[name], tensor, name=name)


# --- bad input


def refused(run: Run, *more: str, script: str = FINETUNE) -> str:
    text = one_error(*run_script(script, [*run.words, *more]))
    assert not folders.complete(run.folder)
    return text


def test_bad_lines_are_named_with_file_and_line(tuned: Run, tmp_path: Path) -> None:
    path = tmp_path / "conversations" / "pairs.jsonl"
    lines = path.read_text().splitlines()
    lines[4] = '{"prompt": "x"'
    lines[7] = '{"prompt": "x"}'
    lines[9] = '{"messages": [{"role": "user", "content": "x"}]}'
    lines[11] = '{"prompt": "x", "completion": " "}'
    path.write_text("\n".join(lines) + "\n")
    text = refused(tuned)
    assert text.startswith("DataError: 4 lines")
    for number in (5, 8, 10, 12):
        assert f"pairs.jsonl:{number}" in text
    run = tuned.elsewhere(tmp_path / "skipped", "finetune.bad_lines=skip")
    outcomes = run_script(FINETUNE, [*run.words, "moe.broadcast=null", "training.steps=1"])
    assert outcomes[0].returncode == 0, outcomes
    assert "pairs: 4 bad lines left out" in outcomes[0].output, "skipped, but not silently"


@pytest.mark.parametrize(
    "words, says",
    [
        (("finetune=null",), ("nothing to fine-tune", "finetune.checkpoint")),
        (("finetune.checkpoint=runs/none",), ("CheckpointError", "runs/none")),
        (("finetune.epochs=2",), ("given twice", "training.steps")),
        (("model.num_layers=3",), ("another architecture", "model.num_layers: 2 -> 3")),
        (("moe.router.type=resonance",), ("another architecture", "moe.router.type")),
        (("finetune.chekpoint=x",), ("did you mean finetune.checkpoint?",)),
        (("data.seq_length=8",), ("too long", "finetune.too_long=drop", "pairs.jsonl:1")),
        (("training.trainable=['*.expert.*']",), ("training.trainable", "*.expert.*", "experts")),
        (("moe.broadcast={quantile: 1.5}",), ("moe.broadcast.quantile",)),
        (("training.steps=4", "training.schedule.warmup_steps=9"), ("training.schedule.warmup_steps", "finetune.py")),
        (("moe.broadcast={top_m: 9}",), ("moe.broadcast.top_m", "moe.num_experts")),
    ],
    ids=lambda value: value[0][:28] if isinstance(value, tuple) else None,
)
def test_bad_input(tuned: Run, words: tuple[str, ...], says: tuple[str, ...]) -> None:
    text = refused(tuned, *words)
    assert not [part for part in says if part not in text], text


def test_a_damaged_start(trained: Run, tuned: Run) -> None:
    weights_file = folders.complete(trained.folder)[-1] / "state" / "rank_00000.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[len(content) // 2] ^= 1
    weights_file.write_bytes(content)
    assert "damaged" in refused(tuned)


def test_the_folder_of_another_run(trained: Run, tuned: Run, tmp_path: Path) -> None:
    """Nothing else may tell a plain fine-tuning from the pretraining that it starts from, or from another start."""
    layout = ("parallel.ep=2", "parallel.zero_stage=1", "moe.broadcast=null")
    before = trained.content()
    words = [*tuned.words, *layout, f"training.output_dir={trained.folder}", "training.steps=20"]
    text = one_error(*run_script(FINETUNE, words, ranks=2))
    assert "is of another run" in text
    assert "pretraining" in text
    assert trained.content() == before
    start(tuned, "moe.broadcast=null", "training.stop_after_step=3", ranks=1)
    other = shutil.copytree(trained.folder, tmp_path / "other")
    words = [*tuned.words, "moe.broadcast=null", f"finetune.checkpoint={other}"]
    assert "is of another run" in one_error(*run_script(FINETUNE, words))


def test_nothing_held_out_is_no_result(tuned: Run) -> None:
    metrics = start(tuned, "moe.broadcast=null", "finetune.validation_fraction=0.0", "training.steps=2", ranks=1)
    assert not [line for line in metrics if "validation_loss" in line]


def test_held_out_files_are_not_learnt(tuned: Run, tmp_path: Path) -> None:
    folder = tmp_path / "conversations"
    source = f"finetune.sources=[{{name: all, path: {folder}, validation: {folder / 'chat.jsonl'}}}]"
    text = refused(tuned, source)
    assert "held out" in text
    assert "chat.jsonl" in text


def test_pretraining_does_not_take_it(tuned: Run) -> None:
    text = refused(tuned, script=PRETRAIN)
    assert "launch/finetune.py" in text


def test_conversations_do_not_change_under_a_run(tuned: Run, tmp_path: Path) -> None:
    start(tuned, "moe.broadcast=null", "training.stop_after_step=3", ranks=1)
    path = tmp_path / "conversations" / "pairs.jsonl"
    shutil.copyfile(tmp_path / "conversations" / "chat.jsonl", path)
    text = one_error(*run_script(FINETUNE, [*tuned.words, "moe.broadcast=null"]))
    assert "not those that this run has learnt from" in text
    assert "pairs" in text
