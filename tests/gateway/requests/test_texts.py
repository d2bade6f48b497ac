"""Prompts and outputs in the history: stored only if an operator enables it, cut, bounded, and private to tenants."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client, make_model_folder, running_gateway
from helpers.waiting import wait_until

from gateway.requests.database import Database
from gateway.requests.texts import MAX_CHARACTERS
from gateway.text.tokenizer import load_model_files
from lorafleet.__main__ import main
from protocol.queue.archive import Past
from protocol.queue.bus import Bus, now_ms
from protocol.queue.history import Place
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, Internal
from tests.gateway.test_bases import base, set_bases

BODY = {"model": "base", "prompt": "the lazy dog sleeps", "max_tokens": 12, "ignore_eos": True}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "the fox"}], "max_tokens": 12}


@asynccontextmanager
async def serving(bus: Bus, model: Path, tmp_path: Path, **settings: Any) -> AsyncIterator[httpx2.AsyncClient]:
    values: dict[str, Any] = {"history": f"sqlite:///{tmp_path}/history.db", "history_text": 100, **settings}
    async with gateway_client(bus, model, **values) as http:
        yield http


@pytest_asyncio.fixture
async def http(bus: Bus, fleet: ScriptedFleet, model_folder: Path, tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    async with serving(bus, model_folder, tmp_path) as http:
        yield http


async def request_of(http: httpx2.AsyncClient, request: str, head: dict[str, str] | None = None) -> dict[str, Any]:
    answer = await http.get(f"/v1/requests/{request}", headers=head)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def text_of(http: httpx2.AsyncClient, request: str, head: dict[str, str] | None = None) -> dict[str, Any]:
    """Return the text of a request once it is available."""
    found: list[dict[str, Any]] = []

    async def is_there() -> bool:
        found[:] = [(await request_of(http, request, head))["text"]]
        return found[0] is not None and found[0]["problem"] is None

    await wait_until(is_there, f"the text of {request} is in the history")
    return found[0]


async def is_copied(http: httpx2.AsyncClient, num: int, head: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Return the ended requests once there are `num` of them."""
    found: list[dict[str, Any]] = []

    async def are_there() -> bool:
        answer = await http.get("/v1/requests", params={"state": "ended"}, headers=head)
        found[:] = answer.json()["data"] if answer.status_code == 200 else []
        return answer.status_code == 200 and len(found) == num

    await wait_until(are_there, f"{num} are in the history")
    return found


async def test_prompt_and_output_are_kept_and_outlive_the_record(
    bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient
) -> None:
    done = (await http.post("/v1/completions", json={**BODY, "n": 2})).json()
    names = [done["id"], f"{done['id']}-1"]
    texts = [await text_of(http, name) for name in names]
    for text, choice in zip(texts, done["choices"], strict=True):
        assert text == {"prompt": BODY["prompt"], "output": choice["text"], "is_cut": False, "problem": None}
    for one in await is_copied(http, 2):
        await bus._redis.delete(bus.keys.req(one["id"]), bus.keys.tok(one["id"]))  # as after two minutes
    assert [await text_of(http, name) for name in names] == texts


async def test_a_chat_has_its_template_and_special_tokens(fleet: ScriptedFleet, http: httpx2.AsyncClient) -> None:
    done = (await http.post("/v1/chat/completions", json=CHAT)).json()
    assert (await text_of(http, done["id"]))["prompt"] == fleet.prompt()
    assert "<|im_start|>user\nthe fox<|im_end|>" in fleet.prompt()


async def test_what_is_too_long_is_cut_and_says_so(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, tmp_path: Path
) -> None:
    async with serving(bus, model_folder, tmp_path, history_text=3) as http:
        done = (await http.post("/v1/completions", json=BODY)).json()
        text = await text_of(http, done["id"])
    assert text["is_cut"]
    assert BODY["prompt"].endswith(text["prompt"])
    assert done["choices"][0]["text"].startswith(text["output"])
    assert 0 < len(text["prompt"]) < len(BODY["prompt"])
    assert 0 < len(text["output"]) < len(done["choices"][0]["text"])


async def test_tokens_of_many_characters_are_cut_too(
    bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient, model_folder: Path, tmp_path: Path
) -> None:
    database = Database(f"sqlite:///{tmp_path}/history.db")
    long = array("i", fleet.tokenizer.encode("dog").ids[:1] * (MAX_CHARACTERS + 9)).tobytes()
    entry = m.HistoryEntry("long-0", "long-0", "", "", "completed", "stop", "", "", 1, 0, 1, 0, 0, 0, now_ms())
    await is_copied(http, 0)
    raw = bus.archive.sealed(
        "public",
        "long-0",
        m.KeptText(long, long, "", "", tokenizer=load_model_files(Settings(model=str(model_folder))).tokenizer),
    )
    await database.write([(Past("public", Place(now_ms(), 0, "m"), entry), raw)])
    await database.close()
    shown = await text_of(http, "long-0")
    assert shown["is_cut"]
    assert len(shown["prompt"]) == len(shown["output"]) == MAX_CHARACTERS


