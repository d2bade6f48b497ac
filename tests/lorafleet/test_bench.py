"""The load generator sends the planned requests, measures the answers, and counts every failure."""

import argparse
import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lorafleet.bench import BenchConfig, BenchRequest, BenchTarget, Summary, WarmupError, run_load
from lorafleet.bench.cli import add_arguments, config_of, run
from lorafleet.bench.client import BenchConnection, api_base
from lorafleet.bench.workload import choose_targets, plan_requests
from lorafleet.shared.parser import Parser


@dataclass
class FakeServer:
    """An OpenAI-compatible server that streams fixed text; requests to certain model names fail."""

    url: str = ""
    tokens_per_chunk: int = 1
    release_at: int = 1  # answers start once this many requests are in flight
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    clients: set[Any] = field(default_factory=set)
    in_flight: int = 0
    max_in_flight: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "base"}, {"id": "adapter-0"}]})

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.paths.append(request.url.path)
        self.clients.add(request.client)
        if body["model"] == "missing":
            return JSONResponse({"error": {"message": "no such model", "code": "model_not_found"}}, 404)
        return StreamingResponse(self.stream(body), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        if self.in_flight >= self.release_at:
            self.released.set()
        try:
            await self.released.wait()
            chat = "messages" in body
            yield chunk(chat, "")
            for _ in range(body["max_tokens"] // self.tokens_per_chunk):
                yield chunk(chat, "word " * self.tokens_per_chunk)
                if body["model"] == "breaks":
                    yield b'data: {"error": {"message": "worker lost"}}\n\n'
                    return
                if body["model"] == "cut":
                    return
                if body["model"] == "hangs":
                    await asyncio.Event().wait()
            yield chunk(chat, "", finish_reason="length")
            usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
            yield b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\r\n\r\n"
            yield b"data: [DONE]\n\n"
        finally:
            self.in_flight -= 1


def chunk(chat: bool, text: str, finish_reason: str | None = None) -> bytes:
    content: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
    choice = {"index": 0, **content, "finish_reason": finish_reason}
    return b"data: " + json.dumps({"choices": [choice], "usage": None}).encode() + b"\n\n"


@asynccontextmanager
async def fake_server(**settings: Any) -> AsyncIterator[FakeServer]:
    fake = FakeServer(**settings)
    routes = [Route("/v1/models", fake.models)]
    routes += [Route(f"/v1/{kind}", fake.generate, methods=["POST"]) for kind in ("completions", "chat/completions")]
    listener = socket.create_server(("127.0.0.1", 0))
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error", lifespan="off"))
    async with asyncio.TaskGroup() as group:
        group.create_task(server.serve(sockets=[listener]))
        try:
            yield fake
        finally:
            server.should_exit = True


def config(fake: FakeServer | None = None, *models: str, **changes: Any) -> BenchConfig:
    url = fake.url if fake else "http://127.0.0.1:1"
    targets = tuple(BenchTarget.model(name) for name in models or ("base",))
    fields: dict[str, Any] = {"num_requests": 12, "concurrency": 3, "output_tokens": 4, "prompt_words": 5}
    return BenchConfig(url=url, targets=targets, **fields | changes)


# --- workload


def test_plan_repeats_with_its_seed_and_no_two_prompts_are_equal() -> None:
    plan = config(num_requests=500, prompt_words=8)
    prompts = [request.body["prompt"] for request in plan_requests(plan)]
    assert len(set(prompts)) == 500
    assert {len(prompt.split()) for prompt in prompts} == {8}
    assert prompts == [request.body["prompt"] for request in plan_requests(plan)]
    assert prompts != [request.body["prompt"] for request in plan_requests(replace(plan, seed=1))]


def test_round_robin_asks_each_target_equally_often() -> None:
    plan = config(None, "a", "b", "c", num_requests=9)
    assert [request.target.name for request in plan_requests(plan)] == ["a", "b", "c"] * 3


@pytest.mark.parametrize("zipf_s", [0.0, 1.0, 1.5])
def test_popularity_follows_the_zipf_law(zipf_s: float) -> None:
    plan = config(None, *(f"adapter-{i}" for i in range(50)), zipf_s=zipf_s, num_requests=20_000)
    counts = np.bincount(choose_targets(plan, np.random.default_rng(0)), minlength=50)
    expected = 1 / np.arange(1, 51) ** zipf_s
    expected *= 20_000 / expected.sum()
    assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected))  # five standard deviations of a binomial count


def test_poisson_arrivals_have_the_asked_rate_and_spread() -> None:
    due_s = np.array([request.due_s for request in plan_requests(config(num_requests=4000, rate_per_s=20.0))])
    gaps_s = np.diff(due_s)
    assert np.all(gaps_s >= 0)
    assert gaps_s.mean() == pytest.approx(1 / 20, rel=0.08)
    assert gaps_s.std() == pytest.approx(1 / 20, rel=0.08)  # exponential: standard deviation equals mean


