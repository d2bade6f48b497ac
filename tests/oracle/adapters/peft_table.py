"""Write the table of measured differences into docs/peft.md: `make peft-table`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from oracle.adapters.peft_kinds import KINDS, make_adapter, measure

DOCUMENT = Path(__file__).parents[3] / "docs" / "peft.md"
HEADING = "## Measured"


def main() -> None:
    rows = ["| adapter | base | difference from PEFT | change of the base |", "| --- | --- | --- | --- |"]
    for name, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            make_adapter(kind, Path(folder))
            measured = measure(kind, Path(folder))
        rows.append(f"| {name} | {kind.base[0]} | {measured.difference:.1e} | {measured.change:.2g} |")
    text = DOCUMENT.read_text()
    before = text[: text.index(HEADING)] if HEADING in text else f"{text.rstrip()}\n\n"
    explained = (
        "Largest difference of any logit, fp32, tiny random models of two layers, three prompts in one batch with the\n"
        "base; the last column is how far the adapter moves a logit. Written by `make peft-table`; the tests measure\n"
        "the same (`tests/oracle/adapters/test_peft_kinds.py`) and allow 1e-4.\n"
    )
    DOCUMENT.write_text(f"{before}{HEADING}\n\n{explained}\n" + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
