"""Bad input ends in one clear error: what, got, expected, to do; exit code 2, no traceback, and nothing lost."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from megamoe.testing.launches import Launcher, command, launch, one_error, outcome, run_script, started
from megamoe.testing.runs import Run

PRETRAIN, EVALUATE, GENERATE = (f"launch/{name}.py" for name in ("pretrain", "evaluate", "generate"))
LAST, BEFORE = "step_00000010", "step_00000005"
PREPARE = "python -m megamoe data prepare"


def refused(run: Run, *words: str, ranks: int = 2) -> str:
    """The one error of a start of this run with more words, which changes nothing in the run's folder."""
    before = run.content()
    text = one_error(*run_script(PRETRAIN, [*run.words, *words], ranks))
    assert run.content() == before, "a start that is refused changed the run"
    return text


def assert_says(text: str, *parts: str) -> None:
    assert not [part for part in parts if part not in text], text


# --- configuration and topology


@pytest.mark.parametrize(
    "words, says",
    [
        (("training.stepz=3",), ("training.stepz", "did you mean training.steps?")),
        (("modle.hidden_size=3", "moe.num_expert=4"), ("2 problems", "did you mean model?", "moe.num_experts?")),
        (("training.steps=ten",), ("training.steps", "ten")),
        (("parallel.ep=3",), ("8 experts do not divide over parallel.ep 3", "8 % 3 = 2")),
        (("--config", "configs/no_such.yaml"), ("no file configs/no_such.yaml",)),
        (("--deepspeed_config", "ds.json"), ("--deepspeed_config ds.json", "deepspeed_extra")),
    ],
    ids=["misspelt_key", "all_at_once", "wrong_type", "experts_over_ep", "no_such_file", "deepspeed_config"],
)
def test_configuration(prepared: Run, words: tuple[str, ...], says: tuple[str, ...]) -> None:
    outcomes = run_script(PRETRAIN, [*prepared.words, *words])
    text = one_error(*outcomes)
    assert text.startswith("ConfigError")
    assert_says(text, *says)


@pytest.mark.parametrize(
    "ranks, words, says",
    [
        (1, (), ("does not fit world size 1", "parallel.ep: world size 1")),
        (1, ("parallel.ep=1", "training.global_batch_size=8", "parallel.ep=4"), ("world size 1", "% 4 = 1")),
        (1, ("--dry-run",), ("world size 1",)),
    ],
    ids=["ep_2_on_1", "ep_4_on_1", "dry_run"],
)
def test_world_size(prepared: Run, ranks: int, words: tuple[str, ...], says: tuple[str, ...]) -> None:
    text = one_error(*run_script(PRETRAIN, [*prepared.words, *words], ranks))
    assert text.startswith("TopologyError")
    assert_says(text, *says)


# --- data


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "validation.bin"])
@pytest.mark.parametrize("damage, says", [(Path.unlink, "is missing"), (halved, "is truncated")])
def test_token_files(prepared: Run, tmp_path: Path, name: str, damage: Callable[[Path], None], says: str) -> None:
    data = copied_data(prepared, tmp_path)
    damage(data / "small" / name)
    words = [*prepared.words, f"data.prepared_dir={data}", "parallel.ep=1"]
    assert_says(one_error(*run_script(PRETRAIN, words)), "DataError", f"small/{name} {says}", f"{PREPARE}")


def test_data_that_was_not_prepared(prepared: Run, tmp_path: Path) -> None:
    words = [*prepared.words, f"data.prepared_dir={tmp_path / 'nothing'}", "parallel.ep=1"]
    assert_says(one_error(*run_script(PRETRAIN, words)), "DataError", "holds no prepared data", PREPARE)


def test_another_vocabulary(prepared: Run, tmp_path: Path) -> None:
    words = [*prepared.words, "parallel.ep=1", "model.vocab_size=384", "data.tokenizer.vocab_size=330"]
    text = one_error(*run_script(PRETRAIN, words))
    assert_says(text, "DataError", "got: data.tokenizer.vocab_size=320", "expected: data.tokenizer.vocab_size=330")


def test_another_tokenizer(prepared: Run, tmp_path: Path) -> None:
    data = copied_data(prepared, tmp_path)
    flipped(data / "tokenizer.model")
    words = [*prepared.words, f"data.prepared_dir={data}", "parallel.ep=1"]
    text = one_error(*run_script(PRETRAIN, words))
    assert_says(text, "DataError", "not the tokenizer that the data was made with", "got: sha256", "expected: sha256")


def test_an_empty_corpus(prepared: Run, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "empty.txt").write_text("")
    words = [f"data.sources=[{{name: small, path: {tmp_path / 'corpus'}}}]", f"data.prepared_dir={tmp_path / 'data'}"]
    text = one_error(*run_script("megamoe/__main__.py", ["data", "prepare", *prepared.words, *words]))
    assert_says(text, "DataError", "'small' holds no text", "1 files, 1 empty")
    assert not (tmp_path / "data").exists()


