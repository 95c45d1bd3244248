"""The whole forward pass against an implementation written here, and what must not change it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megamoe.config.load import load_config
from megamoe.config.run import RunConfig
from megamoe.data.batch import IGNORED
from megamoe.model.decoder import Decoder, ModelOutput
from megamoe.model.initialise import initialise
from megamoe.testing import assert_close, assert_equal_bits

VOCAB, BATCH, SEQUENCE, SIZE = 320, 3, 14, 8
SHAPE = [
    "model.num_layers=3",
    "model.hidden_size=32",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.ffn_size=40",
    f"model.vocab_size={VOCAB}",
    f"data.tokenizer.vocab_size={VOCAB}",
    "model.init_std=0.3",
    "model.loss_chunk_size=5",
    "moe.num_experts=4",
    "moe.expert_ffn_size=24",
    "moe.first_k_dense=1",
    "moe.num_shared_experts=1",
]
RESONANCE = ["moe.router.type=resonance"]
STATIC = ["moe.capacity.mode=static", "moe.capacity.factor=0.7"]


def settings(*overrides: str) -> RunConfig:
    return load_config([], [*SHAPE, *overrides])


def build(*overrides: str) -> Decoder:
    config = settings(*overrides)
    model = Decoder(config, VOCAB)
    initialise(model, config.model, seed=3)
    return model


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    text = torch.randint(VOCAB, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(seed))
    return text[:, :-1], text[:, 1:]


# The model once more, from its formulas


def norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    gate = x @ w1.t()
    return (gate * gate.sigmoid() * (x @ w3.t())) @ w2.t()


def turn(x_BNSH: Tensor) -> Tensor:
    half = SIZE // 2
    angles = torch.arange(SEQUENCE)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    numbers = torch.complex(x_BNSH[..., :half], x_BNSH[..., half:]) * torch.polar(torch.ones(()), angles)
    return torch.cat([numbers.real, numbers.imag], -1)


def attention(x_BSD: Tensor, weights: dict[str, Tensor], prefix: str) -> Tensor:
    def heads(name: str, number: int) -> Tensor:
        return (x_BSD @ weights[f"{prefix}.{name}.weight"].t()).view(BATCH, SEQUENCE, number, SIZE).transpose(1, 2)

    queries, keys = turn(heads("wq", 4)), turn(heads("wk", 2)).repeat_interleave(2, dim=1)
    scores = queries @ keys.transpose(2, 3) / math.sqrt(SIZE)
    scores = scores.masked_fill(torch.ones(SEQUENCE, SEQUENCE).triu(1).bool(), -torch.inf)
    out = scores.softmax(-1) @ heads("wv", 2).repeat_interleave(2, dim=1)
    return out.transpose(1, 2).reshape(BATCH, SEQUENCE, -1) @ weights[f"{prefix}.wo.weight"].t()


def experts(x_BSD: Tensor, weights: dict[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    """Every expert on every token, times a gate that is zero outside of the top 2; and the balance loss."""
    gates = (x_BSD @ weights[f"{prefix}.router.weight"].t()).softmax(-1)
    kth = gates.sort(-1, descending=True).values[..., 1:2]
    chosen = gates >= kth
    kept = gates * chosen / (gates * chosen).sum(-1, keepdim=True)
    stacks = [weights[f"{prefix}.experts.{name}"] for name in ("w1", "w2", "w3")]
    out = sum(kept[..., e : e + 1] * swiglu(x_BSD, *(w[e] for w in stacks)) for e in range(4))
    out = out + swiglu(x_BSD, *(weights[f"{prefix}.shared_experts.{n}.weight"] for n in ("w1", "w2", "w3")))
    share, mean = chosen.float().mean((0, 1)) / 2, gates.mean((0, 1))
    return out, 0.01 * 4 * (share.detach() * mean).sum()


def literal(weights: dict[str, Tensor], tokens_BS: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy with all logits at once, and the sum of balance losses."""
    x_BSD, balance = weights["embedding.weight"][tokens_BS], torch.zeros(())
    for layer in range(3):
        block = f"blocks.{layer}"
        normed = norm(x_BSD, weights[f"{block}.attention_norm.weight"])
        x_BSD = x_BSD + attention(normed, weights, f"{block}.attention")
        normed = norm(x_BSD, weights[f"{block}.ffn_norm.weight"])
        if layer == 0:
            x_BSD = x_BSD + swiglu(normed, *(weights[f"{block}.ffn.{n}.weight"] for n in ("w1", "w2", "w3")))
        else:
            out_BSD, term = experts(normed, weights, f"{block}.ffn")
            x_BSD, balance = x_BSD + out_BSD, balance + term
    head = weights.get("head.weight", weights["embedding.weight"])
    logits = norm(x_BSD, weights["norm.weight"]) @ head.t()
    picked = logits.log_softmax(-1).gather(-1, labels_BS[..., None])
    return -picked.mean(), balance


