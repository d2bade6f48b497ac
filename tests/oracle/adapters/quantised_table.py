"""Write the table of quantized bases into docs/peft.md: `make quantised-table`. Rows of missing libraries stay."""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import warnings
from pathlib import Path

import transformers
from oracle.adapters.quantised import GPU_ONLY, SCHEMES, Scheme, measure, refusal
from oracle.models_table import read_table, replace_block

DOCUMENT = Path(__file__).parents[3] / "docs" / "peft.md"
NAME = "quantised"
HEAD = ["base", "with", "computes in", "difference from PEFT", "last digits", "adapters", "quantising", ""]


def main() -> int:
    """Measure every scheme whose libraries are installed and write the table; return the exit code."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    known = read_table(NAME, DOCUMENT)
    rows: dict[str, list[str]] = {}
    for name, scheme in (SCHEMES | GPU_ONLY).items():
        if scheme.missing:
            print(f"{name}: {scheme.missing} is not installed", flush=True)
            rows[name] = known.get(name, ["", "", "", "", "", "", f"not tried: {scheme.missing} is not installed"])
            continue
        rows[name] = row_of(name, scheme)
        print(name, *rows[name], sep=" | ", flush=True)
    lines = [f"| {' | '.join(HEAD)} |", f"| {' | '.join(['---'] * len(HEAD))} |"]
    lines += [f"| {' | '.join([name, *row])} |" for name, row in rows.items()]
    DOCUMENT.write_text(replace_block(DOCUMENT.read_text(), NAME, lines))
    return 0


def row_of(name: str, scheme: Scheme) -> list[str]:
    """Return the table's cells for one scheme, except the first."""
    versions = ", ".join(
        f"{package.replace('_', '-')} {importlib.metadata.version(package)}" for package in scheme.packages
    )
    dtype = str(scheme.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        if name in GPU_ONLY:
            reason = refusal(scheme, Path(folder))
            note = f"loads; needs a GPU ({scheme.note}), on a CPU refused at start: {reason}"
            return [versions, dtype, "", "", "", "", note]
        measured = measure(scheme, Path(folder))
    figures = [measured.difference, measured.sensitivity, measured.change, measured.rounding]
    return [versions, dtype, *(f"{figure:.1e}" for figure in figures), scheme.note]


if __name__ == "__main__":
    sys.exit(main())
