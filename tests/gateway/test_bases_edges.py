"""Edge cases of several bases: names that are prefixes of others, removed or broken bases, native routes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client, make_model_folder
from helpers.waiting import wait_until

from gateway.fleet.bases import open_bases
from gateway.fleet.view import FleetView
from gateway.http.http_client import HttpClient
from gateway.text.tokenizer import load_model_files
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, Unavailable
from protocol.wire.messages.requests import KNOWN_FIELDS
from tests.gateway.test_bases import add, base, chat, set_bases, speaking


async def knows_scores(bus: Bus) -> None:
    """Publish the optional fields that workers of this version support."""
    status = await bus.get(bus.keys.status, m.SchedulerStatus)
    assert status is not None
    await bus.set(bus.keys.status, msgspec.structs.replace(status, knows=sorted(KNOWN_FIELDS)), 3_600_000)


@pytest.mark.parametrize(("default", "further"), [("llama:8b", "llama"), ("llama", "llama:8b")])
async def test_a_base_whose_name_begins_with_another_ones(
    bus: Bus, fleet: ScriptedFleet, tmp_path: Path, default: str, further: str
) -> None:
    folders = {name: make_model_folder(tmp_path / name) for name in (default, further)}
    await set_bases(bus, base(default), base(further), **{default: 1, further: 1})
    await add(bus, "first", "llama:8b")
    await add(bus, "second", "llama")
    async with gateway_client(bus, folders[default], more_models=str(folders[further])) as http:
        for model, of in (
            ("llama:8b", "llama:8b"), ("llama", "llama"), ("llama:8b:first", "llama:8b"), ("llama:second", "llama"),
            ("first", "llama:8b"), ("second", "llama"), ("base", default), ("", default),
        ):  # fmt: skip
            answer = await chat(http, model)
            assert answer.status_code == 200, (model, answer.text)
            assert fleet.seen[-1][0].base == of
        for name in ("llama", "llama:8b"):
            found = (await http.get(f"/v1/models/{name}")).json()
            assert (found["id"], found["parent"]) == (name, None)


async def test_base_is_no_other_one_while_the_default_is_not_up(bus: Bus, fleet: ScriptedFleet, tmp_path: Path) -> None:
    one, other = make_model_folder(tmp_path / "a"), make_model_folder(tmp_path / "b")
    await set_bases(bus, base("b"), b=1)
    async with gateway_client(bus, one, more_models=str(other)) as http:
        for headers in ({}, {"anthropic-version": "2023-06-01"}):
            assert (await http.get("/v1/models/base", headers=headers)).status_code == 404
            assert (await http.get("/v1/models/b", headers=headers)).json()["id"] == "b"


@pytest.mark.parametrize("more_models", [False, True])
async def test_what_a_base_answered_that_is_gone_is_not_read_as_anothers(
    bus: Bus, fleet: ScriptedFleet, tmp_path: Path, more_models: bool
) -> None:
    """With the default base's tokenizer, the text would be wrong, with status 200."""
    one, other, third = (make_model_folder(tmp_path / name) for name in "abc")
    await set_bases(bus, base("a"), base("b"), base("c"), a=1, b=1, c=1)
    async with gateway_client(bus, one, more_models=str(other)) as http:
        body = {"model": "b", "input": "the fox", "background": True}
        made = (await http.post("/v1/responses", json=body)).json()["id"]

        async def is_done() -> bool:
            return (await http.get(f"/v1/responses/{made}")).json()["status"] == "completed"

        await wait_until(is_done, "the response is complete")
    further = str(third) if more_models else ""
    async with gateway_client(bus, one, more_models=further) as http:
        answer = await http.get(f"/v1/responses/{made}")
        assert answer.status_code == 404, answer.text
        assert "its base `b` is not served here" in answer.text


async def test_what_an_only_base_answered_under_another_name_is_read(
    bus: Bus, fleet: ScriptedFleet, tmp_path: Path
) -> None:
    folder = make_model_folder(tmp_path / "a")
    await set_bases(bus, base("a"), a=1)
    async with gateway_client(bus, folder) as http:
        body = {"model": "a", "input": "the fox", "background": True}
        made = (await http.post("/v1/responses", json=body)).json()["id"]

        async def is_done() -> bool:
            return (await http.get(f"/v1/responses/{made}")).json()["status"] == "completed"

        await wait_until(is_done, "the response is complete")
    await set_bases(bus, base("renamed"), renamed=1)
    async with gateway_client(bus, folder, served_name="renamed") as http:
        assert (await http.get(f"/v1/responses/{made}")).json()["status"] == "completed"


