"""Numbers about stored tensors against torch's own of the whole tensor."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megamoe.convert import statistics as module
from megamoe.convert.statistics import nonfinite, parts, statistics
from megamoe.testing.checkpoints import example_tensors, write_checkpoint
from megamoe.training.checkpoint.reader import Reader


def reader_of(folder: Path, tensors: dict[str, torch.Tensor]) -> Reader:
    return Reader(write_checkpoint(folder, 1, tensors))


def test_they_are_those_of_the_whole_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = example_tensors() | {"weight/large": torch.randn(40, 50) + 3}
    reader = reader_of(tmp_path, tensors)
    for num_elements in (7, 10**6):
        monkeypatch.setattr(module.parts, "__defaults__", (num_elements,))
        for name, value in tensors.items():
            found, wide = statistics(reader, name), value.double()
            if value.numel() == 0:
                assert math.isnan(found.mean)
                assert found.norm == 0
                continue
            assert (found.least, found.largest, found.num_nonfinite) == (wide.min(), wide.max(), 0)
            assert found.mean == pytest.approx(wide.mean().item(), rel=1e-12)
            assert found.norm == pytest.approx(wide.norm().item(), rel=1e-12)


def test_a_tensor_is_read_once_and_in_small_parts(tmp_path: Path) -> None:
    value = torch.randn(6, 5, 4)
    reader, seen = reader_of(tmp_path, {"weight/w": value}), torch.zeros(6, 5, 4)
    for box, values in parts(reader, "weight/w", num_elements=7):
        assert values.numel() <= 7
        assert torch.equal(values, value[box.slices()])
        seen[box.slices()] += 1
    assert torch.equal(seen, torch.ones(6, 5, 4))


def test_values_that_are_not_finite_are_counted_and_seen(tmp_path: Path) -> None:
    value = torch.randn(6, 5)
    value[1, 2], value[3, 4], value[0, 0] = math.nan, math.inf, -math.inf
    reader = reader_of(tmp_path, {"weight/nan": value, "weight/inf": value.nan_to_num(0.0, math.inf, -math.inf)})
    found = statistics(reader, "weight/nan")
    assert found.num_nonfinite == 3
    assert math.isnan(found.least)
    assert math.isnan(found.largest)
    found = statistics(reader, "weight/inf")
    assert (found.num_nonfinite, found.least, found.largest) == (2, -math.inf, math.inf)


def test_large_values_whose_sum_is_not_finite_are_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        values = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)
        assert not values.sum().isfinite()
        assert nonfinite(values) == 0
        values[3] = math.nan
        assert nonfinite(values) == 1
