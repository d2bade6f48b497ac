"""Generates the page of all series: `python -m protocol.metrics.table` rewrites docs/metrics.md."""

from __future__ import annotations

from pathlib import Path

from protocol.metrics.series import DECLARED

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
HEAD = "| series | kind | labels | what it is |\n| --- | --- | --- | --- |\n"
MARK = "<!-- from here on made by python -m protocol.metrics.table -->\n"


def table() -> str:
    """Return a table of the declared series for each kind of service that exports them."""
    parts: list[str] = []
    for shown_by in dict.fromkeys(series.shown_by for series in DECLARED.values()):
        parts.append(f"\n## Shown by: {shown_by}\n\n{HEAD}")
        for series in DECLARED.values():
            if series.shown_by == shown_by:
                labels = ", ".join(series.labels)
                parts.append(f"| `{series.name}` | {series.kind} | {labels} | {series.text} |\n")
    return "".join(parts)


def main() -> None:
    """Rewrite the page after `MARK`; the text before it is kept."""
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(MARK) + len(MARK)] + table())


if __name__ == "__main__":
    main()
