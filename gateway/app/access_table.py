"""Generates the tables of `docs/keys.md` from the routes: `python -m gateway.app.access_table`.

The first table shows which keys each route accepts, the second how other spellings of its path are handled.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints
from urllib.parse import quote, unquote

from fastapi import FastAPI

from gateway.app.app import Handlers, routed
from gateway.http.access import RouteAccess, RouteMatch, RouteTable, normal_path
from protocol.queue.books.api_keys import SCOPES
from protocol.wire.errors import BadRequest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "keys.md"
BEGIN, END = "<!-- tables of gateway/app/access_table.py -->\n", "<!-- end of the tables -->\n"

_PARAMETER = re.compile(r"{\w++(:path)?}")

CONTROLS = tuple(f"%{number:02X}" for number in (*range(0x20), 0x7F))
"""Every control character of ASCII, escaped."""


def _each(*marks: str) -> Callable[[str], list[str]]:
    """Return a function that inserts each mark after a path's first slash, in its middle, and at its end."""

    def spell(path: str) -> list[str]:
        places = (1, (len(path) + 1) // 2, len(path))
        return [f"{path[:place]}{mark}{path[place:]}" for mark in marks for place in places]

    return spell


def _wide(path: str) -> list[str]:
    """Return the path with full-width letters, and with full-width slashes: NFKC would normalize both."""
    letters = "".join(quote(chr(ord(one) + 0xFEE0)) if one.isalnum() else one for one in path)
    return [letters, path[0] + path[1:].replace("/", quote("\uff0f"))]


SPELLINGS: dict[str, Callable[[str], list[str]]] = {
    "as it is": lambda path: [path],
    "a letter or a slash escaped once": lambda path: [
        f"{path[:-1]}%{ord(path[-1]):02x}", *_slashes(path, "%2f", "%2F"),
    ],
    "a slash at the end": lambda path: [f"{path}/"],
    "a control character of ASCII (33 of them) escaped: first, within, last": _each(*CONTROLS),
    "U+0085, U+2028, U+2029, bytes that are not UTF-8 (`%FF`, `%C0%AF`)": _each(
        "%C2%85", "%E2%80%A8", "%E2%80%A9", "%FF", "%C0%AF"
    ),
    "escaped twice (`%250A`, `%252F`)": lambda path: [*_each("%250A", "%2500")(path), *_slashes(path, "%252F")],
    "a space, `?` or `#` escaped": _each("%20", "%3F", "%23"),
    "upper case": lambda path: [path.upper()],
    "letters, slashes of full width": _wide,
    "`//`, and slashes at the end": lambda path: [f"/{path}", *_slashes(path, "//"), f"{path}//"],
    "`/.` and `/..`": lambda path: [
        f"/.{path}", f"{path}/.", f"{path}/..", f"{path}/%2e%2e", f"/x/..{path}", f"{path}/../{path[1:]}",
        f"/health/..{path}", f"/console/..{path}", f"/console/%2e%2e{path}",
    ],
    "matrix parameters (`;x=1`)": lambda path: [f"{path};x=1", f"{path};", *_slashes(path, ";x=1/"), f"/;x=1{path}"],
    "backslashes": lambda path: [*_slashes(path, "\\", "%5C", "/\\"), f"{path}%5C", f"/%5C{path[1:]}"],
}  # fmt: skip
"""Description -> function that returns such spellings of a path, as in a request line."""


def _slashes(path: str, *marks: str) -> list[str]:
    """Return the path once per mark, with all slashes but the first replaced by it."""
    return [path[0] + path[1:].replace("/", mark) for mark in marks]


def unserved() -> FastAPI:
    """Return the routes of a gateway, with handlers that cannot be called because they were not initialized."""
    return routed(Handlers(**{name: object.__new__(kind) for name, kind in get_type_hints(Handlers).items()}))


def example_of(path: str) -> str:
    """Return a path that matches a route: each parameter is replaced by a name."""
    return _PARAMETER.sub("name", path)


def found(table: RouteTable, method: str, raw: str) -> RouteMatch | None:
    """Return the match of a path in a request line, None if `Envelope` refuses the path."""
    try:
        return table.match(method, normal_path(unquote(raw), ""))
    except BadRequest:
        return None


def tables() -> str:
    """Return both tables as Markdown."""
    table = RouteTable(unserved().routes)
    return f"{_scopes_table(table)}\n\n{_spellings_table(table)}\n"


def _scopes_table(table: RouteTable) -> str:
    methods: dict[tuple[str, RouteAccess], list[str]] = {}  # methods by path and required scopes
    for method, match in table.matches:
        access: RouteAccess = getattr(match.route, "access")  # noqa: B009 - only JsonRoute has it
        methods.setdefault((match.path, replace(access, kind="plain")), []).append(method)
    lines = [f"| route | no key | {' | '.join(f'`{scope}`' for scope in SCOPES)} |", "| --- " * (2 + len(SCOPES)) + "|"]
    for (path, access), names in sorted(methods.items(), key=lambda item: item[0][0]):
        cells = [_cell(access, (scope,)) for scope in SCOPES]
        lines.append(f"| {', '.join(sorted(names))} `{path}` | {_stranger(access)} | {' | '.join(cells)} |")
    rest = " | ".join("404, 405" for _ in SCOPES)
    return "\n".join([*lines, f"| any other method or path | 401 | {rest} |"])


def _stranger(access: RouteAccess) -> str:
    if access.scopes is None:
        return "✓"
    return "401; `open_pages`: ✓" if access.is_page else "401"


def _cell(access: RouteAccess, scopes: Sequence[str]) -> str:
    allowed = not access.scopes or "admin" in scopes or set(access.scopes) & set(scopes)
    return "✓" if allowed else "403"


def _spellings_table(table: RouteTable) -> str:
    lines = ["| the path is written with | requests tried | found |", "| --- | --- | --- |"]
    for name, spell in SPELLINGS.items():
        outcomes: Counter[str] = Counter()
        for method, match in table.matches:
            for raw in spell(example_of(match.path)):
                outcomes[_outcome(match, found(table, method, raw))] += 1
        shown = "; ".join(f"{outcome}: {num:,}" for outcome, num in outcomes.most_common())
        lines.append(f"| {name} | {sum(outcomes.values()):,} | {shown} |")
    return "\n".join(lines)


def _outcome(meant: RouteMatch, got: RouteMatch | None) -> str:
    if got is None:
        return "400 `invalid_path`"
    if got.route is None:
        return "no route (401 without a key, else 404 or 405)"
    if got.route is meant.route:
        return "the same route"
    return (
        "the console's file of that name, which is none (404)"
        if got.scopes is None
        else "a route with the path as a name"
    )


def with_tables(page: str) -> str:
    """Return the page with up-to-date tables."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + tables() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
