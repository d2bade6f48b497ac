"""Anthropic's own client: messages in every form, tools and its tool runner, an output format, models, refusals."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from anthropic import Anthropic, AsyncAnthropic, BadRequestError, NotFoundError, beta_tool
from checks import MESSAGES, Tour, differ, raises, same
from pydantic import BaseModel

MAX_TOKENS = 12
GREEDY: dict[str, Any] = {"max_tokens": MAX_TOKENS, "extra_body": {"temperature": 0}}
LONGER: dict[str, Any] = {**GREEDY, "max_tokens": 160}
WEATHER = {
    "name": "get_weather",
    "description": "Tell the weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
    },
}
ASKED: list[str] = []
"""Cities for which the runner called the tool."""


class City(BaseModel):
    """What a constrained answer must be."""

    name: Literal["Paris", "Rome", "Oslo"]  # free text may be cut off by max_tokens
    is_capital: bool


@beta_tool
def get_weather(city: Literal["Paris", "Rome", "Oslo"]) -> str:
    """Tell the weather of a city.

    Args:
        city: The name of the city
    """
    ASKED.append(city)
    return f"It rains in {city}."


def text_of(message: Any) -> str:
    """Return the text of a message."""
    return "".join(block.text for block in message.content if block.type == "text")


def models(tour: Tour, client: Anthropic) -> None:
    """List models, page by page, and retrieve one."""
    with tour.check("models, a page at a time"):
        names = [model.id for model in client.models.list(limit=1)]
        assert tour.adapter in names
        same(len(names), len(set(names)))
        shown = client.models.retrieve(tour.adapter)
        same((shown.id, shown.lifecycle), (tour.adapter, "active"))
        assert (shown.max_input_tokens or 0) > 0


def generation(tour: Tour, client: Anthropic) -> str:
    """Send requests to base and adapter, whole and streamed; return the adapter's answer."""
    ask = client.messages
    ask.create(model=tour.adapter, messages=MESSAGES, **GREEDY)  # later answers find the prompt in the cache
    whole = ask.create(model=tour.adapter, messages=MESSAGES, **GREEDY)
    answer = text_of(whole)
    with tour.check("base and adapter answer differently"):
        differ(text_of(ask.create(model=tour.base, messages=MESSAGES, **GREEDY)), answer)
        same((whole.role, whole.type, whole.model), ("assistant", "message", tour.adapter))
        assert whole.stop_reason in ("end_turn", "max_tokens")
        assert 0 < whole.usage.output_tokens <= MAX_TOKENS
    with tour.check("a stream equals the whole answer: its events, and messages.stream()"):
        text, output_tokens = "", 0
        for event in ask.create(model=tour.adapter, messages=MESSAGES, stream=True, **GREEDY):
            if event.type == "content_block_delta" and event.delta.type == "text_delta":
                text += event.delta.text
            elif event.type == "message_delta":
                output_tokens = event.usage.output_tokens
        same((text, output_tokens), (answer, whole.usage.output_tokens))
        with ask.stream(model=tour.adapter, messages=MESSAGES, **GREEDY) as stream:
            same("".join(stream.text_stream), answer)
            final = stream.get_final_message()
        same((final.stop_reason, final.usage, text_of(final)), (whole.stop_reason, whole.usage, answer))
    with tour.check("system blocks, stop_sequences, count_tokens, a prefilled answer"):
        system = [{"type": "text", "text": "You are brief.", "cache_control": {"type": "ephemeral"}}]
        asked: dict[str, Any] = {"model": tour.adapter, "messages": MESSAGES, "system": system}
        usage = ask.create(**asked, **GREEDY).usage
        counted = ask.count_tokens(**asked).input_tokens
        same(counted, usage.input_tokens + (usage.cache_read_input_tokens or 0))
        stop = answer.split()[1]
        stopped = ask.create(model=tour.adapter, messages=MESSAGES, stop_sequences=[stop], **GREEDY)
        same((stopped.stop_reason, stopped.stop_sequence), ("stop_sequence", stop))
        same(text_of(stopped), answer[: answer.index(stop)])
        begun: list[Any] = [*MESSAGES, {"role": "assistant", "content": answer.split()[0]}]
        assert text_of(ask.create(model=tour.adapter, messages=begun, **GREEDY))
    return answer


