"""What a request may say about adapters: several at once, how strong, merged from others."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI
from scripted_fleet import BASE_NAME, Script, ScriptedFleet

from protocol.merging import Merge, merge_of

QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
ONE, TWO = "11" * 32, "22" * 32


@pytest.fixture(autouse=True)
async def adapters(fleet: ScriptedFleet) -> None:
    await fleet.add_adapter("one", ONE)
    await fleet.add_adapter("org/two", TWO)
    fleet.script = lambda submit, body: Script(text={ONE: "first", TWO: "second"}.get(submit.digest, "base"))


# ---------------------------------------------------------------- several models


async def test_a_list_of_models_gives_choices_of_each(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    body = {"model": ["org/two", "base", "one"], "prompt": ["hi", "the dog"], "n": 2, "max_tokens": 60}
    answer = (await http.post("/v1/completions", json=body)).json()
    assert answer["model"] == "org/two,base,one"
    assert [choice["index"] for choice in answer["choices"]] == list(range(12))
    assert [choice["model"] for choice in answer["choices"]] == ["org/two"] * 4 + ["base"] * 4 + ["one"] * 4
    assert [choice["text"] for choice in answer["choices"]] == ["second"] * 4 + ["base"] * 4 + ["first"] * 4
    sent = sorted(fleet.seen, key=lambda pair: int(pair[0].rid.rpartition("-")[2]))
    assert [submit.digest for submit, _ in sent] == [TWO] * 4 + [""] * 4 + [ONE] * 4
    assert [submit.tenant for submit, _ in sent] == [TWO] * 4 + ["base"] * 4 + [ONE] * 4
    texts = [fleet.tokenizer.decode(list(memoryview(body.prompt).cast("i"))) for _, body in sent]
    assert texts == ["hi", "hi", "the dog", "the dog"] * 3
    seeds = [body.sampling.seed for _, body in sent]
    assert seeds == seeds[:2] * 6  # the same chance for all, to compare them
    assert seeds[0] != seeds[1]
    prompt_tokens = sum(len(fleet.tokenizer.encode(text).ids) for text in ("hi", "the dog"))
    assert answer["usage"]["prompt_tokens"] == 3 * prompt_tokens


async def test_a_list_of_models_streams(client: AsyncOpenAI, fleet: ScriptedFleet) -> None:
    more = {"model": ["one", "base"]}
    stream = await client.chat.completions.create(model="", **QUESTION, stream=True, extra_body=more)
    texts = {"one": "", "base": ""}
    async for chunk in stream:
        [choice] = chunk.choices
        extra = choice.model_extra or {}
        assert extra["model"] == ["one", "base"][choice.index]
        texts[extra["model"]] += choice.delta.content or ""
    assert texts == {"one": "first", "base": "base"}


async def test_a_list_of_one_model_names_it_too(http: httpx2.AsyncClient) -> None:
    answer = (await http.post("/v1/chat/completions", json={"model": ["one"], **QUESTION})).json()
    assert answer["choices"][0]["model"] == "one"
    plain = (await http.post("/v1/chat/completions", json={"model": "one", **QUESTION})).json()
    assert "model" not in plain["choices"][0]
    assert plain["system_fingerprint"] == answer["system_fingerprint"]


async def test_jobs_and_repeated_calls_know_their_models(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    body = {"model": ["one", "org/two"], **QUESTION}
    job = (await http.post("/v1/chat/completions", json={**body, "background": True})).json()
    done = (await http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=30"})).json()
    assert done["status"] == "completed"
    answers = [done["result"]]
    for _ in range(2):
        reply = await http.post("/v1/chat/completions", json=body, headers={"idempotency-key": "k"})
        answers.append(reply.json())
    assert len(fleet.seen) == 4
    for answer in answers:
        assert answer["model"] == "one,org/two"
        assert answer["system_fingerprint"] == answers[0]["system_fingerprint"]
        got = [(choice["model"], choice["message"]["content"]) for choice in answer["choices"]]
        assert got == [("one", "first"), ("org/two", "second")]


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({"model": []}, 422, "model"),
        ({"model": ["one", "nobody"]}, 404, "nobody"),
        ({"model": ["one"] * 200}, 400, "1 prompts for 200 models with n = 1; the limit is"),
        ({"model": ["one", 3]}, 422, "model"),
    ],
)
async def test_bad_lists_of_models(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, fields: dict[str, Any], status: int, text: str
) -> None:
    answer = await http.post("/v1/chat/completions", json={**QUESTION, **fields})
    assert answer.status_code in (status, 400), answer.text
    assert text in answer.text
    assert fleet.seen == []


# ---------------------------------------------------------------- scale


async def test_the_scale_reaches_the_worker_with_adapters_only(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    body = {"model": ["one", "base"], **QUESTION, "lora_scale": 0.25}
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    assert {submit.digest: body.lora_scale for submit, body in fleet.seen} == {ONE: 0.25, "": 1.0}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"model": "base", "lora_scale": 0.5}, "the base model has none"),
        ({"model": "one", "lora_scale": 101}, "100"),
        ({"model": "one", "lora_scale": "high"}, "lora_scale"),
    ],
)
async def test_bad_scales(http: httpx2.AsyncClient, fleet: ScriptedFleet, fields: dict[str, Any], text: str) -> None:
    answer = await http.post("/v1/chat/completions", json={**QUESTION, **fields})
    assert 400 <= answer.status_code < 500
    assert text in answer.text
    assert fleet.seen == []


# ---------------------------------------------------------------- merged


async def test_a_merge_is_submitted_under_its_recipe(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    merged = {"ids": ["one", "org/two"], "weights": [0.5, -1], "merge_strategy": "ties", "density": 0.3}
    body = {"model": BASE_NAME, **QUESTION, "merged_adapters": merged, "lora_scale": 0.5}
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    [(submit, sent)] = fleet.seen
    wanted = Merge(adapters=[bytes.fromhex(ONE), bytes.fromhex(TWO)], weights=[0.5, -1.0], strategy="ties", density=0.3)
    assert merge_of(submit.digest) == wanted
    assert submit.tenant == submit.digest
    assert sent.lora_scale == 0.5


GOOD = {"ids": ["one", "org/two"], "weights": [0.5, 0.5]}


@pytest.mark.parametrize(
    ("merged", "more", "text"),
    [
        (GOOD, {"model": "one"}, "model must be the base model"),
        ({**GOOD, "merge_strategy": "ties"}, {}, "needs a density"),
        ({**GOOD, "merge_strategy": "dare_linear", "density": 0.0}, {}, "density is 0"),
        ({**GOOD, "weights": [1.0]}, {}, "1 weights for 2 adapters"),
        ({**GOOD, "weights": [1.0, 1e9]}, {}, "1000"),
        ({**GOOD, "merge_strategy": "average"}, {}, "magnitude_prune"),
        ({**GOOD, "densty": 1}, {}, "it has no field densty"),
        ({"ids": ["base"], "weights": [1.0]}, {}, "neither the base model nor merges"),
        ({"ids": ["nobody"], "weights": [1.0]}, {}, "nobody"),
        ({"ids": ["one"] * 9, "weights": [1.0] * 9}, {}, "8"),
    ],
)
async def test_bad_merges(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, merged: dict[str, Any], more: dict[str, Any], text: str
) -> None:
    body = {"model": "base", **QUESTION, "merged_adapters": merged, **more}
    answer = await http.post("/v1/chat/completions", json=body)
    assert 400 <= answer.status_code < 500, answer.text
    assert text in answer.text
    assert fleet.seen == []