BROKEN: dict[str, tuple[str, bytes]] = {
    "template of other bytes": ("chat_template.jinja", b"\xff\xfe{{ x }}"),
    "template": ("chat_template.jinja", b"{% if %}"),
    "generation config": ("generation_config.json", b"{"),
    "list as generation config": ("generation_config.json", b"[1]"),
    "tokenizer config": ("tokenizer_config.json", b"{"),
    "list as tokenizer config": ("tokenizer_config.json", b"[]"),
    "config": ("config.json", b"{"),
    "tokenizer": ("tokenizer.json", b"{"),
    "tokenizer of other bytes": ("tokenizer.json", b"\xff"),
    "special tokens": ("special_tokens_map.json", b"{"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_files_of_a_model_that_are_broken_are_refused(tmp_path: Path, what: str) -> None:
    folder = make_model_folder(tmp_path / "b")
    name, content = BROKEN[what]
    (folder / name).write_bytes(content)
    with pytest.raises(BadRequest):
        load_model_files(Settings(model=str(folder)))


@pytest.mark.parametrize("keys", [False, True])
async def test_a_broken_further_base_tells_no_tenant_where_it_lies(bus: Bus, tmp_path: Path, keys: bool) -> None:
    one, other = make_model_folder(tmp_path / "a"), make_model_folder(tmp_path / "secret place" / "b")
    (other / "config.json").write_text("{")
    settings = Settings(redis_url=bus.url, model=str(one), more_models=str(other), data=tmp_path, api_keys=keys)
    bases = await open_bases(settings, FleetView(bus, settings), bus, HttpClient(), lambda: None)
    try:
        assert bases.of("a").base.name == "a"
        with pytest.raises(Unavailable) as refused:
            bases.of("b")
    finally:
        await bases.close()
    assert refused.value.code == "base_unreadable"
    assert ("secret place" in refused.value.message) != keys


@pytest.mark.parametrize(
    ("path", "body", "task"),
    [
        ("/v1/embeddings", {"input": "the dog"}, "embed"), ("/v1/classify", {"input": "the dog"}, "score"),
        ("/v1/rerank", {"query": "the fox", "documents": ["the dog"]}, "score"),
    ],
)  # fmt: skip
async def test_numbers_wait_for_their_base_to_be_known(
    bus: Bus, fleet: ScriptedFleet, tmp_path: Path, path: str, body: dict[str, Any], task: m.Task
) -> None:
    """A call repeated with its Idempotency-Key after the bases were published again."""
    one, other = make_model_folder(tmp_path / "a"), make_model_folder(tmp_path / "b")
    await set_bases(bus, base("a"), base("b", task=task, width=4, labels=["x"]), a=1, b=1)
    await knows_scores(bus)
    numbers = list(struct.unpack("<4i", struct.pack("<4f", 1, 0.5, 0.25, 0)))
    fleet.script = lambda *_: Script(numbers=numbers if task == "embed" else numbers[:1])
    async with gateway_client(bus, one, more_models=str(other)) as http:

        async def ask() -> int:
            head = {"Idempotency-Key": "k"}
            return (await http.post(path, json={"model": "b", **body}, headers=head)).status_code

        assert await ask() == 200
        await bus._redis.delete(bus.keys.bases)

        async def is_unknown() -> bool:
            return await ask() != 200

        await wait_until(is_unknown, "the gateway knows the base no more")
        assert await ask() == 503


async def test_native_routes_that_take_a_model_ask_its_base(bus: Bus, fleet: ScriptedFleet, tmp_path: Path) -> None:
    folders = {name: speaking(tmp_path, name) for name in "abc"}
    await set_bases(bus, base("a"), base("b"), base("c", task="score", labels=["x", "y"]), a=1, b=1, c=1)
    await knows_scores(bus)
    await add(bus, "second", "b")
    further = f"{folders['b']},{folders['c']}"
    async with gateway_client(bus, folders["a"], more_models=further) as http:
        for name in ("b", "second"):
            loaded = await http.post("/api/generate", json={"model": name})
            assert loaded.json()["done_reason"] == "load", loaded.text
            shown = await http.post("/api/show", json={"model": name})
            assert "b says" in shown.json()["template"], shown.text
            tokens = await http.post("/tokenize", json={"inputs": "the", "adapter_id": name})
            assert tokens.status_code == 200, tokens.text
        for path, name in (("/api/show", "nobody"), ("/api/generate", "nobody")):
            assert (await http.post(path, json={"model": name})).status_code == 404
        fleet.script = lambda *_: Script(numbers=list(struct.unpack("<2i", struct.pack("<2f", 1, 0.5))))
        answer = await http.post("/classify", json={"inputs": "the fox", "parameters": {"adapter_id": "c"}})
        assert answer.status_code == 200, answer.text
        assert fleet.seen[-1][0].base == "c"
