"""Adapters with their own tokens and chat template are used with these, which can do no harm."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
import pytest_asyncio
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client
from helpers.waiting import wait_until
from tokenizers import AddedToken, Tokenizer

from adapter_store.http import BlobServer
from peft_adapters.texts.files import TEXTS_FIELD, TEXTS_FILE, OwnTexts
from peft_adapters.texts.tokenizer_json import MAX_ADDED, MAX_ADDED_BYTES, OwnTokenizer
from protocol.queue.bus import Bus
from protocol.wire import messages as m

QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
OWN, BROKEN, GONE = (f"{n}{n}" * 32 for n in "abc")


class Store:
    """Serves texts over the store's own HTTP API."""

    def __init__(self, root: Path, fleet: ScriptedFleet) -> None:
        self.root = root
        self.fleet = fleet
        self.num_asked = 0

    async def add(self, name: str, digest: str, texts: OwnTexts | bytes, vocab_size: int = 0) -> None:
        raw = texts if isinstance(texts, bytes) else msgspec.json.encode(texts)  # unchecked
        (self.root / digest).mkdir()
        (self.root / digest / TEXTS_FILE).write_bytes(raw)
        await self.fleet.add_adapter(name, digest)
        record = m.AdapterRecord(
            digest=digest, rank=8, num_bytes=10, config={TEXTS_FIELD: hashlib.sha256(raw).hexdigest()}, modules=[],
            source=f"local:{name}", created_ms=1, vocab_size=vocab_size,
        )  # fmt: skip
        await self.fleet.bus.set(self.fleet.bus.keys.adapter(digest), record)

    async def locate(self, digest: str) -> Path | None:
        self.num_asked += 1
        folder = self.root / digest
        return folder if folder.exists() else None


@pytest.fixture
def own_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    own = Tokenizer.from_str(tokenizer.to_str())
    own.add_special_tokens([AddedToken("<|end|>", special=True)])
    own.add_tokens(["zebra"])
    return own


@pytest_asyncio.fixture
async def store(fleet: ScriptedFleet, bus: Bus, tmp_path: Path, own_tokenizer: Tokenizer) -> AsyncIterator[Store]:
    async def drop(_: str) -> int:
        raise AssertionError

    store = Store(tmp_path, fleet)
    server = BlobServer(store.locate, drop, dict)
    port = await server.start("127.0.0.1", 0)
    await bus.members.beat(
        bus.keys.store_beat("s"), bus.keys.stores, "s", f"http://127.0.0.1:{port}".encode(), 3_600_000
    )
    texts = OwnTexts(
        template="{{ messages[0].content }}<|end|>zebra{{ eos_token }}{{ add_generation_prompt }}",
        special_tokens={"eos_token": "<|end|>"},
        tokenizer=OwnTokenizer.read(own_tokenizer.to_str()),
    )
    await store.add("own", OWN, texts, own_tokenizer.get_vocab_size())
    yield store
    await server.close()


def prompt_of(body: m.Body) -> list[int]:
    return list(memoryview(body.prompt).cast("i"))


async def test_its_template_and_tokenizer_make_the_prompt(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, store: Store, own_tokenizer: Tokenizer
) -> None:
    own_ids = own_tokenizer.encode("hi<|end|>zebra<|end|>True", add_special_tokens=False).ids
    end, word = own_tokenizer.token_to_id("<|end|>"), own_tokenizer.token_to_id("zebra")
    assert {end, word} <= set(own_ids)
    answer = await http.post("/v1/chat/completions", json={"model": ["own", "base"], **QUESTION})
    assert answer.status_code == 200, answer.text
    by_digest = {submit.digest: body for submit, body in fleet.seen}
    assert prompt_of(by_digest[OWN]) == own_ids
    assert fleet.tokenizer.decode(prompt_of(by_digest[""]), skip_special_tokens=False).startswith("<|im_start|>user")
    assert by_digest[OWN].stop_token_ids == [end]  # unknown to the worker
    assert by_digest[""].stop_token_ids == []
    body = {"model": "own", "prompt": [word, 5], "max_tokens": 3, "ignore_eos": True, "logit_bias": {str(word): 1}}
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    assert fleet.seen[-1][1].stop_token_ids == []
    tokens = (await http.post("/tokenize", json={"inputs": "zebra", "adapter_id": "own"})).json()
    assert [token["id"] for token in tokens] == [word]
    beyond = await http.post("/v1/completions", json={**body, "model": "base"})
    assert (beyond.status_code, "is out of vocabulary" in beyond.text) == (400, True)
    await fleet.bus._redis.delete(fleet.bus.keys.adapter(OWN))
    assert (await http.post("/v1/completions", json=body)).status_code == 200, "what it brings is known by now"
    assert store.num_asked == 1


async def test_its_tokenizer_makes_tokens_of_bad_words(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, store: Store, own_tokenizer: Tokenizer
) -> None:
    word = own_tokenizer.token_to_id("zebra")
    body = {"model": ["own", "base"], "prompt": "hi", "bad_words": ["zebra"], "return_token_ids": True}
    answer = await http.post("/v1/completions", json={**body, "allowed_token_ids": [5, 6]})
    assert answer.status_code == 200, answer.text
    by_digest = {submit.digest: body.sampling.bad_words for submit, body in fleet.seen}
    assert by_digest[OWN] == [[word]]
    assert by_digest[""][0] == fleet.tokenizer.encode("zebra", add_special_tokens=False).ids
    beyond = await http.post("/v1/completions", json={**body, "allowed_token_ids": [word]})
    assert (beyond.status_code, beyond.json()["error"]["param"]) == (400, "allowed_token_ids")
    alone = await http.post("/v1/completions", json={**body, "model": "own", "allowed_token_ids": [word]})
    assert alone.status_code == 200


