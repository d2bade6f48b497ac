"""Parameters reach the worker with the intended values, and their results have the format of the route."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.good_bodies import CHAT, COMPLETION
from helpers.openai_events import events_of
from helpers.scripted_fleet import BASE_NAME, MAX_MODEL_LEN, Script, ScriptedFleet, gateway_client
from openai import AsyncOpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from peft_adapters.texts.tokenizer_json import BaseTokens
from protocol.queue.bus import Bus
from protocol.wire import messages as m

FIELDS: dict[str, Any] = {
    "temperature": 0, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "typical_p": 0.8, "seed": 7, "presence_penalty": 0.5,
    "frequency_penalty": -0.5, "repetition_penalty": 1.1, "logit_bias": {"5": -100, "6": 2.5}, "min_tokens": 2,
    "ignore_eos": True, "max_tokens": 9, "stop": ["a", "", "b"], "stop_token_ids": [7],
}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_every_parameter_reaches_the_worker(http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str) -> None:
    good = CHAT if "chat" in path else COMPLETION
    assert (await http.post(path, json={**good, **FIELDS})).status_code == 200
    [(submit, body)] = fleet.seen
    assert body.sampling == m.Sampling(
        temperature=0, top_p=0.9, top_k=40, min_p=0.05, typical_p=0.8, seed=7, presence_penalty=0.5,
        frequency_penalty=-0.5, repetition_penalty=1.1, logit_bias={5: -100, 6: 2.5}, min_tokens=2, ignore_eos=True,
    )  # fmt: skip
    assert (body.max_new_tokens, submit.max_new_tokens) == (9, 9)
    assert body.stop == ["a", "b"]
    assert body.stop_token_ids == [7]


async def test_a_grammar_that_takes_too_long_is_refused_at_its_limit(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    async with gateway_client(bus, model_folder, grammar_timeout_s=0.01) as http:
        for _ in range(2):
            answer = await http.post(
                "/v1/completions", json={**COMPLETION, "structured_outputs": {"regex": "a{90000}"}}
            )
            assert answer.status_code == 400
            assert "compiling the output's grammar took longer than 0.01 s" in answer.json()["error"]["message"]
        assert (await http.post("/v1/completions", json=COMPLETION)).status_code == 200
    assert len(fleet.seen) == 1


async def test_defaults(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    await http.post("/v1/chat/completions", json={**CHAT, "top_k": -1})
    await http.post("/v1/completions", json={**COMPLETION, "service_tier": "flex"})
    (chat, chat_body), (completion, completion_body) = fleet.seen
    assert chat_body.max_new_tokens == MAX_MODEL_LEN - chat.num_prompt_tokens
    assert completion_body.max_new_tokens == 16
    assert chat_body.sampling == m.Sampling(seed=chat_body.sampling.seed)
    assert chat_body.sampling.seed != completion_body.sampling.seed
    assert (chat.cls, completion.cls) == ("interactive", "batch")
    assert not chat.stored


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)])
async def test_what_has_no_effect_is_named_or_refused(
    http: httpx2.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    given = {**body, "metadata": {"a": "b"}}
    assert (await http.post(path, json=given)).headers["x-ignored-parameters"] == "metadata"
    job = await http.post(path, json={**given, "background": True})
    assert (job.json()["metadata"], job.headers.get("x-ignored-parameters")) == ({"a": "b"}, None)
    refused = await http.post(path, json={**body, "service_tier": "bogus"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "service_tier")


async def test_max_completion_tokens_wins(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    answer = await http.post("/v1/chat/completions", json={**CHAT, "max_completion_tokens": 2, "max_tokens": 9})
    assert fleet.seen[0][1].max_new_tokens == 2
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_choices_have_seeds_of_their_own() -> None:
    for seed in (0, 1, (1 << 63) - 1):
        seeds = [m.Sampling(seed=seed).of_choice(i).seed for i in range(128)]
        assert seeds[0] == seed
        assert len(set(seeds)) == 128
        assert all(0 <= s < 1 << 63 for s in seeds)


async def test_a_negative_seed_is_a_seed(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    for _ in range(2):
        assert (await http.post("/v1/completions", json={**COMPLETION, "seed": -5})).status_code == 200
    seeds = {body.sampling.seed for _, body in fleet.seen}
    assert len(seeds) == 1
    assert seeds.pop() >= 0


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("the dog", ["the dog"]),
        (["the dog", "fox"], ["the dog", "fox"]),
        ([5, 6, 7], None),
        ([[5, 6], [7]], None),
    ],
)
async def test_prompts_in_all_forms(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, prompt: Any, texts: list[str] | None
) -> None:
    answer = (await http.post("/v1/completions", json={**COMPLETION, "prompt": prompt, "echo": True})).json()
    if texts is not None:
        wanted = [fleet.tokenizer.encode(text).ids for text in texts]
    else:
        wanted = prompt if isinstance(prompt[0], list) else [prompt]
    sent = [list(memoryview(body.prompt).cast("i")) for _, body in sorted(fleet.seen, key=lambda pair: pair[0].rid)]
    assert sent == wanted
    echoes = texts or [fleet.tokenizer.decode(ids) for ids in wanted]
    assert len(answer["choices"]) == len(echoes)
    for choice, echo, (_, body) in zip(answer["choices"], echoes, fleet.seen, strict=True):
        generated, _ = fleet.tokens(Script(), body)
        assert choice["text"] == echo + fleet.tokenizer.decode(generated)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, wanted))


MANY: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"model": ["nobody"] * 130, "prompt": [[5] * 200] * 2}, "2 prompts for 130 models with n = 1"),
    ("/v1/completions", {"model": "nobody", "prompt": ["a"] * 43, "n": 3}, "43 prompts for 1 models with n = 3"),
    ("/v1/chat/completions", {**CHAT, "model": ["nobody"] * 65, "n": 2}, "1 prompts for 65 models with n = 2"),
    ("/v1/completions", {"model": "nobody", "prompt": []}, "prompt is an empty list"),
]


async def test_too_many_choices_are_refused_before_any_work(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    """Before names are looked up or text is tokenized, as many models and prompts would cost their product."""
    for path, body, said in MANY:
        answer = await http.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["message"][: len(said)]) == (400, said)
    assert not fleet.seen


@pytest.mark.parametrize("stream", [True, False])
async def test_echo_alone_returns_the_prompt(http: httpx2.AsyncClient, fleet: ScriptedFleet, stream: bool) -> None:
    body = {**COMPLETION, "echo": True, "max_tokens": 0, "n": 2, "stream": stream}
    answer = await http.post("/v1/completions", json=body)
    assert fleet.seen == []
    if stream:
        assert answer.content.count(b'"text":"hi"') == 2
        assert answer.content.count(b'"finish_reason":"length"') == 2
        assert answer.content.endswith(b"data: [DONE]\n\n")
    else:
        assert [choice["text"] for choice in answer.json()["choices"]] == ["hi", "hi"]
        assert answer.json()["usage"]["completion_tokens"] == 0


def scored(fleet: ScriptedFleet, ids: list[int]) -> dict[str, Any]:
    """Return the logprobs object of tokens that start with a prompt, with the scripted worker's values."""
    texts = [fleet.tokenizer.decode([id_]) for id_ in ids]
    return {
        "tokens": texts,
        "token_logprobs": [None, *[-0.5] * (len(ids) - 1)],
        "top_logprobs": [None, *({text: -0.5} for text in texts[1:])],
        "text_offset": [len("".join(texts[:i])) for i in range(len(texts))],
    }


