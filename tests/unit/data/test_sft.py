import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megamoe.common.errors import DataError
from megamoe.config.data import DataConfig
from megamoe.config.finetune import (
    AssistantTurnConfig,
    ConversationSource,
    FinetuneConfig,
    SystemTurnConfig,
    TemplateConfig,
    UserTurnConfig,
)
from megamoe.data.batch import IGNORED, PADDING, Batch
from megamoe.data.manifest import TOKENIZER, Manifest
from megamoe.data.sft import SFTData
from megamoe.data.sft_loader import SFTLoader
from megamoe.data.sft_store import MANIFEST, open_sft, prepare_sft
from megamoe.data.staging import exclusive
from megamoe.data.tokenizer import Tokenizer

S = 96
SEED = 5
TEMPLATE = TemplateConfig(
    system=SystemTurnConfig(suffix="\n"),
    user=UserTurnConfig(prefix="Q: ", suffix="\n"),
    assistant=AssistantTurnConfig(prefix="A: ", suffix="\n"),
)


@pytest.fixture(scope="module")
def tokenizer(prepared: tuple[DataConfig, Manifest]) -> Tokenizer:
    return Tokenizer(Path(prepared[0].prepared_dir) / TOKENIZER)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`chat/`: 60 conversations in two files; `facts.jsonl`: 40 prompts; `held.jsonl`: 9 for validation."""
    root = tmp_path_factory.mktemp("conversations")
    chat = [
        {
            "messages": [
                *([{"role": "system", "content": "Short."}] if n % 3 == 0 else []),
                {"role": "user", "content": f"chat {n} " + "def " * (n % 7)},
                {"role": "assistant", "content": f"[answer {n}" + " import" * (n % 11) + "]"},
                {"role": "user", "content": "more"},
                {"role": "assistant", "content": f"[more {n}]"},
            ]
        }
        for n in range(60)
    ]
    _write(root / "chat" / "a.jsonl", chat[:25])
    _write(root / "chat" / "sub" / "b.jsonl", chat[25:])
    _write(root / "facts.jsonl", [{"prompt": f"fact {n}", "completion": f"[fact is {n}]"} for n in range(40)])
    _write(root / "held.jsonl", [{"prompt": f"held {n}", "completion": f"[held is {n}]"} for n in range(9)])
    return root


def _write(path: Path, records: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def _config(files: Path, **changes: object) -> FinetuneConfig:
    sources = (
        ConversationSource(name="chat", path=str(files / "chat")),
        ConversationSource(
            name="facts", path=str(files / "facts.jsonl"), validation=str(files / "held.jsonl"), repeat=3
        ),
    )
    values: dict[str, object] = {"sources": sources, "template": TEMPLATE, "validation_fraction": 0.2}
    return FinetuneConfig(checkpoint="runs/base", **(values | changes))  # type: ignore[arg-type]


def _one(path: Path, **changes: object) -> FinetuneConfig:
    """One source alone, all of it learnt."""
    return _config(path.parent, **({"sources": (_source(path),), "validation_fraction": 0.0} | changes))


def _source(path: Path, **changes: object) -> ConversationSource:
    return ConversationSource(name="s", path=str(path), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(files: Path, tokenizer: Tokenizer) -> SFTData:
    return SFTData.build(_config(files), tokenizer, S, SEED)


@pytest.fixture(scope="module")
def train(data: SFTData) -> SFTLoader:
    return SFTLoader(data, "train", SEED)


def _rows(loader: SFTLoader, first: int, count: int) -> Batch:
    """Some rows as one batch of one process."""
    return loader.rank_batch(first, 0, 0, 1, count, 1)


def _documents(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of every conversation in a batch."""
    assert batch.documents_BS is not None
    found = []
    for tokens, labels, documents in zip(*batch[:3], strict=True):
        count = int(documents.max()) + 1
        found += [(tokens[documents == d].tolist(), labels[documents == d].tolist()) for d in range(count)]
    return found


