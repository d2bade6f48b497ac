"""Print the test coverage of each package as a Markdown table: the last step of `make coverage`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter, defaultdict
from typing import Any


def table(files: dict[str, dict[str, Any]]) -> str:
    """Return the table, by top-level folder. files: the `files` of coverage's JSON report."""
    sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name, file in files.items():
        package = name.removeprefix("kernels/").split("/")[0]
        for row in (package, "all"):
            sums[row].update({key: value for key, value in file["summary"].items() if isinstance(value, int)})
    lines = ["| package | statements | reached | branches | taken |", "|---|---|---|---|---|"]
    for package in (*sorted(sums.keys() - {"all"}), "all"):
        counts = sums[package]
        reached = counts["covered_lines"] / max(counts["num_statements"], 1)
        taken = counts["covered_branches"] / max(counts["num_branches"], 1)
        numbers = f"{counts['num_statements']:,} | {reached:.1%} | {counts['num_branches']:,} | {taken:.1%}"
        lines.append(f"| `{package}` | {numbers} |")
    return "\n".join(lines)


def main() -> int:
    """Print the table for the data written by `coverage combine`; return the exit code."""
    command = [sys.executable, "-m", "coverage", "json", "--quiet", "-o", "/dev/stdout"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(table(json.loads(report)["files"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