@pytest.mark.parametrize("background", [False, True])
async def test_echo_with_logprobs_scores_the_prompt_too(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, background: bool
) -> None:
    fleet.script = lambda submit, body: Script(text=" lazy", eos=False, finish="length")
    body = {**COMPLETION, "prompt": ["the dog", "fox"], "echo": True, "logprobs": 0, "background": background}
    answer = (await http.post("/v1/completions", json=body)).json()
    if background:
        job = await http.get(f"/v1/jobs/{answer['id']}", headers={"prefer": "wait=20"})
        answer = job.json()["result"]
    for choice, prompt in zip(answer["choices"], body["prompt"], strict=True):
        ids = fleet.tokenizer.encode(prompt).ids + fleet.tokenizer.encode(" lazy").ids
        assert choice["text"] == prompt + " lazy"
        assert choice["logprobs"] == scored(fleet, ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_can_be_scored_alone(client: AsyncOpenAI, fleet: ScriptedFleet, stream: bool) -> None:
    ids = fleet.tokenizer.encode("the quick dog").ids
    if stream:
        chunks = await client.completions.create(
            model="base", prompt="the quick dog", echo=True, logprobs=0, max_tokens=0, stream=True
        )
        [first] = [chunk.choices[0] async for chunk in chunks]
        assert (first.text, first.finish_reason) == ("the quick dog", "length")
    else:
        whole = await client.completions.create(model="base", prompt=ids, echo=True, logprobs=0, max_tokens=0)
        first = whole.choices[0]
        assert (first.text, first.finish_reason) == ("the quick dog", "length")
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 0)
    assert first.logprobs is not None
    assert first.logprobs.model_dump() == scored(fleet, ids)


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_the_best_of_several_choices_are_shown(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, logprobs: int | None
) -> None:
    def worse(submit: m.RequestHead, body: m.Body) -> Script:
        return Script(text=str(submit.rid[-1]), logprob=-1.0 * (int(submit.rid[-1]) * 3 % 4), eos=False)

    fleet.script = worse
    body = {**COMPLETION, "prompt": ["the dog", "fox"], "n": 2, "best_of": 4, "logprobs": logprobs}
    answer = (await http.post("/v1/completions", json=body)).json()
    # The mean logprobs of choices 0 to 3 are 0, -3, -2 and -1; choices 4 to 7 belong to the second prompt.
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "0"),
        (1, "3"),
        (2, "4"),
        (3, "7"),
    ]
    assert all((choice["logprobs"] is None) == (logprobs is None) for choice in answer["choices"])
    prompts = sum(len(fleet.tokenizer.encode(prompt).ids) for prompt in body["prompt"])
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (prompts, 8)
    assert len(fleet.seen) == 8


