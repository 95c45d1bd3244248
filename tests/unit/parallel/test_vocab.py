"""Embedding, loss and scores over a cut vocabulary against one process that has all of it."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megamoe.common.errors import TopologyError
from megamoe.ops.linear_cross_entropy import linear_cross_entropy, reference, token_scores
from megamoe.parallel.axis import Axis, axis_of
from megamoe.parallel.groups import build_groups
from megamoe.parallel.shards import Shard, shards_of
from megamoe.parallel.topology import Topology
from megamoe.parallel.vocab import VocabParallelEmbedding, vocab_parallel_cross_entropy, vocab_parallel_scores
from megamoe.testing import RankError, assert_close, assert_equal_bits, max_rel_error, run_ranks

ROWS, WIDTH, VOCAB = 37, 24, 112
LAYOUTS = [(1, 1), (2, 2), (4, 4), (4, 2)]  # ranks, ranks of an axis; the last: two axes that must not mix
CHUNKS = [0, 1, 5, 36, ROWS, 1024]
DTYPES = {torch.float32: 2e-6, torch.float64: 1e-14}

Results = dict[str, Tensor]
Way = tuple[int, float | None]  # chunk size, targets


def axes(size: int) -> tuple[Axis, int]:
    """This rank's axis of that size, and which of such axes it is."""
    groups = build_groups(Topology(dist.get_world_size(), tp=size))
    return axis_of(groups.tp), groups.dp.place


