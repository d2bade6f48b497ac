"""Only a line feed ends a line, wherever external text is read."""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.runtime.service import JsonLines, TextLines
from protocol.wire.lines import aiter_lines, iter_lines, lines_of

ROOT = Path(__file__).parents[3]
PRODUCT = ("gateway", "scheduler", "gpu_worker", "adapter_store", "protocol", "peft_adapters", "lorafleet", "chaos",
           "examples", "kernels", "benchmarks")  # fmt: skip
FOREIGN = {"splitlines", "iter_lines", "aiter_lines"}

OF_THE_SYSTEM = {
    "adapter_store/blobs.py", "adapter_store/command.py", "benchmarks/common/report.py", "benchmarks/gpu/__main__.py",
    "benchmarks/peers/servers.py", "benchmarks/engine/structured.py", "benchmarks/engine/triton_aot.py",
    "chaos/report.py",
    "examples/tours/__main__.py", "examples/tours/environments.py", "examples/tours/fleets.py",
    "examples/tours/tools/aiperf_tour.py", "examples/tours/tools/forms.py", "examples/tours/tools/lm_eval_tour.py",
    "gateway/grammars/structured.py", "gpu_worker/model/compiled.py", "lorafleet/fetch.py",
    "lorafleet/operate/doctor.py", "protocol/queue/bus.py",
}  # fmt: skip
"""Files that split output of the system, of a program, or of our own: no streams, and no untrusted text except whole
grammars and error messages, whose lines are not parsed as records."""

ODD = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i"


def test_no_stream_is_split_at_what_is_no_line_feed() -> None:
    found = set[str]()
    for package in PRODUCT:
        for path in (ROOT / package).rglob("*.py"):
            if not any(f".{name}" in (text := path.read_text()) for name in FOREIGN):
                continue
            if any(isinstance(n, ast.Attribute) and n.attr in FOREIGN for n in ast.walk(ast.parse(text))):
                found.add(str(path.relative_to(ROOT)))
    assert found - OF_THE_SYSTEM == set(), "`protocol.wire.lines` splits at line feeds alone"
    assert len(found) > 10, "the walk has found what there is"


def test_lines_end_with_a_line_feed_alone() -> None:
    assert lines_of(f"{ODD}\nx\r\n\ny") == [ODD, "x", "", "y"]
    assert lines_of("") == []
    assert lines_of("\n") == [""]


@given(st.text(st.sampled_from("ab\n\r\x85\u2028é😀"), max_size=40), st.lists(st.integers(0, 80), max_size=8))
async def test_a_stream_has_the_lines_of_its_text(text: str, cuts: list[int]) -> None:
    raw = text.encode()
    ends = sorted(min(cut, len(raw)) for cut in cuts)
    chunks = [raw[begin:end] for begin, end in zip([0, *ends], [*ends, len(raw)], strict=True)]
    assert list(iter_lines(chunks)) == lines_of(text)

    async def coming() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    assert [line async for line in aiter_lines(coming())] == lines_of(text)


def test_a_long_line_in_small_parts_is_joined_once() -> None:
    assert list(iter_lines([b"x"] * 200_000 + [b"\n"])) == ["x" * 200_000]


def record(message: str, error: Exception | None = None) -> logging.LogRecord:
    told = (type(error), error, error.__traceback__) if error is not None else None
    return logging.LogRecord("gateway.x", logging.WARNING, "", 1, "no adapter %s", (message,), told)


def test_one_event_is_one_line_of_the_log_whatever_strangers_write() -> None:
    forged = "x\n12:00:00 E gateway gateway.keys: \x1b[31mall keys are gone\r\u2028\x85"
    text = TextLines("%(asctime)s %(levelname).1s gateway %(name)s: %(message)s", "%H:%M:%S")
    line = text.format(record(forged))
    assert not {"\n", "\r", "\x1b", "\u2028", "\x85"} & set(line)
    assert "all keys are gone" in line
    with pytest.raises(ValueError, match="all keys") as raised:
        raise ValueError(forged)
    first, *more = text.format(record("y", raised.value)).split("\n")
    assert first.endswith("no adapter y")
    assert more
    assert all(line.startswith("    ") for line in more)
    assert len(JsonLines("gateway").format(record(forged, raised.value)).splitlines()) == 1
    assert json.loads(JsonLines("gateway").format(record(forged)))["message"] == f"no adapter {forged}"
