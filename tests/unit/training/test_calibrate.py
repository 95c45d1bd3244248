"""The quantile that decides which tokens are uncertain, read from a histogram."""

import pytest
import torch

from megamoe.training.calibrate import BINS, quantile


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.95, 0.999])
def test_the_quantile_of_many_values(share: float) -> None:
    values = torch.rand(200_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 2
    histogram = torch.histc(values, BINS, 0.0, 1.0)
    assert quantile(histogram, share) == pytest.approx(float(values.quantile(share)), abs=1.5 / BINS)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_equal_values(value: float) -> None:
    """Everything lies in one bin, the first and the last included."""
    histogram = torch.histc(torch.full((1000,), value, dtype=torch.float64), BINS, 0.0, 1.0)
    assert quantile(histogram, 0.95) == pytest.approx(value, abs=1.5 / BINS)


def test_parts_of_the_data_add_up() -> None:
    """What ranks count is added, so the layout changes nothing."""
    values = torch.rand(1000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    whole = torch.histc(values, BINS, 0.0, 1.0)
    parts = sum(torch.histc(part, BINS, 0.0, 1.0) for part in values.split(123))
    assert quantile(whole, 0.95) == quantile(parts, 0.95)
