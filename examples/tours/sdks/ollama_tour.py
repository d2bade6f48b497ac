"""Ollama's own client: the base and the adapter as models, chats and texts in every form, a format, tools, refusals."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from checks import MESSAGES, QUESTION, Tour, differ, raises, same
from ollama import AsyncClient, Client, ResponseError
from pydantic import BaseModel

GREEDY = {"temperature": 0, "num_predict": 12}
LONGER = {"temperature": 0, "num_predict": 64}


class City(BaseModel):
    """What a constrained answer must be."""

    name: str
    is_capital: bool


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number
        b: The second number
    """
    return a + b


def models(tour: Tour, client: Client) -> None:
    """List and show models."""
    with tour.check("list, show, ps"):
        assert f"{tour.adapter}:latest" in [entry.model for entry in client.list().models]
        shown = client.show(tour.adapter)
        assert {"completion", "tools"} <= set(shown.capabilities or ())
        info: Any = shown.modelinfo
        assert info[f"{info['general.architecture']}.context_length"] > 0
        running = client.ps().models
        assert running
        assert all(entry.expires_at is not None for entry in running)


def generation(tour: Tour, client: Client) -> str:
    """Send chats and prompts; return the adapter's answer."""
    client.chat(tour.adapter, MESSAGES, options=GREEDY)  # later answers find the prompt in the cache, and round alike
    whole = client.chat(tour.adapter, MESSAGES, options=GREEDY)
    answer = whole.message.content or ""
    with tour.check("chat, of the base and of the adapter, with counts and times"):
        differ(client.chat(tour.base, MESSAGES, options=GREEDY).message.content, answer)
        assert whole.done
        assert whole.done_reason in ("stop", "length")
        assert 0 < (whole.eval_count or 0) <= 12
        assert (whole.total_duration or 0) >= (whole.eval_duration or 0) > 0
    with tour.check("chat, streamed"):
        *chunks, last = client.chat(f"{tour.adapter}:latest", MESSAGES, options=GREEDY, stream=True)
        same("".join(chunk.message.content or "" for chunk in chunks), answer)
        same((last.eval_count, last.done), (whole.eval_count, True))
        assert not any(chunk.done for chunk in chunks)
    with tour.check("generate: whole, streamed, raw, with a system message"):
        same(client.generate(tour.adapter, QUESTION, options=GREEDY).response, answer)
        parts = client.generate(tour.adapter, QUESTION, options=GREEDY, stream=True)
        same("".join(part.response or "" for part in parts), answer)
        assert client.generate(tour.base, "One, two,", raw=True, options={**GREEDY, "stop": ["\n"]}).done
        assert client.generate(tour.adapter, QUESTION, system="You are brief.", options=GREEDY).prompt_eval_count
    with tour.check("logprobs"):
        scored = client.generate(tour.base, QUESTION, logprobs=True, top_logprobs=2, options=GREEDY)
        assert scored.logprobs is not None
        same(len(scored.logprobs), scored.eval_count)
        assert all(len(token.top_logprobs or ()) == 2 and token.logprob <= 0 for token in scored.logprobs)
    with tour.check("a model is loaded by a request without text"):
        same(client.generate(tour.adapter).done_reason, "load")
    return answer


def forms(tour: Tour, client: Client) -> None:
    """Constrain answers to a schema, and offer a tool."""
    with tour.check("format: a schema, any JSON"):
        held = client.chat(tour.base, MESSAGES, format=City.model_json_schema(), options=LONGER)
        City.model_validate_json(held.message.content or "")
        free = client.generate(tour.base, "Answer as JSON. " + QUESTION, format="json", options=LONGER)
        assert free.done_reason == "length" or isinstance(json.loads(free.response or ""), dict)
    with tour.check("a tool, and its result"):
        question = {"role": "user", "content": "What is 2 + 3? Use the tool."}
        asked = client.chat(tour.base, [question], tools=[add], options=LONGER)
        called = asked.message.tool_calls or []
        assert all(call.function.name == "add" for call in called)
        call = {"function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
        result = {"role": "tool", "tool_name": "add", "content": "5"}
        turns: list[Any] = [question, {"role": "assistant", "tool_calls": [call]}, result]
        assert client.chat(tour.base, turns, options=GREEDY).message.content


def refusals(tour: Tour, client: Client) -> None:
    """Provoke errors, which must have the right status and name the cause."""
    with tour.check("errors"):
        with raises(ResponseError, "nobody-has-this", "404"):
            client.chat("nobody-has-this", MESSAGES)
        with raises(ResponseError, "/v1/adapters", "404"):
            client.pull("llama3.2")
        with raises(ResponseError, "suffix", "400"):
            client.generate(tour.base, QUESTION, suffix="x")
        with raises(ResponseError, "options.mirostat", "400"):
            client.chat(tour.base, MESSAGES, options={"mirostat": 1})


async def asynchronous(tour: Tour, answer: str) -> None:
    """Get the same answer from the asyncio client, and close a stream early."""
    with tour.check("asyncio: the same answer, a stream closed early"):
        client = AsyncClient(tour.url, headers={"authorization": f"Bearer {tour.key}"})
        same((await client.chat(tour.adapter, MESSAGES, options=GREEDY)).message.content, answer)
        async for _ in await client.chat(tour.base, MESSAGES, stream=True):
            break


def embeddings(tour: Tour) -> None:
    """Request vectors from an encoder, if the tour has one."""
    if not tour.embedder:
        return
    with tour.check("embed: vectors of length 1"):
        client = Client(tour.embedder, headers={"authorization": f"Bearer {tour.key}"})
        found = client.embed(tour.base, ["one text", "another"]).embeddings
        same(len(found), 2)
        assert all(abs(sum(x * x for x in vector) - 1) < 1e-3 for vector in found)


def main() -> None:
    """Run all of it."""
    tour = Tour()
    client = Client(tour.url, headers={"authorization": f"Bearer {tour.key}"})
    models(tour, client)
    answer = generation(tour, client)
    forms(tour, client)
    refusals(tour, client)
    asyncio.run(asynchronous(tour, answer))
    embeddings(tour)
    tour.end()


if __name__ == "__main__":
    main()
