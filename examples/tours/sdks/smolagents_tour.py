"""smolagents' OpenAIModel: a chat, a stream, a tool call, a response format, an agent's step, errors."""

from __future__ import annotations

import json

import openai
from checks import MAX_TOKENS, QUESTION, Tour, differ, raises, same
from pydantic import BaseModel
from smolagents import ChatMessage, MessageRole, OpenAIModel, ToolCallingAgent, tool


class City(BaseModel):
    """A city of the world."""

    name: str
    is_capital: bool


@tool
def get_weather(city: str) -> str:
    """Tell the weather of a city.

    Args:
        city: The name of the city
    """
    return f"It is sunny in {city}."


def main() -> None:
    """Use every kind of call once."""
    tour = Tour()

    def model(name: str, max_tokens: int = MAX_TOKENS) -> OpenAIModel:
        return OpenAIModel(
            name, api_base=tour.v1, api_key=tour.key, max_tokens=max_tokens, temperature=0,
            client_kwargs={"max_retries": 0},
        )  # fmt: skip

    messages = [ChatMessage(role=MessageRole.USER, content=QUESTION)]
    answer = ""
    with tour.check("base and adapter answer differently"):
        whole = model(tour.adapter).generate(messages)
        answer = whole.content
        differ(model(tour.base).generate(messages).content, answer)
        assert 0 < whole.token_usage.output_tokens <= MAX_TOKENS
    with tour.check("a stream equals the whole answer"):
        same("".join(part.content or "" for part in model(tour.adapter).generate_stream(messages)), answer)
    with tour.check("a tool call"):
        called = model(tour.base, 100).generate(messages, tools_to_call_from=[get_weather])
        arguments = called.tool_calls[0].function.arguments
        same(list(json.loads(arguments) if isinstance(arguments, str) else arguments), ["city"])
    with tour.check("a response format"):
        form = {"type": "json_schema", "json_schema": {"name": "City", "schema": City.model_json_schema()}}
        City.model_validate_json(model(tour.base, 200).generate(messages, response_format=form).content)
    with tour.check("an agent completes its steps"):
        agent = ToolCallingAgent(tools=[get_weather], model=model(tour.base, 100), max_steps=2, verbosity_level=0)
        run = agent.run(QUESTION, return_full_result=True)
        assert run.state in ("success", "max_steps_error")
        assert run.token_usage.output_tokens > 0
        assert any(step.get("tool_calls") for step in run.steps), "no step has a tool call"
    with tour.check("errors"):
        with raises(openai.NotFoundError, "nobody-has-this"):
            model("nobody-has-this").generate(messages)
        with raises(openai.BadRequestError, "max_tokens"):
            model(tour.base, 1 << 30).generate(messages)
    tour.end()


if __name__ == "__main__":
    main()