def gradients(model: Decoder, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("tied", ["true", "false"])
def test_loss_and_gradients_against_the_formulas(tied: str) -> None:
    model, (tokens_BS, labels_BS) = build(f"model.tie_embeddings={tied}"), batch()
    output = model(tokens_BS, labels_BS)
    cross_entropy, balance = literal(dict(model.named_parameters()), tokens_BS, labels_BS)
    assert_close(output.cross_entropy, cross_entropy, rel=1e-5)
    assert_close(output.loss, cross_entropy + balance, rel=1e-5)
    expected = gradients(model, cross_entropy + balance)
    for name, gradient in gradients(model, output.loss).items():
        assert_close(gradient, expected[name], rel=1e-4, name=name)


def test_each_auxiliary_loss_is_returned_once_per_block() -> None:
    output: ModelOutput = build("moe.router.z_loss=0.1")(*batch())
    assert [sorted(aux.losses) for aux in output.layers] == [[], *[["balance_loss", "z_loss"]] * 2]
    total = output.cross_entropy + sum(term for aux in output.layers for term in aux.losses.values())
    assert_close(output.loss, total, rel=1e-6)


@pytest.mark.parametrize("overrides", [[], [*RESONANCE, *STATIC]], ids=["topk", "resonance static"])
def test_scores_of_labels_have_the_loss_as_their_mean(overrides: list[str]) -> None:
    model, (tokens_BS, labels_BS) = build(*overrides).eval(), batch()
    plain, output = model(tokens_BS, labels_BS), model(tokens_BS, labels_BS, each=True)
    assert output.scores.losses_BS.shape == tokens_BS.shape
    assert_close(output.scores.losses_BS.mean(), plain.cross_entropy, rel=1e-5)
    assert_close(output.cross_entropy, plain.cross_entropy, rel=1e-5)
    likeliest = int(model.logits(tokens_BS[1:2, :5]).argmax())
    changed_BS = labels_BS.clone()
    changed_BS[1, 4] = likeliest
    changed = model(tokens_BS, changed_BS, each=True).scores
    assert changed.right_BS[1, 4]
    moved = (changed.losses_BS != output.scores.losses_BS).nonzero().tolist()
    assert moved == [[1, 4]] * (likeliest != labels_BS[1, 4])


def test_labels_that_do_not_count() -> None:
    """The sum over the others, divided by what is asked for; forward, backward and one by one."""
    model, (tokens_BS, labels_BS) = build(), batch()
    left_BS = labels_BS.clone()
    left_BS[0, 3:] = IGNORED
    left_BS[1, ::2] = IGNORED
    counted_BS = left_BS != IGNORED
    each = model(tokens_BS, labels_BS, each=True).scores.losses_BS
    output = model(tokens_BS, left_BS, None, 7.5)
    assert_close(output.cross_entropy, each[counted_BS].sum() / 7.5, rel=1e-5)
    scores = model(tokens_BS, left_BS, None, 7.5, each=True).scores
    assert torch.equal(scores.counted_BS, counted_BS)
    assert_close(scores.losses_BS, each * counted_BS, rel=1e-6)
    logits = model.head(model._hidden(tokens_BS)[0])
    plain = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), left_BS.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    expected = gradients(model, plain / 7.5 + output.loss - output.cross_entropy)
    for name, gradient in gradients(model, model(tokens_BS, left_BS, None, 7.5).loss).items():
        assert_close(gradient, expected[name], rel=1e-4, name=name)


