"""Tables for people, on a terminal or in a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> None:
    """Print on stdout; the columns called `numbers` are flush right."""
    shown = Table(box=None, pad_edge=False)
    for title in header:
        shown.add_column(title, justify="right" if title in numbers else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 1000  # whoever reads it from a file has no line to break it at
    with console.capture() as printed:
        console.print(shown)
    print(*(line.rstrip() for line in printed.get().splitlines()), sep="\n")
