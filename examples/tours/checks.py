"""Shared by the Python scripts of `make tour`: the fleet's address, the questions, and counted checks.

The runner puts this folder on the module path of every script, and reads the lines that `Tour.check` prints.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]
MAX_TOKENS = 12
TEXTS = ["my name is ada", "i live in london with grace"]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
        },
    },
}


class Tour:
    """The fleet at `url` with a base model and `adapter`, an optional encoder fleet, and the count of failed checks."""

    def __init__(self) -> None:
        """Read the fleet's address from the environment: a command line would expose the key."""
        self.url = os.environ["URL"].rstrip("/")
        self.v1 = f"{self.url}/v1"
        self.base = "base"
        self.adapter = os.environ["ADAPTER"]
        self.key = os.environ.get("KEY") or "none"
        self.embedder = os.environ.get("EMBEDDER_URL", "").rstrip("/")
        self.embedder_adapter = os.environ.get("EMBEDDER_ADAPTER", "")
        self._num_failed = 0

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Count the block as one check, which fails on any exception; the script continues with the next check."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  whatever a program raises is its report
            traceback.print_exc()
            self._num_failed += 1
            reason = " ".join(str(error).split())[:300]
            print(f"[failed] {name}: {type(error).__name__}: {reason}", flush=True)
        else:
            print(f"[ok] {name}", flush=True)

    def end(self) -> None:
        """End the script, with exit code 1 if a check has failed."""
        sys.exit(self._num_failed > 0)


@contextmanager
def raises(kind: type[Exception], *words: str) -> Iterator[None]:
    """Expect an error of `kind` whose text contains all `words`. Raises AssertionError otherwise."""
    try:
        yield
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        if missing:
            raise AssertionError(f"{error} does not say {missing}") from error
    else:
        raise AssertionError(f"{kind.__name__} was expected")


def same_vectors(left: list[float], right: list[float]) -> None:
    """Raise AssertionError unless both vectors are nonempty and equal up to rounding."""
    assert len(left) == len(right) > 0, f"{len(left)} and {len(right)} numbers"
    assert all(abs(a - b) <= 1e-4 for a, b in zip(left, right, strict=True)), "the vectors differ"


def same(left: object, right: object) -> None:
    """Raise AssertionError unless both values are equal."""
    assert left == right, f"{left!r} is not {right!r}"


def differ(left: object, right: object) -> None:
    """Raise AssertionError unless both values are nonempty and differ."""
    assert left, "the first answer is empty"
    assert right, "the second answer is empty"
    assert left != right, f"both are {left!r}"
