"""Write the tables of docs/models.md: `make models-table`. The tests compare the engine with these tables."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import transformers
from oracle.conformance import Outcome, try_type
from oracle.tiny_models import causal_types

DOC = Path(__file__).parents[2] / "docs" / "models.md"


def main() -> int:
    """Try every type in sequence and write the results; return the exit code."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    outcomes: dict[str, Outcome] = {}
    for model_type in causal_types():
        outcomes[model_type] = try_type(model_type)
        print(model_type, outcomes[model_type].refused or f"{outcomes[model_type].difference:.1e}", flush=True)
        gc.collect()
    text = DOC.read_text()
    for name, lines in (("served", served_table(outcomes)), ("refused", refused_table(outcomes))):
        text = replace_block(text, name, lines)
    DOC.write_text(text)
    return 0


def served_table(outcomes: dict[str, Outcome]) -> list[str]:
    """Return the lines of the table of served types."""
    served = {name: outcome for name, outcome in outcomes.items() if not outcome.refused}
    return [
        f"{len(served)} of {len(outcomes)} types, transformers {transformers.__version__}; "
        f"largest difference of a logit {max(o.difference for o in served.values()):.1g}, "
        f"smallest effect of an adapter {min(o.effect for o in served.values()):.2g}.",
        "",
        "| type | max abs Δ logit | effect of the adapters | whole layers by shortcut | |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {o.difference:.1e} | {o.effect:.2g} | {o.num_shortcuts} of {o.num_calls} | {o.notes} |"
            for name, o in served.items()
        ),
    ]


def refused_table(outcomes: dict[str, Outcome]) -> list[str]:
    """Return the lines of the table of refused types."""
    return [
        "| type | reason |",
        "| --- | --- |",
        *(f"| {name} | {outcome.refused} |" for name, outcome in outcomes.items() if outcome.refused),
    ]


def replace_block(text: str, name: str, lines: Iterable[str]) -> str:
    """Return `text` with `lines` between the markers of the block `name`."""
    begin, end = f"<!-- {name}: generated -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return "\n".join([before + begin, "", *lines, "", end + after])


def read_table(name: str, document: Path = DOC) -> dict[str, list[str]]:
    """Return the rows of a generated table by their first column."""
    text = document.read_text().partition(f"<!-- {name}: generated -->")[2].partition(f"<!-- end of {name} -->")[0]
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows[2:]}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
