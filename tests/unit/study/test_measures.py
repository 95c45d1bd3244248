"""What is read from a run's metrics."""

import json
from pathlib import Path

import pytest

from megamoe.study.measures import CURVE_POINTS, read_measures


def write(folder: Path, steps: int) -> None:
    lines: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "cross_entropy": 8.0 / step,
                "step_seconds": float(step),
                "layers.0.drop_share": 0.1,
                "layers.2.drop_share": 0.3 if step > steps * 3 // 4 else 0.5,
                "layers.0.load": [0.5, 1.5],
                "layers.2.load": [0.2, 0.4],
            }
        )
        if step % 4 == 0:
            lines.append({"step": step, "validation_loss": 9.0 / step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_scalars_layers_and_curves(tmp_path: Path) -> None:
    write(tmp_path, 8)
    found = read_measures(tmp_path, ["load"])
    assert found.scalars["validation_loss"] == pytest.approx(9 / 8)
    assert found.validation == [(4.0, 9 / 4), (8.0, 9 / 8)]
    assert found.scalars["step_seconds"] == pytest.approx(4.5)
    assert found.scalars["drop_share"] == pytest.approx((0.1 + (6 * 0.5 + 2 * 0.3) / 8) / 2)
    assert found.scalars["drop_share_last"] == pytest.approx(0.2)
    assert found.layers["drop_share"] == pytest.approx({0: 0.1, 2: 0.3})
    # Rows worked on, of K T / E: the mean load, which also counts rows beyond the tokens' own choices.
    assert found.scalars["processed"] == pytest.approx((1.0 + 0.3) / 2)
    assert found.curves == {
        "load": {0: [(s, 1.0) for s in range(1, 9)], 2: [(s, pytest.approx(0.3)) for s in range(1, 9)]}
    }


def test_long_curves_are_thinned(tmp_path: Path) -> None:
    write(tmp_path, 400)
    found = read_measures(tmp_path, ["drop_share"])
    assert len(found.training) <= CURVE_POINTS
    assert found.training[0] == (pytest.approx(4.0), pytest.approx(sum(8 / s for s in range(1, 8)) / 7))
    assert len(found.curves["drop_share"][2]) <= CURVE_POINTS
