"""OpenAI's Python SDK: every kind of call, whole and streamed, with the base model and an adapter."""

from __future__ import annotations

import asyncio
import json

import openai
from checks import MAX_TOKENS, MESSAGES, QUESTION, TEXTS, WEATHER, Tour, differ, raises, same, same_vectors
from pydantic import BaseModel

GREEDY = {"temperature": 0.0, "max_tokens": MAX_TOKENS}


class City(BaseModel):
    """What a constrained answer must be."""

    name: str
    is_capital: bool


async def leave_early(tour: Tour) -> str:
    """Close a stream after its first chunk, then ask again with the same client; return that answer."""
    async with openai.AsyncOpenAI(base_url=tour.v1, api_key=tour.key, max_retries=0) as client:
        stream = await client.chat.completions.create(
            model=tour.adapter, messages=MESSAGES, stream=True, max_tokens=200
        )
        async for _ in stream:
            break
        await stream.close()
        whole = await client.chat.completions.create(model=tour.adapter, messages=MESSAGES, **GREEDY)
        return whole.choices[0].message.content


def responses(tour: Tour, client: openai.OpenAI, said: dict[str, str]) -> None:
    """Use the Responses API: answers must equal those of the chats."""
    made = client.responses
    brief = {"input": QUESTION, "temperature": 0, "max_output_tokens": MAX_TOKENS}
    with tour.check("responses: the chats' texts, a stream, what is kept"):
        for model in (tour.base, tour.adapter):
            whole = made.create(model=model, **brief)
            same(whole.output_text, said[model])
            same(made.retrieve(whole.id).model_dump(), whole.model_dump())
            with made.stream(model=model, **brief) as stream:
                text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            same(text, said[model])
    with tour.check("responses: in the background, resumed, cancelled, deleted"):
        events = list(made.create(model=tour.adapter, background=True, stream=True, **brief))
        same([event.sequence_number for event in events], list(range(len(events))))
        id_ = events[0].response.id
        rest = made.retrieve(id_, stream=True, starting_after=4)
        same([event.sequence_number for event in rest], list(range(5, len(events))))
        same(made.retrieve(id_).output_text, said[tour.adapter])
        long = made.create(model=tour.adapter, input=QUESTION, background=True, extra_body={"seed": 1})
        assert made.cancel(long.id).status in ("cancelled", "completed")
        made.delete(long.id)
        with raises(openai.NotFoundError, long.id):
            made.retrieve(long.id)
    with tour.check("responses: a conversation, input items, a tool call and its result, parse(), logprobs"):
        first = made.create(model=tour.base, **brief)
        second = made.create(model=tour.base, previous_response_id=first.id, **brief)
        same([item.role for item in made.input_items.list(second.id, limit=1)], ["user", "assistant", "user"])
        tool = {"type": "function", **WEATHER["function"]}
        asked = made.create(
            model=tour.base, input=QUESTION, tools=[tool], tool_choice="required", temperature=0, max_output_tokens=100
        )
        assert all(set(json.loads(call.arguments)) == {"city", "unit"} for call in asked.output)
        results = [
            {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in asked.output
        ]
        told = made.create(
            model=tour.base, input=results, previous_response_id=asked.id, tools=[tool], max_output_tokens=MAX_TOKENS
        )
        assert told.status in ("completed", "incomplete")
        held = made.parse(model=tour.adapter, input=QUESTION, text_format=City, temperature=0, max_output_tokens=200)
        assert isinstance(held.output_parsed, City)
        scored = made.create(
            model=tour.base, input=QUESTION, include=["message.output_text.logprobs"], top_logprobs=2,
            max_output_tokens=4,
        )  # fmt: skip
        assert all(len(one.top_logprobs) == 2 for one in scored.output[0].content[0].logprobs)
    with tour.check("conversations: made, continued in two ways, listed, changed, deleted; input_tokens"):
        kept = client.conversations
        one = kept.create(items=[{"role": "developer", "content": "Be brief."}], metadata={"who": "me"})
        turn = made.create(model=tour.base, conversation=one.id, **brief)
        same(turn.conversation.id, one.id)
        late = made.create(model=tour.adapter, conversation=one.id, background=True, stream=True, **brief)
        last = list(late)[-1].response
        items = list(kept.items.list(one.id, order="asc", limit=2))
        same([item.role for item in items], ["developer", "user", "assistant", "user", "assistant"])
        same([items[2].id, items[4].id], [turn.output[0].id, last.output[0].id])
        same(kept.items.retrieve(items[4].id, conversation_id=one.id).content[0].text, last.output_text)
        counted = made.input_tokens.count(model=tour.base, conversation=one.id, input=QUESTION).input_tokens
        again = made.create(model=tour.base, conversation={"id": one.id}, **brief)
        same(counted, again.usage.input_tokens)
        same(kept.items.delete(items[0].id, conversation_id=one.id).id, one.id)
        added = kept.items.create(one.id, items=[{"role": "user", "content": "Thanks."}])
        same(next(iter(kept.items.list(one.id))).id, added.data[0].id)
        same(kept.update(one.id, metadata={"who": "you"}).metadata, {"who": "you"})
        assert kept.delete(one.id).deleted
        with raises(openai.NotFoundError, one.id):
            kept.retrieve(one.id)


def main() -> None:
    """Use every kind of call once."""
    tour = Tour()
    client = openai.OpenAI(base_url=tour.v1, api_key=tour.key, max_retries=0)
    chat, completions = client.chat.completions, client.completions
    said: dict[str, str] = {}
    with tour.check("models"):
        assert tour.adapter in [entry.id for entry in client.models.list()]
        same(client.models.retrieve(tour.adapter).id, tour.adapter)
    with tour.check("base and adapter answer differently"):
        for model in (tour.base, tour.adapter):
            whole = chat.create(model=model, messages=MESSAGES, **GREEDY)
            said[model] = whole.choices[0].message.content
            assert whole.usage.completion_tokens <= MAX_TOKENS
            same(whole.usage.prompt_tokens + whole.usage.completion_tokens, whole.usage.total_tokens)
            assert whole.system_fingerprint.startswith("fp_")
        differ(said[tour.base], said[tour.adapter])
    with tour.check("a stream equals the whole answer, usage too"):
        for model in (tour.base, tour.adapter):
            whole = chat.create(model=model, messages=MESSAGES, **GREEDY)
            chunks = list(
                chat.create(
                    model=model, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
                )
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            same(text, whole.choices[0].message.content)
            same(chunks[-1].usage.total_tokens, whole.usage.total_tokens)
    with tour.check("n, seed, logprobs"):
        options = {"n": 3, "seed": 1, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
        several, again = (chat.create(model=tour.adapter, messages=MESSAGES, **options) for _ in range(2))
        same([choice.index for choice in several.choices], [0, 1, 2])
        same(
            [choice.message.content for choice in several.choices], [choice.message.content for choice in again.choices]
        )
        assert all(len(token.top_logprobs) == 2 for token in several.choices[0].logprobs.content)
    with tour.check("completions: several prompts, best_of, echo with logprobs, logit_bias, headers"):
        best = completions.create(
            model=tour.adapter, prompt=["One, two,", "Three, four,"], n=1, best_of=3, max_tokens=4
        )
        same([choice.index for choice in best.choices], [0, 1])
        scored = completions.create(model=tour.adapter, prompt="Paris is big", echo=True, logprobs=1, max_tokens=0)
        scores = scored.choices[0].logprobs.token_logprobs
        assert scores[0] is None
        assert all(value <= 0 for value in scores[1:])
        same(scored.choices[0].text, "Paris is big")
        raw = completions.with_raw_response.create(
            model=tour.base, prompt="x", max_tokens=2, temperature=0, logprobs=0, logit_bias={"500": 100}
        )
        assert raw.headers["x-request-id"]
        same(len(set(raw.parse().choices[0].logprobs.tokens)), 1)
    with tour.check("a tool call, whole and streamed"):
        forced = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 100, "temperature": 0}
        whole = chat.create(model=tour.base, messages=MESSAGES, **forced)
        call = whole.choices[0].message.tool_calls[0]
        same(call.function.name, "get_weather")
        assert set(json.loads(call.function.arguments)) == {"city", "unit"}
        same(whole.choices[0].finish_reason, "tool_calls")
        with client.chat.completions.stream(model=tour.base, messages=MESSAGES, **forced) as stream:
            final = stream.get_final_completion()
        same(final.choices[0].message.tool_calls[0].function.arguments, call.function.arguments)
        answered = [
            *MESSAGES, whole.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
        ]  # fmt: skip
        assert chat.create(model=tour.base, messages=answered, tools=[WEATHER], **GREEDY).choices[0].finish_reason
    with tour.check("a structured output: parse()"):
        for model in (tour.base, tour.adapter):
            held = chat.parse(model=model, messages=MESSAGES, response_format=City, max_tokens=200, temperature=0)
            assert isinstance(held.choices[0].message.parsed, City)
    with tour.check("async: a stream closed early, then the same answer"):
        same(asyncio.run(leave_early(tour)), said[tour.adapter])
    if hasattr(client, "responses") and openai.__version__ >= "3":
        responses(tour, client, said)
    if tour.embedder:
        with tour.check("embeddings of base and adapter, as base64 and as numbers"):
            embedder = openai.OpenAI(base_url=f"{tour.embedder}/v1", api_key=tour.key, max_retries=0)
            vectors = []
            for model in (tour.base, tour.embedder_adapter):
                made = embedder.embeddings.create(model=model, input=TEXTS)  # the SDK requests base64
                plain = embedder.embeddings.create(model=model, input=TEXTS, encoding_format="float")
                same([item.index for item in made.data], [0, 1])
                for item, other in zip(made.data, plain.data, strict=True):
                    same_vectors(item.embedding, other.embedding)
                same(made.usage.prompt_tokens, made.usage.total_tokens)
                vectors.append(made.data[0].embedding)
            differ(*vectors)
    with tour.check("errors"):
        with raises(openai.NotFoundError, "nobody-has-this"):
            chat.create(model="nobody-has-this", messages=MESSAGES)
        with raises(openai.BadRequestError, "max_tokens"):
            completions.create(model=tour.base, prompt="x", max_tokens=1 << 30)
        with raises(openai.BadRequestError, "temprature", "temperature"):
            chat.create(model=tour.base, messages=MESSAGES, extra_body={"temprature": 1})
    tour.end()


if __name__ == "__main__":
    main()
