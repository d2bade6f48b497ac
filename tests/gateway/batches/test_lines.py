"""The lines of input files: split from arbitrary chunks, bounded in size, and always sorted in the same order."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.batches.lines import (
    MAX_LINES,
    MAX_NUMBER,
    MAX_PROBLEMS,
    PIECE_BYTES,
    SORTED_AT_ONCE,
    InputLines,
    Splitter,
    call_of,
    read_lines,
    turn_of,
)
from gateway.batches.results import Results, failure_of, usage_of
from gateway.files.storage import CHUNK_BYTES, FolderStorage
from gateway.overload.large import Checks
from gateway.overload.loop_slice import STEPS
from protocol.runtime.fair_slots import FairSlots

URL = "/v1/completions"


async def pieces(text: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(text), size):
        yield text[start : start + size]


def row(number: int, **body: object) -> bytes:
    return json.dumps({"custom_id": f"c{number}", "method": "POST", "url": URL, "body": body}).encode()


@given(st.lists(st.binary(max_size=12)), st.integers(1, 9), st.integers(1, 20))
def test_lines_are_those_of_split_however_the_file_is_cut(parts: list[bytes], size: int, max_bytes: int) -> None:
    text = b"\n".join(parts)
    splitter, found = Splitter(max_bytes), []
    for start in range(0, len(text), size):
        found += splitter.feed(text[start : start + size])
    found += splitter.end()
    start, expected = 0, []
    for number, line in enumerate(text.split(b"\n"), start=1):
        if len(line) > max_bytes:
            expected.append((number, start, None))
        elif line.strip(b" \t\r"):
            expected.append((number, start, line))
        start += len(line) + 1
    assert [(*place, None if line is None else b"".join(line)) for *place, line in found] == expected


async def test_each_line_is_found_again_at_its_place() -> None:
    text = b"\n\r\n".join(row(i, model="m", prompt="ü" * i) for i in range(50))
    found = await read_lines(pieces(text, 7), URL, 1000)
    assert [json.loads(text[line.start : line.end])["custom_id"] for line in found.lines] == [
        f"c{i}" for i in range(50)
    ]


def test_a_body_is_found_again_at_its_place() -> None:
    """Even if another field has the same beginning."""
    body, other = (b'{"model":"m","prompt":"%b"}' % (b"a" * 3000 + end) for end in (b"b", b"c"))
    for fields in (b'"other":%b,"body":%b' % (other, body), b'"body":%b,"other":%b' % (body, other)):
        raw = b'{"custom_id":"a","method":"POST","url":"/v1/completions",%b}' % fields
        found = InputLines(URL, 1 << 20)
        found.add(1, 0, raw)
        call = call_of(found.lines[0], raw)
        assert raw[call.begin : call.begin + len(call.body)] == call.body == body


async def test_a_line_that_is_too_long_is_told_and_not_held() -> None:
    found = await read_lines(pieces(row(1) + b"\n" + b"x" * 10_000 + b"\n" + row(2), 100), URL, 500)
    assert [(problem.code, problem.line) for problem in found.problems] == [("line_too_large", 2)]


async def test_a_long_line_is_held_once() -> None:
    """The pieces are released while the reader processes the line."""
    splitter, text = Splitter(1 << 22), b"x" * (1 << 21) + b"\n"
    async for _, _, line in splitter.of(pieces(text, 1 << 16)):
        assert line == text[:-1]
        assert splitter._line == []


async def test_neither_lines_nor_problems_are_too_many() -> None:
    found = await read_lines(pieces(b"x\n" * 1000, 64), URL, 100)
    assert len(found.problems) == MAX_PROBLEMS
    found = await read_lines(pieces(b"\n" * (MAX_NUMBER + 10), 1 << 16), URL, 100)
    assert [problem.code for problem in found.problems] == ["too_many_tasks"]
    lines = InputLines(URL, 1000)
    for number in range(1, MAX_LINES + 2):
        lines.add(number, 0, row(number))
    assert [(problem.code, problem.line) for problem in lines.problems] == [("too_many_tasks", MAX_LINES + 1)]


async def test_the_order_is_by_model_then_prompt_and_always_the_same() -> None:
    rows = [row(i, model=f"m{i % 5}", prompt=f"{i % 3} {i}") for i in range(100)]
    orders = []
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        lines = list(await (await read_lines(pieces(b"\n".join(rows), 512), URL, 1000)).in_order())
        models = [line.model for line in lines]
        assert sum(a != b for a, b in pairwise(models)) == 4
        orders.append([(line.model, line.prompt) for line in lines])
    assert orders[0] == orders[1] == orders[2]
    assert all(a[1] <= b[1] for a, b in pairwise(orders[0]) if a[0] == b[0])


def test_usage_is_read_in_the_words_of_every_api() -> None:
    openai = usage_of(
        b'{"usage":{"prompt_tokens":3,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":1}}}'
    )
    anthropic = usage_of(b'{"usage":{"input_tokens":2,"output_tokens":2,"cache_read_input_tokens":1}}')
    assert (openai.input_tokens, openai.cached_tokens, openai.output_tokens) == (3, 1, 2)
    assert openai == anthropic
    assert usage_of(b'{"data":[]}').input_tokens == 0


NO_TEXT = (b'"\xff"', b'"a\xed\xa0\x80"', b"1e999", b'"' + b"\xff" * 5000 + b'"')
"""Invalid values that are skipped by the first look: not UTF-8, or a number out of range."""


@pytest.mark.parametrize("value", NO_TEXT)
def test_what_is_passed_over_and_is_no_json_is_its_line_s_trouble(value: bytes) -> None:
    fields = {b"custom_id": b'"a"', b"method": b'"POST"', b"url": b'"/v1/completions"', b"body": b'{"model":"m"}'}
    for name in (b"custom_id", b"method", b"url", b"body"):
        found = InputLines(URL, 1 << 20)
        found.add(1, 0, b"{%b}" % b",".join(b'"%b":%b' % one for one in {**fields, name: value}.items()))
        assert [(problem.line, found.lines) for problem in found.problems] == [(1, [])], name
    for name in (b"model", b"prompt", b"messages", b"stream", b"background", b"other"):
        for shown in (value, b'[{"a":%b}]' % value):
            raw = b"{%b}" % b",".join(
                b'"%b":%b' % one for one in {**fields, b"body": b'{"%b":%b}' % (name, shown)}.items()
            )
            found = InputLines(URL, 1 << 20)
            found.add(1, 0, raw)
            call = call_of(found.lines[0], raw)
            assert (call.custom_id, bool(call.refusal)) == ("a", name in (b"stream", b"background"))


def test_what_was_too_deep_to_be_checked_is_not_run_where_it_can_be_read() -> None:
    """How deep a text may be nested depends on the call stack: the second look may accept more than the first."""

    def add(found: InputLines, raw: bytes, calls: int) -> None:
        if calls:
            add(found, raw, calls - 1)
        else:
            found.add(1, 0, raw)

    num_seen = 0
    for depth in range(500, 1100, 5):
        raw = b'{"custom_id":["x"],"url":"/other","body":{"prompt":%b}}' % (b"[" * depth + b"]" * depth)
        found = InputLines(URL, 1 << 20)
        add(found, raw, 100)
        for line in found.lines:  # nested too deep for the first look
            num_seen += 1
            call = call_of(line, raw)
            assert call.custom_id == call.body.decode() == ""
            assert call.refusal == "line 1 is nested too deeply"
    assert num_seen


async def turns_beside(work: Awaitable[object]) -> int:
    """Return how often another task could run while `work` was done."""
    num, others = 0, asyncio.create_task(asyncio.Event().wait())

    async def count() -> None:
        nonlocal num
        while not others.done():
            num += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await asyncio.sleep(0)
    await work
    others.cancel()
    await counting
    return num


async def test_tenants_take_turns_at_large_lines() -> None:
    """A task that is cancelled, while it waits or runs, passes its turn on."""
    turns, checks, order = FairSlots(1), Checks(), list[str]()

    async def read(tenant: str) -> None:
        async with turn_of(1 << 20, turns, tenant):
            order.append(tenant)
            await checks.in_thread(lambda: None, tenant)

    tasks = [asyncio.create_task(read(tenant)) for tenant in "aaaaab"]
    await asyncio.sleep(0)
    tasks[0].cancel()
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert sorted(order) == list("aaaab")
    assert order.index("b") <= 2
    async with asyncio.timeout(30):
        await read("c")


async def test_a_line_with_too_many_fields_is_its_own_trouble() -> None:
    fields = b",".join(b'"f%d":[]' % number for number in range(3000))
    around = b'{"custom_id":"around","method":"POST","url":"%b","body":{},%b}' % (URL.encode(), fields)
    within = b'{"custom_id":"within","method":"POST","url":"%b","body":{"model":"m",%b}}' % (URL.encode(), fields)
    text = b"\n".join([around, within, row(3, model="m")])
    found = await read_lines(pieces(text, 1 << 16), URL, 1 << 20)
    assert found.problems == []
    calls = [call_of(line, text[line.start : line.end]) for line in found.lines]
    assert [call.custom_id for call in calls] == ["", "within", "c3"]
    assert [bool(call.refusal) for call in calls] == [True, True, False]
    assert "line 1 has more than 1024 fields" in calls[0].refusal
    assert "the body has more than 1024 fields" in calls[1].refusal


async def test_large_lines_are_read_as_small_ones() -> None:
    """An error in a large line ends the batch with the same message as in a small one."""
    filler = json.dumps([{"role": "user", "content": "x" * 50}] * 2000)[1:-1].encode()
    told = []
    for inner in (b"1", filler):
        begun, messages = b'"method":"POST","url":"%b"' % URL.encode(), b'"messages":[%b]' % inner
        lines = [
            b'{"custom_id":"a",%b,"body":{"model":"m",%b}}' % (begun, messages),
            b'{"custom_id":"a",%b,"body":{%b}}' % (begun, messages),
            b'{"custom_id":"b","method":"GET","url":"%b","body":{%b}}' % (URL.encode(), messages),
            b'{"custom_id":"c","method":"POST","url":"/x","body":{%b}}' % messages,
            b'{"custom_id":"d",%b,"body":[%b]}' % (begun, inner),
            b'{"custom_id":["e"],%b,"body":{%b}}' % (begun, messages),
            b"[%b]" % inner, b'{"body":{"messages":[nul,%b]}}' % inner,
        ]  # fmt: skip
        found = await read_lines(pieces(b"\n".join(lines), 1 << 16), URL, 1 << 20)
        told.append((list(found.problems), [(line.number, line.model) for line in found.lines]))
    assert told[0] == told[1]
    assert len(told[0][0]) == 7
    assert told[0][1] == [(1, "m")]


async def test_others_have_turns_while_lines_are_looked_for() -> None:
    """With empty lines, of which a file has as many as it has bytes."""
    text = b"\n" * CHUNK_BYTES
    assert await turns_beside(read_lines(pieces(text, CHUNK_BYTES), URL, 100)) > MAX_NUMBER // PIECE_BYTES


async def test_others_have_turns_while_lines_are_sorted() -> None:
    found = InputLines(URL, 1000)
    for number in range(1, 40 * SORTED_AT_ONCE):
        found.add(number, 0, row(number, model=f"m{number % 5}", prompt=f"{number * 7919 % 1000}"))
    assert await turns_beside(found.in_order()) >= 40
    done = {line.number for line in found.lines if line.number % 3}
    left = [line.number for line in await found.in_order(done)]
    assert left == [line.number for line in await found.in_order() if line.number not in done]
    assert found.model == ""


async def test_others_have_turns_while_answers_are_counted_and_gathered(tmp_path: Path) -> None:
    results = Results(FolderStorage(tmp_path), "batch_1", 1)
    for number in range(5000):
        results.add(failure_of(number, f"c{number}", "invalid_request", "no"))
    await results.flush()

    async def gather() -> None:
        assert len(b"".join([chunk async for chunk in results.file("error")]).split(b"\n")) == 5001

    again = Results(FolderStorage(tmp_path), "batch_1", 2)
    least = 5000 // STEPS
    assert await turns_beside(again.load()) > least
    assert await turns_beside(gather()) > least
    assert again.file_bytes == results.file_bytes
