"""Files mapped into this process's memory."""

from __future__ import annotations

from pathlib import Path


def num_mapped(file: Path, address: int | None = None) -> int:
    """Return the number of ranges of a file mapped into this process; with `address`, of those that contain it."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    return sum(address is None or start <= address < end for start, end in ranges)
