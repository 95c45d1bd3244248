"""Weights by global name: written by ranks of one layout, read by any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megamoe.common.errors import CheckpointError
from megamoe.model.decoder import Decoder
from megamoe.model.initialise import initialise
from megamoe.moe.placement import ExpertParallel, Placement
from megamoe.parallel.shards import place_of, shards_of
from megamoe.testing.configs import tiny_config
from megamoe.training.checkpoint.boxes import Box
from megamoe.training.checkpoint.files import write_file
from megamoe.training.checkpoint.index import Index
from megamoe.training.checkpoint.pieces import Piece
from megamoe.training.checkpoint.weights import load_weights, running_statistics


def model(ep_size: int = 1, ep_rank: int = 0, seed: int = 1, *overrides: str) -> Decoder:
    config = tiny_config(*overrides)
    result = Decoder(config, 320, Placement(ExpertParallel(ep_size, ep_rank)))
    initialise(result, config.model, seed)
    return result


def pieces_of(one: Decoder, first: bool) -> list[Piece]:
    """What a rank writes of its model; statistics are the same on all, so the first one writes them."""
    axes, pieces = one.place.axes(), []
    for name, parameter in one.named_parameters():
        if first or shards_of(parameter):
            whole, offsets = place_of(parameter, tuple(parameter.shape), axes)
            pieces.append(Piece(f"weight/{name}", whole, Box(offsets, tuple(parameter.shape)), parameter))
    for name, buffer in running_statistics(one).items() if first else ():
        pieces.append(Piece(f"statistic/{name}", tuple(buffer.shape), Box.of(buffer.shape), buffer))
    return pieces


def write(folder: Path, *ranks: Decoder) -> None:
    (folder / "state").mkdir()
    for rank, one in enumerate(ranks):
        write_file(folder / "state" / f"rank_{rank:05d}.safetensors", pieces_of(one, rank == 0))
    Index.scan(folder).write()


def save(folder: Path, ep_size: int, *overrides: str) -> None:
    write(folder, *(model(ep_size, rank, 1, *overrides) for rank in range(ep_size)))


@pytest.mark.parametrize("router", ["topk", "resonance"])
@pytest.mark.parametrize("saved_by", [1, 2, 8])
@pytest.mark.parametrize("read_by", [1, 2, 4])
def test_any_layout_reads_any_other(tmp_path: Path, saved_by: int, read_by: int, router: str) -> None:
    kind = f"moe.router.type={router}"
    save(tmp_path, saved_by, kind)
    for rank in range(read_by):
        wanted, got = model(read_by, rank, 1, kind), model(read_by, rank, 2, kind)
        load_weights(tmp_path, got)
        for name, tensor in wanted.state_dict().items():
            assert torch.equal(got.state_dict()[name], tensor), name


def test_running_statistics_travel(tmp_path: Path) -> None:
    one, other = model(1, 0, 1, "moe.router.type=resonance"), model(1, 0, 2, "moe.router.type=resonance")
    one.blocks[1].ffn.router.token_mean_D.uniform_()
    write(tmp_path, one)
    load_weights(tmp_path, other)
    assert torch.equal(other.blocks[1].ffn.router.token_mean_D, one.blocks[1].ffn.router.token_mean_D)


def test_a_capacity_bound_travels_to_another_layout_and_is_noticed_there(tmp_path: Path) -> None:
    kind = ("moe.router.type=resonance", "moe.capacity.mode=etr_success")
    ranks = [model(2, rank, 1, *kind) for rank in range(2)]
    for block in (block for one in ranks for block in one.blocks):
        block.ffn.router.bound.move([0.01 * (1 + i) for i in range(8)], 0.5)
    write(tmp_path, *ranks)
    other = model(1, 0, 2, *kind)
    bounds = [block.ffn.router.bound for block in other.blocks]
    static = [bound.limits(256, torch.device("cpu")).per_expert_E.tolist() for bound in bounds]
    load_weights(tmp_path, other)
    for bound, before in zip(bounds, static, strict=True):
        assert bound.state()[0] == 1
        assert bound.state()[1] == pytest.approx([0.01 * (1 + i) for i in range(8)])
        assert bound.limits(256, torch.device("cpu")).per_expert_E.tolist() != before


def test_an_untied_head_and_dense_blocks_travel(tmp_path: Path) -> None:
    mixed = ("model.tie_embeddings=false", "moe.first_k_dense=1", "moe.num_shared_experts=1")
    save(tmp_path, 2, *mixed)
    wanted, got = model(1, 0, 1, *mixed), model(1, 0, 2, *mixed)
    load_weights(tmp_path, got)
    assert all(torch.equal(got.state_dict()[n], t) for n, t in wanted.state_dict().items())


def test_another_shape_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="another architecture"):
        load_weights(tmp_path, model(1, 0, 1, "model.hidden_size=64"))


def test_a_missing_weight_is_refused(tmp_path: Path) -> None:
    one = model()
    del one.blocks[1].ffn.experts.w2
    write(tmp_path, one)
    with pytest.raises(CheckpointError, match=r"damaged(.|\n)*experts\.w2"):
        load_weights(tmp_path, model())


def test_a_weight_too_many_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, "model.tie_embeddings=false")
    with pytest.raises(CheckpointError, match=r"another architecture(.|\n)*head"):
        load_weights(tmp_path, model())


def test_half_of_the_experts_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 2)
    (tmp_path / "state" / "rank_00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(tmp_path, model())


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "state" / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(tmp_path, model())


@pytest.mark.parametrize("wider", [torch.float64, torch.bfloat16])
def test_a_model_of_another_precision_reads_them(tmp_path: Path, wider: torch.dtype) -> None:
    one, other = model().to(wider), model(1, 0, 2)
    write(tmp_path, one)
    load_weights(tmp_path, other)
    assert all(torch.equal(other.state_dict()[n], t.to(torch.float32)) for n, t in one.state_dict().items())