def case(group: int, dtype: torch.dtype, rows: int = ROWS, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows, whole weight and labels; the first and last entry of every rank's range are among these."""
    generator = torch.Generator().manual_seed(5 + group)
    hidden_TD = torch.randn(rows, WIDTH, generator=generator) * scale
    weight_VD = torch.randn(VOCAB, WIDTH, generator=generator) * 0.5
    labels_T = torch.randint(VOCAB, (rows,), generator=generator)
    edges = torch.tensor([edge for start in range(0, VOCAB, VOCAB // 4) for edge in (start, start + VOCAB // 4 - 1)])
    labels_T[: len(edges)] = edges[:rows]
    return hidden_TD.to(dtype), weight_VD.to(dtype), labels_T


def own(weight_VD: Tensor, tp: Axis) -> Tensor:
    return weight_VD.chunk(tp.size)[tp.rank].clone()


def gradients(loss: Tensor, hidden_TD: Tensor, weight_VD: Tensor) -> Results:
    """Loss and gradients; the loss enters a larger one with a factor, as it does beside auxiliary losses."""
    d_hidden, d_weight = torch.autograd.grad(loss * 0.3, [hidden_TD, weight_VD])
    return {"loss": loss.detach(), "hidden": d_hidden, "weight": d_weight}


def in_parts(size: int, dtype: torch.dtype, ways: list[Way], rows: int = ROWS, scale: float = 1.0) -> list[Results]:
    """Loss and gradients of this rank, each way."""
    tp, group = axes(size)
    hidden_TD, weight_VD, labels_T = case(group, dtype, rows, scale)
    hidden_TD, part_VD = hidden_TD.requires_grad_(), own(weight_VD, tp).requires_grad_()
    losses = [vocab_parallel_cross_entropy(hidden_TD, part_VD, labels_T, tp, chunk, targets) for chunk, targets in ways]
    return [gradients(loss, hidden_TD, part_VD) for loss in losses]


def put_together(found: list[Results]) -> Results:
    """What the ranks of an axis have between them; the loss is the same on all."""
    for result in found[1:]:
        assert_equal_bits(result["loss"], found[0]["loss"], name="loss")
    hidden_TD = torch.stack([result["hidden"].double() for result in found]).sum(0)
    return {
        "loss": found[0]["loss"],
        "hidden": hidden_TD.to(found[0]["hidden"].dtype),
        "weight": torch.cat([result["weight"] for result in found]),
    }


def specified(
    group: int, dtype: torch.dtype, targets: float | None = None, rows: int = ROWS, scale: float = 1.0
) -> Results:
    hidden_TD, weight_VD, labels_T = case(group, dtype, rows, scale)
    hidden_TD, weight_VD = hidden_TD.requires_grad_(), weight_VD.requires_grad_()
    loss = reference(hidden_TD, weight_VD, labels_T)
    return gradients(loss if targets is None else loss * rows / targets, hidden_TD, weight_VD)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size, size", LAYOUTS)
def test_value_and_gradients_equal_the_specification(world_size: int, size: int, dtype: torch.dtype) -> None:
    ways = list(product(CHUNKS, (None, 50.0)))
    ranks = run_ranks(in_parts, world_size, size, dtype, ways)
    for index, (chunk_size, targets) in enumerate(ways):
        for group in range(world_size // size):
            got = put_together([found[index] for found in ranks[group * size : (group + 1) * size]])
            for name, tensor in specified(group, dtype, targets).items():
                assert got[name].dtype == dtype
                label = f"{name}, chunks of {chunk_size}, targets {targets}"
                assert_close(got[name], tensor, rel=DTYPES[dtype], name=label)


def test_a_missing_sum_would_show() -> None:
    """The control: one rank's share of the hidden rows' gradient is far from the whole."""
    expected = specified(0, torch.float64)
    for (found,) in run_ranks(in_parts, 2, 2, torch.float64, [(5, None)]):
        assert max_rel_error(found["hidden"], expected["hidden"]) > 0.1


def test_bf16_is_at_most_twice_as_wrong_as_plain_bf16() -> None:
    rows = 512
    hidden_TD, weight_VD, labels_T = case(0, torch.bfloat16, rows)
    exact_inputs = [t.float().requires_grad_() for t in (hidden_TD, weight_VD)]
    exact = gradients(reference(*exact_inputs, labels_T), *exact_inputs)
    plain = specified(0, torch.bfloat16, rows=rows)
    ranks = run_ranks(in_parts, 2, 2, torch.bfloat16, [(0, None), (7, None)], rows)
    for found in zip(*ranks, strict=True):
        got = put_together(list(found))
        for name in exact:
            assert got[name].dtype == plain[name].dtype, name
            assert max_rel_error(got[name], exact[name]) <= 2 * max_rel_error(plain[name], exact[name]), name


def test_large_logits_do_not_overflow() -> None:
    expected = specified(0, torch.float32, scale=1e3)
    for found in zip(*run_ranks(in_parts, 4, 4, torch.float32, [(0, None), (8, None)], ROWS, 1e3), strict=True):
        got = put_together(list(found))
        for name, tensor in expected.items():
            assert bool(got[name].isfinite().all())
            assert_close(got[name], tensor, rel=1e-5, name=name)


@pytest.mark.parametrize("size", [1, 2])
def test_without_rows_the_sum_is_zero(size: int) -> None:
    for found in run_ranks(in_parts, size, size, torch.float32, [(0, 7.0), (5, 7.0)], 0):
        for result in found:
            assert_equal_bits(result["loss"], torch.tensor(0.0))
            assert_equal_bits(result["hidden"], torch.zeros(0, WIDTH))
            assert_equal_bits(result["weight"], torch.zeros(VOCAB // size, WIDTH))


def test_the_mean_of_no_rows_is_no_number() -> None:
    hidden_TD, weight_VD, labels_T = case(0, torch.float32, rows=0)
    assert bool(linear_cross_entropy(hidden_TD, weight_VD, labels_T).isnan())
    for (found,) in run_ranks(in_parts, 2, 2, torch.float32, [(5, None)], 0):
        assert bool(found["loss"].isnan())


class Shapes(TorchDispatchMode):
    """Shapes of everything that is computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, tuple | list) else [out]
        self.seen |= {tuple(t.shape) for t in results if isinstance(t, Tensor)}
        return out


def shapes_inside(trained: bool) -> set[tuple[int, ...]]:
    tp, _ = axes(2)
    hidden_TD, weight_VD, labels_T = case(0, torch.float32)
    part_VD = own(weight_VD, tp).requires_grad_()
    with Shapes() as shapes, torch.set_grad_enabled(trained):
        loss = vocab_parallel_cross_entropy(hidden_TD.requires_grad_(), part_VD, labels_T, tp, 5)
    assert loss.requires_grad == trained
    return shapes.seen


def test_no_more_than_a_chunk_of_the_own_logits_exists() -> None:
    for seen in run_ranks(shapes_inside, 2, True):
        rows_of_logits = {shape[0] for shape in seen if len(shape) == 2 and shape[1] == VOCAB // 2}
        rows_of_logits.discard(WIDTH)  # the transposed weight
        assert max(rows_of_logits) == 5
        assert not any(VOCAB in shape for shape in seen)


def test_without_gradients_none_are_formed() -> None:
    trained, untrained = run_ranks(shapes_inside, 2, True)[0], run_ranks(shapes_inside, 2, False)[0]
    assert (VOCAB // 2, WIDTH) in trained
    assert (VOCAB // 2, WIDTH) not in untrained


def one_frozen(frozen: str) -> tuple[Tensor, bool]:
    """The one gradient that is wanted, and whether the frozen side's shape was computed."""
    tp, _ = axes(2)
    hidden_TD, weight_VD, labels_T = case(0, torch.float64)
    part_VD = own(weight_VD, tp)
    wanted = (part_VD if frozen == "hidden" else hidden_TD).requires_grad_()
    with Shapes() as shapes:
        loss = vocab_parallel_cross_entropy(hidden_TD, part_VD, labels_T, tp, 5)
        (gradient,) = torch.autograd.grad(loss * 0.3, wanted)
    return gradient, tuple(part_VD.shape) in shapes.seen


def test_either_side_may_be_frozen() -> None:
    expected = specified(0, torch.float64)
    of_hidden, of_weight = (run_ranks(one_frozen, 2, frozen) for frozen in ("weight", "hidden"))
    assert_close(of_hidden[0][0] + of_hidden[1][0], expected["hidden"], rel=1e-14)
    assert_close(torch.cat([gradient for gradient, _ in of_weight]), expected["weight"], rel=1e-14)
    assert not any(computed for _, computed in of_hidden)


def scored(size: int, chunk_size: int, cases: list[tuple[torch.dtype, bool]], rows: int) -> list[tuple[Tensor, Tensor]]:
    tp, group = axes(size)
    results = []
    for dtype, ties in cases:
        hidden_TD, weight_VD, labels_T = scores_case(group, dtype, rows, ties)
        part_VD = own(weight_VD, tp).requires_grad_()
        results.append(vocab_parallel_scores(hidden_TD, part_VD, labels_T, tp, chunk_size))
    return results


def scores_case(group: int, dtype: torch.dtype, rows: int, ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Half of the labels are the likeliest entry. With ties every entry of the first quarter is in all quarters."""
    hidden_TD, weight_VD, labels_T = case(group, dtype, rows)
    if ties:
        weight_VD = weight_VD[: VOCAB // 4].repeat(4, 1)
    labels_T[::2] = F.linear(hidden_TD, weight_VD).argmax(-1)[::2]
    if ties:
        labels_T[::4] += VOCAB // 4  # as likely, but not the first
    return hidden_TD, weight_VD, labels_T


@pytest.mark.parametrize("world_size, size", LAYOUTS)
def test_scores_of_every_row(world_size: int, size: int) -> None:
    cases = list(product([*DTYPES, torch.bfloat16], [False, True]))
    for rank, found in enumerate(run_ranks(scored, world_size, size, 5, cases, ROWS)):
        for (dtype, ties), (losses_T, right_T) in zip(cases, found, strict=True):
            expected_losses_T, expected_right_T = token_scores(*scores_case(rank // size, dtype, ROWS, ties))
            assert losses_T.dtype == expected_losses_T.dtype
            assert_close(losses_T, expected_losses_T, rel=DTYPES.get(dtype, 2e-6))
            assert 5 < int(right_T.sum()) < ROWS
            assert torch.equal(right_T, expected_right_T)


def test_scores_of_no_rows() -> None:
    for ((losses_T, right_T),) in run_ranks(scored, 2, 2, 0, [(torch.bfloat16, False)], 0):
        assert_equal_bits(losses_T, torch.zeros(0))
        assert_equal_bits(right_T, torch.zeros(0, dtype=torch.bool))


def with_label(label: int) -> None:
    tp, _ = axes(2)
    hidden_TD, weight_VD, labels_T = case(0, torch.float32)
    labels_T[3] = label
    vocab_parallel_cross_entropy(hidden_TD, own(weight_VD, tp), labels_T, tp)


@pytest.mark.parametrize("label, holder", [(-100, 0), (VOCAB, 1)])
def test_a_label_that_no_rank_holds_is_an_error(label: int, holder: int) -> None:
    with pytest.raises(RankError, match="out of bounds") as failure:
        run_ranks(with_label, 2, label, timeout=20.0)
    assert failure.value.rank == holder


# Embedding


def tokens_of(group: int) -> Tensor:
    """[2, 8]: the edges of every rank's range, and others more than once."""
    edges = [edge for start in range(0, VOCAB, VOCAB // 4) for edge in (start, start + VOCAB // 4 - 1)]
    return torch.tensor([edges, [5, 5, 30, 30, 60 + group, 60, 111, 90]])


def embedded(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tp, group = axes(size)
    embedding = VocabParallelEmbedding(VOCAB, WIDTH, tp).to(dtype)
    embedding.weight.data.copy_(own(case(group, dtype)[1], tp))
    partial_BSD = embedding(tokens_of(group))
    partial_BSD.square().sum().backward()
    assert embedding.weight.grad is not None
    return partial_BSD.detach(), embedding.weight.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size, size", LAYOUTS)
def test_embedding_rows_lie_on_one_rank_each(world_size: int, size: int, dtype: torch.dtype) -> None:
    ranks = run_ranks(embedded, world_size, size, dtype)
    for group in range(world_size // size):
        found = ranks[group * size : (group + 1) * size]
        weight_VD = case(group, dtype)[1].requires_grad_()
        expected_BSD = F.embedding(tokens_of(group), weight_VD)
        expected_BSD.square().sum().backward()
        assert weight_VD.grad is not None
        assert_close(torch.stack([rows for rows, _ in found]).sum(0), expected_BSD.detach(), name="rows")
        assert_close(torch.cat([gradient for _, gradient in found]), weight_VD.grad, name="gradient")
        for place, (rows_BSD, _) in enumerate(found):
            assert torch.equal(rows_BSD.abs().sum(-1) > 0, tokens_of(group) // (VOCAB // size) == place)


def test_a_token_that_no_rank_holds_is_an_error() -> None:
    first, last = (VocabParallelEmbedding(VOCAB, WIDTH, Axis(2, rank, None)) for rank in range(2))
    for token, holder, other in ((-1, first, last), (VOCAB, last, first)):
        assert not bool(other(torch.tensor([[token]])).any())
        with pytest.raises(IndexError):
            holder(torch.tensor([[token]]))


def test_the_embedding_says_what_it_is() -> None:
    embedding = VocabParallelEmbedding(VOCAB, WIDTH, Axis(4, 1, None))
    assert [(name, tuple(p.shape)) for name, p in embedding.named_parameters()] == [("weight", (VOCAB // 4, WIDTH))]
    assert shards_of(embedding.weight) == (Shard(0, "tp"),)
    assert embedding.weight.model_parallel is True
    assert VocabParallelEmbedding(VOCAB, WIDTH, Axis()).weight.model_parallel is False
    with pytest.raises(TopologyError, match="112 % 3 = 1"):
        VocabParallelEmbedding(VOCAB, WIDTH, Axis(3, 0, None))
