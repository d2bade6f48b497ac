"""Pydantic AI: agents with text, streams, tools, and each way of structured outputs; errors."""

from __future__ import annotations

import asyncio

from checks import MAX_TOKENS, QUESTION, Tour, differ, raises, same
from pydantic import BaseModel
from pydantic_ai import Agent, ModelSettings, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    """A city of the world."""

    name: str
    is_capital: bool


async def tour_all(tour: Tour) -> None:
    """Use every kind of run once."""
    provider = OpenAIProvider(base_url=tour.v1, api_key=tour.key)
    brief = ModelSettings(temperature=0, max_tokens=MAX_TOKENS)
    wide = ModelSettings(temperature=0, max_tokens=200)

    def agent(name: str, settings: ModelSettings = brief, **parts: object) -> Agent:
        return Agent(OpenAIChatModel(name, provider=provider), model_settings=settings, **parts)

    answer = ""
    with tour.check("base and adapter answer differently"):
        run = await agent(tour.adapter).run(QUESTION)
        answer = run.output
        differ((await agent(tour.base).run(QUESTION)).output, answer)
    with tour.check("a stream equals the whole answer"):
        async with agent(tour.adapter).run_stream(QUESTION) as streamed:
            parts = [part async for part in streamed.stream_text(delta=True, debounce_by=None)]
        same("".join(parts), answer)
    with tour.check("structured outputs: by the schema, and by a tool"):
        for form in (NativeOutput(City), ToolOutput(City)):
            run = await agent(tour.base, wide, output_type=form).run(QUESTION)
            assert isinstance(run.output, City)
    with tour.check("a structured output while it streams"):
        async with agent(tour.base, wide, output_type=NativeOutput(City)).run_stream(QUESTION) as streamed:
            last = [city async for city in streamed.stream_output(debounce_by=None)][-1]
        assert isinstance(last, City)
    with tour.check("a conversation is continued"):
        first = await agent(tour.adapter).run(QUESTION)
        second = await agent(tour.base).run("And of Italy?", message_history=first.all_messages())
        assert second.output
        assert len(second.all_messages()) > len(first.all_messages())
    with tour.check("errors"):
        with raises(ModelHTTPError, "404", "nobody-has-this"):
            await agent("nobody-has-this").run(QUESTION)
        with raises(ModelHTTPError, "400", "max_"):
            await agent(tour.base, ModelSettings(max_tokens=1 << 30)).run(QUESTION)


def main() -> None:
    """Use every kind of run once."""
    tour = Tour()
    asyncio.run(tour_all(tour))
    tour.end()


if __name__ == "__main__":
    main()
