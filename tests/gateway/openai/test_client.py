"""The official client, unchanged, with a real gateway and a scripted worker."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.scripted_fleet import BASE_NAME, Script, ScriptedFleet
from openai import AsyncOpenAI, NotFoundError

TEXT = Script().text


async def test_chat_answers_with_the_worker_s_text(client: AsyncOpenAI, fleet: ScriptedFleet) -> None:
    answer = await client.chat.completions.create(model="base", messages=[{"role": "user", "content": "hi"}])
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    [(submit, body)] = fleet.seen
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert memoryview(body.prompt).cast("i").tolist() == fleet.tokenizer.encode(prompt).ids
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == submit.num_prompt_tokens == len(body.prompt) // 4
    assert answer.usage.completion_tokens == len(fleet.tokenizer.encode(TEXT).ids) + 1
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


async def test_usage_so_far_counts_what_was_shown(client: AsyncOpenAI, fleet: ScriptedFleet) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    fleet.script = lambda submit, body: Script("one two three", chunk=1)
    stream = await client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "Hi"}], stream=True, stream_options=options, n=2
    )
    shown: list[int] = []
    roles: list[int] = []
    async for chunk in stream:
        assert chunk.usage is not None
        assert chunk.usage.prompt_tokens > 0
        shown.append(chunk.usage.completion_tokens)
        if chunk.choices and chunk.choices[0].delta.role:
            roles.append(shown[-1])
    assert roles[0] == shown[0] == 0
    assert shown == sorted(shown)
    assert len(roles) == 2
    assert shown[-1] > 2


async def test_an_adapter_is_asked_by_name_and_by_base_and_name(client: AsyncOpenAI, fleet: ScriptedFleet) -> None:
    await fleet.add_adapter("org/pirate", "d1")
    for model in ("org/pirate", f"{BASE_NAME}:org/pirate", "base:org/pirate"):
        await client.completions.create(model=model, prompt="hi")
    await client.completions.create(model="base", prompt="hi")
    assert [(submit.digest, submit.tenant) for submit, _ in fleet.seen] == [("d1", "d1")] * 3 + [("", "base")]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_list_of_models_gives_each_ones_answers_in_one_call(
    client: AsyncOpenAI, fleet: ScriptedFleet, stream: bool
) -> None:
    """Choices are ordered by model, then by prompt; each names its model."""
    await fleet.add_adapter("fox", "d1")
    fleet.script = lambda submit, body: Script(text=f"{submit.digest or 'none'} é {submit.rid.rpartition('-')[2]}")
    models: Any = ["fox", "base"]
    ask: dict[str, Any] = {"model": models, "prompt": ["the dog", "hi"], "n": 2, "max_tokens": 60}
    found: dict[int, tuple[str, str]] = {}
    if stream:
        async for chunk in await client.completions.create(**ask, stream=True):
            choice = chunk.choices[0]
            found[choice.index] = (choice.model, found.get(choice.index, ("", ""))[1] + choice.text)  # type: ignore
    else:
        answer = await client.completions.create(**ask)
        assert answer.model == "fox,base"
        found = {choice.index: (choice.model, choice.text) for choice in answer.choices}  # type: ignore[attr-defined]
    wanted = [("fox", f"d1 é {i}") for i in range(4)] + [("base", f"none é {i}") for i in range(4, 8)]
    assert [found[i] for i in range(8)] == wanted
    seeds = [body.sampling.seed for _, body in sorted(fleet.seen, key=lambda pair: pair[0].rid)]
    assert seeds[:4] == seeds[4:]  # so that the models can be compared
    assert seeds[0] == seeds[2] != seeds[1] == seeds[3]
    refused = client.completions.create(model=["fox", "nobody"], prompt="hi")  # type: ignore[call-overload]
    with pytest.raises(NotFoundError, match="nobody"):
        await refused
    assert len(fleet.seen) == 8
