"""Charts from a Prometheus have the same numbers as a gateway's own; no reply of the server causes an error."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qs

import pytest
from helpers.scripted_fleet import ScriptedFleet, gateway_client
from helpers.stub_http import serving
from helpers.waiting import wait_until

from gateway.books.prometheus import MAX_BYTES, RANGES_S, RETRY_S, PrometheusCharts
from gateway.fleet.timeseries import TimeSeries
from gateway.http.http_client import HttpClient
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings

NOW_S = 1_800_000_000.0 + 130
FIRST_S, STEP_S = 1_800_000_000 - 21_600 + 300, 300  # of the range 6h

Form = dict[str, str]
Reply = tuple[int, bytes]


def result(*rows: dict[str, Any], status: int = 200) -> Reply:
    return status, json.dumps({"status": "success", "data": {"result": rows}}).encode()


def row(field: str, values: dict[int, str], **labels: str) -> dict[str, Any]:
    """Return a result with values by index of their period; the timestamp of each is the end of the period."""
    pairs = [[FIRST_S + STEP_S * (place + 1), text] for place, text in values.items()]
    return {"metric": {"field": field, **labels}, "values": pairs}


def names(**values: str) -> Reply:
    return result(*({"metric": {"adapter": name}, "value": [NOW_S, text]} for name, text in values.items()))


@contextmanager
def prometheus(
    reply: Callable[[str, Form], Reply | None], headers: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[str, list[tuple[str, Form]]]]:
    """Serve replies; yield the URL and the requests received. A reply of None closes the connection instead."""
    asked: list[tuple[str, Form]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            form = {name: values[0] for name, values in parse_qs(raw.decode()).items()}
            if "cookie" in self.headers:
                form["cookie"] = self.headers["cookie"]
            asked.append((self.path, form))
            answer = reply(self.path, form)
            if answer is not None:
                self.send_response(answer[0])
                for name, text in headers.items():
                    self.send_header(name, text)
                self.send_header("content-length", str(len(answer[1])))
                self.end_headers()
                self.wfile.write(answer[1])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Handler) as url:
        yield url, asked


def empty(path: str, form: Form) -> Reply:
    return result()


class Clock:
    now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


@contextmanager
def charts(
    reply: Callable[[str, Form], Reply | None],
    timeout_s: float = 30,
    clock: Clock | None = None,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[tuple[PrometheusCharts, list[tuple[str, Form]]]]:
    with prometheus(reply, headers) as (url, asked):
        yield PrometheusCharts(url + "/", 'fleet="a"', HttpClient(), timeout_s, now_s=clock or Clock()), asked


async def test_a_reply_becomes_columns_with_its_gaps() -> None:
    def reply(path: str, form: Form) -> Reply:
        if path == "/api/v1/query":
            return names(small="1", **{'odd".*': "7", "long" * 1000: "3"})
        return result(
            row("fleet:workers", {0: "2", 1: "2", 70: "2", 71: "1"}),
            row("fleet:queued", {0: "NaN", 1: "3"}),
            row("requests", {0: "10.02", 71: "5"}),
            row("requests", {0: "3.01", 71: "5"}, adapter="other"),
            row("requests", {0: "6.01"}, adapter='odd".*'),
            row("requests", {0: "1", 72: "9", -1: "9"}, adapter="small"),
            row("ttft_p95_ms", {0: "120.26", 1: "+Inf", 70: "NaN"}),
            row("hits", {1: "1e300"}),
        )

    with charts(reply) as (made, asked):
        found = await made.read("6h", "model")
        assert await made.read("6h", "model") is found
    assert isinstance(found, dict)
    assert (found["start_time"], found["step_s"], found["num"], found["elapsed_s"]) == (FIRST_S, STEP_S, 72, 130)
    all_, odd, small, other = found["groups"]
    assert [group["name"] for group in found["groups"]] == [None, 'odd".*', "small", "other"]
    seen = [0, 1, 70, 71]
    assert [all_["requests"][at] for at in seen] == [10, 0, 0, 5]  # no samples in a covered period count as 0
    assert [odd["requests"][at] for at in seen] == [6, 0, 0, 0]
    assert [small["requests"][at] for at in seen] == [1, 0, 0, 0]
    assert [other["requests"][at] for at in seen] == [3, 0, 0, 5]
    assert all(all_["requests"][at] is None for at in range(2, 70))  # no value, instead of 0
    assert [all_["ttft_p95_ms"][at] for at in seen] == [120.3, None, None, None]
    assert all_["hits"][:2] == [0, 0]
    assert odd["refused"] == [None] * 72  # not available by model
    assert [found["fleet"]["queued"][at] for at in seen] == [None, 3, None, None]
    own = await TimeSeries(lambda: NOW_S).read(21_600, None, "model")
    assert own.keys() == found.keys()
    assert own["groups"][0].keys() == all_.keys() == other.keys()
    assert own["fleet"].keys() == found["fleet"].keys()
    (_, top), (path, form) = asked
    assert path == "/api/v1/query_range"
    assert (int(form["start"]), int(form["end"]), form["step"]) == (FIRST_S + 300, 1_800_000_300, "300")
    assert 'fleet="a"' in top["query"]
    assert r'adapter=~"odd\"\\.\\*|small",fleet="a"' in form["query"]
    assert r'adapter!~"odd\"\\.\\*|small",fleet="a"' in form["query"]


async def test_a_range_is_asked_for_once_a_period() -> None:
    clock = Clock()
    with charts(empty, clock=clock) as (made, asked):
        for clock.now_s in (NOW_S, NOW_S + 1, NOW_S + 169, NOW_S + 170, NOW_S + 171):
            assert isinstance(await made.read("6h", None), dict)
        assert len(asked) == 2
        clock.now_s -= 3600  # the fleet's clock was ahead and has been corrected
        found = await made.read("6h", None)
        assert isinstance(found, dict)
        assert found["start_time"] == FIRST_S - 3600 + 300
        for span in RANGES_S:
            found = await made.read(span, None)
            assert isinstance(found, dict)
            assert found["num"] <= 360


async def test_replies_of_both_queries_are_read_one_at_a_time() -> None:
    """Two megabytes may take fifty while they are parsed, and there are ten such charts."""
    with charts(lambda path, _: names(a="1") if path.endswith("query") else result()) as (made, asked):
        async with made._reading:
            first = asyncio.create_task(made.read("6h", "model"))
            await wait_until(lambda: len(asked) == 1, "the names are asked for")
            other = PrometheusCharts(made._url.removesuffix("/api/v1/"), "", HttpClient())
            assert isinstance(await other.read("7d", None), dict)
            assert [path for path, _ in asked] == ["/api/v1/query", "/api/v1/query_range"]
        assert isinstance(await first, dict)
        assert len(asked) == 3


async def test_whatever_is_replied_there_is_a_line_that_says_so(subtests: pytest.Subtests) -> None:
    held = threading.Event()

    def slow(path: str, form: Form) -> None:
        held.wait(60)

    wrong: dict[str, tuple[Callable[[str, Form], Reply | None], str]] = {
        "slow": (slow, "it takes longer than 0.2 s"),
        "huge": (lambda *_: (200, b" " * (MAX_BYTES + 1)), f"its reply is longer than {MAX_BYTES} bytes"),
        "status": (lambda *_: (503, b"starting"), "it answers with status 503"),
        "moved": (lambda *_: (302, b""), "it answers with status 302"),
        "closed": (lambda *_: None, "it can't be reached (RemoteProtocolError)"),
    }
    for name, body in {
        "a page": b"<html>", "no object": b"[]", "empty": b"{}", "no results": b'{"data": {"result": 1}}',
        "half of one": b'{"data": {"result": [{"metric": {}}]}}', "nested": b"[" * 100_000,
        "a surrogate": b'{"data": {"result": [{"metric": {"field": "\\ud800"}, "values": []}]}}',
        "no number": b'{"data": {"result": [{"metric": {"field": "hits"}, "values": [[1, {}]]}]}}',
        "no name": b'{"data": {"result": [{"metric": {"field": {}}, "values": []}]}}',
    }.items():  # fmt: skip
        wrong[name] = lambda *_, body=body: (200, body), "its reply is not that of a Prometheus"
    for name, (reply, line) in wrong.items():
        clock = Clock()
        with subtests.test(name), charts(reply, 0.2 if name == "slow" else 30, clock) as (made, asked):
            for clock.now_s in (NOW_S, NOW_S + RETRY_S - 1, NOW_S + RETRY_S):
                assert await made.read("6h", None) == line
            held.set()
            assert len(asked) == 2
    for url, why in (("http://127.0.0.1:port", "InvalidURL"), ("http://127.0.0.1:99999", "ExceptionGroup")):
        assert await PrometheusCharts(url, "", HttpClient()).read("6h", None) == f"it can't be reached ({why})"


async def test_a_cookie_is_neither_kept_nor_sent() -> None:
    """A cookie with a character that no header of httpx may contain made each later request fail."""
    clock = Clock()
    with charts(empty, clock=clock, headers={"set-cookie": "\xff=\xfe"}) as (made, asked):
        for clock.now_s in (NOW_S, NOW_S + 300):
            assert isinstance(await made.read("6h", None), dict)
        assert [form.get("cookie") for _, form in asked] == [None, None]


async def test_operators_get_longer_ranges_and_tenants_their_own(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    heads = {
        scope: {"authorization": f"Bearer {(await bus.api_keys.create(f'prom-{scope}', [scope]))[0]}"}
        for scope in ("infer", "admin")
    }
    replies: list[Callable[[str, Form], Reply]] = [empty]
    with prometheus(lambda *asked: replies[-1](*asked)) as (url, asked):
        async with gateway_client(bus, model_folder, api_keys=True, prometheus_url=url) as http:

            async def read(scope: str, **query: str) -> Any:
                return await http.get("/v1/timeseries", params=query, headers=heads[scope])

            found = (await read("admin", range="30d")).json()
            assert (found["source"], found["range"], found["num"], found["note"]) == ("prometheus", "30d", 360, None)
            assert found["ranges"] == ["15m", "1h", "6h", "24h", "7d", "30d", "90d"]
            assert (await read("admin", range="1h")).json()["source"] == "gateway"
            mine = (await read("infer", range="24h")).json()
            assert (mine["source"], mine["fleet"], mine["ranges"][-1]) == ("gateway", None, "7d")
            assert (await read("infer", range="30d")).status_code == 400
            assert len(asked) == 1
            replies.append(lambda *_: (500, b"secret details"))
            found = (await read("admin", range="90d")).json()
            assert (found["source"], found["range"], found["num"]) == ("gateway", "7d", 336)
            assert found["note"].startswith("Prometheus: it answers with status 500. These are the last 7d")
    async with gateway_client(bus, model_folder) as http:
        refused = await http.get("/v1/timeseries", params={"range": "90d"})
        assert refused.status_code == 400
        assert "--prometheus-url" in refused.json()["error"]["message"]


def test_settings_take_matchers_and_urls_alone(subtests: pytest.Subtests) -> None:
    for good in ('namespace="prod"', 'job=~"lora.{1,3}$",cluster!="b"', ""):
        assert Settings(prometheus_matchers=good).prometheus_matchers == good
    for wrong in ('a="b"} or vector(1)', 'a="b\\"', "prod", 'a="b" c="d"'):
        with subtests.test(wrong), pytest.raises(ValueError, match="prometheus_matchers"):
            Settings(prometheus_matchers=wrong)
    with pytest.raises(ValueError, match="prometheus_url"):
        Settings(prometheus_url="file:///etc/passwd")
