"""`launch/evaluate.py` and `launch/generate.py` against plain forward passes of the same weights, on 1 and 2 ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.config.load import load_config
from megamoe.data.loader import documents
from megamoe.data.manifest import load_manifest
from megamoe.data.tokenizer import Tokenizer
from megamoe.model.decoder import Decoder
from megamoe.testing.launches import launch, one_error, run_script
from megamoe.testing.runs import Run
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.weights import load_weights

PRETRAIN, EVALUATE, GENERATE = (f"launch/{name}.py" for name in ("pretrain", "evaluate", "generate"))
PROMPTS = ("the router sends every", "each expert", "")


@pytest.fixture(scope="module")
def sharper(prepared: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 60 steps: its next token is seldom a near tie."""
    more = ("training.steps=60", "training.checkpoint.every=30", "training.validation.every=0")
    run = prepared.elsewhere(tmp_path_factory.mktemp("sharper") / "run", *more)
    outcomes = run_script(PRETRAIN, run.words, ranks=2)
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes
    return run


def model_of(checkpoint: Path) -> tuple[Decoder, Tokenizer]:
    """One process with all experts, from the weights alone."""
    config = load_config([checkpoint / "config.json"], ["parallel.ep=1"])
    model = Decoder(config, folders.read_manifest(checkpoint).architecture["model.vocab_size"])
    load_weights(checkpoint, model)
    return model.eval().requires_grad_(False), Tokenizer(checkpoint / "tokenizer.model")


def last(run: Run) -> Path:
    return folders.complete(run.folder)[-1]


# --- evaluate


def evaluated(run: Run, tmp_path: Path, *words: str, ranks: int = 1, checkpoint: Path | None = None) -> dict[str, Any]:
    out = tmp_path / "scores.json"
    words = ("--checkpoint", str(checkpoint or run.folder), "--out", str(out), *words)
    outcomes = run_script(EVALUATE, words, ranks)
    assert [outcome.returncode for outcome in outcomes] == [0] * ranks, outcomes
    assert all(outcome.stdout == "" for outcome in outcomes[1:]), "rank 0 speaks for all"
    scores: dict[str, Any] = json.loads(out.read_text())
    for name, score in scores.items():
        (row,) = (line.split() for line in outcomes[0].stdout.splitlines() if line.startswith(f"{name} "))
        assert row[1:4] == [str(score["documents"]), str(score["tokens"]), f"{score['loss']:.4f}"]
    return scores


def by_hand(run: Run, source: str, count: int | None = None) -> dict[str, float]:
    """Window after window through the training forward pass, one at a time."""
    config = load_config([last(run) / "config.json"])
    manifest = load_manifest(config.data.prepared_dir)
    model, tokenizer = model_of(last(run))
    nats, tokens, held_out = 0.0, 0, list(documents(config.data, manifest, source))[:count]
    for document in held_out:
        stream = torch.cat([torch.tensor([tokenizer.eod_id]), document])
        for start in range(0, len(document), config.data.seq_length):
            window = stream[start : start + config.data.seq_length + 1]
            loss = model(window[None, :-1], window[None, 1:]).cross_entropy
            nats, tokens = nats + float(loss) * (len(window) - 1), tokens + len(window) - 1
    return {"documents": len(held_out), "tokens": tokens, "loss": nats / tokens}


def test_equal_on_one_and_two_ranks_and_by_hand(sharper: Run, tmp_path: Path) -> None:
    one, two = (evaluated(sharper, tmp_path, ranks=ranks) for ranks in (1, 2))
    assert list(one) == ["small", "notes"]
    manifest = load_manifest(load_config([last(sharper) / "config.json"]).data.prepared_dir)
    for source, score in one.items():
        assert two[source] == pytest.approx(score, abs=1e-6, rel=1e-6)
        expected = by_hand(sharper, source)
        assert {name: score[name] for name in expected} == pytest.approx(expected, abs=1e-6)
        split = manifest.source(source).validation
        assert (score["documents"], score["tokens"]) == (split.documents, split.tokens), "all of them"
        assert score["text_bytes"] == split.text_bytes
        assert score["perplexity"] == pytest.approx(torch.tensor(score["loss"]).double().exp().item())
        assert score["bits_per_byte"] == pytest.approx(
            score["loss"] * score["tokens"] / torch.tensor(2.0).double().log().item() / split.text_bytes
        )
    assert one["small"]["loss"] != one["notes"]["loss"]


