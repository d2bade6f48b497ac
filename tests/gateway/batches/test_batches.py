"""Batches with OpenAI's client: upload, run, download; invalid files, invalid lines, cancelling."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.scripted_fleet import BASE_NAME, RunningGateway, Script, ScriptedFleet, running_gateway
from helpers.waiting import wait_until
from openai import APIStatusError, AsyncOpenAI
from openai.types import Batch
from prometheus_client import REGISTRY

from protocol.queue.bus import Bus
from protocol.wire.errors import Internal
from protocol.wire.keys import BATCH

CHAT = "/v1/chat/completions"


def line(number: int, text: str = "hello", *, url: str = CHAT, **more: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": BASE_NAME, "messages": [{"role": "user", "content": text}], "max_tokens": 8}
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": body | more}


def file_of(lines: Sequence[Any]) -> io.BytesIO:
    rows = [row if isinstance(row, str) else json.dumps(row) for row in lines]
    return io.BytesIO("\n".join(rows).encode())


async def started(client: AsyncOpenAI, lines: Sequence[Any], endpoint: Any = CHAT, **more: Any) -> Batch:
    uploaded = await client.files.create(file=("in.jsonl", file_of(lines)), purpose="batch")
    return await client.batches.create(
        input_file_id=uploaded.id, endpoint=endpoint, completion_window="24h", **more
    )  # fmt: skip


async def ended(client: AsyncOpenAI, batch: Batch) -> Batch:
    async def look() -> Batch | None:
        found = await client.batches.retrieve(batch.id)
        return found if found.status in ("completed", "failed", "expired", "cancelled") else None

    return await wait_until(look, "the batch has ended")


async def rows_of(client: AsyncOpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    if file_id is None:
        return {}
    text = (await client.files.content(file_id)).text
    rows = [json.loads(row) for row in text.splitlines()]
    found = {row["custom_id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


async def test_every_line_gets_the_answer_that_its_endpoint_gives(client: AsyncOpenAI, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(text=f"{len(body.prompt)}", eos=True)
    lines = [line(i, "x" * i) for i in range(1, 30)]
    batch = await ended(client, await started(client, lines, metadata={"a": "b"}))
    assert batch.status == "completed"
    assert batch.metadata == {"a": "b"}
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (29, 29, 0)
    assert batch.error_file_id is None
    rows = await rows_of(client, batch.output_file_id)
    assert rows.keys() == {f"line-{i}" for i in range(1, 30)}
    used = 0
    for sent in lines:
        response = rows[sent["custom_id"]]["response"]
        assert response["status_code"] == 200
        assert response["request_id"].startswith("req_")
        whole = await client.chat.completions.create(**sent["body"])
        assert response["body"]["choices"][0]["message"]["content"] == whole.choices[0].message.content
        used += response["body"]["usage"]["total_tokens"]
    assert batch.usage is not None
    assert batch.usage.total_tokens == used > 0
    assert {submit.cls for submit, _ in fleet.seen[:29]} == {BATCH}


async def test_wrong_lines_are_told_with_their_number(client: AsyncOpenAI) -> None:
    lines = [
        line(1), "{", line(1), line(3, url="/v1/completions"), {**line(4), "method": "GET"}, {**line(5), "body": 7},
        {**line(6), "custom_id": ""}, "[]",
    ]  # fmt: skip
    batch = await ended(client, await started(client, lines))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(problem.code, problem.line) for problem in batch.errors.data] == [
        ("invalid_json_line", 2), ("duplicate_custom_id", 3), ("url_mismatch", 4), ("invalid_method", 5),
        ("invalid_body", 6), ("invalid_custom_id", 7), ("invalid_json_line", 8),
    ]  # fmt: skip
    assert batch.output_file_id is batch.error_file_id is None
    empty = await ended(client, await started(client, ["", " "]))
    assert empty.errors is not None
    assert empty.errors.data is not None
    assert empty.errors.data[0].code == "empty_file"


async def test_a_refused_line_ends_in_the_error_file_and_no_other(client: AsyncOpenAI, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(error=Internal("it broke") if submit.max_new_tokens == 3 else None)
    lines = [
        line(1), line(2, model="nobody"), line(3, temperature=9), line(4, stream=True), line(5, tempersture=1),
        line(6, background=True), line(7, max_tokens=3),
    ]  # fmt: skip
    batch = await ended(client, await started(client, lines))
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 6)
    assert (await rows_of(client, batch.output_file_id)).keys() == {"line-1"}
    rows = await rows_of(client, batch.error_file_id)
    told = {name: row["response"] and row["response"]["status_code"] for name, row in rows.items()}
    assert told == {"line-2": 404, "line-3": 400, "line-4": None, "line-5": 400, "line-6": None, "line-7": 500}
    assert rows["line-3"]["response"]["body"]["error"]["param"] == "temperature"
    assert rows["line-4"]["error"] == {"code": "invalid_request", "message": "stream cannot be true in a batch"}


async def test_a_cancelled_batch_keeps_what_it_has(client: AsyncOpenAI, fleet: ScriptedFleet, bus: Bus) -> None:
    fleet.script = lambda submit, body: Script(hold_after=0 if submit.max_new_tokens == 9 else None)
    lines = [line(1), line(2), line(3, max_tokens=9), line(4, max_tokens=9)]
    batch = await started(client, lines)

    async def two_done() -> bool:
        return (await client.batches.retrieve(batch.id)).request_counts.completed == 2  # type: ignore[union-attr]

    await wait_until(two_done, "two lines have answers")
    asked = await client.batches.cancel(batch.id)
    assert asked.status == "cancelling"
    assert asked.cancelling_at is not None
    batch = await ended(client, asked)
    assert batch.status == "cancelled"
    assert (await rows_of(client, batch.output_file_id)).keys() == {"line-1", "line-2"}
    rows = await rows_of(client, batch.error_file_id)
    assert {name: row["error"]["code"] for name, row in rows.items()} == {
        "line-3": "batch_cancelled", "line-4": "batch_cancelled"
    }  # fmt: skip
    assert (await client.batches.cancel(batch.id)).status == "cancelled"

    async def none_runs() -> bool:
        facts = await bus.requests([submit.rid for submit, _ in fleet.seen])
        return all(fact is None or fact.is_terminal for fact in facts)

    await wait_until(none_runs, "no line runs in the queue any more")


async def test_what_creating_a_batch_refuses(client: AsyncOpenAI) -> None:
    uploaded = await client.files.create(file=("in.jsonl", file_of([line(1)])), purpose="batch")

    async def refusal(**changes: Any) -> tuple[int, str | None]:
        asked: dict[str, Any] = {"input_file_id": uploaded.id, "endpoint": CHAT, "completion_window": "24h"}
        with pytest.raises(APIStatusError) as caught:
            await client.batches.create(**asked | changes)
        return caught.value.status_code, caught.value.param

    assert await refusal(input_file_id="file-none") == (400, "input_file_id")
    assert await refusal(endpoint="/v1/nothing") == (400, "endpoint")
    assert await refusal(completion_window="1h") == (400, "completion_window")
    assert await refusal(metadata={"a": "b" * 513}) == (400, "metadata")
    assert await refusal(output_expires_after={"anchor": "created_at", "seconds": 5}) == (
        400, "output_expires_after"
    )  # fmt: skip
    assert await refusal(extra_body={"metadta": {}}) == (400, "metadta")
    with pytest.raises(APIStatusError) as caught:
        await client.batches.retrieve("batch_none")
    assert (caught.value.status_code, caught.value.code) == (404, "batch_not_found")


async def test_the_list_has_the_newest_first_and_pages(client: AsyncOpenAI) -> None:
    made = [(await started(client, [line(1)])).id for _ in range(3)]
    first = await client.batches.list(limit=2)
    assert [batch.id for batch in first.data] == made[:0:-1]
    assert [batch.id async for batch in client.batches.list(limit=2)] == made[::-1]


async def test_lines_run_by_model_and_beginning(client: AsyncOpenAI, fleet: ScriptedFleet) -> None:
    for name in ("a", "b", "c"):
        await fleet.add_adapter(name, f"digest-{name}")
    lines = [line(i, f"{'xyz'[i // 3 % 3]} {i}", model="abc"[i % 3]) for i in range(27)]
    batch = await ended(client, await started(client, lines))
    assert batch.request_counts is not None
    assert batch.request_counts.completed == 27
    digests = [submit.digest for submit, _ in fleet.seen]
    changes = sum(before != after for before, after in pairwise(digests))
    assert changes < 20  # would be 26 in the order of the file; some lines run concurrently, so the order is not strict
    assert batch.model is None


async def test_a_running_line_has_the_batch_s_time_at_the_next_gateway(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, tmp_path: Path
) -> None:
    """The time of other requests ends before the first token, and the next gateway looks for it twice."""
    fleet.script = lambda submit, body: Script(hold_after=0)
    gateway = {"files": str(tmp_path / "files"), "request_timeout_s": 0.001, "grace_s": 0.1}

    def client_of(one: RunningGateway) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{one.url}/v1", api_key="any", max_retries=0)

    def log_reads() -> float:
        return REGISTRY.get_sample_value("lorafleet_gateway_log_reads_total") or 0.0

    async with running_gateway(bus, model_folder, **gateway) as one, client_of(one) as client:
        batch = await started(client, [line(1)])
        await wait_until(lambda: fleet.seen, "the line is submitted")
    before = log_reads()
    async with running_gateway(bus, model_folder, **gateway) as two, client_of(two) as client:
        await wait_until(lambda: log_reads() >= before + 2, "the next gateway waits for the line", timeout_s=20.0)
        fleet.go.set()
        counts = (await ended(client, batch)).request_counts
    assert counts is not None
    assert (counts.completed, counts.failed) == (1, 0)
