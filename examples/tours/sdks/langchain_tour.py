"""LangChain's ChatOpenAI: invoke, stream, batch, tools, structured outputs, errors."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from checks import MAX_TOKENS, QUESTION, TEXTS, Tour, differ, raises, same, same_vectors
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class City(BaseModel):
    """A city of the world."""

    name: str
    is_capital: bool


@tool
def get_weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"It is sunny in {city}."


def main() -> None:
    """Use every kind of call once."""
    tour = Tour()
    where: dict[str, Any] = {"base_url": tour.v1, "api_key": tour.key, "temperature": 0, "max_retries": 0}
    base = ChatOpenAI(model=tour.base, max_tokens=MAX_TOKENS, **where)
    adapter = ChatOpenAI(model=tour.adapter, max_tokens=MAX_TOKENS, **where)
    long = ChatOpenAI(model=tour.base, max_tokens=200, **where)
    answer = ""
    with tour.check("base and adapter answer differently"):
        whole = adapter.invoke(QUESTION)
        answer = whole.content
        differ(base.invoke(QUESTION).content, answer)
        usage = whole.usage_metadata
        same(usage["input_tokens"] + usage["output_tokens"], usage["total_tokens"])
    with tour.check("a stream equals the whole answer"):
        same("".join(str(chunk.content) for chunk in adapter.stream(QUESTION)), answer)
    with tour.check("use_responses_api: the chats' answer, a stream, a tool call, a conversation, an output"):
        responding = ChatOpenAI(model=tour.adapter, max_tokens=MAX_TOKENS, use_responses_api=True, **where)
        first = responding.invoke(QUESTION)
        same(first.text, answer)
        same("".join(chunk.text for chunk in responding.stream(QUESTION)), answer)
        again = responding.invoke([HumanMessage(QUESTION), first, HumanMessage("Why?")])
        assert again.usage_metadata["input_tokens"] > first.usage_metadata["input_tokens"]
        following = responding.invoke("Why?", previous_response_id=first.response_metadata["id"])
        same(following.text, again.text)
        wide = ChatOpenAI(model=tour.base, max_tokens=200, use_responses_api=True, **where)
        call = wide.bind_tools([get_weather], tool_choice="get_weather").invoke(QUESTION).tool_calls[0]
        same(list(call["args"]), ["city"])
        assert isinstance(wide.with_structured_output(City, method="json_schema").invoke(QUESTION), City)
    with tour.check("batch, async"):
        same(adapter.batch([QUESTION, "Who are you?"])[0].content, answer)
        same(asyncio.run(adapter.ainvoke(QUESTION)).content, answer)
    with tour.check("a system message, logprobs"):
        assert base.invoke([SystemMessage("You are brief."), HumanMessage(QUESTION)]).content
        content = base.bind(logprobs=True).invoke(QUESTION).response_metadata["logprobs"]["content"]
        assert all(token["logprob"] <= 0 for token in content)
    with tour.check("completions"):
        assert OpenAI(model=tour.adapter, max_tokens=4, **where).invoke("One, two,")
    with tour.check("a tool call and its result"):
        bound = long.bind_tools([get_weather], tool_choice="get_weather")
        asked = bound.invoke(QUESTION)
        call = asked.tool_calls[0]
        same(list(call["args"]), ["city"])
        result = get_weather.invoke(call)
        assert isinstance(result, ToolMessage)
        assert base.bind_tools([get_weather]).invoke([HumanMessage(QUESTION), asked, result]).response_metadata
        gathered = None
        for chunk in bound.stream(QUESTION):
            gathered = chunk if gathered is None else gathered + chunk
        same(gathered.tool_calls[0]["args"], call["args"])
    with tour.check("structured outputs: json_schema, function_calling"):
        for method in ("json_schema", "function_calling"):
            assert isinstance(long.with_structured_output(City, method=method).invoke(QUESTION), City)
    if tour.embedder:
        with tour.check("embeddings of base and adapter"):
            made = []
            for model in (tour.base, tour.embedder_adapter):
                # Its token counts are for OpenAI's models, so texts must be sent unsplit.
                embedder = OpenAIEmbeddings(
                    model=model, base_url=f"{tour.embedder}/v1", api_key=tour.key, check_embedding_ctx_length=False
                )
                made.append(embedder.embed_documents(TEXTS))
                same_vectors(embedder.embed_query(TEXTS[0]), made[-1][0])
            differ(*made)
    with tour.check("errors"):
        with raises(openai.NotFoundError, "nobody-has-this"):
            ChatOpenAI(model="nobody-has-this", **where).invoke(QUESTION)
        with raises(openai.BadRequestError, "max_"):
            ChatOpenAI(model=tour.base, max_tokens=1 << 30, **where).invoke(QUESTION)
    tour.end()


if __name__ == "__main__":
    main()
