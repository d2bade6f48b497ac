"""Generates the table of `docs/compat.md` from `parameters.toml`: `python -m gateway.bodies.compat`."""

from __future__ import annotations

from pathlib import Path

import orjson

from gateway.bodies.parameters import OBJECTS, PARAMETERS, SERVERS, Parameter

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compat.md"
BEGIN, END = "<!-- table of gateway/bodies/parameters.toml -->\n", "<!-- end of the table -->\n"


def table() -> str:
    """Return the table as Markdown, with a section for each group of objects that share parameters."""
    parts: dict[tuple[str, ...], list[Parameter]] = {}
    for parameter in PARAMETERS:
        parts.setdefault(tuple(parameter.objects), []).append(parameter)
    lines: list[str] = []
    for objects, rows in parts.items():
        lines += [f"### {', '.join(_place(name) for name in objects)}", ""]
        lines += [f"| parameter | {' | '.join(SERVERS.values())} | here |"]
        lines += ["| --- " * (len(SERVERS) + 2) + "|"]
        same: dict[str, list[str]] = {}  # row cells -> parameter names that share them
        for parameter in rows:
            same.setdefault(_cells(parameter), []).append(f"`{parameter.name}`")
        lines += [f"| {', '.join(names)} | {cells} |" for cells, names in same.items()] + [""]
    return "\n".join(lines)


def _place(name: str) -> str:
    where = OBJECTS[name]
    return f"`{where}`" if " " not in where else where


def _cells(parameter: Parameter) -> str:
    known = " | ".join("✓" if name in parameter.servers else "" for name in SERVERS)
    here = parameter.fate + (f": {parameter.why}" if parameter.why else "")
    if parameter.neutral:
        here += f" ({', '.join(f'`{orjson.dumps(value).decode()}`' for value in parameter.neutral)} is accepted)"
    return f"{known} | {here}"


def with_table(page: str) -> str:
    """Return the page with an up-to-date table."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
