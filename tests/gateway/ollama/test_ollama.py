"""Ollama's API: its bodies and answers, its defaults, and errors that name the field."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from helpers.scripted_fleet import (
    BASE_NAME,
    MAX_MODEL_LEN,
    TEMPLATE,
    Script,
    ScriptedFleet,
    gateway_client,
    make_model_folder,
)

from gateway.grammars.schemas import JSON_STYLE
from gateway.ollama.ollama_parse import openai_messages, plain_name, tagged_name
from gateway.ollama.ollama_routes import VERSION
from protocol.queue.bus import Bus
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest

TEXT = Script().text
ADAPTER = "ab" * 32
MESSAGES = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": "base", "messages": MESSAGES}
GENERATE: dict[str, Any] = {"model": "base", "prompt": "hi"}
ROUTES = {"/api/chat": CHAT, "/api/generate": GENERATE}
WHOLE = {"stream": False}
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {
    "type": "object", "properties": {"p": {"type": "string"}}}}}  # fmt: skip


def text_of(made: dict[str, Any]) -> str:
    return made["message"]["content"] if "message" in made else made["response"]


def lines(answer: httpx2.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.text.endswith("\n")
    return [json.loads(line) for line in answer.text.splitlines()]


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("path", ROUTES)
async def test_a_repeated_key_finds_the_same_answer(http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str) -> None:
    headers = {"idempotency-key": "k"}
    for number, body in enumerate((ROUTES[path], {**ROUTES[path], **WHOLE})):
        headers["idempotency-key"] += str(number)
        answers = [await http.post(path, json=body, headers=headers) for _ in range(2)]
        first, second = ("".join(text_of(json.loads(line)) for line in one.text.splitlines()) for one in answers)
        assert first == second == TEXT
    assert len(fleet.seen) == 2
    assert (await http.post(path, json={**ROUTES[path], "model": "x"}, headers=headers)).status_code == 422


@pytest.mark.parametrize("path", ROUTES)
async def test_an_answer_streams_unless_it_is_told_not_to(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str
) -> None:
    streamed = lines(await http.post(path, json=ROUTES[path]))
    *parts, last = streamed
    assert "".join(map(text_of, parts)) == TEXT
    shown = "message" if path == "/api/chat" else "response"
    assert all(part.keys() == {"model", "created_at", shown, "done"} for part in parts)
    assert not any(part["done"] for part in parts)
    assert (last["done"], last["done_reason"], text_of(last)) == (True, "stop", "")
    answer = await http.post(path, json={**ROUTES[path], **WHOLE})
    whole = answer.json()
    assert answer.headers["content-type"] == "application/json"
    assert (text_of(whole), whole["done"], whole["done_reason"]) == (TEXT, True, "stop")
    for made in (last, whole):
        assert made["model"] == "base"
        assert datetime.fromisoformat(made["created_at"]).tzinfo is not None
        assert made["prompt_eval_count"] == len(fleet.seen[0][1].prompt) // 4
        assert made["eval_count"] == len(fleet.tokenizer.encode(TEXT).ids) + 1
        assert all(isinstance(made[name], int) and made[name] >= 0 for name in DURATIONS)
        assert sum(made[name] for name in DURATIONS[1:]) <= made["total_duration"] + 3_000_000  # rounded to whole ms


async def test_the_prompt_is_what_openai_s_route_makes_of_it(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    messages = [{"role": "system", "content": "be brief"}, *MESSAGES]
    for path, body in (
        ("/v1/chat/completions", {"model": "base", "messages": messages}),
        ("/api/chat", {"model": "base", "messages": messages}),
        ("/api/generate", {"model": "base", "system": "be brief", "prompt": "hi"}),
    ):
        assert (await http.post(path, json=body)).status_code == 200
    prompts = [body.prompt for _, body in fleet.seen]
    assert prompts == [prompts[0]] * 3
    await http.post("/api/generate", json={**GENERATE, "raw": True})
    assert list(memoryview(fleet.seen[-1][1].prompt).cast("i")) == fleet.tokenizer.encode("hi").ids


async def test_a_last_message_of_the_assistant_goes_on(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Well,"}]
    await http.post("/api/chat", json={**CHAT, "messages": messages})
    assert fleet.prompt().endswith("<|im_start|>assistant\nWell,")


async def test_defaults_and_options_are_ollama_s(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    await http.post("/api/chat", json=CHAT)
    options = {
        "temperature": 0.5, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "typical_p": 0.9, "seed": 3.0, "num_predict": 9,
        "stop": "x", "repeat_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.2, "repeat_last_n": -1,
        "num_keep": 4, "num_gpu": 99, "mirostat": 0, "penalize_newline": True, "low_vram": None, "num_ctx": 100000,
    }  # fmt: skip
    await http.post("/api/generate", json={**GENERATE, "options": options, "keep_alive": "5m"})
    (_, plain), (submit, given) = fleet.seen
    seed = plain.sampling.seed
    assert plain.sampling == m.Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=seed)
    assert given.sampling == m.Sampling(
        temperature=0.5, top_p=0.5, top_k=7, min_p=0.1, typical_p=0.9, seed=3, repetition_penalty=1.2,
        presence_penalty=0.1, frequency_penalty=0.2,
    )  # fmt: skip
    assert (submit.max_new_tokens, given.stop) == (9, ["x"])
    await http.post("/api/chat", json={**CHAT, "options": {"seed": -1, "num_predict": -1}})
    await http.post("/api/chat", json={**CHAT, "options": {"seed": -1, "num_predict": 1 << 20}})
    room = MAX_MODEL_LEN - len(plain.prompt) // 4
    assert [sub.max_new_tokens for sub, _ in fleet.seen[2:]] == [room, room]
    assert len({body.sampling.seed for _, body in fleet.seen[2:]}) == 2


async def test_num_ctx_bounds_prompt_and_answer(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    num = len(fleet.tokenizer.encode("hi").ids)
    body = {**GENERATE, "raw": True, **WHOLE}
    answer = (await http.post("/api/generate", json={**body, "options": {"num_ctx": num + 2}})).json()
    assert (answer["done_reason"], answer["eval_count"]) == ("length", 2)
    refused = await http.post("/api/generate", json={**body, "options": {"num_ctx": num}})
    assert refused.status_code == 400
    assert f"the prompt has {num} tokens; the context has {num}" in refused.json()["error"]


async def test_formats_become_grammars(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    fleet.script = lambda submit, body: Script('{"a": 1}', eos=False)
    for path, body in ROUTES.items():
        for form in ("json", schema):
            assert text_of((await http.post(path, json={**body, **WHOLE, "format": form})).json()) == '{"a": 1}'
        await http.post(path, json={**body, "format": ""})
    grammars = [json.loads(body.grammar)["grammars"][0]["json_schema"] if body.grammar else None
                for _, body in fleet.seen]  # fmt: skip
    assert [grammar is None for grammar in grammars] == [False, False, True] * 2
    assert grammars[1] == {**schema, "additionalProperties": False, "x-guidance": JSON_STYLE}
    assert (grammars[0] or {})["type"] == "object"
    for form, words in (("xml", 'format must be "json" or a JSON schema'), ({"type": "object", "not": {}}, "not")):
        refused = await http.post("/api/chat", json={**CHAT, "format": form})
        assert refused.status_code == 400
        assert words in refused.json()["error"]


async def test_logprobs_are_of_every_token(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    ids = [*fleet.tokenizer.encode(TEXT).ids, 1]
    body = {**CHAT, "logprobs": True, "top_logprobs": 2}
    whole = (await http.post("/api/chat", json={**body, **WHOLE})).json()["logprobs"]
    streamed = [entry for part in lines(await http.post("/api/chat", json=body)) for entry in part.get("logprobs", ())]
    assert streamed == whole
    assert len(whole) == len(ids)
    shown = b"".join(bytes(entry["bytes"]) for entry in whole[:-1])
    assert shown.decode() == TEXT
    assert all(entry["logprob"] == -0.5 and len(entry["top_logprobs"]) == 2 for entry in whole)
    assert "top_logprobs" not in (await http.post("/api/chat", json={**CHAT, **WHOLE, "logprobs": True})).json()[
        "logprobs"][0]  # fmt: skip


# ---------------------------------------------------------------- tools and thinking


CALLS = "<think>\nHm.\n</think>\n\nLet me see.\n" + "\n".join(
    f'<tool_call>\n{{"name": "add", "arguments": {{"p": "{value}"}}}}\n</tool_call>' for value in ("ö", "😀")
)


async def test_tool_calls_come_whole_and_thinking_apart(qwen: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(CALLS)
    body = {**CHAT, "tools": [TOOL], "think": True}
    whole = (await qwen.post("/api/chat", json={**body, **WHOLE})).json()
    message = whole["message"]
    assert message["content"] == "Let me see."
    assert message["thinking"].strip() == "Hm."
    functions = [call["function"] for call in message["tool_calls"]]
    assert functions == [{"index": i, "name": "add", "arguments": {"p": p}} for i, p in enumerate(("ö", "😀"))]
    assert whole["done_reason"] == "stop"
    *parts, last = lines(await qwen.post("/api/chat", json=body))
    assert "".join(part["message"]["content"] for part in parts) == message["content"]
    assert "".join(part["message"].get("thinking", "") for part in parts) == message["thinking"]
    streamed = [call["function"] for part in parts for call in part["message"].get("tool_calls", ())]
    assert streamed == functions
    assert last["done_reason"] == "stop"

    fleet.script = lambda submit, body: Script(CALLS[:-20], eos=False, finish="length")
    cut = (await qwen.post("/api/chat", json={**body, **WHOLE})).json()["message"]
    assert len(cut["tool_calls"]) == 1
    assert cut["content"].startswith("Let me see.add(")  # the cut call is shown as text


@pytest.mark.parametrize(("think", "shown"), [(True, True), (False, False), ("high", True), (None, None)])
async def test_think_reaches_the_template(
    bus: Bus, fleet: ScriptedFleet, tmp_path: Path, think: Any, shown: bool | None
) -> None:
    wants = "{{ [enable_thinking | default(none), reasoning_effort | default(none)] | tojson }}{# </think> #}"
    folder = make_model_folder(tmp_path / "model", TEMPLATE + wants)
    async with gateway_client(bus, folder) as http:
        answer = await http.post("/api/chat", json={**CHAT, "think": think})
        assert answer.status_code == 200, answer.text
    prompt = fleet.prompt()
    if think is not None:
        assert f"[{json.dumps(shown)}," in prompt
    assert ('"high"' in prompt) == (think == "high")


async def test_thinking_is_refused_of_a_model_that_does_not(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    for path, body in ROUTES.items():
        refused = await http.post(path, json={**body, "model": "base:latest", "think": True})
        assert (refused.status_code, refused.json()) == (400, {"error": '"base:latest" does not support thinking'})
        assert (await http.post(path, json={**body, "think": False})).status_code == 200


def test_messages_get_the_ids_that_openai_s_have() -> None:
    call = {"function": {"name": "add", "arguments": {"p": 1}}}
    other = {"function": {"name": "sub", "arguments": {}}}
    found = openai_messages([
        {"role": "user", "content": "x", "images": None},
        {"role": "assistant", "tool_calls": [call, other]},
        {"role": "tool", "content": "1", "tool_name": "sub"},
        {"role": "tool", "content": "2"},
    ])  # fmt: skip
    first, second = found[1]["tool_calls"]
    assert (first["type"], first["function"]) == ("function", call["function"])
    assert first["id"] != second["id"]
    assert found[2] == {"role": "tool", "content": "1", "name": "sub", "tool_call_id": second["id"]}
    assert found[3] == {"role": "tool", "content": "2", "tool_call_id": first["id"]}
    with pytest.raises(BadRequest, match=r"messages\[0\].images"):
        openai_messages([{"role": "user", "content": "x", "images": ["AAAA"]}])


@pytest.mark.parametrize("wrong", [1, None, [], {"role": "assistant", "tool_calls": [1]}, {"role": "tool"},
                                   {"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}])  # fmt: skip
async def test_malformed_messages_are_the_client_s_mistake(http: httpx2.AsyncClient, wrong: Any) -> None:
    answer = await http.post("/api/chat", json={**CHAT, "messages": [wrong]})
    assert answer.status_code == 400
    assert isinstance(answer.json()["error"], str)


# ---------------------------------------------------------------- errors


async def test_errors_have_ollama_s_shape_and_status(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    for path, body, status, words in (
        ("/api/chat", {**CHAT, "model": "nobody"}, 404, "The model `nobody` does not exist"),
        ("/api/show", {"model": "nobody"}, 404, "does not exist"),
        ("/api/show", {}, 400, "model: it is missing"),
        ("/api/chat", {"messages": MESSAGES}, 400, "model: it is missing"),
        ("/api/chat", {**CHAT, "model": ""}, 400, "model"),
        ("/api/chat", {**CHAT, "top_logprobs": 1}, 400, "top_logprobs needs logprobs"),
        ("/api/chat", {**CHAT, "logprobs": True, "top_logprobs": 999}, 400, "the limit is 20"),
        ("/api/generate", {**GENERATE, "raw": True, "system": "x"}, 400, "system has no effect beside raw"),
        ("/api/generate", {**GENERATE, "options": {"temperature": -1}}, 400, "options"),
        ("/api/generate", {**GENERATE, "options": {"temprature": 1}}, 400, "Did you mean `temperature`"),
        ("/api/generate", {**GENERATE, "options": {"repeat_last_n": 5000}}, 400, "4096, not 5000"),
        ("/api/generate", {**GENERATE, "options": {"mirostat": 2}}, 400, "`options.mirostat`"),
        ("/api/generate", {**GENERATE, "template": "{{ .Prompt }}"}, 400, "`template` is code"),
        ("/api/generate", {**GENERATE, "suffix": "x"}, 400, "`suffix`"),
        ("/api/generate", {**GENERATE, "images": ["AAAA"]}, 400, "`images`"),
        ("/api/generate", {**GENERATE, "context": [1]}, 400, "`context` is not kept"),
        ("/api/embed", {"model": "base", "input": "x"}, 400, "embeddings need an encoder"),
        ("/api/pull", {"model": "x"}, 404, "POST /v1/adapters"),
        ("/api/embeddings", {"model": "x"}, 404, "/api/embed"),
        ("/api/tag", {}, 404, "/api/tags"),
    ):
        answer = await http.post(path, json=body)
        assert answer.status_code == status, (path, body, answer.text)
        assert answer.json().keys() == {"error"}
        assert words in answer.json()["error"]
    assert (await http.request("DELETE", "/api/delete")).status_code == 404
    assert (await http.get("/api/chat")).json() == {"error": "GET is not allowed on /api/chat: only POST"}
    assert fleet.seen == []


async def test_a_body_needs_no_content_type(http: httpx2.AsyncClient) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}  # the default of curl, used in Ollama's documentation
    for path, body in (("/api/chat", CHAT), ("/api/show", {"model": "base"})):
        answer = await http.post(path, content=json.dumps(body).encode(), headers=form)
        assert answer.status_code == 200, answer.text
    broken = await http.post("/api/chat", content=b"{", headers=form)
    assert (broken.status_code, "not valid JSON" in broken.json()["error"]) == (400, True)


# ---------------------------------------------------------------- models


async def test_models_are_the_base_and_its_adapters(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    await fleet.add_adapter("fox", ADAPTER)
    await fleet.add_adapter("far", "cd" * 32)
    await fleet.add_adapter("lost", state="failed", reason="gone")
    fleet.resident = [ADAPTER]
    await fleet.beat()
    tags = (await http.get("/api/tags")).json()["models"]
    assert [model["name"] for model in tags] == ["tiny/base:latest", "far:latest", "fox:latest"]
    assert tags[2] == {
        "name": "fox:latest", "model": "fox:latest", "modified_at": "1970-01-01T00:00:01.000000Z", "size": 10,
        "digest": ADAPTER, "details": {
            "parent_model": "tiny/base:latest", "format": "safetensors", "family": "tiny", "families": ["tiny"],
            "parameter_size": "", "quantization_level": "",
        },
    }  # fmt: skip
    running = (await http.get("/api/ps")).json()["models"]
    assert [model["name"] for model in running] == ["tiny/base:latest", "fox:latest"]
    assert all(model["context_length"] == MAX_MODEL_LEN and model["size_vram"] == 0 for model in running)
    datetime.fromisoformat(running[0]["expires_at"])
    for name in ("fox", "fox:latest", "base", "base:latest", BASE_NAME, f"{BASE_NAME}:latest"):
        answer = await http.post("/api/chat", json={**CHAT, **WHOLE, "model": name})
        assert (answer.status_code, answer.json()["model"]) == (200, name)
    assert [submit.digest for submit, _ in fleet.seen] == [ADAPTER, ADAPTER, "", "", "", ""]
    assert (await http.get("/api/version")).json() == {"version": VERSION}


async def test_show_says_what_editors_ask(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    await fleet.add_adapter("fox", ADAPTER)
    base = (await http.post("/api/show", json={"model": "base"})).json()
    assert base["capabilities"] == ["completion", "tools"]
    assert base["template"] == TEMPLATE
    assert base["parameters"] == 'stop "<|im_end|>"'
    kind = base["model_info"]["general.architecture"]
    assert base["model_info"][f"{kind}.context_length"] == MAX_MODEL_LEN
    fox = (await http.post("/api/show", json={"name": "fox:latest"})).json()
    assert fox["modelfile"] == f"FROM {BASE_NAME}\nADAPTER local:fox\n"
    assert fox["details"]["parent_model"] == f"{BASE_NAME}:latest"
    assert (fox["model_info"]["adapter.type"], fox["model_info"]["adapter.rank"]) == ("lora", 8)
    config = {"peft_type": "PROMPT_TUNING"}
    await fleet.add_adapter("soft", "d-soft", num_virtual=100, config=config)
    soft = (await http.post("/api/show", json={"name": "soft"})).json()["model_info"]
    assert (soft[f"{kind}.context_length"], soft["adapter.type"]) == (MAX_MODEL_LEN - 100, "prompt_tuning")


@pytest.mark.parametrize("path", ROUTES)
async def test_a_request_without_text_only_asks_for_the_model(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str
) -> None:
    nothing: dict[str, Any] = {"messages": []} if path == "/api/chat" else {"prompt": ""}
    for body in (
        {"model": "base"},
        {"model": "base", "keep_alive": 0},
        {"model": "base", **nothing},
    ):
        answer = (await http.post(path, json=body)).json()
        assert (answer["done"], answer["done_reason"], text_of(answer)) == (True, "load", "")
    assert (await http.post(path, json={"model": "nobody"})).status_code == 404
    assert fleet.seen == []


async def test_embed_gives_vectors_of_length_one(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, http: httpx2.AsyncClient
) -> None:
    fleet.facts = {"task": "embed", "width": 4}
    await fleet.register()
    vectors = {b"a": [3.0, 4.0, 0.0, 0.0], b"b": [0.0, 2.0, 0.0, 0.0]}

    def script(submit: m.RequestHead, body: m.Body) -> Script:
        text = fleet.tokenizer.decode(list(memoryview(body.prompt).cast("i"))).encode()
        return Script(numbers=np.array(vectors[text], "<f4").view("<i4").tolist(), chunk=4, eos=False)

    fleet.script = script
    async with gateway_client(bus, model_folder) as fresh:
        answer = (
            await fresh.post("/api/embed", json={"model": "base:latest", "input": ["a", "b"], "options": {}})
        ).json()
        assert np.allclose(answer["embeddings"], [[0.6, 0.8, 0, 0], [0, 1, 0, 0]])
        assert answer["model"] == "base:latest"
        assert answer["prompt_eval_count"] == 2
        short = (await fresh.post("/api/embed", json={"model": "base", "input": "a", "dimensions": 1})).json()
        assert short["embeddings"] == [[1.0]]
        assert (await fresh.post("/api/show", json={"model": "base"})).json()["capabilities"] == ["embedding"]
        refused = await fresh.post("/api/embed", json={"model": "base", "input": "a", "truncate": True})
        assert refused.status_code == 400
        assert "`truncate` is not supported" in refused.json()["error"]


def test_names_with_and_without_a_tag() -> None:
    for name, tagged in (("fox", "fox:latest"), ("a/b", "a/b:latest"), ("s3://b/c", "s3://b/c:latest"), ("x:y", "x:y")):
        assert tagged_name(name) == tagged
        assert plain_name(tagged) == name


# ---------------------------------------------------------------- waiting


async def test_a_stream_that_waits_is_kept_alive_by_lines(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    fleet.script = lambda submit, body: Script(hold_after=0)
    async with (
        gateway_client(bus, model_folder, keepalive_s=0.05) as http,
        http.stream("POST", "/api/chat", json=CHAT) as answer,
    ):
        seen: list[dict[str, Any]] = []
        async for text in answer.aiter_lines():
            seen.append(json.loads(text))  # including those that only keep the connection alive
            if len(seen) == 3:
                fleet.go.set()
        assert [part["message"]["content"] for part in seen[:3]] == ["", "", ""]
        assert "".join(part["message"]["content"] for part in seen) == TEXT
        assert seen[-1]["done"]
