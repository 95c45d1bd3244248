"""The model of a layer's time in chunks, against timelines drawn by hand."""

import pytest

from megamoe.config.chunks import Layer, Rates, best, best_for, layer_of, seconds
from megamoe.config.load import load_config

# One row is 1 second of the link each way, and 6 * D * F flops = 6 seconds / r of computation in each of three passes.
LAYER = Layer(rows=4, width=1, ffn=1, value_bytes=1, elsewhere=1.0)


def rates(work: float, **others: float) -> Rates:
    """With so many seconds of work for each row and pass."""
    return Rates(bytes_per_second=1.0, flops_per_second=6.0 / work, **others)


def test_in_one_piece_nothing_is_hidden() -> None:
    # Four ways of 4 s, three passes of 4 s.
    assert seconds(LAYER, rates(1.0), 1) == pytest.approx(28)


def test_as_much_work_as_exchange() -> None:
    # Two chunks of 2 s. Forward: rows are here at 2 and 4, worked on until 4 and 6, home at 6 and 8. Backward the same;
    # the weights' 4 s go from 6 to 10.
    assert seconds(LAYER, rates(1.0), 2) == pytest.approx(8 + 10)
    # Four of 1 s: here at 1 2 3 4, done at 2 3 4 5, home at 5 6 7 8. The weights' 4 s go from 5 to 9.
    assert seconds(LAYER, rates(1.0), 4) == pytest.approx(8 + 9)


def test_little_work() -> None:
    # Two chunks of 2 s, 0.5 s of work each: the link is never idle, 8 s, and the weights are done by 5.5.
    assert seconds(LAYER, rates(0.25), 2) == pytest.approx(8 + 8)


def test_much_work() -> None:
    # Two chunks of 2 s, 6 s of work each: done at 8 and 14, home at 16; backward 14 and 12 s for the weights.
    assert seconds(LAYER, rates(3.0), 2) == pytest.approx(16 + 26)


def test_work_beside_is_done_while_the_first_rows_travel() -> None:
    beside = Layer(rows=4, width=1, ffn=1, value_bytes=1, elsewhere=1.0, beside_flops=6.0)
    # 1 s forward, before the first rows are here at 2; 2 s backward, after 6, then the weights until 12.
    assert seconds(beside, rates(1.0), 2) == pytest.approx(8 + 12)
    assert seconds(beside, rates(1.0), 1) == pytest.approx(28 + 3)


def test_what_a_chunk_costs() -> None:
    # 0.5 s more for each of two exchanges there (2.5, 5) and home, 1 s more for each of two passes through experts of 2
    # s: forward done at 5.5 and 8.5, home at 8 and 11; backward 8.5, then 2 * 3 s of weights.
    assert seconds(LAYER, rates(1.0, latency=0.5, launches=1.0), 2) == pytest.approx(11 + 14.5)
    # Two rows at half of the speed: 4 s of work for each chunk. Done at 6 and 10, home at 12; weights until 18.
    assert seconds(LAYER, rates(1.0, half_rows=2.0), 2) == pytest.approx(12 + 18)


def test_only_rows_from_elsewhere_travel() -> None:
    half = Layer(rows=4, width=1, ffn=1, value_bytes=1, elsewhere=0.5)
    assert seconds(half, rates(1.0), 1) == pytest.approx(4 * 2 + 12)


def test_no_rows_take_no_time() -> None:
    assert seconds(Layer(0, 1, 1, 1, 1.0), rates(1.0, half_rows=2.0), 2) == 0


def test_the_best_number_grows_with_the_exchange_and_falls_with_the_latency() -> None:
    assert best(LAYER, rates(1.0), 4) == 4
    # Forward 2 (4 + 0.04 n), both ways; backward 4 + 0.04 n until all are here, 4 / n for the last, 4 for the weights:
    # together 16 + 0.12 n + 4 / n, least at 5.8.
    assert best(LAYER, rates(1.0, latency=0.04), 12) == 6
    assert best(LAYER, rates(1.0, latency=10.0), 8) == 1
    local = Layer(rows=4, width=1, ffn=1, value_bytes=1, elsewhere=0.0)
    assert best(local, rates(1.0), 4) == 1, "nothing to hide: the smallest of equals"


BIG = [
    "model.hidden_size=4096",
    "model.num_heads=32",
    "data.seq_length=4096",
    "training.micro_batch_size=8",
    "training.precision=bf16",
    "moe.num_experts=64",
    "moe.top_k=2",
    "moe.expert_ffn_size=2048",
    "moe.num_shared_experts=1",
]


def test_a_layer_of_a_configuration() -> None:
    layer = layer_of(load_config([], [*BIG, "parallel.ep=8"]))
    assert (layer.rows, layer.width, layer.ffn, layer.value_bytes, layer.elsewhere) == (65536, 4096, 2048, 2, 7 / 8)
    assert layer.beside_flops == 6 * 32768 * 4096 * 2048


def test_where_chunks_are_worth_it() -> None:
    config = load_config([], [*BIG, "parallel.ep=8"])
    assert best_for(config, on_gpu=False, ranks_per_node=8) == 1
    inside, between = (best_for(config, on_gpu=True, ranks_per_node=ranks) for ranks in (8, 4))
    assert 1 < inside < 8
    assert 1 < between <= 8
    assert best_for(load_config([], BIG), on_gpu=True, ranks_per_node=8) == 1, "one rank has all experts"
