"""A tour of OpenAI's clients, unchanged: `make tour-openai URL=http://127.0.0.1:8000 ADAPTER=name KEY=any`.

It runs the `openai` package, LiteLLM and LangChain's ChatOpenAI in a separate environment: with `openai` 3.x, or with
2.x as `make tour-openai2`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise its import fetches prices from the network

import litellm
import openai
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletionMessageParam

QUESTION = "What is the capital of France?"
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]
GREEDY = {"temperature": 0.0, "max_tokens": 12}


def tour_openai(url: str, model: str, key: str) -> str:
    """Use every kind of call once; return the greedy answer. Raises AssertionError for an unexpected answer."""
    print("openai", openai.__version__)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    names = [entry.id for entry in client.models.list()]
    assert model in (*names, "base")
    whole = client.chat.completions.create(model=model, messages=MESSAGES, **GREEDY)
    assert whole.usage is not None
    answer = whole.choices[0].message.content or ""
    assert whole.usage.completion_tokens <= 12
    assert (whole.system_fingerprint or "").startswith("fp_")
    stream = client.chat.completions.create(
        model=model, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer
    assert chunks[-1].usage == whole.usage or chunks[-1].usage is not None
    several = client.chat.completions.create(
        model=model, messages=MESSAGES, n=3, seed=1, max_tokens=4, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    logprobs = several.choices[0].logprobs
    assert logprobs is not None
    assert all(len(token.top_logprobs) == 2 for token in logprobs.content or [])
    print("openai chat:", repr(answer))

    best = client.completions.create(model=model, prompt=["One, two,", "Three, four,"], n=1, best_of=3, max_tokens=4)
    assert [choice.index for choice in best.choices] == [0, 1]
    scored = client.completions.create(model=model, prompt="Paris is big", echo=True, logprobs=1, max_tokens=0)
    scores = scored.choices[0].logprobs
    assert scores is not None
    assert scores.token_logprobs is not None
    assert scores.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in scores.token_logprobs[1:])
    assert scored.choices[0].text == "Paris is big"
    raw = client.completions.with_raw_response.create(model=model, prompt="x", max_tokens=1, logit_bias={"5": 100})
    assert raw.headers["x-request-id"]
    print("openai completions: best_of, echo with logprobs, logit_bias, headers")
    _expect(openai.NotFoundError, lambda: client.chat.completions.create(model="nobody-has-this", messages=MESSAGES))
    _expect(openai.BadRequestError, lambda: client.completions.create(model=model, prompt="x", max_tokens=1 << 30))

    async def leave_early() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as slow:
            stream = await slow.chat.completions.create(model=model, messages=MESSAGES, stream=True, max_tokens=200)
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(leave_early())
    return answer


def tour_litellm(url: str, model: str, key: str, answer: str) -> None:
    """Check that LiteLLM gets the same greedy answer, whole and streamed."""
    where = {"api_base": f"{url}/v1", "api_key": key}
    whole = litellm.completion(model=f"openai/{model}", messages=MESSAGES, **GREEDY, **where)
    assert whole.choices[0].message.content == answer
    stream = litellm.completion(model=f"openai/{model}", messages=MESSAGES, stream=True, **GREEDY, **where)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer
    text = litellm.text_completion(model=f"text-completion-openai/{model}", prompt="One, two,", max_tokens=4, **where)
    assert text.choices[0].text
    _expect(
        litellm.exceptions.NotFoundError,
        lambda: litellm.completion(model="openai/nobody-has-this", messages=MESSAGES, **where),
    )
    print("litellm: completion, stream, text_completion")


def tour_langchain(url: str, model: str, key: str, answer: str) -> None:
    """Check that LangChain gets the same greedy answer, whole, streamed and in a batch."""
    chat = ChatOpenAI(base_url=f"{url}/v1", api_key=key, model=model, temperature=0, max_tokens=12)  # type: ignore
    whole = chat.invoke(QUESTION)
    assert whole.content == answer
    assert whole.usage_metadata is not None
    assert "".join(str(chunk.content) for chunk in chat.stream(QUESTION)) == answer
    batch = chat.batch([QUESTION, "Who are you?"])
    assert batch[0].content == answer
    system = chat.invoke([SystemMessage("You are brief."), HumanMessage(QUESTION)])
    assert system.content
    logprobs = chat.bind(logprobs=True).invoke(QUESTION).response_metadata["logprobs"]["content"]
    assert logprobs
    print("langchain: invoke, stream, batch, logprobs")


def _expect(kind: type[Exception], call: Callable[[], object]) -> None:
    try:
        call()
    except kind as error:
        print(f"{kind.__name__}: {str(error)[:100]}")
    else:
        raise AssertionError(f"{kind.__name__} was expected")


if __name__ == "__main__":
    url, model, key = [*sys.argv[1:], *("", "base", "any")[len(sys.argv) - 1 :]][:3]
    said = tour_openai(url, model, key)
    tour_litellm(url, model, key, said)
    tour_langchain(url, model, key, said)
