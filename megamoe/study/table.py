"""The results for people: a markdown page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from megamoe.bench.report import as_table
from megamoe.study.plan import Measure

Arm = dict[str, Any]

NOTHING = "–"
EXACT = "exact_match"
UNITS = {"validation_loss": "nats", EXACT: "of the conversations"}
PLOTS = {
    "differences": "What the arms are judged by, minus the baseline's, with 95 % intervals",
    "cost_against_loss": "Tokens per expert against validation loss, both relative to the baseline",
    "loss": "Validation loss over steps",
}
"""Pictures that every study has, and what they show."""


class Column(NamedTuple):
    """A column of the table: its heading, and an arm's cell."""

    heading: str
    cell: Callable[[Arm], str]


def markdown(results: dict[str, Any], pictures: list[tuple[str, str]]) -> str:
    """The whole page.

    Args:
        results: of `results.collect`.
        pictures: (file name, what it shows).
    """
    conditions = "\n".join(f"- {name}: {value}" for name, value in results["conditions"].items())
    missing = results["missing"]
    return (
        "\n\n".join(
            [
                f"# {results['title']}",
                results["question"],
                "## Arms",
                _arms(results),
                "## Results",
                _table(results),
                _reading(results),
                *([f"Not complete, and left out: {', '.join(missing)}."] if missing else []),
                "## Verdicts",
                _verdicts(results),
                *(f"![{text}]({name})" for name, text in pictures),
                "## Conditions",
                conditions,
            ]
        )
        + "\n"
    )


def difference(values: dict[str, Any] | None) -> str:
    """`+0.0123 [-0.0010, +0.0256]`."""
    if values is None:
        return NOTHING
    interval = "" if values["low"] is None else f" [{values['low']:+.4f}, {values['high']:+.4f}]"
    return f"{values['mean']:+.4f}{interval}"


def _arms(results: dict[str, Any]) -> str:
    rows = []
    for name, arm in results["arms"].items():
        mark = " (baseline)" if name == results["baseline"] else ""
        settings = ", ".join(f"`{word}`" for word in arm["settings"]) or "as the common configuration"
        rows.append((f"{arm['label']}{mark}", arm["why"] or NOTHING, settings, f"`{arm['config_digest']}`"))
    return as_table(("arm", "what for", "settings", "configuration"), rows)


def _table(results: dict[str, Any]) -> str:
    columns = [column for name in results["measures"] for column in (*COLUMNS[name], *_per_source(name, results))]
    rows = [
        (arm["label"], *(column.cell(arm) for column in columns)) if arm["means"] else (arm["label"], "not run")
        for arm in results["arms"].values()
    ]
    width = len(columns) + 1
    return as_table(("arm", *(column.heading for column in columns)), [(*r, *[""] * (width - len(r))) for r in rows])


def _per_source(name: str, results: dict[str, Any]) -> list[Column]:
    """A column for each source that the measure is known of by itself."""
    keys = {key for arm in results["arms"].values() for key in arm["means"] if key.startswith(f"{name}.")}
    return [Column(key.removeprefix(f"{name}."), _share_cell(key)) for key in sorted(keys)] if name == EXACT else []


def _reading(results: dict[str, Any]) -> str:
    return (
        "Mean ± standard deviation over seeds. Differences are paired: an arm and the baseline with the same seed read "
        "the same samples in the same order; in brackets the two-sided 95 % interval of the mean difference (Student's "
        "t), of each arm by itself, not adjusted for the number of arms. K T / E is what an expert gets when all "
        "tokens keep their K experts and all experts get the same. Step time is the median ratio of rounds in which "
        "all arms took turns (smallest to largest), at the trained state."
    )


