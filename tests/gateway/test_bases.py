"""A gateway of several bases: resolution of names, tokenizers, and errors when no base is available."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from helpers.reported import report
from helpers.scripted_fleet import ScriptedFleet, gateway_client, make_model_folder
from helpers.waiting import wait_until

from protocol.queue.bus import Bus, now_ms
from protocol.runtime.model_files import base_settings
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest

CHAT = [{"role": "user", "content": "the quick fox"}]


async def set_bases(bus: Bus, *bases: m.ServedModel, **workers: int) -> None:
    """Publish bases as their workers do, and the number of workers of each as the scheduler does."""
    known, _ = await bus.members.bases()
    await bus._redis.hdel(bus.keys.bases, "", *(base.name for base in known))
    await report(bus, *bases)
    loads = {name: m.BaseLoad(num, 2, 1) for name, num in workers.items()}
    status = m.SchedulerStatus(queued=0, running=0, workers=1, drain_rate=0.0, sent_ms=now_ms(), bases=loads)
    await bus.set(bus.keys.status, status, 3_600_000)


def base(name: str, **more: Any) -> m.ServedModel:
    facts = {"fingerprint": "f", "model_type": "t", "vocab_size": 300, "max_model_len": 256, "sites": []} | more
    return m.ServedModel(model=name, name=name, **facts)


async def add(bus: Bus, name: str, of: str, digest: str = "") -> None:
    digest = digest or f"{name:0<64}"
    alias = m.Alias(name=name, state="on_disk", digest=digest, source=f"local:{name}", base=of, created_ms=1)
    record = m.AdapterRecord(
        digest=digest, rank=8, num_bytes=1, config={}, modules=[], source=f"local:{name}", created_ms=1
    )
    await bus.adapters.publish([(alias, record)])


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {name: speaking(tmp_path, name) for name in ("a", "b", "b:2")}


def speaking(root: Path, name: str) -> Path:
    """Return the folder of a base whose prompts begin with its name."""
    return make_model_folder(root / name, f"{name} says {{{{ messages[0].content }}}}")


@pytest_asyncio.fixture
async def http(bus: Bus, fleet: ScriptedFleet, folders: dict[str, Path]) -> AsyncIterator[httpx2.AsyncClient]:
    await set_bases(bus, base("a"), base("b", max_model_len=64), base("b:2"), **{"a": 1, "b": 1, "b:2": 1})
    for name, of in (("first", "a"), ("second", "b"), ("old", ""), ("lost", "gone")):
        await add(bus, name, of)
    further = f"{folders['b']},{folders['b:2']}"
    async with gateway_client(bus, folders["a"], more_models=further) as client:
        yield client


async def chat(http: httpx2.AsyncClient, model: str, **more: Any) -> httpx2.Response:
    return await http.post("/v1/chat/completions", json={"model": model, "messages": CHAT, "max_tokens": 5, **more})


@pytest.mark.parametrize(
    ("model", "of", "adapter"),
    [
        ("a", "a", ""), ("", "a", ""), ("base", "a", ""), ("b", "b", ""), ("b:2", "b:2", ""), ("first", "a", "first"),
        ("a:first", "a", "first"), ("base:first", "a", "first"), ("second", "b", "second"),
        ("b:second", "b", "second"),
    ],
)  # fmt: skip
async def test_a_name_stands_for_a_base_and_an_adapter(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, model: str, of: str, adapter: str
) -> None:
    answer = await chat(http, model)
    assert answer.status_code == 200, answer.text
    submit, _ = fleet.seen[-1]
    assert submit.base == of
    assert submit.digest.strip("0") == adapter
    assert fleet.prompt() == f"{of} says the quick fox"  # by this base's template


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("b:first", "It is an adapter of the base `a`, not of `b`."),
        ("a:second", "It is an adapter of the base `b`, not of `a`."),
        ("base:second", "It is an adapter of the base `b`, not of `a`."),
        ("b:2:second", "It is an adapter of the base `b`, not of `b:2`."),
        ("b:", "No adapter is named after the colon."),
        ("b:base", "`b:base`"), ("c", "`c`"), ("c:first", "`c:first`"),
        ("lost", "It is an adapter of the base `gone`, which this gateway does not serve."),
    ],
)  # fmt: skip
async def test_a_name_of_nobody_here_is_not_found(http: httpx2.AsyncClient, model: str, text: str) -> None:
    answer = await chat(http, model)
    assert answer.status_code == 404, answer.text
    assert text.replace("b:base", "base") in answer.text.replace("b:base", "base")


@pytest.mark.parametrize("model", ["old", "a:old", "b:old", "base:old"])
async def test_an_adapter_of_the_time_of_one_base_waits_for_a_store(http: httpx2.AsyncClient, model: str) -> None:
    """Its catalogue entry has no base: another base with the same layout would answer with wrong tokens."""
    answer = await chat(http, model)
    assert answer.status_code == 503, answer.text
    assert "the base of `old` is not known yet" in answer.text


async def test_each_base_has_its_own_context(http: httpx2.AsyncClient) -> None:
    words = " ".join(["fox"] * 70)
    answers = {
        name: await http.post("/v1/completions", json={"model": name, "prompt": words, "max_tokens": 5})
        for name in ("a", "b", "second")
    }
    assert [answer.status_code for answer in answers.values()] == [200, 400, 400]
    assert "maximum context length is 64 tokens" in answers["second"].text


async def test_a_list_shows_every_base_and_whose_its_adapters_are(http: httpx2.AsyncClient) -> None:
    models = (await http.get("/v1/models")).json()["data"]
    assert {model["id"]: model["parent"] for model in models} == {
        "a": None, "b": None, "b:2": None, "first": "a", "second": "b", "old": "a", "lost": "gone",
    }  # fmt: skip
    for name, parent in (("b", None), ("second", "b"), ("b:second", "b"), ("base", None)):
        assert (await http.get(f"/v1/models/{name}")).json()["parent"] == parent
    assert (await http.get("/v1/models/b:first")).status_code == 404
    head = {"anthropic-version": "2023-06-01"}
    page = (await http.get("/v1/models", headers=head)).json()["data"]
    assert {model["id"]: model["max_tokens"] for model in page} | {"lost": 0} == {
        "a": 255, "b": 63, "b:2": 255, "first": 255, "second": 63, "old": 255, "lost": 0,
    }  # fmt: skip


async def test_tokens_are_counted_by_the_asked_base(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    for model, of in (("second", "b"), ("first", "a")):
        wanted = fleet.tokenizer.encode(f"{of} says the quick fox").ids
        answer = await http.post("/tokenize", json={"model": model, "messages": CHAT})
        assert answer.json()["tokens"] == wanted
        counted = await http.post("/v1/messages/count_tokens", json={"model": model, "messages": CHAT})
        assert counted.json()["input_tokens"] == len(wanted), counted.text


async def test_older_apis_speak_of_the_default_base(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    info = (await http.get("/info")).json()
    assert (info["model_id"], info["adapters"]) == ("a", ["first"])
    tags = {model["name"] for model in (await http.get("/api/tags")).json()["models"]}
    assert tags == {"a:latest", "first:latest"}
    await http.post("/generate", json={"inputs": "fox", "parameters": {"max_new_tokens": 2}})
    assert fleet.seen[-1][0].base == "a"


async def test_a_job_of_a_further_base_is_read_with_its_tokenizer(
    http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    body = {"model": "second", "input": "the quick fox", "background": True, "max_output_tokens": 64}
    made = (await http.post("/v1/responses", json=body)).json()

    async def is_done() -> bool:
        return (await http.get(f"/v1/responses/{made['id']}")).json()["status"] in ("completed", "incomplete")

    await wait_until(is_done, "the response is complete")
    assert fleet.seen[-1][0].base == "b"
    head = {"idempotency-key": "k"}
    body = {"model": "second", "messages": CHAT, "max_tokens": 5}
    one, other = [await http.post("/v1/chat/completions", json=body, headers=head) for _ in range(2)]
    assert one.json()["choices"] == other.json()["choices"]


async def test_only_a_base_without_workers_is_unavailable(
    bus: Bus, http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    await bus.members.note_failure("b", "no memory")
    await set_bases(bus, base("a"), base("b"), base("b:2"), **{"b:2": 1})

    async def is_seen() -> bool:
        return (await chat(http, "a")).status_code == 503

    await wait_until(is_seen, "the gateway has seen it")
    answers = {name: await chat(http, name) for name in ("a", "b", "second", "b:2")}
    assert [answer.status_code for answer in answers.values()] == [503, 503, 503, 200]
    assert "no worker is ready to serve `a`; it may still be loading" in answers["a"].text
    assert "no worker is ready to serve `b`: it did not start: no memory" in answers["second"].text
    assert (await http.get("/health")).status_code == 200  # it serves what it can
    jobs = await http.post("/v1/responses", json={"model": "a", "input": "x", "background": True})
    assert jobs.status_code == 200  # waits for a worker
    whole = (await http.get("/v1/fleet")).json()
    assert {one["name"]: one["workers"] for one in whole["bases"]} == {"a": 0, "b": 0, "b:2": 1}
    assert {one["name"]: one["demand"] for one in whole["bases"]} == {"a": 0, "b": 0, "b:2": 3}
    assert whole["failed"] == {"b": "no memory"}
    metrics = (await http.get("/metrics")).text
    assert 'lorafleet_base_load{base="b:2",what="workers"} 1.0' in metrics
    assert 'lorafleet_base_load{base="b:2",what="queued"} 2.0' in metrics
    assert 'lorafleet_base_load{base="b:2",what="demand"} 3.0' in metrics


async def test_a_base_of_which_no_worker_has_come_up_yet_asks_for_one(
    bus: Bus, fleet: ScriptedFleet, folders: dict[str, Path]
) -> None:
    await set_bases(bus, base("a"), a=1)
    async with gateway_client(bus, folders["a"], more_models=str(folders["b"])) as http:
        found = (await http.get("/v1/fleet")).json()["bases"]
        assert {one["name"]: (one["demand"], one["fingerprint"]) for one in found} == {"a": (3, "f"), "b": (1, None)}
        assert 'lorafleet_base_load{base="b",what="demand"} 1.0' in (await http.get("/metrics")).text


async def test_a_worker_that_the_scheduler_has_not_met_yet_is_counted(
    bus: Bus, http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    await set_bases(bus, base("a"), base("b"), base("b:2"), a=1)

    async def answers(status: int) -> bool:
        return (await chat(http, "b")).status_code == status

    await wait_until(lambda: answers(503), "the gateway has seen that the base has no worker")
    beat = m.WorkerBeat(wid="w2", name="w2", base="b", capacity=4)
    await bus.members.beat(bus.keys.worker_beat("w2"), bus.keys.workers, "w2", m.encode(beat), 3_600_000)
    await wait_until(lambda: answers(200), "its calls are accepted")


async def test_a_base_whose_tokenizer_cannot_be_read_fails_its_own_calls(
    bus: Bus, fleet: ScriptedFleet, folders: dict[str, Path]
) -> None:
    (folders["b"] / "tokenizer.json").unlink()
    await set_bases(bus, base("a"), base("b"), a=1, b=1)
    async with gateway_client(bus, folders["a"], more_models=str(folders["b"])) as client:
        answers = {name: await chat(client, name) for name in ("a", "b")}
    assert [answer.status_code for answer in answers.values()] == [200, 503]
    assert "has no tokenizer.json" in answers["b"].text


async def test_a_gateway_of_one_base_never_asks_the_workers_of_another(
    bus: Bus, fleet: ScriptedFleet, folders: dict[str, Path]
) -> None:
    """A worker of another base may have joined the fleet first, by mistake or for another gateway."""
    await set_bases(bus, base("b"), base("a"), a=1, b=1)
    async with gateway_client(bus, folders["a"]) as client:
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["a"]
        assert (await chat(client, "a")).status_code == 200
        assert fleet.seen[-1][0].base == "a"
        assert (await chat(client, "b")).status_code == 404
        await set_bases(bus, base("b"), base("a"), b=1)

        async def is_seen() -> bool:
            return (await chat(client, "a")).status_code == 503

        await wait_until(is_seen, "the gateway has seen that only another base has a worker")


@pytest.mark.parametrize(
    ("name", "why"), [("a", "two base models of this fleet have the name a"), ("base", "means the default base")]
)
def test_further_bases_need_names_of_their_own(tmp_path: Path, name: str, why: str) -> None:
    one, other = (make_model_folder(tmp_path / folder) for folder in ("a", f"other/{name}"))
    with pytest.raises(BadRequest, match=why):
        base_settings(Settings(model=str(one), more_models=str(other)))
    found = base_settings(Settings(model=str(one), served_name="mine", more_models=f"{one}, org/model"))
    assert [(name, each.served_name, each.model) for name, each in found.items()] == [
        ("mine", "mine", str(one)), ("a", "a", str(one)), ("org/model", "org/model", "org/model"),
    ]  # fmt: skip