async def test_its_tokenizer_makes_the_answer(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, store: Store, own_tokenizer: Tokenizer
) -> None:
    fleet.tokenizer = own_tokenizer
    fleet.script = lambda submit, body: Script(text="a zebra<|end|>unseen", eos=False)
    answers: list[Any] = []
    body = {"model": "own", "prompt": "zebra", "max_tokens": 60, "logprobs": 0, "n": 2}
    answers.append((await http.post("/v1/completions", json=body)).json())
    job = (await http.post("/v1/completions", json={**body, "background": True})).json()
    answers.append((await http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=30"})).json()["result"])
    for _ in range(2):
        answers.append((await http.post("/v1/completions", json=body, headers={"idempotency-key": "k"})).json())
    for answer in answers:
        for choice in answer["choices"]:
            assert (choice["text"], choice["finish_reason"]) == ("a zebra", "stop")
            assert choice["logprobs"]["tokens"][-2:] == ["zebra", "<|end|>"]
    echo = {**body, "logprobs": None, "echo": True, "prompt": [own_tokenizer.token_to_id("zebra")]}
    assert (await http.post("/v1/completions", json=echo)).json()["choices"][0]["text"] == "zebraa zebra"


async def test_a_broken_template_is_its_own_fault(http: httpx2.AsyncClient, store: Store) -> None:
    await store.add("broken", BROKEN, OwnTexts("{% if %}"))
    answer = await http.post("/v1/chat/completions", json={"model": "broken", **QUESTION})
    assert (answer.status_code, "template is broken" in answer.text) == (400, True)
    # Its tokenizer is the base's, which works without a template.
    assert (await http.post("/v1/completions", json={"model": "broken", "prompt": "hi"})).status_code == 200


async def test_endless_templates_of_one_adapter_hold_up_no_other(
    bus: Bus, fleet: ScriptedFleet, store: Store, model_folder: Path
) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    await store.add("endless", BROKEN, OwnTexts(endless))
    async with (
        gateway_client(bus, model_folder, template_timeout_s=120.0) as http,
        asyncio.TaskGroup() as group,
    ):
        body = {"model": "endless", **QUESTION}
        calls = [group.create_task(http.post("/v1/chat/completions", json=body)) for _ in range(4)]
        await wait_until(lambda: store.num_asked, "the template has been fetched")
        answer = await http.post("/v1/chat/completions", json={"model": "own", **QUESTION})
        assert answer.status_code == 200, answer.text
        assert sum(call.done() for call in calls) < len(calls)
        for call in calls:
            call.cancel()


def added(num: int, size: int = 0) -> dict[str, Any]:
    tokens = [{"id": 300 + i, "content": f"{i:{size}}", "special": False} for i in range(num)]
    return {"tokenizer": {"parts": {}, "added": tokens}}


BOMBS: dict[str, tuple[dict[str, Any], str]] = {
    "of an older store": ({"tokenizer.json": "{}"}, "texts.json cannot be read"),
    "many tokens": (added(MAX_ADDED + 1), "texts.json cannot be read"),
    "much of them": (added(MAX_ADDED_BYTES // 1000 + 1, 1000), f"the limit is {MAX_ADDED_BYTES}"),
    "a token twice": ({"tokenizer": {"parts": {}, "added": [*added(1)["tokenizer"]["added"]] * 2}}, "a token twice"),
    "a long token": (added(1, 1025), "texts.json cannot be read"),
    "another id": ({"tokenizer": {"parts": {}, "added": [{"id": 9, "content": "x y", "special": True}]}}, "another id"),
    "a large file": ({"template": "x" * (8 << 20)}, "texts.json has 83886"),
}


@pytest.mark.parametrize(("texts", "said"), BOMBS.values(), ids=BOMBS)
async def test_texts_that_no_store_would_let_in_are_refused(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, store: Store, texts: dict[str, Any], said: str
) -> None:
    """Texts from a store are checked again, as an older store may have accepted them."""
    await store.add("bomb", BROKEN, json.dumps(texts).encode())
    for path, body, status in (
        ("/v1/completions", {"model": "bomb", "prompt": "aaaaaa"}, 422),
        ("/tokenize", {"inputs": "aaaaaa", "adapter_id": "bomb"}, 424),
    ):
        answer = await http.post(path, json=body)
        assert (answer.status_code, said in answer.text) == (status, True), answer.text
    assert fleet.seen == []


async def test_a_template_that_makes_much_of_little_is_refused(http: httpx2.AsyncClient, store: Store) -> None:
    await store.add("long", BROKEN, OwnTexts("{{ 'a ' * 3000000 }}"))
    answer = await http.post("/v1/chat/completions", json={"model": "long", **QUESTION})
    assert (answer.status_code, "makes 6000000 characters" in answer.text) == (400, True)


async def test_what_cannot_be_used_or_had_is_said(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, store: Store, bus: Bus
) -> None:
    await store.add("broken", BROKEN, b'{"template": 3}')
    answer = await http.post("/v1/completions", json={"model": "broken", "prompt": "hi"})
    assert (answer.status_code, "texts.json cannot be read" in answer.text) == (422, True)
    await store.add("gone", GONE, OwnTexts("x"))
    (store.root / GONE / TEXTS_FILE).unlink()
    answer = await http.post("/v1/completions", json={"model": "gone", "prompt": "hi"})
    assert (answer.status_code, "no adapter store has" in answer.text) == (404, True)
    await bus._redis.zrem(bus.keys.stores, "s")
    answer = await http.post("/v1/completions", json={"model": "gone", "prompt": "hi"})
    assert (answer.status_code, "no adapter store returned" in answer.text) == (503, True)
    assert fleet.seen == []
