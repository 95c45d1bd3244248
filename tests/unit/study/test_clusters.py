"""The Calinski-Harabasz index by hand, and on the rows that reach a router."""

import math

import pytest
import torch

from megamoe.model.decoder import Decoder
from megamoe.model.initialise import initialise
from megamoe.study.clusters import calinski_harabasz, first_choices
from megamoe.testing.configs import tiny_config


def test_by_hand() -> None:
    """Two pairs on a line: means 1 and 5 around 3, so B = 4 * 2^2 = 16 and W = 4 * 1^2 = 4; (16 / 1) / (4 / 2) = 8."""
    rows_ND = torch.tensor([[0.0], [2.0], [4.0], [6.0]])
    assert calinski_harabasz(rows_ND, torch.tensor([0, 0, 1, 1])) == pytest.approx(8.0)
    assert calinski_harabasz(rows_ND, torch.tensor([0, 0, 5, 5])) == pytest.approx(8.0), "empty clusters do not count"
    assert calinski_harabasz(rows_ND, torch.tensor([0, 1, 0, 1])) < 1.0


def test_where_it_has_no_value() -> None:
    rows_ND = torch.tensor([[0.0], [2.0], [4.0]])
    assert math.isnan(calinski_harabasz(rows_ND, torch.zeros(3, dtype=torch.int64)))
    assert math.isnan(calinski_harabasz(rows_ND, torch.arange(3)))


def test_rows_and_first_choices_of_every_router() -> None:
    config = tiny_config()
    model = Decoder(config, 320)
    initialise(model, config.model, 1)
    tokens_BS = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(0))
    found = first_choices(model.eval(), [(tokens_BS, tokens_BS), (tokens_BS, tokens_BS)])
    assert sorted(found) == [0, 1]
    for rows_ND, experts_N in found.values():
        assert rows_ND.shape == (128, 32)
        assert torch.equal(rows_ND[:64], rows_ND[64:])
        assert experts_N.shape == (128,)
        assert 0 <= int(experts_N.min()) <= int(experts_N.max()) < 8