def _contents(data: SFTData, tokenizer: Tokenizer, split: str, source: str | None = None) -> list[str]:
    """The text of every conversation of an epoch."""
    loader = SFTLoader(data, split, SEED, source)  # type: ignore[arg-type]
    return [tokenizer.decode(tokens) for tokens, _ in _documents(_rows(loader, 0, loader.num_rows))]


# What an epoch holds


def test_every_conversation_is_learnt_as_often_as_asked_in_every_epoch(
    data: SFTData, train: SFTLoader, tokenizer: Tokenizer
):
    summary = {source.name: source for source in data.summary.sources}
    for epoch in (0, 1, 6):
        batch = _rows(train, epoch * train.num_rows, train.num_rows)
        texts = Counter(tokenizer.decode(tokens) for tokens, _ in _documents(batch))
        facts = {text: count for text, count in texts.items() if text.startswith("Q: fact")}
        assert set(facts.values()) == {3}
        assert len(facts) == summary["facts"].train.conversations == 40
        assert len(texts) - len(facts) == summary["chat"].train.conversations
        assert texts.total() == 3 * 40 + summary["chat"].train.conversations


def test_a_row_holds_its_conversations_one_after_the_other_and_then_padding(train: SFTLoader, tokenizer: Tokenizer):
    tokens_BS, labels_BS, documents_BS, _ = _rows(train, 0, train.num_rows)
    assert documents_BS is not None
    assert {tensor.dtype for tensor in (tokens_BS, labels_BS, documents_BS)} == {torch.int64}
    assert tokens_BS.shape == labels_BS.shape == documents_BS.shape == (train.num_rows, S)
    for tokens, labels, documents in zip(tokens_BS, labels_BS, documents_BS, strict=True):
        padding = documents == PADDING
        used = int((~padding).sum())
        assert not padding[:used].any()
        assert tokens[padding].eq(tokenizer.eod_id).all()
        assert labels[padding].eq(IGNORED).all()
        steps = documents[:used].diff()
        assert documents[0] == 0
        assert set(steps.tolist()) <= {0, 1}
        # Each begins with the beginning mark, and holds it nowhere else.
        begins = torch.cat([torch.ones(1, dtype=torch.bool), steps == 1])
        assert torch.equal(tokens[:used] == tokenizer.eod_id, begins)


def test_labels_are_the_next_tokens_of_the_answers(train: SFTLoader, tokenizer: Tokenizer):
    for tokens, labels in _documents(_rows(train, 0, train.num_rows)):
        following = [*tokens[1:], tokenizer.eod_id]
        assert all(label in (IGNORED, token) for label, token in zip(labels, following, strict=True))
        learnt = tokenizer.decode([label for label in labels if label != IGNORED])
        assert learnt == "".join(re.findall(r"A: (\[.*?\]\n)", tokenizer.decode(tokens)))
        assert labels[-1] == tokenizer.eod_id


def test_no_token_is_lost_or_doubled(data: SFTData, train: SFTLoader):
    batch = _rows(train, 0, train.num_rows)
    assert batch.documents_BS is not None
    used = batch.documents_BS != PADDING
    lengths = {"chat": 1, "facts": 3}
    expected = sum(source.train.tokens * lengths[source.name] for source in data.summary.sources)
    answers = sum(source.train.answer_tokens * lengths[source.name] for source in data.summary.sources)
    assert int(used.sum()) == expected
    assert int((batch.labels_BS != IGNORED).sum()) == answers
    assert data.summary.train.rows == train.num_rows == train.rows_per_epoch == data.rows_per_epoch
    assert data.summary.train.fill == pytest.approx(expected / used.numel())
    assert data.summary.train.answer_share == pytest.approx(answers / used.numel())


def test_packing_fills_rows_and_without_it_each_conversation_has_one(files: Path, tokenizer: Tokenizer, data: SFTData):
    alone = SFTData.build(_config(files, packing=False), tokenizer, S, SEED)
    assert len(alone.train.ends) == len(alone.train.members) == len(data.train.members)
    assert data.summary.train.fill > 0.85 > 0.6 > alone.summary.train.fill
    for split in ("train", "validation"):
        assert sorted(_contents(alone, tokenizer, split)) == sorted(_contents(data, tokenizer, split))
    batch = _rows(SFTLoader(alone, "train", SEED), 0, 8)
    assert batch.documents_BS is not None
    assert set(batch.documents_BS.unique().tolist()) == {0, PADDING}


