"""`top_logprobs: -1` and `prompt_logprobs: -1`: the whole vocabulary, bounded in bytes, written off the event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest
from helpers.openai_events import events_of
from helpers.scripted_fleet import Script, ScriptedFleet
from tokenizers import Tokenizer

from gateway.calls.size import MAX_WHOLE_BYTES
from gateway.http.paths import CHAT, COMPLETIONS
from protocol.wire import messages as m

USER = [{"role": "user", "content": "hi"}]
NUM = 2


@pytest.fixture(autouse=True)
def a_token_each_step(fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script("dog", chunk=1, eos=False)


def by_id(own: int, size: int) -> dict[int, float]:
    """Return the scripted worker's logprobs of the vocabulary at a position with token `own`, the most likely first."""
    return {(own + i) % size: -1.0 - i for i in range(size)}


async def asked(http: httpx2.AsyncClient, path: str, **fields: Any) -> Any:
    body = {"model": "base", "max_tokens": NUM, **({"messages": USER} if path == CHAT else {"prompt": "hi"}), **fields}
    found = events_of(await http.post(path, json=body))
    return found if fields.get("stream") else found[0]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_has_all_tokens_at_each_place(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, tokenizer: Tokenizer, stream: bool
) -> None:
    found = await asked(http, CHAT, logprobs=True, top_logprobs=-1, return_tokens_as_token_ids=True, stream=stream)
    chunks = found if stream else [found]
    content = [one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert len(content) == NUM
    for one in content:
        own = int(one["token"].removeprefix("token_id:"))
        top = {int(other["token"].removeprefix("token_id:")): other["logprob"] for other in one["top_logprobs"]}
        assert one["logprob"] == -0.5  # the worker reports -0.5 for the chosen token, although it is -1 among all
        assert list(top.items()) == list((by_id(own, tokenizer.get_vocab_size()) | {own: -0.5}).items())
    assert fleet.seen[-1][1].sampling.vocabulary == tokenizer.get_vocab_size()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_completion_has_all_texts_at_each_place(
    http: httpx2.AsyncClient, tokenizer: Tokenizer, stream: bool
) -> None:
    size = tokenizer.get_vocab_size()
    found = await asked(http, COMPLETIONS, logprobs=-1, return_tokens_as_token_ids=True, stream=stream, echo=True)
    lists = [chunk["choices"][0]["logprobs"] for chunk in (found if stream else [found])]
    tokens = [int(token.removeprefix("token_id:")) for one in lists for token in one["tokens"]]
    tops = [top for one in lists for top in one["top_logprobs"]]
    assert tokens[:-NUM] == tokenizer.encode("hi").ids
    assert tops[0] is None
    for own, top in list(zip(tokens, tops, strict=True))[1:]:
        assert top == {f"token_id:{id_}": value for id_, value in (by_id(own, size) | {own: -0.5}).items()}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_prompts_have_all_tokens_at_each_place(http: httpx2.AsyncClient, tokenizer: Tokenizer, path: str) -> None:
    found = await asked(http, path, prompt_logprobs=-1, return_token_ids=True)
    holder = found if path == CHAT else found["choices"][0]
    ids, given = holder["prompt_token_ids"], holder["prompt_logprobs"]
    assert given[0] is None
    for own, entries in list(zip(ids, given, strict=True))[1:]:
        likely = by_id(own, tokenizer.get_vocab_size())
        assert {int(id_): one["logprob"] for id_, one in entries.items()} == likely | {own: -0.5}
        ranks = {int(id_): one["rank"] for id_, one in entries.items()}
        assert ranks == {id_: rank for rank, id_ in enumerate(likely, 1)} | {own: 7}


async def test_what_is_too_much_is_refused_before_any_work(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    size = fleet.tokenizer.get_vocab_size()
    await fleet.set_context(http.base_url, 1 << 16)
    fits = MAX_WHOLE_BYTES // m.logprob_record_bytes(m.WHOLE, size)
    for path, fields in ((COMPLETIONS, {"logprobs": -1}), (CHAT, {"logprobs": True, "top_logprobs": -1})):
        for n, num in ((1, fits + 1), (4, fits // 4 + 1)):
            body = {"model": "base", "prompt": "hi", "messages": USER, "n": n, "max_tokens": num, **fields}
            body.pop("messages" if path == COMPLETIONS else "prompt")
            answer = await http.post(path, json=body)
            text = answer.json()["error"]["message"]
            assert answer.status_code == 400, text
            assert f"each of {size}" in text
            assert str(MAX_WHOLE_BYTES) in text
    assert fleet.seen == []


async def test_a_whole_vocabulary_is_kept_nowhere(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    for path, name, fields in (
        (CHAT, "top_logprobs", {"messages": USER, "logprobs": True}),
        (CHAT, "prompt_logprobs", {"messages": USER}),
        (COMPLETIONS, "logprobs", {"prompt": "hi"}),
    ):
        body = {"model": "base", name: -1, **fields}
        jobs = await http.post(path, json={**body, "background": True})
        keyed = await http.post(path, json=body, headers={"idempotency-key": "k"})
        for answer in (jobs, keyed):
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name), answer.text
    assert fleet.seen == []


async def test_many_at_once_take_turns(http: httpx2.AsyncClient, tokenizer: Tokenizer) -> None:
    """Threads write the answers concurrently, without mixing them up."""
    names = {"logprobs": True, "top_logprobs": -1, "return_tokens_as_token_ids": True}
    answers = await asyncio.gather(*(asked(http, CHAT, n=4, stream=i % 2 == 1, **names) for i in range(8)))
    for answer in answers:
        chunks = answer if isinstance(answer, list) else [answer]
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
        content = [one for choice in choices for one in choice["logprobs"]["content"]]
        assert len(content) == 4 * NUM
        assert all(len(one["top_logprobs"]) == tokenizer.get_vocab_size() for one in content)