async def test_nothing_is_kept_unless_it_is_asked_for(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, tmp_path: Path
) -> None:
    async with serving(bus, model_folder, tmp_path, history_text=0) as http:
        done = (await http.post("/v1/completions", json=BODY)).json()
        await is_copied(http, 1)
        request = await request_of(http, done["id"])
        assert (request["state"], request["text"]) == ("completed", None)
        assert not await bus._redis.hexists(bus.keys.req(request["id"]), "text")
        assert not await bus._redis.exists(bus.keys.body(request["id"]))
    database = Database(f"sqlite:///{tmp_path}/history.db")
    assert await database.text("public", request["id"]) is None
    await database.close()


async def test_texts_without_a_database_are_refused_at_start(bus: Bus, model_folder: Path) -> None:
    with pytest.raises(ExceptionGroup) as raised:
        async with running_gateway(bus, model_folder, history_text=9):
            pass
    assert raised.group_contains(BadRequest, match="--history-text needs --history")


async def test_a_job_has_it_until_it_is_deleted(
    bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient, tmp_path: Path
) -> None:
    job = (await http.post("/v1/completions", json={**BODY, "background": True})).json()
    done = (await http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=30"})).json()
    text = await text_of(http, job["id"])
    assert (text["prompt"], text["output"]) == (BODY["prompt"], done["result"]["choices"][0]["text"])
    [one] = await is_copied(http, 1)
    assert (await http.delete(f"/v1/jobs/{job['id']}")).status_code == 200
    assert (await request_of(http, one["id"]))["text"] is None, "from this moment on, whenever the database follows"
    database = Database(f"sqlite:///{tmp_path}/history.db")

    async def is_gone() -> bool:
        return await database.text("public", one["id"]) is None

    await wait_until(is_gone, "the database has no text")
    await database.close()


async def test_a_failed_request_has_what_came_before(fleet: ScriptedFleet, http: httpx2.AsyncClient) -> None:
    fleet.script = lambda submit, body: Script(text="the quick", error=Internal("the engine stumbled"))
    failed = await http.post("/v1/completions", json=BODY)
    assert failed.status_code == 500
    [request] = await is_copied(http, 1)
    text = await text_of(http, request["id"])
    assert (text["prompt"], text["is_cut"]) == (BODY["prompt"], False)


async def test_a_batch_leaves_nothing(bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient) -> None:
    line = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "base", "prompt": "fox"}}'
    file = (await http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", line)})).json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = (await http.post("/v1/batches", json=asked)).json()

    async def is_done() -> bool:
        return (await http.get(f"/v1/batches/{batch['id']}")).json()["status"] == "completed"

    await wait_until(is_done, "the batch is done")
    assert len(fleet.seen) == 1
    assert not await bus._redis.exists(bus.keys.history_deleted)
    await http.post("/v1/completions", json=BODY)
    assert len(await is_copied(http, 1)) == 1


async def test_the_command_shows_it_without_control_characters(
    fleet: ScriptedFleet, http: httpx2.AsyncClient, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet.script = lambda submit, body: Script(text="a\x1b[2Jb\nc")
    done = (await http.post("/v1/completions", json=BODY)).json()
    await text_of(http, done["id"])
    assert await asyncio.to_thread(main, ["explain", done["id"], "--url", str(http.base_url)]) == 0
    shown = capsys.readouterr().out
    assert f"prompt:\n{BODY['prompt']}\n" in shown
    assert "output:\na\\x1b[2Jb\nc" in shown
    assert "\x1b[2J" not in shown


def other_tokenizer(folder: Path) -> Path:
    """Create a model folder whose tokens have the same ids and different texts."""
    path = make_model_folder(folder) / "tokenizer.json"
    file = json.loads(path.read_text())
    vocab = file["model"]["vocab"]
    letters = sorted((name for name in vocab if len(name) == 1), key=vocab.get)
    file["model"]["vocab"] = vocab | dict(zip(letters, [vocab[name] for name in letters[::-1]], strict=True))
    path.write_text(json.dumps(file))
    return folder


async def test_no_text_is_shown_by_another_bases_tokenizer(bus: Bus, fleet: ScriptedFleet, tmp_path: Path) -> None:
    one, other = make_model_folder(tmp_path / "one"), other_tokenizer(tmp_path / "other")
    await set_bases(bus, base("one"), base("other"), one=1, other=1)
    calls = [{**BODY, "model": name} for name in ("one", "other")]
    async with serving(bus, one, tmp_path, more_models=str(other)) as http:
        done = [(await http.post("/v1/completions", json=call)).json()["id"] for call in calls]
        assert [(await text_of(http, name))["prompt"] for name in done] == [BODY["prompt"]] * 2
    await bus._redis.delete(bus.keys.bases)
    async with serving(bus, one, tmp_path, served_name="renamed") as http:
        kept, gone = [(await request_of(http, name))["text"] for name in done]
        assert (kept["prompt"], kept["problem"]) == (BODY["prompt"], None), "the tokenizer is the same"
        problem = "its tokens are those of the base `other`, whose tokenizer this gateway does not have"
        assert gone == {"prompt": None, "output": None, "is_cut": False, "problem": problem}
    async with serving(bus, other, tmp_path, served_name="one") as http:
        gone = (await request_of(http, done[0]))["text"]
        assert gone["prompt"] is None, "the base has the same name and another tokenizer"
        assert "of the base `one`, whose tokenizer" in gone["problem"]