@pytest.mark.parametrize("loss_on", ["answers", "all"])
def test_plain_text_is_learnt_whole_and_everything_can_be(tmp_path: Path, tokenizer: Tokenizer, loss_on: str):
    path = _write(tmp_path / "a.jsonl", [{"text": "import json"}, {"prompt": "a", "completion": "b"}])
    data = SFTData.build(_one(path, loss_on=loss_on), tokenizer, S, SEED)
    documents = _documents(_rows(SFTLoader(data, "train", SEED), 0, data.rows_per_epoch))
    ignored = {tokenizer.decode(tokens): labels.count(IGNORED) for tokens, labels in documents}
    prompt = sum(len(tokenizer.encode(text)) for text in ("Q: ", "a", "\n", "A: "))
    assert ignored == {"import json": 0, "Q: a\nA: b\n": prompt if loss_on == "answers" else 0}


# The order


@pytest.mark.parametrize("dp_size, micro_batch", [(1, 2), (2, 2), (4, 2), (1, 16), (4, 1), (2, 8), (16, 1)])
@pytest.mark.parametrize("consumed", [0, 16, 160])
def test_any_number_of_ranks_reads_the_same_samples(train: SFTLoader, consumed: int, dp_size: int, micro_batch: int):
    micro_steps = 16 // (dp_size * micro_batch)
    parts = [
        train.rank_batch(consumed, step, rank, dp_size, micro_batch, micro_steps)
        for step in range(micro_steps)
        for rank in range(dp_size)
    ]
    whole = _rows(train, consumed, 16)
    for field in range(3):
        assert torch.equal(torch.cat([part[field] for part in parts]), whole[field])


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("dp_size, micro_batch, micro_steps", [(1, 4, 1), (4, 1, 3), (2, 3, 2), (8, 2, 4)])
def test_losses_divided_by_targets_average_to_the_mean_over_all_labels(
    data: SFTData, split: str, dp_size: int, micro_batch: int, micro_steps: int
):
    loader = SFTLoader(data, split, SEED)  # type: ignore[arg-type]
    batches = [
        loader.rank_batch(0, step, rank, dp_size, micro_batch, micro_steps)
        for step in range(micro_steps)
        for rank in range(dp_size)
    ]
    assert len({batch.targets for batch in batches}) == 1
    shares = [int((batch.labels_BS != IGNORED).sum()) / batch.targets for batch in batches]
    assert sum(shares) == pytest.approx(micro_steps * dp_size)


def test_a_batch_does_not_depend_on_what_was_read_before(data: SFTData, train: SFTLoader):
    straight = _rows(train, 0, 5 * train.num_rows)
    for first in (3 * train.num_rows + 1, 0, train.num_rows - 3, train.num_rows, 7):
        again = _rows(SFTLoader(data, "train", SEED), first, 6)
        for field in range(3):
            assert torch.equal(again[field], straight[field][first : first + 6])


def test_epochs_and_seeds_have_their_own_order_of_the_same_rows(data: SFTData, train: SFTLoader):
    first, second = (_rows(train, epoch * train.num_rows, train.num_rows).tokens_BS.tolist() for epoch in (0, 1))
    other = _rows(SFTLoader(data, "train", SEED + 1), 0, train.num_rows).tokens_BS.tolist()
    assert first != second != other != first
    assert sorted(first) == sorted(second) == sorted(other)


def test_the_seed_decides_who_shares_a_row(files: Path, tokenizer: Tokenizer, data: SFTData):
    same, other = (SFTData.build(_config(files), tokenizer, S, seed) for seed in (SEED, SEED + 1))
    assert np.array_equal(same.train.members, data.train.members)
    assert not np.array_equal(other.train.members, data.train.members)
    assert np.array_equal(other.validation.members, data.validation.members)