def test_target_body_selects_an_adapter_in_the_servers_own_way() -> None:
    target = BenchTarget("one", {"model": "base", "lora": [{"id": 1, "scale": 1.0}]})
    (request,) = plan_requests(replace(config(num_requests=1), targets=(target,)))
    assert request.body["lora"] == [{"id": 1, "scale": 1.0}]
    assert request.body["ignore_eos"] is True


@pytest.mark.parametrize("change", [{"num_requests": 0}, {"concurrency": -1}, {"rate_per_s": 0.0}, {"targets": ()}])
def test_config_without_load_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"positive|at least one"):
        replace(config(), **change)


# --- one answer


ANSWER = b"".join(
    [
        chunk(True, ""),
        b": keep-alive\n\n",
        chunk(True, "é one"),
        chunk(True, " two", finish_reason="length").replace(b"\n", b"\r\n"),
        b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\n',
        b"data: [DONE]\n\n",
    ]
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(ANSWER)


class ReplayTransport(asyncio.Transport):
    """A transport that answers any request with the given pieces."""

    def __init__(self, connection: BenchConnection, pieces: list[bytes]) -> None:
        super().__init__()
        self._connection, self._pieces = connection, pieces

    def write(self, data: bytes | bytearray | memoryview) -> None:
        for piece in self._pieces:
            asyncio.get_running_loop().call_soon(self._connection.data_received, piece)


@given(cuts=st.sets(st.integers(1, len(HEAD + ANSWER) - 1)))
def test_answer_reads_the_same_wherever_the_network_cuts_it(cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), len(HEAD + ANSWER)]
    pieces = [(HEAD + ANSWER)[start:stop] for start, stop in pairwise(edges)]

    async def receive() -> BenchRequest:
        connection, record = BenchConnection(), BenchRequest("base")
        connection.connection_made(ReplayTransport(connection, pieces))
        await connection.exchange(b"", record)
        return record

    record = asyncio.run(receive())
    assert (record.prompt_tokens, record.output_tokens, len(record.arrivals_s)) == (3, 2, 2)
    assert (record.text, record.finish_reason, record.complete, record.error) == ("é one two", "length", True, None)
    assert (record.status, record.headers) == (200, {})


async def test_a_refusal_is_kept_with_its_headers() -> None:
    answer = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nContent-Length: 4\r\n\r\nbusy"
    connection, record = BenchConnection(), BenchRequest("base")
    connection.connection_made(ReplayTransport(connection, [answer[:30], answer[30:]]))
    await connection.exchange(b"", record)
    assert (record.status, record.headers["retry-after"], record.error) == (429, "7", "HTTP 429: busy")


def test_summary_defines_latencies_as_documented() -> None:
    fast = BenchRequest("a", start_s=10.0, end_s=10.5, arrivals_s=[10.1, 10.2, 10.4], output_tokens=5)
    slow = BenchRequest("b", start_s=10.0, end_s=12.0, arrivals_s=[10.3, 10.9], output_tokens=3)
    failed = BenchRequest("b", start_s=10.0, end_s=99.0, arrivals_s=[50.0], output_tokens=100, error="HTTP 500")
    summary = Summary.of([fast, slow, failed], wall_s=2.0)
    assert (summary.num_requests, summary.num_errors) == (3, 1)
    assert summary.output_tokens_per_s == pytest.approx(4.0)
    assert summary.tokens_per_chunk == pytest.approx(8 / 5)
    assert summary.ttft.p50_ms == pytest.approx(200.0)
    assert summary.inter_token.mean_ms == pytest.approx((100 + 200 + 600) / 3)
    assert summary.inter_token.p50_ms == pytest.approx(200.0)
    assert summary.tpot.mean_ms == pytest.approx((300 / 4 + 600 / 2) / 2)
    assert summary.e2e.p90_ms == pytest.approx(500 + 0.9 * 1500)


# --- whole runs


@pytest.mark.parametrize("chat", [False, True])
async def test_run_counts_the_servers_tokens_and_keeps_connections(chat: bool) -> None:
    async with fake_server(tokens_per_chunk=2) as fake:
        result = await run_load(config(fake, "base", "a", chat=chat, num_warmup=2))
    assert result.errors == {}
    assert len(fake.bodies) == 14  # warm-up requests are sent but not counted
    assert set(fake.paths) == {"/v1/chat/completions" if chat else "/v1/completions"}
    assert (result.summary.num_requests, result.summary.output_tokens, result.summary.prompt_tokens) == (12, 48, 84)
    assert result.summary.tokens_per_chunk == 2.0
    assert {name: summary.num_requests for name, summary in result.per_target.items()} == {"a": 6, "base": 6}
    assert {record.finish_reason for record in result.records} == {"length"}
    assert len(fake.clients) <= 3


async def test_closed_loop_holds_its_concurrency() -> None:
    async with fake_server(release_at=3) as fake:  # with fewer in flight, no answer would ever start
        result = await run_load(config(fake))
    assert result.errors == {}
    assert fake.max_in_flight == 3