def copied_data(run: Run, tmp_path: Path) -> Path:
    shutil.copytree(run.folder.parent / "data", tmp_path / "data")
    return tmp_path / "data"


# --- resuming


@pytest.mark.parametrize(
    "words, says",
    [
        (("model.hidden_size=64",), ("another architecture", "model.hidden_size: 32 -> 64")),
        (("moe.num_experts=4",), ("another architecture", "moe.num_experts: 8 -> 4")),
        (("moe.router.type=resonance",), ("another architecture", "moe.router.type: 'topk' -> 'resonance'")),
        (("training.precision=bf16",), ("trained another way", "precision: fp32 -> bf16")),
        (("training.checkpoint.resume=never",), ("holds checkpoints already", "resume=never", "output_dir")),
        (("training.checkpoint.resume=atuo",), ("neither one of its words nor a folder", "did you mean auto?")),
        (("training.checkpoint.resume=no/such",), ("no/such is not a complete checkpoint", "no such folder")),
        (("training.checkpoint.resume=tests",), ("tests is not a complete checkpoint", "no manifest.json")),
    ],
    ids=["width", "experts", "router", "precision", "never", "slip", "no_folder", "no_checkpoint"],
)
def test_a_checkpoint_that_does_not_fit(trained: Run, words: tuple[str, ...], says: tuple[str, ...]) -> None:
    assert_says(refused(trained, *words), "CheckpointError", *says)


def test_resume_must_find_a_checkpoint(prepared: Run, tmp_path: Path) -> None:
    run = prepared.elsewhere(tmp_path / "fresh")
    text = one_error(*run_script(PRETRAIN, [*run.words, "training.checkpoint.resume=must"], ranks=2))
    assert_says(text, "CheckpointError", f"no complete checkpoint in {run.checkpoints}", "resume=must")
    assert run.content() == {}


