from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megamoe.common.errors import DataError
from megamoe.config.data import DataConfig
from megamoe.data.indexed import IndexedTokens, IndexedWriter
from megamoe.data.loader import BatchLoader, TokenSamples, documents
from megamoe.data.manifest import Manifest

Prepared = tuple[DataConfig, Manifest]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> IndexedTokens:
    """Documents of 1 to 40 tokens; every token is a number of its own, so it shows where it came from."""
    writer = IndexedWriter(tmp_path_factory.mktemp("numbered") / "train", 30_000)
    first = 0
    for number in range(60):
        length = 1 + (number * 17) % 40
        writer.add(list(range(first, first + length)))
        first += length
    writer.close()
    return IndexedTokens(writer.prefix)


@pytest.fixture(scope="module")
def train(prepared: Prepared) -> BatchLoader:
    return BatchLoader(*prepared, "train", seed=5)


def _epoch(samples: TokenSamples, epoch: int) -> np.ndarray:
    return np.stack([samples.sample(epoch * samples.num_samples + i) for i in range(samples.num_samples)])


def test_an_epoch_covers_every_token_once(numbered: IndexedTokens):
    samples = TokenSamples(numbered, 16, "s", seed=1)
    for epoch in (0, 1, 7):
        tokens = _epoch(samples, epoch)[:, :-1].ravel().tolist()
        assert max(Counter(tokens).values()) == 1
        # Only what does not fill a last sample is left out.
        assert numbered.num_tokens - len(tokens) <= 16


def test_epochs_have_different_orders_and_leave_out_different_ends(numbered: IndexedTokens):
    samples = TokenSamples(numbered, 16, "s", seed=1)
    first, second = _epoch(samples, 0), _epoch(samples, 1)
    assert not np.array_equal(first, second)
    assert not np.array_equal(np.sort(first.ravel()), np.sort(second.ravel()))


def test_samples_are_shuffled_by_epoch_and_source_also_within_one_document(tmp_path: Path):
    writer = IndexedWriter(tmp_path / "a", 30_000)
    writer.add(list(range(1000)))
    writer.close()
    tokens = IndexedTokens(tmp_path / "a")
    samples = TokenSamples(tokens, 16, "s", seed=1)
    other = TokenSamples(tokens, 16, "t", seed=1)
    orders = [_epoch(samples, 0), _epoch(samples, 1), _epoch(other, 0)]
    firsts = [order[:, 0].tolist() for order in orders]
    assert all(sorted(first) == list(range(0, 16 * 62, 16)) for first in firsts)
    assert len({tuple(first) for first in firsts}) == 3


def test_a_sample_follows_its_documents(numbered: IndexedTokens):
    whole = [numbered.read(i).tolist() for i in range(len(numbered))]
    following = {a: b for document in whole for a, b in pairwise(document)}
    starts = {document[0] for document in whole}
    for sample in _epoch(TokenSamples(numbered, 16, "s", seed=1), 0).tolist():
        for a, b in pairwise(sample):
            assert following.get(a, b) == b
            assert a in following or b in starts


def test_labels_overlap_with_the_next_sample_in_the_stream(numbered: IndexedTokens):
    stream = np.concatenate([numbered.read(i) for i in range(len(numbered))])
    samples = TokenSamples(numbered, 16, "s", seed=None)
    for i in range(samples.num_samples):
        assert samples.sample(i).tolist() == stream[16 * i : 16 * i + 17].tolist()
    # Not shuffled: the next epoch is the same.
    assert samples.sample(samples.num_samples).tolist() == stream[:17].tolist()


def test_the_last_token_can_be_a_label(tmp_path: Path):
    writer = IndexedWriter(tmp_path / "a", 300)
    writer.add(list(range(33)))
    writer.close()
    samples = TokenSamples(IndexedTokens(tmp_path / "a"), 16, "s", seed=None)
    assert samples.num_samples == 2
    assert samples.sample(1).tolist() == list(range(16, 33))


@pytest.mark.parametrize("other", [{"seed": 2}, {"name": "t"}])
def test_seed_and_source_name_decide_the_order(numbered: IndexedTokens, other: dict[str, object]):
    plain = {"seed": 1, "name": "s"}
    same, again, different = (
        _epoch(TokenSamples(numbered, 16, **values), 0)  # type: ignore[arg-type]
        for values in (plain, plain, plain | other)
    )
    assert np.array_equal(same, again)
    assert not np.array_equal(same, different)


