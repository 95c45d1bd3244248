"""Pictures of schedules: what runs when on which resource, with exposed exchange marked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.common.errors import ConfigError
from megamoe.plan.events import Interval, Placed, makespan
from megamoe.plan.limits import exposed
from megamoe.plan.rates import BETWEEN, COMPUTE, HOST, INSIDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".html", ".png", ".svg")
LANES = (COMPUTE, INSIDE, BETWEEN, HOST)
COLOURS = {
    "experts": "#2f6db5",
    "gradients of rows": "#5b8fd0",
    "gradients of weights": "#9dbde6",
    "shared experts": "#7a5ea8",
    "router": "#8a8a8a",
    "move": "#b9b9b9",
    "dispatch": "#d9822b",
    "combine": "#2f8f5b",
    "combine backward": "#7cc29b",
    "dispatch backward": "#f0b67a",
    "counts": "#a8324e",
    "parts": "#c9a227",
    "replicas": "#c9a227",
    "attention": "#4b9fb5",
    "dense": "#356f80",
    "head": "#6b6b6b",
    "optimizer": "#444444",
    "wait": "#dddddd",
    "launch": "#cfcfcf",
    "exposed": "#d62f2f",
}
WORDS = {
    "move": "rows into order",
    "counts": "numbers of rows",
    "parts": "exchange over tp, cp, etp",
    "replicas": "gradients and weights of replicas",
    "launch": "host issues an operation",
    "wait": "waiting for other stages",
    "dense": "dense blocks",
    "exposed": "exposed exchange",
}
SHADE = "#f6c6c6"
"""Of the time in which something is under way and nothing is computed."""


@dataclass(frozen=True)
class Panel:
    """A schedule with its title."""

    title: str
    placed: Sequence[Placed]
    coarse: bool = False
    """Whether parts of a step stand for all that is in them; nothing is shaded then."""

    @property
    def lanes(self) -> list[str]:
        """Resources that are used, the processor first."""
        return [lane for lane in LANES if any(_visible(each) and each.task.resource == lane for each in self.placed)]

    @property
    def shaded(self) -> list[Interval]:
        """Exposed exchange."""
        return [] if self.coarse else exposed(self.placed)

    def label(self, lane: str) -> str:
        """Of a lane."""
        if self.coarse:
            return {COMPUTE: "computed or hidden", INSIDE: "exposed"}[lane]
        return {COMPUTE: "computation", HOST: "host"}.get(lane, f"link {lane}")


def require(path: Path) -> None:
    """Refuse at the start what would fail at the end.

    Raises:
        ConfigError: the file is of no kind that can be drawn, or what draws it is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError("A timeline is a picture.", got=str(path), expected=f"a file with {', '.join(SUFFIXES)}")
    if path.suffix == ".html":
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"A timeline as {path.suffix} is drawn with matplotlib, which is not installed.",
            got=str(error),
            todo='pip install -c docker/constraints.txt ".[study]", or give a file with .html, which needs nothing',
        ) from error


