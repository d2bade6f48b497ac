"""Lists as commands print them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Return a text that strangers or a model wrote, with control characters shown as escapes: they move cursors."""
    return text.translate(_CONTROL)


def print_list(columns: Sequence[str], rows: Sequence[Sequence[str]], nothing: str, width: int = 140) -> None:
    """Print rows of text below the names of their columns, or `nothing` if there is none.

    width: columns of characters at least, however narrow the terminal is, so that no value is folded.
    """
    table = Table(*columns, box=None, header_style="bold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=max(width, Console().width)).print(table if rows else nothing)


def size_text(num_bytes: int | None) -> str:
    """Return bytes as people read them, "-" where they are not known."""
    if num_bytes is None:
        return "-"
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def part_text(used: float, total: float) -> str:
    """Return a part of a whole in percent, "-" where there is no whole."""
    return f"{100 * used / total:.0f} %" if total else "-"
