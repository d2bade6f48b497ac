"""Lists as commands print them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_list(columns: Sequence[str], rows: Sequence[Sequence[str]], nothing: str, width: int = 140) -> None:
    """Print rows of text below the names of their columns, or `nothing` if there is none.

    width: columns of characters at least, however narrow the terminal is, so that no value is folded.
    """
    table = Table(*columns, box=None, header_style="bold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=max(width, Console().width)).print(table if rows else nothing)
