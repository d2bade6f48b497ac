"""Which files are this process's memory."""

from __future__ import annotations

from pathlib import Path


def num_mapped(file: Path, address: int | None = None) -> int:
    """Return how many ranges of a file are mapped into this process, of those that have an address."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    return sum(address is None or start <= address < end for start, end in ranges)
