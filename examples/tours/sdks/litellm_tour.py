"""LiteLLM as a client: chats, streams, completions, tools, structured outputs, errors."""

from __future__ import annotations

import asyncio
import json
import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise its import fetches prices from the network

import litellm
from checks import MAX_TOKENS, MESSAGES, TEXTS, WEATHER, Tour, differ, raises, same
from pydantic import BaseModel

GREEDY = {"temperature": 0.0, "max_tokens": MAX_TOKENS}


class City(BaseModel):
    """What a constrained answer must be."""

    name: str
    is_capital: bool


def main() -> None:
    """Use every kind of call once."""
    tour = Tour()
    where = {"api_base": tour.v1, "api_key": tour.key, "max_retries": 0}
    models = [f"openai/{tour.base}", f"openai/{tour.adapter}"]
    said: dict[str, str] = {}
    with tour.check("base and adapter answer differently"):
        for model in models:
            whole = litellm.completion(model=model, messages=MESSAGES, **GREEDY, **where)
            said[model] = whole.choices[0].message.content
            same(whole.usage.prompt_tokens + whole.usage.completion_tokens, whole.usage.total_tokens)
        differ(*said.values())
    with tour.check("a stream equals the whole answer"):
        for model in models:
            stream = litellm.completion(
                model=model, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY, **where
            )
            chunks = list(stream)
            same("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), said[model])
            built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
            assert 0 < built.usage.completion_tokens <= MAX_TOKENS
    with tour.check("async"):
        whole = asyncio.run(litellm.acompletion(model=models[1], messages=MESSAGES, **GREEDY, **where))
        same(whole.choices[0].message.content, said[models[1]])
    with tour.check("responses(), whole and streamed, a conversation, a tool call"):
        brief = {"input": MESSAGES[0]["content"], "temperature": 0.0, "max_output_tokens": 16}  # the minimum
        for model in models:
            answer = litellm.responses(model=model, **brief, **where)
            text = answer.output[0].content[0].text
            assert text.startswith(said[model]), text
            events = list(litellm.responses(model=model, stream=True, **brief, **where))
            same("".join(one.delta for one in events if one.type == "response.output_text.delta"), text)
        more = litellm.responses(model=models[0], previous_response_id=answer.id, **brief, **where)
        assert more.output
        tool = {"type": "function", **WEATHER["function"]}
        called = litellm.responses(
            model=models[0], input=MESSAGES[0]["content"], tools=[tool], tool_choice="required", temperature=0.0,
            max_output_tokens=100, **where,
        )  # fmt: skip
        assert set(json.loads(called.output[0].arguments)) == {"city", "unit"}
    with tour.check("text_completion"):
        text = litellm.text_completion(
            model=f"text-completion-openai/{tour.adapter}", prompt="One, two,", max_tokens=4, **where
        )
        assert text.choices[0].text
    with tour.check("a tool call"):
        whole = litellm.completion(
            model=models[0], messages=MESSAGES, tools=[WEATHER], tool_choice="required", max_tokens=100, temperature=0,
            **where,
        )  # fmt: skip
        assert set(json.loads(whole.choices[0].message.tool_calls[0].function.arguments)) == {"city", "unit"}
    with tour.check("a structured output"):
        held = litellm.completion(
            model=models[1], messages=MESSAGES, response_format=City, max_tokens=200, temperature=0, **where
        )
        City.model_validate_json(held.choices[0].message.content)
    with tour.check("Anthropic's route: completion(), whole and streamed, a tool call; anthropic_messages()"):
        there = {"api_base": tour.url, "api_key": tour.key, "max_retries": 0}
        model = f"anthropic/{tour.adapter}"
        whole = litellm.completion(model=model, messages=MESSAGES, **GREEDY, **there)
        same(whole.choices[0].message.content, said[models[1]])
        stream = litellm.completion(model=model, messages=MESSAGES, stream=True, **GREEDY, **there)
        same("".join(chunk.choices[0].delta.content or "" for chunk in stream), said[models[1]])
        called = litellm.completion(
            model=model, messages=MESSAGES, tools=[WEATHER], tool_choice="required", max_tokens=100, **there
        )
        assert set(json.loads(called.choices[0].message.tool_calls[0].function.arguments)) == {"city", "unit"}
        message = asyncio.run(litellm.anthropic_messages(model=model, messages=MESSAGES, **GREEDY, **there))
        same(message["content"][0]["text"], said[models[1]])
    if tour.embedder:
        with tour.check("embeddings of base and adapter"):
            there = {"api_base": f"{tour.embedder}/v1", "api_key": tour.key}
            made = [
                litellm.embedding(model=f"openai/{model}", input=TEXTS, **there)
                for model in (tour.base, tour.embedder_adapter)
            ]
            assert all(len(answer.data) == len(TEXTS) for answer in made)
            differ(made[0].data[0]["embedding"], made[1].data[0]["embedding"])
    with tour.check("errors"):
        with raises(litellm.exceptions.NotFoundError, "nobody-has-this"):
            litellm.completion(model="openai/nobody-has-this", messages=MESSAGES, **where)
        with raises(litellm.exceptions.BadRequestError, "max_tokens"):
            litellm.completion(model=models[0], messages=MESSAGES, max_tokens=1 << 30, **where)
    tour.end()


if __name__ == "__main__":
    main()