def _verdicts(results: dict[str, Any]) -> str:
    """One plain sentence for each arm."""
    base = results["arms"][results["baseline"]]["label"]
    lines = []
    for name, arm in results["arms"].items():
        if name == results["baseline"]:
            continue
        if arm["verdict"] is None:
            lines.append(f"- {arm['label']}: not run, or the baseline is not.")
            continue
        versus, judged = arm["differences"][results["judge"]], results["judge"].replace("_", " ")
        parts = [f"- **{arm['label']}**: {judged} against {base}: {arm['verdict']}"]
        if arm["verdict"] in ("better", "worse"):
            parts = [f"- **{arm['label']}**: {arm['verdict']} than {base} in {judged}"]
        parts.append(f" ({difference(versus)} {UNITS[results['judge']]}, {versus['seeds']} seeds)")
        if (share := arm["ratios"].get("processed")) is not None:
            parts.append(f", at {share:.1%} of its tokens per expert")
        if arm["cost"] is not None:
            parts.append(f" and {arm['cost']['step_time']['median']:.2f} times its step time")
        lines.append("".join(parts) + ".")
    return "\n".join(lines)


def _mean_cell(key: str, form: str) -> Callable[[Arm], str]:
    def cell(arm: Arm) -> str:
        values = arm["means"].get(key)
        if values is None:
            return NOTHING
        deviation = "" if values["deviation"] is None else f" ± {values['deviation']:{form}}"
        return f"{values['mean']:{form}}{deviation}"

    return cell


def _share_cell(key: str) -> Callable[[Arm], str]:
    return lambda arm: f"{arm['means'][key]['mean']:.1%}" if key in arm["means"] else NOTHING


def _processed_cell(arm: Arm) -> str:
    share = arm["ratios"].get("processed")
    return NOTHING if share is None else f"{share:.1%}"


def _time_cell(arm: Arm) -> str:
    if arm["cost"] is None:
        return NOTHING
    ratio = arm["cost"]["step_time"]
    return f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})"


def _bytes_cell(arm: Arm) -> str:
    sent = arm["cost"]["metrics"].get("sent_bytes") if arm["cost"] is not None else None
    if sent is None:
        return NOTHING
    share = arm["cost"]["sent_ratio"]
    return f"{sent / 1e6:.2f}" + ("" if share is None else f" ({share:.1%})")


COLUMNS: dict[Measure, tuple[Column, ...]] = {
    "validation_loss": (
        Column("validation loss", _mean_cell("validation_loss", ".4f")),
        Column("difference [95 %]", lambda arm: difference(arm["differences"].get("validation_loss"))),
    ),
    "exact_match": (
        Column("exact match, mean of sources", _mean_cell("exact_match", ".4f")),
        Column("difference [95 %]", lambda arm: difference(arm["differences"].get("exact_match"))),
    ),
    "processed": (
        Column("tokens per expert, of the baseline's", _processed_cell),
        Column("of K T / E", _share_cell("processed")),
    ),
    "drop_share": (Column("dropped", _share_cell("drop_share")),),
    "unserved_share": (Column("tokens without expert", _share_cell("unserved_share")),),
    "step_time": (Column("step time, of the baseline's", _time_cell),),
    "sent_bytes": (Column("MB sent per step (forward, all ranks), of the baseline's", _bytes_cell),),
    "max_load": (Column("largest load (1: K T / E)", _mean_cell("max_load", ".2f")),),
    "router_entropy": (Column("router entropy", _mean_cell("router_entropy", ".3f")),),
    "broadcast_share": (Column("broadcast", _share_cell("broadcast_share")),),
    "sensitivity": (
        Column("loss added by random experts for uncertain tokens", _mean_cell("sensitivity", ".4f")),
        Column("difference [95 %]", lambda arm: difference(arm["differences"].get("sensitivity"))),
        Column("for as many random tokens", _mean_cell("sensitivity_random", ".4f")),
        Column("tokens that these are", _share_cell("replaced_share")),
        Column("agreement with the best experts, uncertain tokens", _mean_cell("agreement", ".3f")),
        Column("other tokens", _mean_cell("agreement_certain", ".3f")),
    ),
    "calinski_harabasz": (Column("CH index of clusters", _mean_cell("calinski_harabasz", ".0f")),),
}