def test_a_batch_without_any_label_that_counts() -> None:
    model, (tokens_BS, labels_BS) = build(), batch()
    output = model(tokens_BS, torch.full_like(labels_BS, IGNORED), None, 1.0)
    assert output.cross_entropy.item() == 0
    assert all(gradient.isfinite().all() for gradient in gradients(model, output.loss).values())


@pytest.mark.parametrize("overrides", [[], RESONANCE], ids=["topk", "resonance"])
def test_documents_in_one_sequence_do_not_see_each_other(overrides: list[str]) -> None:
    """Each one has the losses that it has alone, up to rounding; padding changes nothing."""
    model, (tokens_BS, labels_BS) = build(*overrides).eval(), batch()
    ends = (5, 9, SEQUENCE - 2)
    documents_S = torch.tensor([0] * 5 + [1] * 4 + [2] * (SEQUENCE - 11) + [-1] * 2)
    documents_BS = documents_S.expand_as(tokens_BS)
    together = model(tokens_BS, labels_BS, documents_BS, each=True).scores.losses_BS
    for start, end in zip((0, *ends), ends, strict=False):
        alone = model(tokens_BS[:, start:end], labels_BS[:, start:end], each=True).scores.losses_BS
        assert_close(together[:, start:end], alone, rel=1e-5)
    assert not torch.allclose(together[:, 5:], model(tokens_BS, labels_BS, each=True).scores.losses_BS[:, 5:])


@pytest.mark.parametrize("splits", [[1] * SEQUENCE, [5, 9], [10, 1, 1, 1, 1], [2, 7, 5]], ids=str)
@pytest.mark.parametrize("overrides", [[], [*RESONANCE, *STATIC]], ids=["topk", "resonance static"])
def test_cached_logits_equal_those_of_the_whole_text(overrides: list[str], splits: list[int]) -> None:
    model, (tokens_BS, _) = build(*overrides).eval(), batch()
    caches, seen = model.new_caches(), 0
    with torch.no_grad():
        for part_BS in tokens_BS.split(splits, dim=1):
            seen += part_BS.shape[1]
            logits_BV = model.logits(part_BS, caches)
            assert logits_BV.shape == (BATCH, VOCAB)
            assert_close(logits_BV, model.logits(tokens_BS[:, :seen]), rel=2e-5, name=f"after {seen} tokens")


def all_hidden(model: Decoder, tokens_BS: Tensor) -> Tensor:
    kept: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.no_grad():
        model.logits(tokens_BS)
    hook.remove()
    return kept[0]


@pytest.mark.parametrize("overrides", [[], [*RESONANCE, *STATIC]], ids=["topk", "resonance static"])
def test_a_later_token_changes_nothing_before_it(overrides: list[str]) -> None:
    model, (tokens_BS, _) = build(*overrides).eval(), batch()
    changed_BS, place = tokens_BS.clone(), 6
    changed_BS[:, place] = (changed_BS[:, place] + 1) % VOCAB
    before, after = all_hidden(model, tokens_BS), all_hidden(model, changed_BS)
    assert_close(after[:, :place], before[:, :place], rel=1e-6)
    moved = (after - before).abs().amax(-1)
    assert bool((moved[:, place:] > 1e-4).all()), "and every position from it on has seen it"