def tools(tour: Tour, client: Anthropic) -> None:
    """Get tool calls: by hand, whole and streamed, and with the client's tool runner."""
    called: dict[str, Any] = {
        "model": tour.adapter, "messages": MESSAGES, "tools": [WEATHER],
        "tool_choice": {"type": "tool", "name": "get_weather"},
    }  # fmt: skip
    with tour.check("a tool call, whole and streamed, and its result"):
        message = client.messages.create(**called, **LONGER)
        [use] = [block for block in message.content if block.type == "tool_use"]
        same((message.stop_reason, use.name, set(use.input)), ("tool_use", "get_weather", {"city", "unit"}))
        with client.messages.stream(**called, **LONGER) as stream:
            parts = [event.partial_json for event in stream if event.type == "input_json"]
            [streamed] = [block for block in stream.get_final_message().content if block.type == "tool_use"]
        same(streamed.input, use.input)
        assert len(parts) > 1
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "It rains."}
        turns: list[Any] = [*MESSAGES, message.to_param(), {"role": "user", "content": [result]}]
        assert client.messages.create(model=tour.adapter, messages=turns, tools=[WEATHER], **LONGER).content
    for stream in (False, True):
        with tour.check(f"an agent: tool_runner() completes its steps, {'streamed' if stream else 'whole'}"):
            ASKED.clear()
            runner = client.beta.messages.tool_runner(
                model=tour.adapter, messages=MESSAGES, tools=[get_weather], tool_choice={"type": "any"}, max_tokens=160,
                max_iterations=2, stream=stream,
            )  # fmt: skip
            steps = [step.get_final_message() if stream else step for step in runner]
            same([step.stop_reason for step in steps], ["tool_use"] * 2)
            assert len(ASKED) >= 1


def forms(tour: Tour, client: Anthropic) -> None:
    """Constrain an answer to a schema."""
    with tour.check("an output format: parse()"):
        parsed = client.messages.parse(
            model=tour.base, messages=MESSAGES, output_format=City, **LONGER
        )  # fmt: skip
        assert isinstance(parsed.parsed_output, City)


def refusals(tour: Tour, client: Anthropic) -> None:
    """Provoke errors, which must be the client's own exceptions and name the cause."""
    ask = client.messages
    with tour.check("errors"):
        with raises(NotFoundError, "nobody-has-this"):
            ask.create(model="nobody-has-this", messages=MESSAGES, **GREEDY)
        with raises(BadRequestError, "prompt is too long"):
            ask.create(model=tour.base, messages=[{"role": "user", "content": "one two " * 20_000}], **GREEDY)
        with raises(BadRequestError, "mcp_servers"):
            client.beta.messages.create(
                model=tour.base, messages=MESSAGES, max_tokens=5,
                mcp_servers=[{"type": "url", "name": "x", "url": "https://example.com"}],
            )  # fmt: skip
        image = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
        with raises(BadRequestError, "this model accepts text only"):
            ask.create(model=tour.base, messages=[{"role": "user", "content": [image]}], **GREEDY)
        with raises(NotFoundError, "send each to /v1/messages"):
            client.messages.batches.create(requests=[])
        refused: NotFoundError | None = None
        try:
            ask.create(model="nobody-has-this", messages=MESSAGES, **GREEDY)
        except NotFoundError as error:
            refused = error
        assert refused is not None
        assert refused.request_id
        same((refused.type, refused.error_code), ("not_found_error", "model_not_found"))


async def asynchronous(tour: Tour, answer: str) -> None:
    """Get the same answer from the asyncio client, after closing a stream early."""
    with tour.check("asyncio: a stream closed early, then the same answer"):
        async with AsyncAnthropic(base_url=tour.url, api_key=tour.key) as client:
            async with client.messages.stream(model=tour.base, messages=MESSAGES, **LONGER) as stream:
                async for _ in stream.text_stream:
                    break
            same(text_of(await client.messages.create(model=tour.adapter, messages=MESSAGES, **GREEDY)), answer)


def main() -> None:
    """Run all of it."""
    tour = Tour()
    client = Anthropic(base_url=tour.url, api_key=tour.key)
    models(tour, client)
    answer = generation(tour, client)
    tools(tour, client)
    forms(tour, client)
    refusals(tour, client)
    asyncio.run(asynchronous(tour, answer))
    with tour.check("the key as a bearer"):
        bearer = Anthropic(base_url=tour.url, auth_token=tour.key)
        same(text_of(bearer.messages.create(model=tour.adapter, messages=MESSAGES, **GREEDY)), answer)
    tour.end()


if __name__ == "__main__":
    main()