def test_too_little_text_is_an_error(tmp_path: Path):
    writer = IndexedWriter(tmp_path / "a", 300)
    writer.add([1] * 16)
    writer.close()
    with pytest.raises(DataError, match=r"got: 16 tokens(.|\n)*at least data\.seq_length \+ 1 = 17"):
        TokenSamples(IndexedTokens(tmp_path / "a"), 16, "s", seed=1)


def test_a_batch_has_the_declared_shape_and_type(train: BatchLoader):
    batch = train.batch(3, 5)
    assert batch.shape == (5, 65)
    assert batch.dtype == torch.int64


def test_a_batch_does_not_depend_on_what_was_read_before(prepared: Prepared, train: BatchLoader):
    total = sum(train.num_samples.values())
    straight = train.batch(0, 4 * total)  # through several epochs of both sources
    fresh = BatchLoader(*prepared, "train", seed=5)
    for first in (3 * total + 1, 0, total, total - 1, 2 * total, 7):
        assert torch.equal(fresh.batch(first, 6), straight[first : first + 6])


def test_another_seed_is_another_order(prepared: Prepared, train: BatchLoader):
    assert not torch.equal(BatchLoader(*prepared, "train", seed=6).batch(0, 8), train.batch(0, 8))


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("consumed", [0, 16])
def test_any_number_of_ranks_reads_the_same_samples_in_the_same_order(train: BatchLoader, dp_size: int, consumed: int):
    micro_batch, global_batch = 2, 16
    micro_steps = global_batch // (micro_batch * dp_size)
    parts = [
        train.rank_batch(consumed, step, rank, dp_size, micro_batch, micro_steps)
        for step in range(micro_steps)
        for rank in range(dp_size)
    ]
    expected = train.batch(consumed, global_batch)
    assert torch.equal(torch.cat([part.tokens_BS for part in parts]), expected[:, :-1])
    assert torch.equal(torch.cat([part.labels_BS for part in parts]), expected[:, 1:])
    assert all(part.tokens_BS.is_contiguous() and part.labels_BS.is_contiguous() for part in parts)


def test_sources_are_blended_by_weight(prepared: Prepared, train: BatchLoader):
    config, manifest = prepared
    of_source = [{tuple(row) for row in _windows(config, manifest, source.name)} for source in config.sources]
    counts = [0, 0]
    for n, row in enumerate(train.batch(0, 40).tolist(), start=1):
        inside = [any(tuple(row[i : i + 8]) in windows for i in (0, 20, 40)) for windows in of_source]
        assert sum(inside) == 1
        counts[inside.index(True)] += 1
        assert abs(counts[0] - 0.7 * n) < 1
    assert counts == [28, 12]


def _windows(config: DataConfig, manifest: Manifest, source: str) -> list[list[int]]:
    found = []
    for document in documents(config, manifest, source, "train"):
        ids = document.tolist()
        found += [ids[i : i + 8] for i in range(len(ids) - 7)]
    return found


def test_validation_is_one_fixed_list_from_many_documents(prepared: Prepared):
    config, manifest = prepared
    one, other = (BatchLoader(config, manifest, "validation", seed) for seed in (1, 2))
    count = sum(one.num_samples.values())
    assert torch.equal(one.batch(0, count), other.batch(0, count))
    only = config.model_copy(update={"sources": config.sources[:1]})
    held_out = [d.tolist() for d in documents(config, manifest, "code", "validation")]
    loader = BatchLoader(only, manifest, "validation", 1)
    rows = loader.batch(0, loader.num_samples["code"]).tolist()
    stream = [token for document in held_out for token in document]
    in_file_order = [stream[64 * i : 64 * i + 65] for i in range(len(rows))]
    assert rows != in_file_order
    assert len({tuple(row) for row in rows}) == len(rows)


def test_training_and_validation_share_no_document(prepared: Prepared):
    config, manifest = prepared
    for source in config.sources:
        held_out = {tuple(d.tolist()) for d in documents(config, manifest, source.name)}
        assert held_out.isdisjoint(tuple(d.tolist()) for d in documents(config, manifest, source.name, "train"))


def test_an_unknown_source_is_an_error(prepared: Prepared):
    with pytest.raises(DataError, match="No source is called 'poems'"):
        documents(*prepared, "poems")


def test_files_that_are_not_the_manifests_are_an_error(prepared: Prepared):
    config, manifest = prepared
    changed = manifest.model_dump()
    changed["sources"][0]["train"]["tokens"] += 1
    with pytest.raises(DataError, match="are not the ones in the manifest"):
        BatchLoader(config, Manifest.model_validate(changed), "train", 1)
