"""The same program in several checkouts, asked in turns, so that what else the machine does concerns all alike."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from protocol.runtime.environment import COMPUTE, child_environment


class Checkout:
    """A process of a checkout, whose program reads lines of JSON and answers each with another."""

    def __init__(self, folder: Path, program: str, *arguments: Path, **environment: str) -> None:
        """Start it. program: Python's text."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)], cwd=folder, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**child_environment(*COMPUTE), "PYTHONPATH": ".:kernels", **environment},
        )  # fmt: skip

    def ask(self, *line: object) -> Any:
        """Send a line; return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(orjson.dumps(line).decode(), file=self._process.stdin, flush=True)
        return orjson.loads(self._process.stdout.readline())

    def stop(self) -> None:
        """End the process."""
        self._process.communicate()


def in_turns(
    checkouts: Mapping[str, Checkout], cases: Mapping[str, Sequence[object]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Ask all checkouts for lists of numbers and end them. Returns the numbers of all rounds, by case and checkout.

    cases: the line of each.
    """
    found: dict[str, dict[str, list[float]]] = {name: {label: [] for label in checkouts} for name in cases}
    for index in range(rounds):
        for name, line in cases.items():
            for label in list(checkouts)[:: 1 if index % 2 else -1]:
                found[name][label] += checkouts[label].ask(*line)
    for checkout in checkouts.values():
        checkout.stop()
    return found
