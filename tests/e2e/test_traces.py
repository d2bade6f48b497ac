"""One trace through the queue: exported by real services over OTLP, even when a worker is killed midway."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
from helpers.factories import make_adapter, make_tiny_model
from helpers.fleets import chunks, completion
from helpers.otlp import Span, collecting, drawn
from helpers.preloaded import fork
from helpers.waiting import wait_until

from chaos.fleet import ProcessFleet, Shape

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed: pip install lorafleet[tracing]")

TRACE, OTHER = "4bf92f3577b34da6a3ce929d0e0e4736", "0af7651916cd43dd8448eb211c80319c"
PARENT = "00f067aa0ba902b7"
NUM = 3900  # output tokens: enough that the worker, which first reports its prefill, dies while it makes them


async def test_a_trace_goes_through_the_queue_and_shows_a_death(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", max_len=4096)
    make_adapter(tmp_path / "adapters" / "pirate", model, seed=1)
    with collecting() as collector:
        fleet = ProcessFleet.prepare(
            tmp_path, model, tmp_path / "adapters", durable=False, spawn=fork, otlp_endpoint=collector.url,
            trace_share=0.0, log_format="json",
        )  # fmt: skip
        try:
            await fleet.start_all(Shape(workers=("one", "two")))
            body = completion("pirate", "the dog", max_tokens=NUM, stream=True)
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            async with (
                httpx2.AsyncClient(base_url=fleet.url, timeout=60, trust_env=False) as http,
                http.stream("POST", "/v1/completions", json=body, headers=headers) as answer,
            ):
                assert answer.headers["x-trace-id"] == TRACE
                texts = chunks(answer)
                await anext(texts)
                first = await wait_until(lambda: collector.named("prefill"), "the first worker has told its prefill")
                beats = (await fleet.bus.members.worker_beats()).values()
                held = {beat.name: await fleet.bus.work_of(beat.wid) for beat in beats if beat is not None}
                (holder,) = (name for name, work in held.items() if work)
                fleet.kill(holder)
                _ = [text async for text in texts]
                other = {"traceparent": f"00-{OTHER}-{PARENT}-01"}
                error = await http.post("/v1/completions", json={**body, "model": "nobody"}, headers=other)
            assert error.status_code == 404
            assert error.json()["error"]["trace_id"] == OTHER
            page = await fleet.http.get(f"{fleet.url}/metrics", headers={"accept": "application/openmetrics-text"})
            assert f'# {{trace_id="{TRACE}"}}' in page.text  # an exemplar of the time to the first token
            untraced = await fleet.http.post(f"{fleet.url}/v1/completions", json=completion("base", "the dog"))
            assert "x-trace-id" not in untraced.headers
            names = ("queue wait", "decode", "publish", "stream", "text_completion pirate")
            await wait_until(lambda: all(map(collector.named, names)), lambda: f"all are told: {collector.spans}")
            await wait_until(lambda: len(collector.beginning("run on")) == 2, "both runs are told")
        finally:
            await fleet.close()
    check([span for span in collector.spans if span.trace == TRACE], holder, first[0])
    assert {span.trace for span in collector.spans} == {TRACE, OTHER}  # no other request was traced
    (tmp_path / "trace.txt").write_text(drawn([span for span in collector.spans if span.trace == TRACE]))


def check(spans: list[Span], holder: str, prefill: Span) -> None:
    """Check one trace: the parents of its spans, their order, and their links."""
    by_name = {span.name: span for span in spans}
    root = by_name["text_completion pirate"]
    assert (root.parent, root.kind, root.service) == (PARENT, 2, "lorafleet-gateway")
    assert root.schema.startswith("https://opentelemetry.io/schemas/")
    wanted = {
        "gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "lorafleet",
        "gen_ai.request.model": "pirate", "gen_ai.request.max_tokens": NUM, "gen_ai.usage.output_tokens": NUM,
        "gen_ai.response.finish_reasons": ["length"], "http.response.status_code": 200,
    }  # fmt: skip
    assert wanted.items() <= root.attributes.items()
    stages = [by_name[name] for name in ("admission", "resolve names", "render and tokenize", "submit", "stream")]
    assert {stage.parent for stage in stages} == {root.id}
    assert [s.begin_ns for s in stages] == sorted(s.begin_ns for s in stages)

    dead, alive = sorted((s for s in spans if s.name.startswith("run on")), key=lambda s: s.begin_ns)
    assert (dead.name, dead.error, dead.service) == (f"run on {holder}", "the worker died", "lorafleet-scheduler")
    assert (alive.error, alive.service, alive.parent, alive.links) == ("", "lorafleet-worker", root.id, [dead.id])
    assert dead.parent == root.id
    waits = sorted((s for s in spans if s.name == "queue wait"), key=lambda s: s.begin_ns)
    assert [wait.links for wait in waits] == [[], [dead.id]]
    assert {wait.parent for wait in waits} == {root.id}
    assert prefill.parent == dead.id
    below = {span.name for span in spans if span.parent == alive.id}
    assert {"prefill", "decode", "publish"} <= below
    assert any(span.name == "adapter wait" and span.parent in (dead.id, alive.id) for span in spans)
    assert all(span.begin_ns <= span.end_ns for span in spans)