def draw(panels: Sequence[Panel], title: str, text: str, path: Path) -> None:
    """Write the picture.

    Args:
        panels: one below the other, of one scale where they are not coarse.
        text: that goes with it in HTML.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        path.write_text(_html(panels, title, text), encoding="utf-8")
    else:
        _matplotlib(panels, title, path)


def _visible(each: Placed) -> bool:
    return each.end > each.start and each.task.kind != ""


def _scale(panel: Panel, panels: Iterable[Panel]) -> float:
    """Seconds from the left to the right."""
    return max(makespan(other.placed) for other in panels if other.coarse == panel.coarse) or 1.0


def _kinds(panels: Iterable[Panel]) -> list[str]:
    used = {each.task.kind for panel in panels for each in panel.placed if _visible(each)}
    return [kind for kind in COLOURS if kind in used]


def _tip(each: Placed) -> str:
    """What the mouse shows."""
    parts = [each.task.name, each.task.hint, f"{1e3 * (each.end - each.start):.3f} ms from {1e3 * each.start:.3f} ms"]
    return ", ".join(part for part in parts if part)


# --- HTML with inline SVG

WIDTH, LEFT, RIGHT, LANE, TOP, GAP = 1180, 150, 20, 34, 30, 46


def _html(panels: Sequence[Panel], title: str, text: str) -> str:
    height = sum(TOP + GAP + LANE * len(panel.lanes) for panel in panels)
    body, y = list[str](), 0.0
    for panel in panels:
        body += _svg_panel(panel, _scale(panel, panels), y)
        y += TOP + GAP + LANE * len(panel.lanes)
    legend = "".join(f'<span><i style="background:{c}"></i>{escape(w)}</span>' for w, c in _legend(panels))
    style = (
        "body{font:14px system-ui,sans-serif;margin:24px;max-width:1230px;color:#222}"
        "h1{font-size:18px}pre{font-size:12px;overflow:auto;background:#f6f6f6;padding:12px}"
        "span{display:inline-block;margin:0 16px 6px 0}i{display:inline-block;width:14px;height:14px;"
        "margin-right:6px;vertical-align:-2px}rect.t:hover{stroke:#000;stroke-width:1.5}"
        "svg{width:100%;height:auto}text{font-size:12px;fill:#222}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>\n'
        f"<h1>{escape(title)}</h1>\n<p>{legend}</p>\n"
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">\n' + "\n".join(body) + "\n</svg>\n"
        f"<pre>{escape(text)}</pre>\n</html>\n"
    )


def _legend(panels: Sequence[Panel]) -> list[tuple[str, str]]:
    entries = [(WORDS.get(kind, kind), COLOURS[kind]) for kind in _kinds(panels)]
    shaded = any(panel.shaded for panel in panels)
    return [*entries, *([("exchange that nothing hides", SHADE)] if shaded else [])]


def _svg_panel(panel: Panel, scale: float, y: float) -> list[str]:
    def x(seconds: float) -> float:
        return LEFT + seconds / scale * (WIDTH - LEFT - RIGHT)

    bottom = y + TOP + LANE * len(panel.lanes)
    found = [f'<text x="0" y="{y + 18}" font-weight="bold">{escape(panel.title)}</text>']
    for start, end in panel.shaded:
        found.append(
            f'<rect x="{x(start):.2f}" y="{y + TOP - 4}" width="{x(end) - x(start):.2f}" '
            f'height="{bottom - y - TOP + 6}" fill="{SHADE}">'
            f"<title>exposed: {1e3 * (end - start):.3f} ms</title></rect>"
        )
    for row, lane in enumerate(panel.lanes):
        top = y + TOP + LANE * row
        found.append(f'<text x="0" y="{top + LANE / 2 + 2}">{escape(panel.label(lane))}</text>')
        for each in panel.placed:
            if each.task.resource == lane and _visible(each):
                found.append(_svg_bar(each, x(each.start), top, x(each.end) - x(each.start)))
    for tick in _ticks(scale):
        found.append(
            f'<line x1="{x(tick):.2f}" y1="{bottom}" x2="{x(tick):.2f}" y2="{bottom + 5}" stroke="#666"/>'
            f'<text x="{x(tick):.2f}" y="{bottom + 18}" text-anchor="middle">{_tick(tick, scale)}</text>'
        )
    return found


def _svg_bar(each: Placed, x: float, top: float, width: float) -> str:
    colour = COLOURS.get(each.task.kind, "#888888")
    edge = ' stroke="#fff" stroke-width="0.6"' if width > 3 else ""
    bar = (
        f'<rect class="t" x="{x:.2f}" y="{top}" width="{max(width, 0.3):.2f}" height="{LANE - 8}" '
        f'fill="{colour}"{edge}><title>{escape(_tip(each))}</title></rect>'
    )
    label = _short(each)
    if width < 7 * len(label) or each.task.resource == HOST:
        return bar
    return (
        bar + f'<text x="{x + width / 2:.2f}" y="{top + LANE / 2 + 1}" text-anchor="middle" pointer-events="none" '
        f'style="fill:{_ink(colour)}">{escape(label)}</text>'
    )


def _short(each: Placed) -> str:
    """What fits on a bar."""
    return (each.task.name.split(" ")[-1] if "/" in each.task.name else each.task.name).split("/")[0]


def _ink(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#000" if 0.3 * red + 0.6 * green + 0.1 * blue > 150 else "#fff"


def _ticks(scale: float) -> list[float]:
    """Round moments, about ten."""
    step = 10.0 ** len(str(int(scale * 1e9))) / 1e10
    while scale / step > 12:
        step *= 2 if scale / step < 24 else 5
    while scale / step < 5:
        step /= 2
    return [number * step for number in range(int(scale / step + 1e-9) + 1)]


def _tick(seconds: float, scale: float) -> str:
    unit, name = (1.0, "s") if scale >= 10 else (1e3, "ms") if scale >= 2e-3 else (1e6, "µs")
    return f"{seconds * unit:g} {name}"


# --- PNG and SVG

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "svg.fonttype": "none",
    # Equal plans give equal files.
    "svg.hashsalt": "megamoe",
}


def _matplotlib(panels: Sequence[Panel], title: str, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heights = [len(panel.lanes) + 1.2 for panel in panels]
    entries = _legend(panels)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 0.42 * sum(heights) + 1.0 + 0.2 * (len(entries) // 5)), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
        for (own,), panel in zip(axes, panels, strict=True):
            _axes(own, panel, _scale(panel, panels))
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        patches = [Patch(facecolor=colour, label=words) for words, colour in entries]
        figure.legend(handles=patches, loc="outside lower left", ncols=5, frameon=False)
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type")) if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata, dpi=150)


def _axes(axes: Axes, panel: Panel, scale: float) -> None:
    for start, end in panel.shaded:
        axes.axvspan(start, end, color=SHADE, linewidth=0)
    for row, lane in enumerate(panel.lanes):
        bars = [each for each in panel.placed if each.task.resource == lane and _visible(each)]
        axes.barh(
            [row] * len(bars),
            [each.end - each.start for each in bars],
            left=[each.start for each in bars],
            height=0.72,
            color=[COLOURS.get(each.task.kind, "#888888") for each in bars],
            edgecolor="white",
            linewidth=0.4 if lane != HOST else 0,
        )
        for each in bars:
            label = _short(each)
            if lane != HOST and (each.end - each.start) / scale > 0.0075 * len(label):
                ink = _ink(COLOURS.get(each.task.kind, "#888888"))
                axes.text((each.start + each.end) / 2, row, label, ha="center", va="center", color=ink, fontsize=8)
    ticks = _ticks(scale)
    axes.set_xticks(ticks, [_tick(tick, scale) for tick in ticks])
    axes.set_yticks(range(len(panel.lanes)), [panel.label(lane) for lane in panel.lanes])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(panel.lanes) - 0.5, -0.6)
    axes.set_xlim(0, scale * 1.005)
    axes.set_title(panel.title, loc="left", fontsize=9, fontweight="bold")