async def test_open_loop_sends_without_waiting_for_answers() -> None:
    async with fake_server(release_at=12) as fake:
        result = await run_load(config(fake, rate_per_s=500.0, concurrency=100))
    assert result.errors == {}
    assert fake.max_in_flight == 12


async def test_each_failure_is_counted_with_its_reason() -> None:
    async with fake_server() as fake:
        result = await run_load(config(fake, "base", "missing", "breaks", "cut", num_requests=8, concurrency=1))
    reasons = sorted(result.errors)
    assert list(result.errors.values()) == [2, 2, 2]
    assert reasons[0].startswith("HTTP 404: ")
    assert "model_not_found" in reasons[0]
    assert reasons[1] == "the stream ended without [DONE]"
    assert "worker lost" in reasons[2]
    assert result.summary.num_errors == 6
    assert result.summary.output_tokens == 8  # of the two requests that succeeded


async def test_request_without_end_times_out_and_the_next_is_clean() -> None:
    async with fake_server() as fake:
        result = await run_load(config(fake, "hangs", "base", num_requests=2, concurrency=1, timeout_s=0.2))
    assert result.errors == {"no end after 0.2 s": 1}
    assert result.per_target["base"].output_tokens == 4


async def read_request(reader: asyncio.StreamReader) -> None:
    """Read one request completely; closing a socket with unread bytes would reset the connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.split(b"\r\n") if line.startswith(b"Content-Length: "))
    await reader.readexactly(int(length.partition(b": ")[2]))


async def test_connection_closed_between_requests_is_replaced() -> None:
    """Some servers promise to keep a connection open, yet close it after a stream."""
    num_connections = 0

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        await read_request(reader)
        writer.write(HEAD + ANSWER)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer_once, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        result = await run_load(replace(config(num_requests=6, concurrency=2), url=url))
    assert result.errors == {}
    assert num_connections == 6


async def test_server_that_dies_before_it_answers_is_an_error() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        result = await run_load(replace(config(num_requests=2, concurrency=1), url=url))
    assert result.errors == {"connection lost (closed by the server)": 2}


async def test_unreachable_server_is_an_error_per_request_and_fails_a_warmup() -> None:
    result = await run_load(config(num_requests=2))
    assert result.summary.num_errors == 2
    with pytest.raises(WarmupError, match="'base' failed"):
        await run_load(config(num_warmup=1))


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "h:1"])
def test_url_may_end_in_the_api_version(url: str) -> None:
    assert api_base(url) == "http://h:1"


# --- command


def arguments(*argv: str) -> argparse.Namespace:
    parser = Parser()
    add_arguments(parser)
    return parser.parse_args(argv)


def test_adapters_by_name_or_by_count() -> None:
    named = config_of(arguments("u:1", "--model", "base", "--adapters", "pirate, json", "--zipf", "1.2"))
    assert [target.name for target in named.targets] == ["base", "pirate", "json"]
    assert named.zipf_s == 1.2
    counted = config_of(arguments("u:1", "--adapters", "3", "--adapter-format", "lora{i}"))
    assert [target.name for target in counted.targets] == ["lora0", "lora1", "lora2"]


def test_the_key_comes_from_a_file_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of the variable")
    assert config_of(arguments("u:1", "--model", "base")).api_key == "of the variable"
    (tmp_path / "key").write_text("of the file\n")
    assert (
        config_of(arguments("u:1", "--model", "base", "--api-key-file", str(tmp_path / "key"))).api_key == "of the file"
    )
    monkeypatch.delenv("OPENAI_API_KEY")
    assert config_of(arguments("u:1", "--model", "base")).api_key is None


@pytest.mark.thorough
async def test_command_writes_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "bench.json"
    async with fake_server() as fake:
        argv = [fake.url, "--adapters", "40", "--requests", "80", "--output-tokens", "4", "--out", str(out)]
        assert await asyncio.to_thread(run, arguments(*argv)) == 0
    report = json.loads(out.read_text())
    assert report["summary"]["output_tokens"] == 320
    assert len(report["per_target"]) == 40
    assert len(report["requests"]) == 80
    assert "api_key" not in report["config"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "80 requests, 0 failed" in capsys.readouterr().out


async def test_command_asks_for_the_model_list_where_none_is_named(tmp_path: Path) -> None:
    async with fake_server() as fake:
        argv = [fake.url, "--requests", "2", "--out", str(tmp_path / "bench.json"), "--no-plot"]
        assert await asyncio.to_thread(run, arguments(*argv)) == 0
    assert {body["model"] for body in fake.bodies} == {"base"}


async def test_command_says_by_its_status_that_requests_failed(tmp_path: Path) -> None:
    common = ["--requests", "2", "--warmup", "0", "--out", str(tmp_path / "bench.json"), "--no-plot"]
    async with fake_server() as fake:
        assert await asyncio.to_thread(run, arguments(fake.url, "--model", "missing", *common)) == 1
    assert await asyncio.to_thread(run, arguments("http://127.0.0.1:1", *common)) == 2
