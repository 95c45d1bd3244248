"""The page: what each arm's sentence says, and cells without a value."""

from typing import Any

import pytest

from megamoe.study.plan import MEASURES
from megamoe.study.table import markdown

COST = {
    "step_time": {"median": 0.9, "min": 0.8, "max": 1.1},
    "sent_ratio": 0.5,
    "metrics": {"sent_bytes": 3_000_000.0},
}


def arm(label: str, **values: Any) -> dict[str, Any]:
    empty = {"label": label, "why": "", "settings": [], "config_digest": "0" * 12, "verdict": None, "cost": None}
    return empty | {"means": {}, "differences": {}, "ratios": {}} | values


def page(verdict: str, judge: str = "validation_loss") -> str:
    means = {"validation_loss": {"mean": 3.0, "deviation": 0.01, "seeds": 5}}
    versus = {"validation_loss": {"mean": -0.02, "low": -0.03, "high": -0.01, "seeds": 5}}
    if judge == "exact_match":
        means |= {name: {"mean": 0.4, "deviation": 0.02, "seeds": 5} for name in (judge, f"{judge}.b", f"{judge}.a")}
        versus |= {judge: {"mean": 0.02, "low": 0.01, "high": 0.03, "seeds": 5}}
    arms = {
        "a": arm("A", means=means),
        "b": arm("B", means=means, differences=versus, ratios={"processed": 0.6}, verdict=verdict, cost=COST),
        "c": arm("C"),
    }
    results = {"title": "T", "question": "Q?", "conditions": {"steps": 4}, "baseline": "a", "judge": judge}
    results |= {"measures": [judge] if judge == "exact_match" else list(MEASURES)}
    return markdown(results | {"arms": arms, "missing": ["c seed 1"]}, [("loss.svg", "Loss")])


@pytest.mark.parametrize(
    "verdict, sentence",
    [
        ("better", "**B**: better than A in validation loss (-0.0200 [-0.0300, -0.0100] nats, 5 seeds)"),
        ("no difference seen at 95 %", "**B**: validation loss against A: no difference seen at 95 % ("),
        ("a run diverged: no verdict", "**B**: validation loss against A: a run diverged: no verdict ("),
    ],
)
def test_verdicts_in_words(verdict: str, sentence: str) -> None:
    text = page(verdict)
    assert sentence in text
    assert "at 60.0% of its tokens per expert and 0.90 times its step time." in text
    assert "- C: not run" in text
    assert "left out: c seed 1." in text


def test_another_judge() -> None:
    text = page("better", "exact_match")
    assert "**B**: better than A in exact match (+0.0200 [+0.0100, +0.0300] of the conversations, 5 seeds)" in text
    heading = next(line for line in text.splitlines() if line.startswith("| arm | exact match"))
    assert [cell.strip() for cell in heading.strip("|").split("|")][3:] == ["a", "b"], "a column for each source"


def test_cells() -> None:
    rows = [line for line in page("better").splitlines() if line.startswith("| B ") and "3.0000" in line]
    assert len(rows) == 1
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert cells[1:5] == ["3.0000 ± 0.0100", "-0.0200 [-0.0300, -0.0100]", "60.0%", "–"]
    assert "0.900 (0.800 to 1.100)" in cells
    assert "3.00 (50.0%)" in cells
