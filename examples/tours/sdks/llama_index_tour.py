"""LlamaIndex's OpenAILike: chats, streams, completions, tools, structured outputs, errors."""

from __future__ import annotations

import asyncio

import openai
from checks import MAX_TOKENS, QUESTION, TEXTS, Tour, differ, raises, same
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class City(BaseModel):
    """A city of the world."""

    name: str
    is_capital: bool


def get_weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"It is sunny in {city}."


def main() -> None:
    """Use every kind of call once."""
    tour = Tour()

    def model(name: str, max_tokens: int = MAX_TOKENS, *, chats: bool = True) -> OpenAILike:
        return OpenAILike(
            model=name, api_base=tour.v1, api_key=tour.key, temperature=0, max_tokens=max_tokens, max_retries=0,
            is_chat_model=chats, is_function_calling_model=chats, context_window=2048,
        )  # fmt: skip

    messages = [ChatMessage(role="user", content=QUESTION)]
    base, adapter = model(tour.base), model(tour.adapter)
    answer = ""
    with tour.check("base and adapter answer differently"):
        answer = adapter.chat(messages).message.content or ""
        differ(base.chat(messages).message.content, answer)
    with tour.check("a stream equals the whole answer"):
        chunks = list(adapter.stream_chat(messages))
        same("".join(chunk.delta or "" for chunk in chunks), answer)
        same(chunks[-1].message.content, answer)
    with tour.check("async"):
        same(asyncio.run(adapter.achat(messages)).message.content, answer)
    with tour.check("complete, whole and streamed"):
        plain = model(tour.adapter, chats=False)
        whole = plain.complete("One, two,").text
        assert whole
        same("".join(chunk.delta or "" for chunk in plain.stream_complete("One, two,")), whole)
    with tour.check("a tool call"):
        tool = FunctionTool.from_defaults(get_weather)
        asked = model(tour.base, 100).chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
        calls = model(tour.base).get_tool_calls_from_response(asked)
        same([(call.tool_name, list(call.tool_kwargs)) for call in calls], [("get_weather", ["city"])])
    with tour.check("a structured output"):
        held = model(tour.base, 200).as_structured_llm(City).chat(messages)
        assert isinstance(held.raw, City)
    if tour.embedder:
        with tour.check("embeddings of base and adapter"):
            there = {"api_base": f"{tour.embedder}/v1", "api_key": tour.key, "max_retries": 0}
            made = [
                OpenAILikeEmbedding(model_name=name, **there).get_text_embedding_batch(TEXTS)
                for name in (tour.base, tour.embedder_adapter)
            ]
            same([len(vectors) for vectors in made], [len(TEXTS)] * 2)
            differ(*made)
    with tour.check("errors"):
        with raises(openai.NotFoundError, "nobody-has-this"):
            model("nobody-has-this").chat(messages)
        with raises(openai.BadRequestError, "max_tokens"):
            model(tour.base, 1 << 30).chat(messages)
    tour.end()


if __name__ == "__main__":
    main()
