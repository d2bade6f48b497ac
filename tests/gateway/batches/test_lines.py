"""The lines of input files: cut anywhere, bounded, and in an order that is always the same."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gateway.batches.lines import MAX_LINES, MAX_NUMBER, MAX_PROBLEMS, InputLines, Splitter, read_lines
from gateway.batches.results import usage_of

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
    assert found == expected


async def test_each_line_is_found_again_at_its_place() -> None:
    text = b"\n\r\n".join(row(i, model="m", prompt="ü" * i) for i in range(50))
    found = await read_lines(pieces(text, 7), URL, 1000)
    assert [json.loads(text[line.start : line.end])["custom_id"] for line in found.lines] == [
        f"c{i}" for i in range(50)
    ]


async def test_a_line_that_is_too_long_is_told_and_not_held() -> None:
    found = await read_lines(pieces(row(1) + b"\n" + b"x" * 10_000 + b"\n" + row(2), 100), URL, 500)
    assert [(problem.code, problem.line) for problem in found.problems] == [("line_too_large", 2)]


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
        lines = (await read_lines(pieces(b"\n".join(rows), 512), URL, 1000)).in_order()
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
