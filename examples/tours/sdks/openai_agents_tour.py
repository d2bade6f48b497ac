"""OpenAI's Agents SDK: runs, streamed runs, a tool, a hand-off, an output type, errors."""

from __future__ import annotations

import asyncio

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIConversationsSession,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from agents.items import HandoffCallItem, ToolCallOutputItem
from checks import MAX_TOKENS, QUESTION, Tour, differ, raises, same
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel


class City(BaseModel):
    """What a constrained answer must be."""

    name: str
    is_capital: bool


@function_tool
def get_weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"It is sunny in {city}."


async def tour_all(tour: Tour) -> None:
    """Use every kind of run once."""
    client = openai.AsyncOpenAI(base_url=tour.v1, api_key=tour.key, max_retries=0)
    brief = ModelSettings(temperature=0, max_tokens=MAX_TOKENS)
    forced = ModelSettings(temperature=0, max_tokens=100, tool_choice="required")

    def agent(name: str, settings: ModelSettings = brief, **parts: object) -> Agent:
        model = OpenAIChatCompletionsModel(model=name, openai_client=client)
        return Agent(name=name, instructions="Be brief.", model=model, model_settings=settings, **parts)

    answer = ""
    with tour.check("base and adapter answer differently"):
        run = await Runner.run(agent(tour.adapter), QUESTION)
        answer = run.final_output
        differ((await Runner.run(agent(tour.base), QUESTION)).final_output, answer)
        usage = run.context_wrapper.usage
        same(usage.input_tokens + usage.output_tokens, usage.total_tokens)
        assert usage.output_tokens <= MAX_TOKENS
    with tour.check("a streamed run equals the whole answer"):
        streamed = Runner.run_streamed(agent(tour.adapter), QUESTION)
        parts = [
            event.data.delta
            async for event in streamed.stream_events()
            if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent)
        ]
        same("".join(parts), answer)
        same(streamed.final_output, answer)
    with tour.check("a tool is called, and its result is sent back"):
        run = await Runner.run(agent(tour.base, forced, tools=[get_weather]), QUESTION, max_turns=3)
        outputs = [item.output for item in run.new_items if isinstance(item, ToolCallOutputItem)]
        assert outputs, "no tool was called"
        assert all(output.startswith("It is sunny in ") for output in outputs)
        assert isinstance(run.final_output, str)
    with tour.check("a hand-off from the base to the adapter"):
        first = agent(tour.base, forced, handoffs=[agent(tour.adapter)])
        run = await Runner.run(first, QUESTION, max_turns=3)
        assert any(isinstance(item, HandoffCallItem) for item in run.new_items)
        same(run.last_agent.name, tour.adapter)
        assert run.final_output
    with tour.check("an output type"):
        wide = ModelSettings(temperature=0, max_tokens=200)
        run = await Runner.run(agent(tour.adapter, wide, output_type=City), QUESTION)
        assert isinstance(run.final_output, City)
    with tour.check("on Responses: the chats' answer, streamed, a tool, an output type, a conversation"):
        # A streamed run treats a truncated answer as a failure.
        wide = ModelSettings(temperature=0, max_tokens=200)
        answer = (await Runner.run(agent(tour.adapter, wide), QUESTION)).final_output

        def responding(name: str, settings: ModelSettings = wide, **parts: object) -> Agent:
            model = OpenAIResponsesModel(model=name, openai_client=client)
            return Agent(name=name, instructions="Be brief.", model=model, model_settings=settings, **parts)

        run = await Runner.run(responding(tour.adapter), QUESTION)
        same(run.final_output, answer)
        streamed = Runner.run_streamed(responding(tour.adapter), QUESTION)
        async for _ in streamed.stream_events():
            pass
        same(streamed.final_output, answer)
        tooled = await Runner.run(responding(tour.base, forced, tools=[get_weather]), QUESTION, max_turns=3)
        outputs = [item.output for item in tooled.new_items if isinstance(item, ToolCallOutputItem)]
        assert outputs, "no tool was called"
        assert all(output.startswith("It is sunny in ") for output in outputs)
        held = await Runner.run(responding(tour.adapter, output_type=City), QUESTION)
        assert isinstance(held.final_output, City)
        more = await Runner.run(responding(tour.adapter), "And of Italy?", previous_response_id=run.last_response_id)
        assert more.final_output
        again = await Runner.run(responding(tour.adapter), [*run.to_input_list(), {"role": "user", "content": "Why?"}])
        assert again.final_output
    with tour.check("conversations: a session that the client keeps there, and runs that are turns of one"):
        session = OpenAIConversationsSession(openai_client=client)
        for question in (QUESTION, "And of Italy?"):
            assert (await Runner.run(responding(tour.adapter), question, session=session)).final_output
        same([item["role"] for item in await session.get_items()], ["user", "assistant"] * 2)
        assert await session.pop_item()
        await session.clear_session()
        one = (await client.conversations.create()).id
        run = await Runner.run(responding(tour.adapter), QUESTION, conversation_id=one)
        same(run.final_output, answer)
        streamed = Runner.run_streamed(responding(tour.base), "Why?", conversation_id=one)
        async for _ in streamed.stream_events():
            pass
        roles = [item.role async for item in client.conversations.items.list(one, order="asc")]
        same(roles, ["user", "assistant"] * 2)
    with tour.check("errors"):
        with raises(openai.NotFoundError, "nobody-has-this"):
            await Runner.run(agent("nobody-has-this"), QUESTION)
        with raises(openai.BadRequestError, "max_tokens"):
            await Runner.run(agent(tour.base, ModelSettings(max_tokens=1 << 30)), QUESTION)
    await client.close()


def main() -> None:
    """Use every kind of run once, without sending traces anywhere."""
    set_tracing_disabled(True)
    tour = Tour()
    asyncio.run(tour_all(tour))
    tour.end()


if __name__ == "__main__":
    main()