# ---------------------------------------------------------------- ends


async def test_min_tokens_and_stop_tokens(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    text = "stop and stop again"
    fleet.script = lambda submit, body: Script(text=text)
    tokens = [fleet.tokenizer.decode([id_]) for id_ in fleet.tokenizer.encode(text).ids]
    num_first = 1 + next(i for i in range(len(tokens)) if "stop" in "".join(tokens[: i + 1]))
    body = {**COMPLETION, "stop": "stop", "max_tokens": 60}
    assert (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"] == ""
    later = (await http.post("/v1/completions", json={**body, "min_tokens": num_first})).json()
    assert later["choices"][0]["text"] == "stop and "
    assert later["choices"][0]["finish_reason"] == "stop"
    ids = fleet.tokenizer.encode(text).ids
    ended = (await http.post("/v1/completions", json={**body, "stop": None, "stop_token_ids": [ids[4]]})).json()
    assert ended["choices"][0]["text"] == fleet.tokenizer.decode(ids[: ids.index(ids[4])])
    assert ended["choices"][0]["finish_reason"] == "stop"


async def test_end_tokens_never_show(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(text="a<|im_end|>b")
    body = {**COMPLETION, "max_tokens": 60}
    assert (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"] == "a"
    ignored = (await http.post("/v1/completions", json={**body, "ignore_eos": True})).json()
    assert ignored["choices"][0]["text"] == "ab"


# ---------------------------------------------------------------- logprobs


@pytest.mark.parametrize("top", [None, 0, 3])
async def test_chat_logprobs(client: AsyncOpenAI, fleet: ScriptedFleet, top: int | None) -> None:
    fleet.script = lambda submit, body: Script(text="a é")
    extra: dict[str, Any] = {} if top is None else {"top_logprobs": top}
    question: dict[str, Any] = {"model": "base", "messages": CHAT["messages"], "logprobs": True, **extra}
    answer = await client.chat.completions.create(**question)
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content
    assert entries is not None
    assert b"".join(bytes(entry.bytes or []) for entry in entries) == "a é<|im_end|>".encode()
    assert len(entries) == len(fleet.tokenizer.encode("a é").ids) + 1
    assert all(entry.logprob == pytest.approx(-0.5) for entry in entries)
    assert [len(entry.top_logprobs) for entry in entries] == [top or 0] * len(entries)
    # The chosen token is first even if others are more likely; it may also be the script's most likely one.
    assert all([t.token for t in entry.top_logprobs][:1] == [entry.token][: top or 0] for entry in entries)
    likeliest = [[t.logprob for t in entry.top_logprobs[1:]] for entry in entries]
    assert all(found in ([-1.0, -2.0, -3.0][: (top or 1) - 1], [-2.0, -3.0][: (top or 1) - 1]) for found in likeliest)
    assert [entry.token for entry in entries][-3:] == ["bytes:\\xc3", "bytes:\\xa9", "<|im_end|>"]
    streamed = [
        entry
        async for chunk in await client.chat.completions.create(**question, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == entries
    plain = await client.chat.completions.create(model="base", messages=[{"role": "user", "content": "hi"}])
    assert plain.choices[0].logprobs is None


async def test_every_counted_token_has_its_logprob(
    subtests: pytest.Subtests, http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    for end in [
        {},
        {"stop": "dog"},
        {"stop_token_ids": [1]},
        {"max_tokens": 2},
        {"text": ""},
        {"text": "", "max_tokens": 1},
    ]:
        for path in ["completions", "completions with echo", "chat/completions"]:
            for stream in [False, True]:
                with subtests.test(stream=stream, path=path, end=end):
                    fields = dict(end)
                    text = fields.pop("text", "the dog sleeps")
                    fleet.script = lambda submit, body, text=text: Script(text=text)
                    body = {
                        **(CHAT if "chat" in path else COMPLETION),
                        "logprobs": True if "chat" in path else 0,
                        **fields,
                    }
                    body |= {"echo": "echo" in path} if "chat" not in path else {"top_logprobs": 0}
                    body |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
                    answers = events_of(await http.post(f"/v1/{path.split()[0]}", json=body))
                    usage = answers[-1]["usage"]
                    found = [
                        choice["logprobs"] for answer in answers for choice in answer["choices"] if choice["logprobs"]
                    ]
                    num = sum(len(logprobs["content" if "chat" in path else "tokens"]) for logprobs in found)
                    assert num == usage["completion_tokens"] + (usage["prompt_tokens"] if "echo" in path else 0)
                    assert usage["completion_tokens"] >= 1


@pytest.mark.parametrize("num", [0, 3])
async def test_completion_logprobs(client: AsyncOpenAI, fleet: ScriptedFleet, num: int) -> None:
    fleet.script = lambda submit, body: Script(text="the dog", chunk=2)
    answer = await client.completions.create(model="base", prompt="hi", logprobs=num)
    lists = answer.choices[0].logprobs
    assert lists is not None
    assert lists.tokens is not None
    assert lists.text_offset is not None
    assert lists.token_logprobs is not None
    assert lists.top_logprobs is not None
    assert "".join(lists.tokens) == "the dog<|im_end|>"
    assert answer.choices[0].text == "the dog"
    for offset, token in zip(lists.text_offset, lists.tokens, strict=True):
        assert "the dog<|im_end|>"[offset:].startswith(token)
    assert all(math.isclose(value, -0.5) for value in lists.token_logprobs)
    for token, top in zip(lists.tokens, lists.top_logprobs, strict=True):
        assert next(iter(top.items())) == (token, pytest.approx(-0.5)), "the chosen one comes first"
        assert len(top) in ({1} if num == 0 else {num, num + 1})
    pieces = [
        chunk.choices[0].logprobs
        async for chunk in await client.completions.create(model="base", prompt="hi", logprobs=num, stream=True)
        if chunk.choices[0].logprobs
    ]
    assert [token for piece in pieces for token in piece.tokens or []] == lists.tokens
    assert [offset for piece in pieces for offset in piece.text_offset or []] == lists.text_offset


def test_tokens_have_their_true_bytes() -> None:
    byte_level = Tokenizer(models.BPE({"Ã": 0, "©": 1, "Ġa": 2, "Ċ": 3}, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel()
    byte_level.decoder = decoders.Sequence([decoders.ByteLevel()])
    byte_level.add_special_tokens(["<|end|>"])
    byte_level.add_tokens(["neu é"])
    tokens = BaseTokens(byte_level.to_str()).table
    assert [tokens.bytes_of(i) for i in range(6)] == [b"\xc3", b"\xa9", b" a", b"\n", b"<|end|>", "neu é".encode()]
    assert [tokens.text_of(i) for i in range(3)] == ["bytes:\\xc3", "bytes:\\xa9", " a"]
    pieces = Tokenizer(models.BPE({"▁the": 0, "<0xC3>": 1, "é": 2, "<0x41": 3}, [], byte_fallback=True))
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokens = BaseTokens(pieces.to_str()).table
    assert [tokens.bytes_of(i) for i in range(4)] == [b" the", b"\xc3", "é".encode(), b"<0x41"]
    assert tokens.bytes_of(99) == b""


# ---------------------------------------------------------------- models, ids, metrics


async def test_models_are_listed_base_first(client: AsyncOpenAI, fleet: ScriptedFleet) -> None:
    await fleet.add_adapter("org/zulu", "d2")
    await fleet.add_adapter("alpha", "d1")
    await fleet.add_adapter("broken", state="failed", reason="rank 0")
    models_ = [model.model_dump() async for model in client.models.list()]
    assert [model["id"] for model in models_] == [BASE_NAME, "alpha", "broken", "org/zulu"]
    base, alpha, broken, zulu = models_
    assert (base["parent"], base["root"], base["object"]) == (None, BASE_NAME, "model")
    assert {model["parent"] for model in models_[1:]} == {BASE_NAME}
    assert (alpha["digest"], alpha["rank"], alpha["state"], alpha["root"]) == ("d1", 8, "on_disk", "local:alpha")
    assert (broken["digest"], broken["rank"], broken["state"], broken["reason"]) == (None, None, "failed", "rank 0")
    for name, wanted in (("org/zulu", zulu), ("base:alpha", alpha), ("broken", broken), (BASE_NAME, base)):
        assert (await client.models.retrieve(name)).model_dump() == wanted
    assert (await client.models.retrieve("base")).id == BASE_NAME


async def test_a_slash_in_a_name_may_be_encoded(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    await fleet.add_adapter("org/zulu", "d2")
    for path in ("/v1/models/org/zulu", "/v1/models/org%2Fzulu"):
        assert (await http.get(path)).json()["id"] == "org/zulu"


async def test_an_adapter_moved_to_other_content_is_served_at_once(
    http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    prints: list[str] = []
    for digest in ("d1", "d2", "d1"):
        await fleet.add_adapter("alpha", digest)
        answer = (await http.post("/v1/completions", json={**COMPLETION, "model": "alpha"})).json()
        prints.append(answer["system_fingerprint"])
    assert [submit.digest for submit, _ in fleet.seen] == ["d1", "d2", "d1"]
    assert prints[0] == prints[2] != prints[1]


async def test_request_ids_are_kept_or_made(http: httpx2.AsyncClient, client: AsyncOpenAI) -> None:
    answer = await http.post("/v1/completions", json=COMPLETION, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    answer = await http.get("/health", headers={"x-request-id": "not mine"})
    assert answer.headers["x-request-id"].startswith("req_")
    assert int(answer.headers["openai-processing-ms"]) >= 0
    completion = await client.completions.create(model="base", prompt="hi")
    assert (completion._request_id or "").startswith("req_")
