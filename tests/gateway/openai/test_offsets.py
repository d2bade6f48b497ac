"""`text_offset`: each token starts at its offset in the text."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from helpers.openai_events import events_of, text_of
from helpers.scripted_fleet import Script, ScriptedFleet
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gateway.bodies.json_slices import ROWS
from gateway.openai.offsets import TextOffsets
from peft_adapters.texts.tokenizer_json import BaseTokens
from protocol.wire.tokens import TokenTable

IM_START, IM_END = 0, 1


@pytest.fixture(scope="session")
def table(tokenizer: Tokenizer) -> TokenTable:
    return BaseTokens(tokenizer.to_str()).table


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_offsets_of_an_echo(http: httpx2.AsyncClient, fleet: ScriptedFleet, as_ids: bool, stream: bool) -> None:
    """A prompt has the same echo as text and as ids, and offsets only count characters of the text."""
    prompt = "<|im_start|>hi 😀<|im_end|>"
    ids = fleet.tokenizer.encode(prompt).ids
    assert (ids[0], ids[-1]) == (IM_START, IM_END)
    fleet.script = lambda submit, body: Script(text="é!", chunk=1)
    body = {"model": "base", "prompt": ids if as_ids else prompt, "echo": True, "logprobs": 0, "max_tokens": 9}
    text, tokens, offsets = await _asked(http, {**body, "stream": stream})
    assert text == "<|im_start|>hi 😀<|im_end|>é!"
    assert len(tokens) == len(offsets)
    start, end = text.index("😀"), text.index("é")
    assert offsets[: tokens.index(" ")] == [0, 12, 13]
    assert offsets[tokens.index(" ") + 1 : len(ids)] == [start] * 4 + [start + 1]
    assert offsets[len(ids) :] == [end, end, end + 1, end + 2], "two bytes, one character, and the end of the text"
    assert tokens[-1] == "<|im_end|>"


async def test_a_long_echo_comes_in_chunks_with_their_part_of_the_text(
    http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    await fleet.set_context(http.base_url, 1024)
    fleet.script = lambda submit, body: Script(text="é!", chunk=1)
    body = {"model": "base", "prompt": "<|im_start|>the dög 😀 jumps, " * 25, "echo": True, "logprobs": 3, "n": 2}
    whole = (await http.post("/v1/completions", json=body)).json()["choices"]
    answer = await http.post("/v1/completions", json={**body, "stream": True})
    chunks = [event["choices"] for event in events_of(answer)]
    for index, choice in enumerate(whole):
        mine = [one for choices in chunks for one in choices if one["index"] == index]
        assert len(choice["logprobs"]["tokens"]) > 300
        assert max(len(one["logprobs"]["tokens"]) for one in mine) <= ROWS
        assert "".join(one["text"] for one in mine) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for one in mine for value in one["logprobs"][name]] == values
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + ["stop"]
        begins = 0
        for one in mine:
            offsets = one["logprobs"]["text_offset"]
            assert not offsets or begins <= offsets[0] <= offsets[-1] <= begins + len(one["text"])
            begins += len(one["text"])


async def _asked(http: httpx2.AsyncClient, body: dict[str, Any]) -> tuple[str, list[str], list[int]]:
    """Return the text, the tokens and their offsets of an answer, streamed or not."""
    chunks = events_of(await http.post("/v1/completions", json=body))
    shown = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    tokens = [token for one in shown for token in one["tokens"]]
    return text_of(chunks), tokens, [offset for one in shown for offset in one["text_offset"]]


@given(ids=st.lists(st.integers(0, 299), max_size=20), more=st.lists(st.integers(0, 299), max_size=20))
def test_offsets_are_within_the_text_and_never_fall(table: TokenTable, ids: list[int], more: list[int]) -> None:
    echo = table.decode(ids, special=True)
    text = echo + table.decode(more)
    writer = TextOffsets(table, echo)
    offsets = [*writer.of_prompt(ids), *writer.of_output(more[:7]), *writer.of_output(more[7:])]
    assert offsets == sorted(offsets)
    assert all(0 <= offset <= len(text) for offset in offsets)
    for id_, offset in zip(ids, offsets, strict=False):
        if table.bytes_of(id_).isascii():
            assert text.startswith(("�", table.text_of(id_)), offset)


def test_a_beginning_that_the_tokenizer_adds_has_no_place(table: TokenTable, tokenizer: Tokenizer) -> None:
    ids = [IM_START, *tokenizer.encode("the dog").ids]
    assert list(TextOffsets(table, "the dog").of_prompt(ids))[:2] == [0, 0]