# Validation


def test_validation_ends_with_empty_rows(data: SFTData, tokenizer: Tokenizer):
    loader = SFTLoader(data, "validation", SEED)
    whole = _rows(loader, 0, loader.num_rows)
    beyond = _rows(loader, loader.num_rows - 1, 3)
    assert torch.equal(beyond.tokens_BS[0], whole.tokens_BS[-1])
    for batch, rows in ((beyond, slice(1, 3)), (_rows(loader, 50 * loader.num_rows, 2), slice(0, 2))):
        assert batch.documents_BS is not None
        assert batch.tokens_BS[rows].eq(tokenizer.eod_id).all()
        assert batch.labels_BS[rows].eq(IGNORED).all()
        assert batch.documents_BS[rows].eq(PADDING).all()
    assert batch.targets == 1.0
    assert beyond.targets == int((beyond.labels_BS != IGNORED).sum())


def test_validation_by_source_has_the_rows_of_the_whole(data: SFTData, tokenizer: Tokenizer):
    whole = SFTLoader(data, "validation", SEED)
    parts = [SFTLoader(data, "validation", SEED + 1, source) for source in ("chat", "facts")]
    assert sum(part.num_rows for part in parts) == whole.num_rows == data.summary.validation.rows
    rows = [_rows(part, 0, part.num_rows).tokens_BS.tolist() for part in parts]
    assert sorted(rows[0] + rows[1]) == sorted(_rows(whole, 0, whole.num_rows).tokens_BS.tolist())
    texts = [_contents(data, tokenizer, "validation", source) for source in ("chat", "facts")]
    assert sorted(text.partition(" ")[0] for text in set(texts[1])) == ["Q:"] * 9
    assert all("Q: held" in text for text in texts[1])
    assert all("Q: chat" in text for text in texts[0])
    assert [len(text) for text in texts] == [source.validation.conversations for source in data.summary.sources]


def test_an_unknown_source_and_training_on_one_are_refused(data: SFTData):
    with pytest.raises(DataError, match=r"No source is called 'poems'(.|\n)*one of: chat, facts"):
        SFTLoader(data, "validation", SEED, "poems")
    with pytest.raises(ValueError, match="training"):
        SFTLoader(data, "train", SEED, "chat")


def test_the_split_stays_when_lines_move_or_are_added_and_keeps_equal_ones_together(
    tmp_path: Path, tokenizer: Tokenizer
):
    records: list[object] = [{"prompt": f"p {n}", "completion": f"c {n}"} for n in range(200)]
    few = _write(tmp_path / "few.jsonl", records[:100])
    many = _write(tmp_path / "many.jsonl", [*reversed(records), *records])
    held = []
    for path in (few, many):
        data = SFTData.build(_one(path, validation_fraction=0.2), tokenizer, S, SEED)
        train, validation = (set(_contents(data, tokenizer, split)) for split in ("train", "validation"))
        assert not train & validation
        held.append(validation)
    assert 8 <= len(held[0]) <= 35
    first_hundred = {f"Q: p {n}\nA: c {n}\n" for n in range(100)}
    assert held[0] == held[1] & first_hundred


