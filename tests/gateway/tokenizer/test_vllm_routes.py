"""vLLM's tokenizer and server routes; `/tokenize` remains LoRAX's if the body has `inputs`."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest
from helpers.scripted_fleet import MAX_MODEL_LEN, TEMPLATE, Script, ScriptedFleet, gateway_client
from helpers.waiting import wait_until
from tokenizers import Tokenizer

from gateway.text.counted import MAX_CHARACTERS_PER_TOKEN, MIN_TOKENIZED
from gateway.tokenizer.tokenizer_routes import TOKENIZER_CLASS
from protocol.queue.bus import Bus

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the dog é"}]
BEGUN = [*MESSAGES, {"role": "assistant", "content": "It sle"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
ADAPTER = "ab" * 32


async def test_a_prompt_is_tokenized_as_the_tokenizer_does(http: httpx2.AsyncClient, tokenizer: Tokenizer) -> None:
    text = "the <|im_start|> dog é"
    expected = tokenizer.encode(text)
    answer = await http.post("/tokenize", json={"model": "base", "prompt": text})
    assert answer.json() == {
        "count": len(expected.ids), "max_model_len": MAX_MODEL_LEN, "tokens": expected.ids, "token_strs": None,
    }  # fmt: skip
    shown = (await http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    assert shown["token_strs"] == expected.tokens
    empty = (await http.post("/tokenize", json={"prompt": ""})).json()
    assert (empty["count"], empty["tokens"]) == (0, [])


async def test_the_context_of_an_adapter_is_what_its_virtual_tokens_leave(
    http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    """A client can use all of the reported remaining context."""
    await fleet.add_adapter("soft", "d-soft", num_virtual=100)
    for asked in ({"prompt": "hi"}, {"messages": MESSAGES}):
        answer = (await http.post("/tokenize", json={"model": "soft", **asked})).json()
        assert answer["max_model_len"] == MAX_MODEL_LEN - 100
    told = (await http.post("/tokenize", json={"model": "soft", "prompt": "hi"})).json()
    body = {"model": "soft", "prompt": "hi", "max_tokens": told["max_model_len"] - told["count"]}
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    more = await http.post("/v1/completions", json={**body, "max_tokens": body["max_tokens"] + 1})
    assert more.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": MESSAGES},
        {"messages": MESSAGES, "add_generation_prompt": False},
        {"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": False},
        {"messages": MESSAGES, "tools": [TOOL]},
        {"messages": MESSAGES, "chat_template_kwargs": {"x": 1}},
    ],
)
async def test_messages_have_the_tokens_that_a_chat_computes(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, fields: dict[str, Any]
) -> None:
    fleet.max_model_len = 1024
    await fleet.register()
    async with gateway_client(bus, model_folder) as http:
        answer = (await http.post("/tokenize", json={**fields, "return_token_strs": True})).json()
        chat = await http.post("/v1/chat/completions", json={"model": "base", "max_tokens": 1, **fields})
    assert chat.status_code == 200, chat.text
    [(_, body)] = fleet.seen
    assert answer["tokens"] == list(memoryview(body.prompt).cast("i"))
    assert answer["count"] == chat.json()["usage"]["prompt_tokens"]
    assert answer["token_strs"] == [fleet.tokenizer.id_to_token(id_) for id_ in answer["tokens"]]


async def test_detokenize_takes_what_tokenize_gave(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    await fleet.add_adapter("fox", ADAPTER)
    text = "<|im_start|>user\nthe dog 😀<|im_end|>"
    for model in ("base", "fox"):
        tokens = (await http.post("/tokenize", json={"model": model, "prompt": text})).json()["tokens"]
        answer = await http.post("/detokenize", json={"model": model, "tokens": tokens})
        assert answer.json() == {"prompt": text}
    assert (await http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_the_body_says_whose_route_it_is(http: httpx2.AsyncClient, tokenizer: Tokenizer) -> None:
    answer = (await http.post("/tokenize", json={"inputs": "the dog"})).json()
    assert [token["id"] for token in answer] == tokenizer.encode("the dog").ids
    assert answer[0].keys() == {"id", "text", "start", "stop"}
    for body, status, words in (
        ({"prompt": "x", "adapter_id": "fox"}, 400, "adapter_id has no effect with prompt"),
        ({"prompt": "x", "messages": MESSAGES}, 400, "messages has no effect with prompt"),
        (
            {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
            400,
            "cannot be used together",
        ),
        ({"messages": []}, 400, "messages"),
        ({"prompt": "x", "add_generation_prompt": True}, 400, "add_generation_prompt"),
        ({"prompt": "x", "promt": "y"}, 400, "Did you mean `prompt`"),
        ({"prompt": 5}, 400, "prompt: it must be a string"),
        ({"prompt": "x", "model": "nobody"}, 404, "The model `nobody` does not exist"),
        ({"messages": MESSAGES, "chat_template": "{{ 1 }}"}, 400, "chat_template"),
    ):
        refused = await http.post("/tokenize", json=body)
        assert refused.status_code == status, refused.text
        assert words in refused.json()["error"]["message"]
    for body, words in (({}, "inputs: it is missing"), ({"inputs": "x", "model": "base"}, "model has no effect")):
        native = await http.post("/tokenize", json=body)
        assert (native.status_code, native.json()["error_type"]) == (422, "validation")
        assert words in native.json()["error"]


async def test_too_many_tokens_are_refused(http: httpx2.AsyncClient) -> None:
    long = "the dog " * (MIN_TOKENIZED * MAX_CHARACTERS_PER_TOKEN // 8 + 2)
    for body in ({"prompt": long}, {"prompt": "é" * (MIN_TOKENIZED // 2 + 1)},
                 {"messages": [{"role": "user", "content": long}]}):  # fmt: skip
        answer = await http.post("/tokenize", json=body)
        assert answer.status_code == 400, answer.text[:300]
        assert f"must have at most {MIN_TOKENIZED} tokens" in answer.json()["error"]["message"]
    answer = await http.post("/detokenize", json={"tokens": [5] * (MIN_TOKENIZED + 1)})
    assert f"at most {MIN_TOKENIZED} tokens" in answer.json()["error"]["message"]


@pytest.mark.parametrize("tokens", [[-1], [1 << 30], [1 << 80], ["x"], "text", None])
async def test_detokenize_refuses_what_is_no_token(http: httpx2.AsyncClient, tokens: Any) -> None:
    answer = await http.post("/detokenize", content=orjson.dumps({"tokens": tokens}) if tokens != [1 << 80] else
                             b'{"tokens": [%d]}' % (1 << 80), headers={"content-type": "application/json"})  # fmt: skip
    assert answer.status_code == 400, answer.text
    assert "tokens" in answer.json()["error"]["message"]


async def test_tokenizer_info_is_the_model_s_own_config(http: httpx2.AsyncClient) -> None:
    info = (await http.get("/tokenizer_info")).json()
    assert info == {"eos_token": "<|im_end|>", "tokenizer_class": TOKENIZER_CLASS, "chat_template": TEMPLATE}


async def test_version_and_ping(http: httpx2.AsyncClient) -> None:
    assert (await http.get("/version")).json() == {"version": version("lorafleet")}
    for method in ("GET", "POST", "HEAD"):
        assert (await http.request(method, "/ping")).status_code == 200


async def test_ping_needs_no_key(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    async with gateway_client(bus, model_folder, api_keys=True) as http:
        assert (await http.post("/ping")).status_code == 200
        assert (await http.get("/load")).status_code == 401


async def test_load_counts_the_calls_that_are_being_answered(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(hold_after=1)
    assert (await http.get("/load")).json() == {"server_load": 0}

    async def load() -> int:
        return (await http.get("/load")).json()["server_load"]

    body = {"model": "base", "prompt": "x"}
    calls = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(3)]

    async def is_three() -> bool:
        return await load() == 3

    await wait_until(is_three, "three calls are being answered")
    fleet.go.set()
    for call in calls:
        assert (await call).status_code == 200

    async def is_none() -> bool:
        return await load() == 0

    await wait_until(is_none, "no call is being answered")
