"""LoRAX's native routes: bodies, headers, status codes and messages."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest
from helpers.scripted_fleet import BASE_NAME, MAX_MODEL_LEN, Script, ScriptedFleet, gateway_client
from helpers.waiting import wait_until
from tokenizers import Tokenizer

from gateway.grammars.schemas import JSON_STYLE, MAX_FREE_KEYS
from gateway.openai.openai_bodies import ChatRequest
from gateway.openai.openai_parse import conversation_of
from peft_adapters.recipe import merge_of
from protocol.queue.bus import Bus
from protocol.wire import messages as m
from protocol.wire.errors import Internal, WorkerLost

TEXT = Script().text
ADAPTER = "ab" * 32
OTHER = "cd" * 32


def generate_body(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "the dog", "parameters": parameters}


def events(content: bytes) -> list[dict[str, Any]]:
    frames = [frame for frame in content.split(b"\n\n") if frame]
    assert all(frame.startswith((b"data: ", b":")) for frame in frames)
    return [json.loads(frame[6:]) for frame in frames if frame.startswith(b"data: ")]


# ---------------------------------------------------------------- answers


async def test_generate(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    answer = await http.post("/generate", json={"inputs": "the dog"})
    assert answer.json() == {"generated_text": TEXT}
    [(submit, body)] = fleet.seen
    assert body.sampling == m.Sampling(
        temperature=0.0, seed=body.sampling.seed, num_logprobs=0, penalties="lorax", logprobs_of="choice"
    )
    num_prompt = len(fleet.tokenizer.encode("the dog").ids)
    num_output = len(fleet.tokenizer.encode(TEXT).ids) + 1
    assert submit.max_new_tokens == MAX_MODEL_LEN - num_prompt
    headers = answer.headers
    assert headers["x-compute-type"] == "cpu+optimized"
    assert headers["x-compute-characters"] == "7"
    assert headers["x-model-id"] == BASE_NAME
    assert (headers["x-prompt-tokens"], headers["x-generated-tokens"]) == (str(num_prompt), str(num_output))
    assert headers["x-total-tokens"] == str(num_prompt + num_output)
    assert headers["x-skipped-tokens"] == "0"
    assert "x-adapter-id" not in headers
    for name in ("compute-time", "total-time", "validation-time", "queue-time", "inference-time", "time-per-token",
                 "time-to-first-token", "time-per-output-token"):  # fmt: skip
        assert int(headers[f"x-{name}"]) >= 0


async def test_what_the_output_must_be(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    """Without a schema, any object; with a null schema, any text; the end of a grammar counts as end of text."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    fleet.script = lambda submit, body: Script('{"a": 1}', eos=False)
    forms = [{"type": "json_object"}, {"type": "json_schema", "schema": schema}, {"type": "text"}]
    for form in [*forms, {"type": "json_object", "schema": None}]:
        answer = await http.post("/generate", json=generate_body(response_format=form, details=True))
        assert answer.status_code == 200, answer.text
    grammars = [json.loads(body.grammar)["grammars"][0] if body.grammar else None for _, body in fleet.seen]
    style = {"x-guidance": JSON_STYLE}
    free = {"type": "object", "maxProperties": MAX_FREE_KEYS, **style}
    assert grammars == [
        {"json_schema": free},
        {"json_schema": {**schema, "additionalProperties": False, **style}},
        None,
        None,
    ]
    for stop, reason in (([], "eos_token"), (["}"], "stop_sequence")):
        body = generate_body(response_format=forms[0], details=True, stop=stop)
        answer = await http.post("/generate", json=body)
        assert answer.json()["details"]["finish_reason"] == reason