@pytest.mark.parametrize("overrides", [[], [*RESONANCE, *STATIC]], ids=["topk", "resonance static"])
def test_another_sequence_of_the_batch_changes_nothing(overrides: list[str]) -> None:
    model, (tokens_BS, _) = build(*overrides).eval(), batch()
    together = all_hidden(model, tokens_BS)
    for row in range(BATCH):
        assert_close(all_hidden(model, tokens_BS[row : row + 1])[0], together[row], rel=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [[], ["moe.router.score=sigmoid", "moe.router.bias_update_rate=0.01"], [*RESONANCE, *STATIC]],
    ids=["softmax", "sigmoid", "resonance static"],
)
def test_recomputation_changes_no_bit(overrides: list[str]) -> None:
    kept, again = build(*overrides), build(*overrides, "training.recompute=full")
    runs = []
    for model in (kept, again):
        calls = 0

        def counted(*_: object) -> None:
            nonlocal calls
            calls += 1

        model.blocks[1].attention.register_forward_hook(counted)
        output = model(*batch())
        runs.append((output, gradients(model, output.loss), dict(model.named_buffers()), calls))
    (first, first_gradients, first_buffers, once), (second, second_gradients, second_buffers, twice) = runs
    assert (once, twice) == (1, 2), "the second model does run its blocks again"
    dropped = [aux.metrics["drop_share"][0].item() for aux in first.layers[1:]]
    assert all(share > 0 for share in dropped) == (STATIC[0] in overrides)
    assert_equal_bits(second.loss, first.loss, name="loss")
    for name, gradient in first_gradients.items():
        assert_equal_bits(second_gradients[name], gradient, name=name)
    for name, buffer in first_buffers.items():
        assert_equal_bits(second_buffers[name], buffer, name=name)
    assert_same_reports(first, second)


def assert_same_reports(first: ModelOutput, second: ModelOutput) -> None:
    assert len(first.layers) == len(second.layers)
    for one, other in zip(first.layers, second.layers, strict=True):
        for have, want in ((other.losses, one.losses), (other.observations, one.observations)):
            assert have.keys() == want.keys()
            for name, value in want.items():
                assert_equal_bits(have[name], value, name=name)
        assert other.metrics.keys() == one.metrics.keys()
        for name, (value, how) in one.metrics.items():
            assert other.metrics[name][1] == how
            assert_equal_bits(other.metrics[name][0], value, name=name)


def test_head_gives_fp32_logits_of_a_bf16_model() -> None:
    model = build().bfloat16().eval()
    with torch.no_grad():
        logits_BV = model.logits(batch()[0])
    assert logits_BV.dtype == torch.float32
    assert bool(logits_BV.isfinite().all())
    assert F.cosine_similarity(logits_BV, build().eval().logits(batch()[0])).min().item() > 0.9


class Narrowed(TorchDispatchMode):
    """Operations inside that lose digits of fp64: by narrowing it, or by mixing it with rows of fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before, after = widths((args, kwargs)), widths(out)
        if torch.float64 in before and {torch.float32, torch.bfloat16} & (before | after):
            self.seen.append(str(func))
        return out


def widths(values: object) -> set[torch.dtype]:
    """The floating-point types of the tensors in `values` that are more than one number."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.numel() > 1}


@pytest.mark.parametrize(
    "overrides",
    [["moe.num_experts=0"], [], ["moe.router.score=sigmoid"], ["moe.router.z_loss=0.1"], RESONANCE, RESONANCE + STATIC],
    ids=" ".join,
)
def test_fp64_loses_no_digits_on_the_way(overrides: list[str]) -> None:
    model = build(*overrides).double()
    with Narrowed() as narrowed:
        output = model(*batch())
        output.loss.backward()
    assert not narrowed.seen
    assert output.loss.dtype == output.cross_entropy.dtype == torch.float64
    with Narrowed() as narrowed, torch.no_grad():
        model.eval().logits(batch()[0], model.new_caches())
        model(*batch(), each=True)
    assert not narrowed.seen


def test_a_lost_digit_is_seen() -> None:
    model = build("moe.num_experts=0").double()
    model.norm.float()
    model.norm.register_forward_pre_hook(lambda module, inputs: tuple(x.float() for x in inputs))
    model.norm.register_forward_hook(lambda module, inputs, output: output.double())
    with Narrowed() as narrowed:
        model(*batch())
    assert narrowed.seen
