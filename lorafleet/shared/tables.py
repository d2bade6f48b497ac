"""Printed lists of commands."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

MAX_WIDTH = 10_000
"""Maximum characters of a line in a list."""

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Return an untrusted text with control characters, which could move the cursor, shown as escapes."""
    return text.translate(_CONTROL)


def print_list(columns: Sequence[str], rows: Sequence[Sequence[str]], nothing: str) -> None:
    """Print rows of text below the names of their columns, or `nothing` if there are none.

    No value is wrapped or cut. If a terminal is too narrow for that, each row is a block with one line per value.
    """
    terminal, wide = Console(), Console(width=MAX_WIDTH, emoji=False)
    if not rows:
        print(nothing)
        return
    table = Table(*columns, box=None, header_style="bold")
    for row in rows:
        table.add_row(*map(escape, row))
    if not terminal.is_terminal or wide.measure(table).maximum <= terminal.width:
        wide.print(table)
        return
    for number, row in enumerate(rows):
        block = Table(box=None, show_header=False)
        for column, value in zip(columns, row, strict=True):
            block.add_row(f"[bold]{escape(column)}[/]", escape(value))
        if number:
            print()
        wide.print(block)


def size_text(num_bytes: int | None) -> str:
    """Return bytes with a readable unit, "-" if unknown."""
    if num_bytes is None:
        return "-"
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def count_text(number: int, thing: str) -> str:
    """Return a number of things, with the singular for one."""
    return f"{number} {thing}" + ("" if number == 1 else "s")


def part_text(used: float, total: float) -> str:
    """Return used / total in percent, "-" if the total is 0."""
    return f"{100 * used / total:.0f} %" if total else "-"