@pytest.mark.parametrize("path", ["/", "/invocations"])
async def test_the_compatible_route_wraps_its_answer(http: httpx2.AsyncClient, path: str) -> None:
    answer = await http.post(path, json={**generate_body(max_new_tokens=3, details=True), "stream": False})
    [found] = answer.json()
    assert found["details"]["finish_reason"] == "length"
    streamed = await http.post(path, json={**generate_body(max_new_tokens=3), "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert events(streamed.content)[-1]["generated_text"] == found["generated_text"]


async def test_a_repeated_key_finds_the_same_answer(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    """The repeated answer has the same drawn seed and the tokens of the prompt."""
    body, headers = generate_body(details=True, do_sample=True, decoder_input_details=True), {"idempotency-key": "k"}
    first, second = [(await http.post("/generate", json=body, headers=headers)).json() for _ in range(2)]
    assert first == second
    assert first["details"]["seed"] is not None
    assert len(first["details"]["prefill"]) > 1
    streamed, headers = generate_body(details=True, do_sample=True), {"idempotency-key": "other"}
    one, other = [
        events((await http.post("/generate_stream", json=streamed, headers=headers)).content) for _ in range(2)
    ]  # fmt: skip
    assert one == other
    assert len(fleet.seen) == 2
    assert (await http.post("/generate", json=body, headers=headers)).status_code == 422


async def test_details_hold_every_token(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    body = generate_body(details=True, seed=5, do_sample=True, return_k_alternatives=2)
    answer = (await http.post("/generate", json=body)).json()
    ids = [*fleet.tokenizer.encode(TEXT).ids, 1]
    details = answer["details"]
    assert [token["id"] for token in details["tokens"]] == ids
    assert "".join(token["text"] for token in details["tokens"] if not token["special"]) == TEXT
    assert details["tokens"][-1] == {
        "id": 1, "text": "<|im_end|>", "logprob": -0.5, "special": True, "skipped": False,
        "alternative_tokens": [
            {"id": 1, "text": "<|im_end|>", "logprob": -1.0}, {"id": 2, "text": "!", "logprob": -2.0},
        ],
    }  # fmt: skip
    assert {key: value for key, value in details.items() if key != "tokens"} == {
        "finish_reason": "eos_token", "prompt_tokens": len(fleet.tokenizer.encode("the dog").ids),
        "generated_tokens": len(ids), "skipped_tokens": 0, "seed": 5, "prefill": [],
    }  # fmt: skip


async def test_an_end_that_comes_alone_still_comes_with_a_token(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(text="", eos=False)
    [only] = (await http.post("/", json=generate_body(details=True))).json()
    assert only["generated_text"] == ""
    assert only["details"]["tokens"] == []


async def test_stop_strings_stay_in_the_text(http: httpx2.AsyncClient) -> None:
    answer = (await http.post("/generate", json=generate_body(stop=["wör"], details=True))).json()
    assert answer["generated_text"].startswith("Hello wör")
    assert answer["details"]["finish_reason"] == "stop_sequence"


async def test_full_text_and_truncation(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    body = {"inputs": "the dog " * 300, "parameters": {"truncate": 4, "return_full_text": True, "max_new_tokens": 2}}
    answer = await http.post("/generate", json=body)
    assert answer.json()["generated_text"].startswith("the dog the dog")
    [(_, sent)] = fleet.seen
    assert list(memoryview(sent.prompt).cast("i")) == fleet.tokenizer.encode(body["inputs"]).ids[-4:]
    assert answer.headers["x-prompt-tokens"] == "4"


async def test_decoder_input_details_tell_of_the_prompt(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    answer = await http.post("/generate", json=generate_body(decoder_input_details=True))
    ids = fleet.tokenizer.encode("the dog").ids
    texts = [fleet.tokenizer.decode([id_]) for id_ in ids]
    logprobs = [None, *[-0.5] * (len(ids) - 1)]
    assert answer.json()["details"]["prefill"] == [
        {"id": id_, "text": text, "logprob": logprob} for id_, text, logprob in zip(ids, texts, logprobs, strict=True)
    ]
    assert len(answer.json()["details"]["tokens"]) == answer.json()["details"]["generated_tokens"]


async def test_best_of_answers_with_the_likeliest(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    lengths = {0: 2, 1: 4, 2: 3}
    fleet.script = lambda submit, body: Script(text="the dog" * lengths[int(submit.rid[-1])], eos=False)
    answer = await http.post("/generate", json=generate_body(best_of=3, do_sample=True, details=True))
    details = answer.json()["details"]
    assert len(details["best_of_sequences"]) == 2
    assert {"generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"} == set(
        details["best_of_sequences"][0]
    )
    assert len({body.sampling.seed for _, body in fleet.seen}) == 3


async def test_sampling_parameters_reach_the_worker(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    body = generate_body(
        temperature=0.5, top_k=7, top_p=0.9, typical_p=0.8, repetition_penalty=1.5, frequency_penalty=0.25,
        presence_penalty=-0.5, seed=(1 << 64) - 1, watermark=True, ignore_eos_token=True, max_new_tokens=5,
        stop=["x", ""], details=True,
    )  # fmt: skip
    answer = await http.post("/generate", json=body)
    [(_, sent)] = fleet.seen
    assert sent.sampling == m.Sampling(
        temperature=0.5, top_k=7, top_p=0.9, typical_p=0.8, repetition_penalty=1.5, frequency_penalty=0.25,
        presence_penalty=-0.5, seed=(1 << 63) - 1, num_logprobs=0, ignore_eos=True, penalties="lorax", watermark=True,
        logprobs_of="choice",
    )  # fmt: skip
    assert (sent.stop, sent.max_new_tokens) == (["x"], 5)
    assert answer.json()["details"]["seed"] == (1 << 64) - 1


async def test_when_tokens_are_drawn(subtests: pytest.Subtests, http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    for fields, temperature in [
        ({}, 0),
        ({"do_sample": True}, 1),
        ({"temperature": 0.0, "do_sample": True}, 0),
        ({"temperature": 1.0}, 0),
        ({"top_k": 3}, 1),
        ({"top_p": 1.0}, 0),
        ({"top_p": 0.5}, 1),
        ({"typical_p": 0.5}, 1),
    ]:
        with subtests.test(fields=fields, temperature=temperature):
            assert (await http.post("/generate", json=generate_body(**fields))).status_code == 200
            assert fleet.seen[-1][1].sampling.temperature == temperature


# ---------------------------------------------------------------- adapters


async def test_adapters(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    await fleet.add_adapter("fox", ADAPTER)
    for fields in ({"adapter_id": "fox"}, {"adapter_id": "fox", "adapter_source": "Local"}):
        answer = await http.post("/generate", json=generate_body(**fields))
        assert answer.status_code == 200
        assert (answer.headers["x-adapter-id"], answer.headers["x-adapter-source"]) == ("fox", "local")
    assert [submit.digest for submit, _ in fleet.seen] == [ADAPTER, ADAPTER]
    for base in (None, "", BASE_NAME):
        await http.post("/generate", json=generate_body(adapter_id=base))
    assert [submit.digest for submit, _ in fleet.seen[2:]] == ["", "", ""]


async def test_an_adapter_that_cannot_be_served_is_424(
    subtests: pytest.Subtests, http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    for fields, word in [
        ({"adapter_id": "nobody"}, "nobody"),
        ({"adapter_id": "nobody", "adapter_source": "local"}, "nobody"),
        ({"adapter_id": "../../etc", "adapter_source": "local"}, "does not exist"),
        ({"adapter_id": "/etc/passwd", "adapter_source": "local"}, "does not exist"),
        ({"adapter_id": "org/fox", "adapter_source": "hub"}, "register"),
        ({"adapter_id": "bucket/fox", "adapter_source": "s3"}, "s3"),
        ({"adapter_id": "fox/1", "adapter_source": "pbase"}, "Invalid source 'pbase'"),
        ({"adapter_id": "broken"}, "DoRA"),
    ]:
        with subtests.test(fields=fields, word=word):
            await fleet.add_adapter("broken", state="failed", reason="DoRA is not understood")
            answer = await http.post("/generate", json=generate_body(**fields))
            assert answer.status_code == 424
            body = answer.json()
            assert body["error_type"] == "generation"
            assert body["error"].startswith("Request failed during generation: ")
            assert word in body["error"]
            assert fleet.seen == []


async def test_openai_s_routes_take_lorax_s_fields(http: httpx2.AsyncClient, fleet: ScriptedFleet, bus: Bus) -> None:
    await fleet.add_adapter("fox", ADAPTER)
    body = {"prompt": "hi", "max_tokens": 2}
    for model, source, digest in (
        ("", "hub", ""),
        ("base", "s3", ""),
        ("fox", "local", ADAPTER),
        ("fox", None, ADAPTER),
    ):
        fields = {"model": model, "adapter_source": source, "ignore_eos_token": True, "top_k": 3}
        assert (await http.post("/v1/completions", json={**body, **fields})).status_code == 200
        assert (fleet.seen[-1][0].digest, fleet.seen[-1][1].sampling.ignore_eos) == (digest, True)
    for source, status, param in (("hub", 404, "model"), ("pbase", 400, "adapter_source")):
        answer = await http.post("/v1/completions", json={**body, "model": "fox", "adapter_source": source})
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    chat = ChatRequest(model="", messages=[{}], guideline="be kind", chat_template_kwargs={"a": 1})
    assert conversation_of(chat).variables == {"guideline": "be kind", "a": 1}
    job = await http.post(
        "/v1/completions", json={**body, "model": "fox", "background": True, "api_token": "hf_secret"}
    )
    kept = b"".join(await bus._redis.hvals(bus.keys.job(job.json()["id"])))
    assert b"fox" in kept
    assert b"hf_secret" not in kept


async def test_a_source_is_part_of_an_adapters_name(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    await fleet.add_adapter("fox", ADAPTER)  # from a folder
    answer = await http.post("/generate", json=generate_body(adapter_id="fox", adapter_source="hub"))
    assert answer.status_code == 424


async def test_merged_adapters(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    await fleet.add_adapter("fox", ADAPTER)
    await fleet.add_adapter("dog", OTHER)
    merged = {"ids": ["fox", "dog"], "weights": [0.25, 0.75], "merge_strategy": "ties", "density": 0.5,
              "majority_sign_method": "frequency", "arithmetic": "lorax"}  # fmt: skip
    answer = await http.post("/generate", json=generate_body(merged_adapters=merged))
    assert answer.headers["x-adapter-id"] == "fox,dog"
    merge = merge_of(fleet.seen[0][0].digest)
    assert merge is not None
    assert (merge.digests, merge.weights, merge.strategy) == ([ADAPTER, OTHER], [0.25, 0.75], "ties")
    assert (merge.density, merge.majority_sign, merge.arithmetic) == (0.5, "frequency", "lorax")
    for wrong, word in [
        ({**merged, "weights": [1]}, "number of adapter IDs must match"),
        ({**merged, "ids": [], "weights": []}, "at least one adapter ID"),
        ({**merged, "ids": ["nobody"] * 9, "weights": [1] * 9}, "9 adapters; from 1 to 8 can be merged"),
        ({**merged, "merge_strategy": "best"}, "merged_adapters"),
        ({**merged, "density": None}, "density"),
        ({**merged, "ids": ["fox", ""]}, "neither the base model"),
    ]:
        answer = await http.post("/generate", json=generate_body(merged_adapters=wrong))
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
        assert word in answer.json()["error"]
    both = generate_body(merged_adapters=merged, adapter_id="fox")
    assert "at most one of" in (await http.post("/generate", json=both)).json()["error"]


# ---------------------------------------------------------------- errors


BAD: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 0}, "`best_of` must be > 0 and <= 128. Given: 0"),
    ({"best_of": 129}, "`best_of` must be > 0 and <= 128. Given: 129"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"temperature": -1}, "`temperature` must be non-negative"),
    ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"presence_penalty": -2.5}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 1.5}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"return_k_alternatives": 0}, "`return_k_alternatives` must be strictly positive"),
    ({"return_k_alternatives": 1001}, "`return_k_alternatives` must be <= 1000. Given: 1001"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 256. Given: 0"),
    ({"truncate": 256}, "`truncate` must be strictly positive and less than 256. Given: 256"),
    ({"typical_p": 1}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"max_new_tokens": 257}, "`max_new_tokens` must be <= 256. Given: 257"),
    ({"max_new_tokens": 256}, "`inputs` tokens + `max_new_tokens` must be <= 256. Given: 2 `inputs` tokens and 256"),
    ({"stop": ["a"] * 65}, "`stop` supports up to 64 stop sequences. Given: 65"),
    ({"stop": "a"}, "parameters.stop: it must be a list"),
    ({"seed": -1}, "parameters"),
    ({"seed": "x"}, "parameters"),
    ({"do_sample": 1}, "parameters"),
    ({"response_format": {"type": "regex", "schema": {}}}, "`response_format` of type 'regex' is not supported"),
    (
        {"response_format": {"type": "json_object", "schema": {"type": "array", "uniqueItems": True}}},
        'response_format cannot be served: Unimplemented keys: ["uniqueItems"]',
    ),
]


async def test_wrong_parameters_are_422_in_lorax_words(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    wrong: list[str] = []
    for fields, text in BAD:
        answer = await http.post("/generate", json=generate_body(**fields))
        body = answer.json()
        good = body["error_type"] == "validation" and body["error"].startswith(f"Input validation error: {text}")
        if answer.status_code != 422 or not good or set(body) != {"error", "error_type"}:
            wrong.append(f"{fields}: {answer.status_code} {body}")
    assert not wrong, "\n".join(wrong)
    assert fleet.seen == []


async def test_what_cannot_be_streamed(subtests: pytest.Subtests, http: httpx2.AsyncClient) -> None:
    for fields, text in [
        ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"decoder_input_details": True}, "`decoder_input_details` == true is not supported when streaming tokens"),
    ]:
        with subtests.test(fields=fields, text=text):
            answer = await http.post("/generate_stream", json=generate_body(**fields))
            assert (answer.status_code, answer.json()["error"]) == (422, f"Input validation error: {text}")


@pytest.mark.parametrize(
    ("body", "headers", "status", "kind"),
    [
        (b"{", {"content-type": "application/json"}, 400, "bad_request"),
        (b"{}", {"content-type": "application/json"}, 422, "validation"),
        (b'{"inputs": 3}', {"content-type": "application/json"}, 422, "validation"),
        (b'{"inputs": ""}', {"content-type": "application/json"}, 422, "validation"),
        (b'{"inputs": "a"}', {"content-type": "text/plain"}, 415, "unsupported_media_type"),
    ],
)
async def test_frame_errors_are_json_too(
    http: httpx2.AsyncClient, body: bytes, headers: dict[str, str], status: int, kind: str
) -> None:
    answer = await http.post("/generate", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error_type"]) == (status, kind)


async def test_wrong_methods_and_sizes(bus: Bus, fleet: ScriptedFleet, model_folder: Any) -> None:
    async with gateway_client(bus, model_folder, max_body_bytes=100, max_queued=1, path_prefix="/llms/a") as http:
        for path in ("/generate", "/llms/a/generate"):
            wrong = await http.get(path)
            assert (wrong.status_code, wrong.json()["error_type"]) == (405, "method_not_allowed")
        for path in ("/llms/a", "/llms/a/", "/"):  # as LoRAX's client posts to its URL
            assert (await http.post(path, json={"inputs": "a"})).json() == [{"generated_text": TEXT}]
        assert (await http.post("/llms/ab", json={"inputs": "a"})).status_code == 404
        large = await http.post("/generate", json={"inputs": "a" * 200})
        assert (large.status_code, large.json()["error_type"]) == (413, "payload_too_large")
        body = {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True}}
        never = await http.post("/generate", json=body)
        assert (never.status_code, never.json()["error_type"]) == (422, "validation")
        fleet.assigning.clear()
        waiting = asyncio.create_task(http.post("/generate", json={"inputs": "a"}))

        async def is_queued() -> bool:
            return await bus._redis.xlen(bus.keys.sub("interactive")) == 1

        await wait_until(is_queued, "one request waits")
        full = await http.post("/generate", json={"inputs": "a"})
        assert (full.status_code, full.json()["error_type"]) == (429, "overloaded")
        assert full.json()["error"].startswith("Model is overloaded")
        assert int(full.headers["retry-after"]) >= 1
        fleet.assigning.set()
        assert (await waiting).status_code == 200


async def test_a_failing_engine(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(error=Internal("the pool is on fire"))
    answer = await http.post("/generate", json=generate_body())
    assert (answer.status_code, answer.json()["error_type"]) == (424, "generation")
    text = "Request failed during generation: Server error: the pool is on fire"
    assert answer.json()["error"] == text
    fleet.script = lambda submit, body: Script(error=WorkerLost("three died"))
    streamed = await http.post("/generate_stream", json=generate_body())
    assert events(streamed.content)[-1] == {
        "error": "Request failed during generation: Server error: three died", "error_type": "generation",
    }  # fmt: skip


# ---------------------------------------------------------------- other routes


async def test_tokenize(http: httpx2.AsyncClient, tokenizer: Tokenizer) -> None:
    answer = (await http.post("/tokenize", json={"inputs": "wörld the dog"})).json()
    encoding = tokenizer.encode("wörld the dog")
    assert [token["id"] for token in answer] == encoding.ids
    assert [token["text"] for token in answer] == encoding.tokens
    assert all(set(token) == {"id", "text", "start", "stop"} for token in answer)
    assert (answer[0]["start"], answer[-1]["stop"]) == (0, 13)
    unknown = await http.post("/tokenize", json={"inputs": "the dog", "adapter_id": "nobody"})
    assert (unknown.status_code, unknown.json()["error_type"]) == (424, "generation")