def test_an_output_folder_that_is_a_file(prepared: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/run"):
        words = [*prepared.words, f"training.output_dir={tmp_path / place}"]
        text = one_error(*run_script(PRETRAIN, words, ranks=2))
        assert_says(text, "ConfigError", f"training.output_dir = {tmp_path / place}", "choose another")
    assert (tmp_path / "file").read_text() == "mine"


def manifest_with(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return damage


SOME = "state/rank_00000.safetensors"
DAMAGES = {
    "flipped": ("state/rank_00000.safetensors", flipped, "does not match its digest"),
    "truncated": ("state/rank_00001.safetensors", halved, "bytes, expected"),
    "index": ("index.json", flipped, "does not match its digest"),
    "deleted": ("ranks/rank_00001.json", Path.unlink, "ranks/rank_00001.json is missing"),
    "manifest_cut": ("manifest.json", halved, "manifest.json cannot be read"),
    "manifest_key": (
        "manifest.json",
        manifest_with(lambda v: v.pop("topology")),
        "manifest.json cannot be read: topology",
    ),
    "manifest_entry": ("manifest.json", manifest_with(lambda v: v["files"].update(x={"bytez": 1})), "files.x.bytes"),
}


@pytest.mark.parametrize("name, damage, says", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint(trained: Run, name: str, damage: Callable[[Path], None], says: str) -> None:
    """Named, it is an error that offers the one before; else the run goes on from that one, by itself."""
    damage(trained.checkpoints / LAST / name)
    text = refused(trained, f"training.checkpoint.resume={trained.checkpoints / LAST}")
    way_back = f"training.checkpoint.resume={trained.checkpoints / BEFORE}"
    assert_says(text, "DamagedCheckpointError", f"{trained.checkpoints / LAST} is damaged", says, way_back)


def test_the_newest_sound_checkpoint_is_taken_and_the_damaged_one_replaced(trained: Run) -> None:
    losses = [line.get("loss") for line in trained.metrics()]
    flipped(trained.checkpoints / LAST / SOME)
    outcomes = run_script(PRETRAIN, trained.words, ranks=2)
    assert [outcome.returncode for outcome in outcomes] == [0, 0]
    assert f"{trained.checkpoints / LAST} is damaged: the content of {SOME}" in outcomes[0].stderr
    assert f"resumed from {trained.checkpoints / BEFORE}" in outcomes[0].stderr
    assert [line.get("loss") for line in trained.metrics()] == losses, "steps 6 to 10 are the same again"
    assert (trained.checkpoints / f"damaged_{LAST}" / "manifest.json").is_file(), "for a person to look at"
    assert [o.returncode for o in run_script(PRETRAIN, trained.words, ranks=2)] == [0, 0], "step 10 is whole again"


def test_only_a_whole_checkpoint_is_offered(trained: Run) -> None:
    halved(trained.checkpoints / BEFORE / "manifest.json")
    flipped(trained.checkpoints / LAST / SOME)
    text = refused(trained)
    assert_says(text, "none of the 2 checkpoints is sound", f"{trained.checkpoints / BEFORE}: manifest.json", SOME)
    # The person does as told.
    (trained.checkpoints / LAST).rename(trained.checkpoints / f"{LAST}.damaged")
    assert_says(refused(trained), f"{trained.checkpoints / BEFORE} is damaged", "no older checkpoint")
    (trained.checkpoints / BEFORE).rename(trained.checkpoints / f"{BEFORE}.damaged")
    assert [o.returncode for o in run_script(PRETRAIN, trained.words, ranks=2)] == [0, 0], "it starts again"


# --- evaluate and generate


@pytest.mark.parametrize("script", [EVALUATE, GENERATE])
def test_no_checkpoint_to_open(script: str, tmp_path: Path) -> None:
    for folder, says in ((tmp_path / "none", "no such folder"), (tmp_path, "no manifest.json")):
        text = one_error(*run_script(script, ["--checkpoint", str(folder)]))
        assert_says(text, f"CheckpointError: {folder} is not a complete checkpoint", says, "step_00000100")
    (tmp_path / "checkpoints" / ".incomplete-step_00000005").mkdir(parents=True)
    text = one_error(*run_script(script, ["--checkpoint", str(tmp_path)]))
    assert_says(text, f"no complete checkpoint in {tmp_path / 'checkpoints'}", "interrupted", "launch/pretrain.py")


@pytest.mark.parametrize("script", [EVALUATE, GENERATE])
def test_a_damaged_checkpoint_is_not_opened(trained: Run, script: str) -> None:
    flipped(trained.checkpoints / LAST / SOME)
    text = one_error(*run_script(script, ["--checkpoint", str(trained.folder)], ranks=2))
    assert_says(text, f"{LAST} is damaged", SOME, str(trained.checkpoints / BEFORE))


@pytest.mark.parametrize(
    "script, words, says",
    [
        (GENERATE, ("--temperature", "-1"), ("--temperature", "got: -1.0", "expected: 0 or more")),
        (GENERATE, ("--temperature", "nan"), ("--temperature", "got: nan")),
        (GENERATE, ("--top-p", "0"), ("--top-p", "got: 0.0")),
        (GENERATE, ("--samples", "0"), ("--samples", "got: 0")),
        (EVALUATE, ("--batch-size", "0"), ("--batch-size", "got: 0")),
        (EVALUATE, ("--documents", "-1"), ("--documents", "got: -1")),
        (EVALUATE, ("--out", "no/such/folder.json"), ("--out", "mkdir -p no/such")),
        (EVALUATE, ("data.prepared_dir=no/such",), ("DataError", "no/such holds no prepared data")),
    ],
)
def test_arguments_of_evaluate_and_generate(
    trained: Run, script: str, words: tuple[str, ...], says: tuple[str, ...]
) -> None:
    assert_says(one_error(*run_script(script, ["--checkpoint", str(trained.folder), *words])), *says)


# --- the same through real launchers, which pass the exit code on


def assert_one_error_of(launcher: Launcher, words: list[str], *says: str) -> None:
    assert_says(one_error(launch(launcher, PRETRAIN, words, ranks=2, timeout=60)), *says)


def test_a_misspelt_key_with_plain_python(prepared: Run) -> None:
    assert_one_error_of("python", [*prepared.words, "training.stepz=3"], "did you mean training.steps?")


def test_a_world_size_that_does_not_fit_under_deepspeed(prepared: Run) -> None:
    """Every rank finds this by itself, and still it is said once."""
    words = [*prepared.words, "parallel.ep=4", "training.global_batch_size=6"]
    says = ("TopologyError", "world size 2 / pp 1 = 2 does not divide by ep 4", "6 % 4 = 2")
    assert_one_error_of("deepspeed", words, *says)


def test_a_damaged_checkpoint_under_deepspeed(trained: Run) -> None:
    flipped(trained.checkpoints / LAST / "ranks" / "rank_00001.json")
    before = trained.content()
    words = [*trained.words, f"training.checkpoint.resume={trained.checkpoints / LAST}"]
    assert_one_error_of("deepspeed", words, f"{LAST} is damaged", str(trained.checkpoints / BEFORE))
    assert trained.content() == before


def test_a_port_in_use(prepared: Run, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        words = command("deepspeed", PRETRAIN, prepared.words, ranks=2, port=port)
        with started(words, tmp_path) as process:
            text = one_error(outcome(process, tmp_path, timeout=60))
    assert_says(text, "TopologyError: The ranks could not meet.", str(port), "--master_port")
