"""`bench parallel`: its report as small tables."""

from __future__ import annotations

from typing import Any

from megamoe.bench.report import as_table, closing, in_words


def markdown(report: dict[str, Any]) -> str:
    """The report of :func:`megamoe.bench.parallel.bench_parallel` as markdown."""
    settings, training, results = report["settings"], report["config"]["training"], report["results"]
    heading = (
        f"Training steps on random tokens: {settings['ranks']} ranks, {training['global_batch_size']} sequences of "
        f"{report['config']['data']['seq_length']} tokens per step, {settings['rounds']} rounds of {settings['steps']} "
        f"steps in turns. Ratios and differences are of the same round, to {results[0]['layout']} at ZeRO-1: median "
        "(smallest to largest). Explained is the ratio if nothing but the time of messages came on top: of those of a "
        f"step, sent in the same rounds amid work that is the same for all layouts, {report['pieces']} products, as "
        "much as a step has. Unexplained is what is left, with the 95 % confidence interval of its median; below zero, "
        "messages take less in a step than they do there. Each round begins with another layout; ranks are pinned to "
        "CPUs in turn."
    )
    tables = [
        _layouts(results),
        _cpu(results, min(settings["ranks"], report["conditions"]["cpus"])),
        _bytes(results),
        _operations(results),
    ]
    return "\n\n".join([heading, *tables, *closing(report)]) + "\n"


def _ms(values: dict[str, Any]) -> str:
    return f"{1e3 * values['median']:.0f}"


def _layouts(results: list[dict[str, Any]]) -> str:
    plain = results[0]["times"]["step"]["seconds"]["median"]
    rows = []
    for r in results:
        low, high = (1e3 * end for end in r["unexplained_seconds"]["interval"])
        rows.append(
            (
                r["layout"],
                r["micro_batch_size"],
                f"{r['tokens_per_second']['median']:,.0f}",
                in_words(r["over_plain"]),
                f"{plain / (plain + r['times']['amid work']['longer']['median']):.2f}",
                _ms(r["times"]["step"]["longer"]),
                _ms(r["times"]["amid work"]["longer"]),
                _ms(r["times"]["alone"]["longer"]),
                f"{_ms(r['unexplained_seconds'])} ({low:.0f} to {high:.0f})",
            )
        )
    columns = ("layout", "micro-batch", "tokens/s", "over plain", "explained", "ms longer per step", "its messages")
    return as_table((*columns, "its messages alone", "unexplained"), rows)


def _cpu(results: list[dict[str, Any]], cpus: int) -> str:
    """Where the time goes: CPU time of all ranks on so many CPUs, and the rest, in which CPUs had nothing to do."""
    rows, header = [], ["layout"]
    for r in results:
        row: list[str] = [r["layout"]]
        for times in r["times"].values():
            wall, busy = 1e3 * times["seconds"]["median"], 1e3 * times["cpu_seconds"]["median"] / cpus
            row += [f"{wall:.0f}", f"{busy:.0f}", f"{wall - busy:.0f}"]
        rows.append(row)
    for what in ("ms per step", "its messages amid work", "its messages alone"):
        header += [what, f"CPU time / {cpus}", "idle"]
    return as_table(header, rows)


def _bytes(results: list[dict[str, Any]]) -> str:
    """Bytes by axis; rows to experts are predicted for even load."""
    rows = [
        (r["layout"], axis, f"{v['predicted']:,.0f}", f"{v['counted']:,.0f}", f"{1e3 * v['seconds']:.1f}")
        for r in results
        for axis, v in r["axes"].items()
    ]
    rows += [(r["layout"], "small messages", "", "", f"{1e3 * r['small_message_seconds']:.1f}") for r in results]
    columns = ("layout", "axis", "bytes per step and rank, predicted", "counted", "ms of the predicted, alone")
    return as_table(columns, rows)


def _operations(results: list[dict[str, Any]]) -> str:
    rows = [
        (
            r["layout"],
            f"{o['axis']} {o['operation']}",
            o["messages"],
            f"{o['bytes'] / o['messages'] / 2**10:,.1f}",
            f"{o['bytes_per_second'] / 2**20:,.0f}",
        )
        for r in results
        for o in r["operations"]
        if o["bytes"]
    ]
    return as_table(("layout", "operation (rank 0)", "per step", "KiB sent each", "MiB/s, alone"), rows)
