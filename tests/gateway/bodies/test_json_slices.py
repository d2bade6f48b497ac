"""Large answers are written in slices: the JSON is the same as in one piece, and no slice blocks others for long."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import tracemalloc
from collections.abc import Iterator
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest
from helpers.asgi import AsgiClient
from helpers.openai_events import events_of
from helpers.scripted_fleet import Script, ScriptedFleet
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI

from gateway.adapters.catalogue import OBJECTS_AT_ONCE
from gateway.answers.sse import GenerationAnswer
from gateway.auth.callers import CALLER, Caller
from gateway.bodies.json_bodies import SENT_BYTES, SlicedResponse, in_thread
from gateway.bodies.json_slices import (
    PART_BYTES,
    ROWS,
    FieldSlices,
    JsonText,
    RowSlices,
    dumps,
    joined,
    rows_of,
    slices,
)
from gateway.calls.choices import Logprobs, Piece
from gateway.calls.follow import ClientGoneError
from gateway.calls.parsed_call import CallOptions
from gateway.overload.large import Checks
from gateway.overload.loop_slice import SLICE_S
from protocol.queue.adapters import ALIASES_AT_ONCE
from protocol.queue.books.api_keys import Tenant
from protocol.queue.bus import Bus
from protocol.wire import messages as m

PLAIN = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=5)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
        | st.tuples(st.lists(inner, max_size=9), st.integers(1, 3)).map(
            lambda pair: RowSlices(lambda: pair[0], pair[1])
        )
    ),
    max_leaves=20,
)


def plain(value: Any) -> Any:
    if isinstance(value, RowSlices):
        return [plain(row) for row in value.whole()]
    if isinstance(value, list):
        return [plain(row) for row in value]
    return {key: plain(entry) for key, entry in value.items()} if isinstance(value, dict) else value


@given(VALUES)
def test_slices_are_the_json_of_the_whole(value: Any) -> None:
    text = b"".join(slices(value))
    assert json.loads(text) == plain(value) == json.loads(dumps(value))


def test_rows_are_made_when_they_are_written() -> None:
    made: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(1000):
            made.append(number)
            yield {"n": number, "v": np.ones(2, np.float32)}

    parts = slices({"a": 1, "rows": RowSlices(rows, at_once=10), "z": [2]})
    before = 0
    for part in parts:
        assert len(made) - before <= 10, part
        assert part.count(b'"n"') <= 10
        before = len(made)
    assert len(made) == 1000


async def test_an_answer_in_slices_stops_when_its_client_leaves() -> None:
    made: list[int] = []

    def rows() -> Iterator[str]:
        for number in range(100_000):
            made.append(number)
            yield "x" * 100

    client = AsgiClient(lambda message: len(client.sent) == 5 and client.left.set())
    await SlicedResponse(RowSlices(rows))({"type": "http"}, client.receive, client.send)
    assert 5 <= len(client.sent) < 10
    assert len(made) * 100 < 10 * (SENT_BYTES + 10_000)
    assert all(len(message.get("body", b"")) < SENT_BYTES + 10_000 for message in client.sent)


async def test_rows_that_take_long_are_made_by_turns_of_tenants() -> None:
    made: list[str] = []  # the owner of each row, in order
    num_at_once, most_at_once = 0, 0
    app = SimpleNamespace(state=SimpleNamespace(writing=Checks()))

    async def answer(name: str, num_rows: int) -> None:
        def rows() -> Iterator[str]:
            nonlocal num_at_once, most_at_once
            for _ in range(num_rows):
                num_at_once += 1
                most_at_once = max(most_at_once, num_at_once)
                made.append(name)
                time.sleep(0.0005)  # another thread could run here
                num_at_once -= 1
                yield "x"

        client, scope = AsgiClient(), {"type": "http", "app": app, CALLER: Caller(Tenant(name))}
        await SlicedResponse(RowSlices(rows, 1), in_thread=True)(scope, client.receive, client.send)

    many = asyncio.gather(*(answer("many", 10) for _ in range(20)))
    await answer("one", 10)
    assert most_at_once == 1
    assert made.count("many") <= 2 * 10 + 2, "two of another tenant's for each of its own, and those of the ends"
    await many
    assert made.count("many") == 200


async def test_a_body_is_checked_beside_an_answer_whose_rows_take_long() -> None:
    checked, making = threading.Event(), threading.Event()

    def rows() -> Iterator[str]:
        making.set()
        assert checked.wait(60)
        yield "x"

    client = AsgiClient()
    app = SimpleNamespace(state=SimpleNamespace(checks=Checks(), writing=Checks()))
    scope = {"type": "http", "app": app, CALLER: Caller(Tenant("a"))}
    answer = asyncio.create_task(SlicedResponse(RowSlices(rows, 1), in_thread=True)(scope, client.receive, client.send))
    await asyncio.to_thread(making.wait, 60)
    await in_thread(scope, checked.set)
    await answer


async def test_others_have_a_turn_while_short_frames_take_long_to_make() -> None:
    made: list[int] = []  # number of frames per turn

    class Frames:
        def frames(self, piece: Piece) -> Iterator[bytes]:
            for _ in range(20):
                begun_s = time.perf_counter()
                while time.perf_counter() < begun_s + SLICE_S:
                    pass
                made[-1] += 1
                yield b"x"

    async def others() -> None:
        while True:
            made.append(0)
            await asyncio.sleep(0)

    call = SimpleNamespace(parsed=SimpleNamespace(options=CallOptions(m.Sampling(), stream=True)), prompts=[])
    generation: Any = SimpleNamespace(call=call, client_gone=False)
    answer = GenerationAnswer(generation, Frames())  # type: ignore[arg-type]
    turns = asyncio.create_task(others())
    await asyncio.sleep(0)
    assert await answer._send_pieces([Piece(index) for index in range(3)]) == b"x" * 60
    turns.cancel()
    assert (sum(made), max(made)) == (60, 1)


def test_a_whole_vocabulary_is_made_as_it_is_read() -> None:
    size = 100_000
    row = np.random.default_rng(0).permutation(size).astype(np.float32)
    logprobs = Logprobs(np.int32(7).tobytes(), np.append(np.float32(-0.5), row).tobytes(), is_whole=True)
    tracemalloc.start()
    try:
        [token] = logprobs
        assert sum(1 for _ in token.top) == size
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * size, "a few numbers of each token, and no object"
    likeliest = int(row.argmax())
    assert (token.id, token.logprob, len(token.top)) == (7, -0.5, size)
    assert token.top[0] == (likeliest, float(row[likeliest]))
    assert list(token.top[:3]) == [token.top[0], token.top[1], token.top[2]] == list(token.top)[:3]
    assert list(token.top) == sorted(enumerate(row.tolist()), key=itemgetter(1), reverse=True)


def test_packed_logprobs_are_those_of_the_log() -> None:
    ids = np.arange(5, dtype=np.int32)
    records = np.zeros((5, 5), np.float32)
    records[:, 0] = -0.5 * ids
    records[:, 1::2] = np.stack([ids + 7, ids + 9], 1).astype(np.int32).view(np.float32)
    records[:, 2::2] = [-1, -2]
    whole = Logprobs(ids.tobytes(), records.tobytes())
    found = list(whole)
    assert [token.id for token in found] == ids.tolist()
    assert found[3] == (3, -1.5, [(10, -1.0), (12, -2.0)], 0)
    parts = Logprobs()
    for part in (whole.part(0, 2), whole.part(2, 5)):
        parts = parts.joined(part)
    assert list(parts) == found
    assert len(whole) == 5
    assert list(Logprobs()) == []


@pytest.mark.parametrize("stream", [False, True])
async def test_many_logprobs_are_whole_in_slices(
    client: AsyncOpenAI, http: httpx2.AsyncClient, fleet: ScriptedFleet, stream: bool
) -> None:
    fleet.script = lambda submit, body: Script(text="abc " * 100, eos=False, finish="length", chunk=10_000)
    body = {"model": "base", "prompt": "hi", "max_tokens": 200, "logprobs": 20, "n": 2, "stream": stream}
    answer = await http.post("/v1/completions", json=body)
    found: dict[int, list[str]] = {0: [], 1: []}
    for event in events_of(answer):
        for choice in event["choices"]:
            found[choice["index"]] += (choice["logprobs"] or {"tokens": []})["tokens"]
    if not stream:
        assert answer.headers["transfer-encoding"] == "chunked"
        assert all(len(choice["logprobs"]["top_logprobs"]) == 200 for choice in answer.json()["choices"])
    assert [len(tokens) for tokens in found.values()] == [200, 200]
    assert "".join(found[0]) == ("abc " * 100)[: len("".join(found[0]))]
    named = {"model": "base", "prompt": "hi", "max_tokens": 150, "logprobs": 20}
    typed = await client.completions.create(**named)
    assert typed.choices[0].logprobs is not None
    assert len(typed.choices[0].logprobs.tokens or []) == 150


async def test_others_have_a_turn_between_the_frames_of_many_pieces() -> None:
    made: list[int] = []  # number of frames per turn

    class Frames:
        def frames(self, piece: Piece) -> Iterator[bytes]:
            for number in range(20):
                made[-1] += 1
                yield b"%d %d\n" % (piece.index, number) + b" " * 1000

    async def others() -> None:
        while True:
            made.append(0)
            await asyncio.sleep(0)

    sent: list[bytes] = []

    async def write(part: bytes, *, more: bool) -> None:
        assert more
        sent.append(part)

    call = SimpleNamespace(parsed=SimpleNamespace(options=CallOptions(m.Sampling(), stream=True)), prompts=[])
    generation: Any = SimpleNamespace(call=call, client_gone=False)
    answer = GenerationAnswer(generation, Frames())  # type: ignore[arg-type]
    to: Any = SimpleNamespace(has_begun=True, write=write)
    answer._to = to
    turns = asyncio.create_task(others())
    await asyncio.sleep(0)
    last = await answer._send_pieces([Piece(index) for index in range(30)])
    assert b"".join([*sent, last]).split() == [b"%d" % one for i in range(30) for j in range(20) for one in (i, j)]
    assert sum(made) == 600
    assert max(made) <= 20
    generation.client_gone = True
    with pytest.raises(ClientGoneError):
        await answer._send_pieces([Piece(index) for index in range(30)])
    turns.cancel()


def test_rows_may_have_slices_and_be_fields() -> None:
    def field(number: int) -> FieldSlices:
        return FieldSlices(lambda: ((f"k{i}", number) for i in range(5)), 2)

    value = {"a": RowSlices(lambda: map(field, range(3))), "empty": FieldSlices(dict[str, int]().items)}
    expected = {"a": [{f"k{i}": number for i in range(5)} for number in range(3)], "empty": {}}
    assert json.loads(joined(value)) == json.loads(dumps(value)) == expected
    assert max(map(len, slices(value))) <= len(b'{"k0":0,"k1":0')


def test_an_existing_json_text_is_written_in_parts() -> None:
    text = dumps(["a" * 1000] * 200)
    value = {"data": RowSlices(lambda: map(JsonText, [text, b"{}"]), 1), "one": JsonText(text)}
    expected = {"data": [["a" * 1000] * 200, {}], "one": ["a" * 1000] * 200}
    assert json.loads(joined(value)) == json.loads(dumps(value)) == expected
    assert max(map(len, slices(value))) == PART_BYTES < len(text)


def test_rows_of_many_entries_are_few() -> None:
    assert [rows_of(num) for num in (0, 1, 5, 21, 22, 129, 1001)] == [64, 64, 33, 8, 7, 1, 1]
    options = CallOptions(m.Sampling(num_logprobs=128, prompt_logprobs=None))
    assert options.rows == 1


async def test_a_log_is_read_so_many_tokens_at_a_time(bus: Bus, http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(text="abc " * 100, eos=False, finish="length", chunk=10_000)
    body = {"model": "base", "prompt": "hi", "max_tokens": 200, "logprobs": 5, "background": True}
    job = (await http.post("/v1/completions", json=body)).json()
    found = (await http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=20"})).json()
    assert len(found["result"]["choices"][0]["logprobs"]["tokens"]) == 200
    rid, record_bytes = fleet.seen[0][0].rid, m.logprob_record_bytes(5)
    parts = [await bus.read_log(rid, begin, record_bytes, ROWS) for begin in range(0, 201, ROWS)]
    sizes = [(len(part.ids) // 4, len(part.logprobs) // record_bytes, part.finish) for part in parts if part]
    assert sizes == [(64, 64, ""), (64, 64, ""), (64, 64, ""), (8, 8, "length")]
    whole = await bus.read_log(rid, 0, record_bytes)
    assert whole is not None
    assert whole.logprobs == b"".join(part.logprobs for part in parts if part)


async def test_thousands_of_adapters_are_listed_some_at_a_time(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    num = 3 * ALIASES_AT_ONCE + 5
    for number in range(num):
        await fleet.add_adapter(f"a{number:05}", digest=f"{number % 7:064}")
    listed = (await http.get("/v1/models")).json()["data"]
    assert [entry["id"] for entry in listed[1:]] == [f"a{number:05}" for number in range(num)]
    assert listed[1]["rank"] == 8
    info = (await http.get("/info")).json()
    assert info["num_adapters"] == num
    names = [alias.name for alias in await fleet.bus.adapters.aliases(None)]
    assert sorted(names) == [entry["id"] for entry in listed[1:]]
    assert num > OBJECTS_AT_ONCE