@pytest.mark.parametrize(
    "prompts, fraction, train, validation",
    [("ab", 0.0001, 1, 1), ("ab", 0.9999, 1, 1), ("ab", 0.0, 2, 0), ("a", 0.5, 1, 0), ("aaa", 0.5, 3, 0)],
)
def test_both_splits_get_something_where_that_is_possible(
    tmp_path: Path, tokenizer: Tokenizer, prompts: str, fraction: float, train: int, validation: int
):
    path = _write(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": "x"} for prompt in prompts])
    data = SFTData.build(_one(path, validation_fraction=fraction), tokenizer, S, SEED)
    assert data.summary.sources[0].train.conversations == train
    assert data.summary.sources[0].validation.conversations == validation
    assert SFTLoader(data, "validation", SEED).num_rows == validation
    assert _rows(SFTLoader(data, "validation", SEED), 0, 2).targets is not None


# What cannot be used

MIXED = [{"text": "fine"}, "{", {"text": ""}, {"prompt": "a", "completion": "b"}]
LONG = [
    {"prompt": "a", "completion": "b"},
    {"prompt": "a", "completion": "b" + " class" * 300},
    {"prompt": "class" * 300, "completion": "b"},
]


def test_bad_lines_of_all_sources_are_one_error(tmp_path: Path, tokenizer: Tokenizer):
    first, second = _write(tmp_path / "a.jsonl", MIXED), _write(tmp_path / "b.jsonl", [*MIXED, *["nope"] * 20])
    third = _write(tmp_path / "c.jsonl", MIXED)
    sources = (_source(first), ConversationSource(name="t", path=str(second), validation=str(third)))
    with pytest.raises(DataError) as caught:
        SFTData.build(_config(tmp_path, sources=sources), tokenizer, S, SEED)
    message = str(caught.value)
    assert message.startswith("26 lines in finetune.sources are no conversations.")
    for place in (f"{first}:2: not JSON", f"{first}:3: 'text' is empty", f"{second}:2: ", f"{second}:3: ", "16 more"):
        assert place in message
    assert "finetune.bad_lines=skip" in message


def test_bad_lines_can_be_left_out_and_are_listed(tmp_path: Path, tokenizer: Tokenizer):
    path = _write(tmp_path / "a.jsonl", MIXED)
    data = SFTData.build(_one(path, bad_lines="skip"), tokenizer, S, SEED)
    bad = data.summary.sources[0].bad_lines
    assert (bad.count, [example.split(": ")[0] for example in bad.examples]) == (2, [f"{path}:2", f"{path}:3"])
    assert sorted(_contents(data, tokenizer, "train")) == ["Q: a\nA: b\n", "fine"]


def test_too_long_is_an_error_with_place_length_and_remedies(tmp_path: Path, tokenizer: Tokenizer):
    path = _write(tmp_path / "a.jsonl", LONG)
    with pytest.raises(DataError) as caught:
        SFTData.build(_one(path), tokenizer, S, SEED)
    message = str(caught.value)
    parts = ("Q: ", "a", "\n", "A: ", LONG[1]["completion"], "\n")
    long = 1 + sum(len(tokenizer.encode(text)) for text in parts)
    assert message.startswith("2 conversations")
    for part in (f"{path}:2: {long} tokens", f"{path}:3: ", "seq_length = 96", "too_long=drop", "too_long=truncate"):
        assert part in message
    assert f"{path}:1" not in message


@pytest.mark.parametrize("too_long, left, dropped, cut", [("drop", 1, [2, 3], []), ("truncate", 2, [3], [2])])
def test_too_long_ones_are_left_out_or_cut(
    tmp_path: Path, tokenizer: Tokenizer, too_long: str, left: int, dropped: list[int], cut: list[int]
):
    path = _write(tmp_path / "a.jsonl", LONG)
    data = SFTData.build(_one(path, too_long=too_long), tokenizer, S, SEED)
    summary = data.summary.sources[0]
    for listing, lines in ((summary.dropped, dropped), (summary.truncated, cut)):
        assert listing.count == len(lines)
        assert [example.split(": ")[0] for example in listing.examples] == [f"{path}:{line}" for line in lines]
    documents = _documents(_rows(SFTLoader(data, "train", SEED), 0, data.rows_per_epoch))
    assert summary.train.conversations == len(documents) == left
    longest = max(documents, key=lambda document: len(document[0]))
    # What is cut fills a row, and its end is not said to be the end.
    assert (len(longest[0]) == S and longest[1][-1] not in (IGNORED, tokenizer.eod_id)) == bool(cut)


def test_a_conversation_of_exactly_seq_length_tokens_fits(tmp_path: Path, tokenizer: Tokenizer):
    path = _write(tmp_path / "a.jsonl", [LONG[0]])
    length = SFTData.build(_one(path), tokenizer, S, SEED).summary.sources[0].train.tokens
    exact = SFTData.build(_one(path), tokenizer, length, SEED)
    assert exact.summary.train.fill == 1.0
    batch = _rows(SFTLoader(exact, "train", SEED), 0, 1)
    assert batch.labels_BS[0, -1] == tokenizer.eod_id
    with pytest.raises(DataError, match=f"up to {length} tokens"):
        SFTData.build(_one(path), tokenizer, length - 1, SEED)


@pytest.mark.parametrize("records", [[], ["", " "], ["{"], [LONG[2]]])
@pytest.mark.parametrize("split", ["path", "validation"])
def test_a_source_without_usable_conversations_is_an_error(
    tmp_path: Path, tokenizer: Tokenizer, records: list[object], split: str
):
    paths = {"path": _write(tmp_path / "good.jsonl", MIXED), "validation": tmp_path / "good.jsonl"}
    paths[split] = _write(tmp_path / "useless.jsonl", records)
    source = _source(paths["path"], validation=str(paths["validation"]))
    config = _config(tmp_path, sources=(source,), bad_lines="skip", too_long="truncate")
    with pytest.raises(DataError, match=r"Source 's' holds no usable conversation\.\n  got: .*useless\.jsonl"):
        SFTData.build(config, tokenizer, S, SEED)


# The folder


def _stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _same(one: SFTData, other: SFTData) -> bool:
    arrays = ("tokens", "learnt", "ends", "answer_tokens", "sources")
    return (
        all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
        and all(map(np.array_equal, (*one.train, *one.validation), (*other.train, *other.validation)))
        and (one.seq_length, one.eod_id, one.summary) == (other.seq_length, other.eod_id, other.summary)
    )


def test_what_is_stored_is_what_was_built(tmp_path: Path, files: Path, tokenizer: Tokenizer, data: SFTData):
    folder = tmp_path / "run" / "data"
    summary = prepare_sft(_config(files), tokenizer, S, SEED, folder)
    stored = open_sft(folder)
    assert summary == data.summary
    assert _same(stored, data)
    whole, again = (_rows(SFTLoader(each, "train", SEED), 0, 40) for each in (data, stored))
    assert all(torch.equal(whole[field], again[field]) for field in range(3))
    assert not stored.tokens.flags.writeable
    assert sorted(path.name for path in folder.parent.iterdir()) == [".data.lock", "data"]


def test_nothing_is_held_out_and_stored(tmp_path: Path, tokenizer: Tokenizer):
    path = _write(tmp_path / "a.jsonl", [LONG[0]])
    prepare_sft(_one(path), tokenizer, S, SEED, tmp_path / "data")
    assert SFTLoader(open_sft(tmp_path / "data"), "validation", SEED).num_rows == 0


@pytest.fixture
def moved(tmp_path: Path, files: Path) -> Path:
    """A copy of the sources that a test may change."""
    for file in files.rglob("*.jsonl"):
        target = tmp_path / "files" / file.relative_to(files)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return tmp_path / "files"


def test_the_same_is_not_made_twice(tmp_path: Path, files: Path, moved: Path, tokenizer: Tokenizer):
    folder = tmp_path / "data"
    first = prepare_sft(_config(files), tokenizer, S, SEED, folder)
    before = folder.stat().st_ino
    # Neither the checkpoint, nor the number of epochs, nor where the files lie changes what is made.
    config = _config(moved, epochs=3).model_copy(update={"checkpoint": "runs/other"})
    assert prepare_sft(config, tokenizer, S, SEED, folder) == first
    assert folder.stat().st_ino == before


def test_a_run_under_way_does_not_go_on_with_others(tmp_path: Path, moved: Path, tokenizer: Tokenizer):
    folder = tmp_path / "data"
    first = prepare_sft(_config(moved), tokenizer, S, SEED, folder)
    assert prepare_sft(_config(moved, epochs=3), tokenizer, S, SEED, folder, under_way=True) == first
    before = folder.stat().st_ino
    with pytest.raises(DataError) as caught:
        prepare_sft(_config(moved, packing=False), tokenizer, S, SEED, folder, under_way=True)
    assert "finetune" in caught.value.got
    assert folder.stat().st_ino == before


CHANGES: dict[str, dict[str, object]] = {
    "template": {"template": TemplateConfig()},
    "packing": {"packing": False},
    "loss_on": {"loss_on": "all"},
    "fraction": {"validation_fraction": 0.3},
    "too_long": {"too_long": "drop"},
    "bad_lines": {"bad_lines": "skip"},
}


@pytest.mark.parametrize("change", [*CHANGES, "repeat", "seq_length", "seed", "content", "new file", "validation"])
def test_something_else_is_made_again(tmp_path: Path, moved: Path, tokenizer: Tokenizer, change: str):
    folder, config, seq_length, seed = tmp_path / "data", _config(moved), S, SEED
    prepare_sft(config, tokenizer, S, SEED, folder)
    before = folder.stat().st_ino
    if change in CHANGES:
        config = _config(moved, **CHANGES[change])
    elif change == "repeat":
        config = _config(moved, sources=tuple(s.model_copy(update={"repeat": 2}) for s in config.sources))
    elif change == "validation":
        config = _config(moved, sources=tuple(s.model_copy(update={"validation": None}) for s in config.sources))
    elif change == "content":
        with (moved / "facts.jsonl").open("a") as stream:
            stream.write('{"text": "one more"}\n')
    elif change == "new file":
        _write(moved / "chat" / "c.jsonl", [{"text": "one more"}])
    seq_length, seed = S + (change == "seq_length"), SEED + (change == "seed")
    prepare_sft(config, tokenizer, seq_length, seed, folder)
    assert folder.stat().st_ino != before
    assert _same(open_sft(folder), SFTData.build(config, tokenizer, seq_length, seed))


def test_an_error_leaves_the_folder_as_it_was(tmp_path: Path, moved: Path, tokenizer: Tokenizer):
    folder = tmp_path / "data"
    prepare_sft(_config(moved), tokenizer, S, SEED, folder)
    before = _stored(folder)
    with (moved / "facts.jsonl").open("a") as stream:
        stream.write("{\n")
    with pytest.raises(DataError, match=r"facts\.jsonl:41: not JSON"):
        prepare_sft(_config(moved), tokenizer, S, SEED, folder)
    assert _stored(folder) == before


@pytest.mark.parametrize("name", ["tokens.npy", "train_members.npy", "validation_ends.npy", MANIFEST])
@pytest.mark.parametrize("how", ["missing", "cut", "other"])
def test_a_damaged_folder_is_an_error(tmp_path: Path, files: Path, tokenizer: Tokenizer, name: str, how: str):
    folder = tmp_path / "data"
    prepare_sft(_config(files), tokenizer, S, SEED, folder)
    path = folder / name
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if how == "cut" else b"\0" * len(content))
    with pytest.raises(DataError, match=rf"(?s)does not hold the complete conversations.*{name}.*remove the folder"):
        open_sft(folder)
    if (folder / MANIFEST).exists():
        with pytest.raises(DataError, match="does not hold the complete conversations"):
            prepare_sft(_config(files), tokenizer, S, SEED, folder)


def test_a_folder_of_something_else_or_of_another_process_is_refused(tmp_path: Path, files: Path, tokenizer: Tokenizer):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="not made here"):
        prepare_sft(_config(files), tokenizer, S, SEED, folder)
    with exclusive(tmp_path / "busy"), pytest.raises(DataError, match="another process"):
        prepare_sft(_config(files), tokenizer, S, SEED, tmp_path / "busy")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, files: Path, tokenizer: Tokenizer):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(DataError, match="cannot be prepared"):
        prepare_sft(_config(files), tokenizer, S, SEED, tmp_path / "run" / "data")


def test_threads_and_batches_change_nothing(
    files: Path, tokenizer: Tokenizer, data: SFTData, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("megamoe.data.sft_encode._BATCH_CHARS", 50)
    assert _same(SFTData.build(_config(files), tokenizer, S, SEED, progress=True), data)
