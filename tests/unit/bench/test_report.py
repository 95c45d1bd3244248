"""Reports as files."""

import json
import math
from pathlib import Path

from megamoe.bench.report import write


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    report = {"loss": math.nan, "arms": [{"low": -math.inf, "mean": 1.5}], "pair": (math.inf, 2), "name": "x"}
    files = write(report, "# page\n", tmp_path / "sub" / "results.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    stored = json.loads(files[0].read_text(), parse_constant=refuse)
    assert stored == {"loss": None, "arms": [{"low": None, "mean": 1.5}], "pair": [None, 2], "name": "x"}
    assert files[1].read_text() == "# page\n"