def test_batches_do_not_matter_and_documents_can_be_few(sharper: Run, tmp_path: Path) -> None:
    few = evaluated(sharper, tmp_path, "--documents", "2", "--batch-size", "3", ranks=2)
    expected = by_hand(sharper, "small", 2)
    assert {name: few["small"][name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_an_older_checkpoint_can_be_named(sharper: Run, tmp_path: Path) -> None:
    first, newest = folders.complete(sharper.folder)
    assert evaluated(sharper, tmp_path, checkpoint=newest) == evaluated(sharper, tmp_path)
    assert evaluated(sharper, tmp_path, checkpoint=first)["small"]["loss"] > by_hand(sharper, "small")["loss"]


def test_evaluate_under_deepspeed(sharper: Run, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    words = ["--checkpoint", str(sharper.folder), "--out", str(out), "--documents", "1"]
    result = launch("deepspeed", EVALUATE, words, ranks=2)
    assert result.returncode == 0, result.output
    assert result.stderr == ""
    assert result.stdout.count("held-out documents:") == 1
    found, expected = json.loads(out.read_text()), evaluated(sharper, tmp_path, "--documents", "1")
    for source in ("small", "notes"):
        assert found[source] == pytest.approx(expected[source], rel=1e-6)


# --- evaluate the routing


def routing(run: Run, out: Path, ranks: int) -> tuple[dict[str, Any], str]:
    """The numbers, and what was printed, on 8 samples in batches of 3: on two ranks one is left without any."""
    words = ["--checkpoint", str(run.folder), "--documents", "1", "--batch-size", "3", "--out", str(out)]
    outcomes = run_script(EVALUATE, [*words, "--routing", "--routing-tokens", "250"], ranks)
    assert [outcome.returncode for outcome in outcomes] == [0] * ranks, outcomes
    assert all(outcome.stdout == "" for outcome in outcomes[1:]), "rank 0 speaks for all"
    found: dict[str, Any] = json.loads(out.read_text()).pop("_routing")
    return found, outcomes[0].stdout


def test_routing_on_one_and_two_ranks(sharper: Run, tmp_path: Path) -> None:
    (one, text), (two, text_of_two) = (routing(sharper, tmp_path / "numbers.json", ranks) for ranks in (1, 2))
    assert "entropy of the routers, 256 tokens:" in text
    for alone, together in zip(one["entropy"]["blocks"], two["entropy"]["blocks"], strict=True):
        assert alone["tokens"] == sum(alone["histogram"]) == together["tokens"] == 256
        for name in ("mean", "threshold", "uncertain_share"):
            assert alone[name] == pytest.approx(together[name], rel=1e-5)
        shown = [f"{alone['mean']:.3f}", f"{alone['threshold']:.3f}", "quantile", f"{alone['uncertain_share']:.1%}"]
        assert [str(alone["block"]), *shown] in [line.split()[:5] for line in text.splitlines()]
    (loss, loss_of_two), (arms, arms_of_two) = ([of["sensitivity"][n] for of in (one, two)] for n in ("loss", "arms"))
    assert loss == pytest.approx(loss_of_two, rel=1e-6)
    for name, arm in arms.items():
        assert arm["losses"] == pytest.approx(arms_of_two[name]["losses"], rel=1e-5)
        assert arm["mean"] != loss
        assert f"{arm['mean']:.4f}" in text
    assert "(chance 0.250)" in text
    for block in one["agreement"]["blocks"]:
        assert block["uncertain"]["tokens"] + block["certain"]["tokens"] == 256
        assert f"{block['certain']['share']:.3f}" in text
    assert two["agreement"] is None
    assert "not measured, because the experts are spread over ranks" in text_of_two


def test_routing_needs_tokens(sharper: Run) -> None:
    words = ["--checkpoint", str(sharper.folder), "--routing", "--routing-tokens", "0"]
    text = one_error(*run_script(EVALUATE, words))
    assert "--routing-tokens has a value that cannot be used" in text
    assert "expected: at least 1" in text


# --- generate


def written(run: Run | Path, *words: str, ranks: int = 1, prompts: tuple[str, ...] = PROMPTS) -> str:
    """What generate prints."""
    folder = run.folder if isinstance(run, Run) else run
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    outcomes = run_script(GENERATE, ["--checkpoint", str(folder), *given, *words], ranks)
    assert [outcome.returncode for outcome in outcomes] == [0] * ranks, outcomes
    assert all(outcome.output == "" for outcome in outcomes[1:]), "rank 0 speaks for all"
    return outcomes[0].stdout


def greedy(checkpoint: Path, prompt: str, count: int) -> list[int]:
    """The likeliest next token, `count` times or up to the end of the document, without a cache."""
    model, tokenizer = model_of(checkpoint)
    tokens = [tokenizer.eod_id, *tokenizer.encode(prompt)]
    for step in range(count):
        logits_V = model.logits(torch.tensor([tokens]))[0, : tokenizer.vocab_size]
        best, second = logits_V.topk(2).values.tolist()
        assert best - second > 1e-4, f"token {step} is a near tie, which rounding may decide"
        tokens.append(int(logits_V.argmax()))
        if tokens[-1] == tokenizer.eod_id:
            break
    return tokens[1 + len(tokenizer.encode(prompt)) :]


def test_greedy_is_the_argmax_of_full_forward_passes(sharper: Run) -> None:
    _, tokenizer = model_of(last(sharper))
    expected = ""
    for prompt in PROMPTS:
        text = tokenizer.decode([t for t in greedy(last(sharper), prompt, 40) if t != tokenizer.eod_id])
        expected += f"--- {prompt!r}\n{prompt}{text}\n"
    words = ("--temperature", "0", "--max-new-tokens", "40")
    assert written(sharper, *words) == expected
    assert written(sharper, *words, ranks=2) == expected, "three prompts on two ranks"
    assert written(last(sharper), *words) == expected, "from the checkpoint's own folder"
    only_one = ("--temperature", "2", "--top-p", "1e-9", "--max-new-tokens", "40")
    assert written(sharper, *only_one) == expected, "the smallest nucleus is the likeliest token"


def test_sampling_depends_on_the_seed_alone(sharper: Run) -> None:
    words = ("--temperature", "1", "--samples", "2", "--max-new-tokens", "24")
    text = written(sharper, *words, "--seed", "1")
    assert text.count("--- ") == 6, "two continuations of each of three prompts"
    assert written(sharper, *words, "--seed", "1") == text
    assert written(sharper, *words, "--seed", "1", ranks=2) == text
    other = written(sharper, *words, "--seed", "2")
    assert other != text
    first, second = text.split("--- ")[1:3]
    assert first != second, "the two continuations are drawn apart"


def test_a_document_ends_where_its_end_token_is_written(prepared: Run, sharper: Run, tmp_path: Path) -> None:
    """Trained on documents of two words, the model ends its own soon, long before the limit."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(300):
        (corpus / f"{number:03d}.txt").write_text("the router" if number % 3 else "every expert")
    words = [
        *(f"data.sources=[{{name: short, path: {corpus}}}]", f"data.prepared_dir={tmp_path / 'data'}"),
        f"data.tokenizer.path={last(sharper) / 'tokenizer.model'}",
        *("training.steps=120", "training.checkpoint.every=0", "parallel.ep=1"),
    ]
    run = prepared.elsewhere(tmp_path / "run", *words)
    for script, first in (("megamoe/__main__.py", ["data", "prepare"]), (PRETRAIN, [])):
        (outcome,) = run_script(script, [*first, *run.words])
        assert outcome.returncode == 0, outcome.output
    _, tokenizer = model_of(last(run))
    expected, limit = "", 60
    for prompt in ("the", "every"):
        ids = greedy(last(run), prompt, limit)
        assert ids[-1] == tokenizer.eod_id
        assert len(ids) < limit / 2
        expected += f"--- {prompt!r}\n{prompt}{tokenizer.decode(ids[:-1])}\n"
    words = ("--temperature", "0", "--max-new-tokens", str(limit))
    assert written(run, *words, prompts=("the", "every")) == expected
    drawn = written(run, "--temperature", "0.7", "--max-new-tokens", str(limit), "--samples", "8", prompts=("",))
    lengths = [len(tokenizer.encode(text)) for text in drawn.split("--- ''\n")[1:]]
    assert len(lengths) == 8
    assert min(lengths) < limit / 4
    assert len(set(lengths)) > 1, "each continuation ends by itself"
