"""Any conversation allowed by OpenAI's schema is rendered, or refused with the template's own message.

The templates in `families` are short texts of our own with the control flow of each family's template: the roles it
refuses, whether it indexes, joins or iterates content, the format of calls, and the fields of results it needs.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import examples
from helpers.factories import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from gateway.chat.messages import normalize_messages
from gateway.chat.template import ChatTemplate
from gateway.chat.template_forms import in_forms
from gateway.text.tokenizer import Encoder, ModelFiles
from protocol.wire.errors import BadRequest
from protocol.wire.tokens import TokenTable

FOLDER = Path(__file__).parents[1] / "templates" / "families"
FAMILIES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja"))}
ENCODER = Encoder(make_tokenizer().backend_tokenizer)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {name: ChatTemplate(source, SPECIAL) for name, source in FAMILIES.items()}
Conversation = list[dict[str, Any]]

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def prompt_of(name: str, messages: Conversation, **how: Any) -> str:
    """Return a conversation as the gateway renders it."""
    files = ModelFiles("base", ENCODER, TokenTable([]), TEMPLATES[name], frozenset(), {})
    texts: list[str] = []
    options: dict[str, Any] = {"add_generation_prompt": True, "variables": {}, **how}
    asyncio.run(files.encode_chat(messages, tenant="", check=texts.append, **options))
    return texts[0]


def call(id_: str, city: str) -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}


CALLS_ONLY = ("hermes", "llama3.1", "mistral-v3", "mistral-v7")  # families that drop text next to calls


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}, {"content": "Let me"}])
def test_calls_without_content_go_back_without_tools(name: str, content: dict[str, Any]) -> None:
    """Agents hand over conversations to other agents without tools."""
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", **content, "tool_calls": [call("a1b2c3d4e", "Oslo")]},
        {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": [{"type": "text", "text": "rain"}]},
    ]
    for tools in (None, [WEATHER]):
        text = refused = ""
        try:
            text = prompt_of(name, messages, tools=tools)
        except BadRequest as error:
            refused = error.message
        if refused:
            assert "refuses these messages: System role not supported" in refused
            assert name == "gemma2"
            continue
        assert ("a1b2c3d4e" if name == "kimi-k2" and not tools else "weather") in text
        assert "Oslo" in text
        assert "rain" in text
        assert "Let me" in text or not content.get("content") or name in CALLS_ONLY
        assert "'city'" not in text
        assert "'type'" not in text
        assert "None" not in text


WORDS = st.text(alphabet="ab <>\n'\"{}é", max_size=6)
TEXTS = st.builds(lambda word, num: f"{word}t{num}t{word}", WORDS, st.integers(100, 999))
PARTS = st.lists(st.builds(lambda text: {"type": "text", "text": text}, TEXTS), min_size=1, max_size=3)
CONTENT = TEXTS | PARTS
NAME = st.one_of(st.just({}), st.just({"name": "anna"}))
IDS = st.sampled_from(["a1b2c3d4e", "call_0123456789"])
ARGUMENTS = st.sampled_from(
    ["{}", "", '{"city": "Oslo"}', '{"a": [1, {"b": null}], "c": "it\'s"}', '{"n": 12345678901234567890}']
)
CALLS = st.lists(
    st.builds(
        lambda id_, arguments: {"id": id_, "type": "function", "function": {"name": "weather", "arguments": arguments}},
        IDS, ARGUMENTS,
    ), min_size=1, max_size=2,
)  # fmt: skip
MESSAGE = st.one_of(
    st.builds(lambda role, content, name: {"role": role, "content": content, **name},
              st.sampled_from(["system", "developer", "user", "user", "assistant"]), CONTENT, NAME),
    st.builds(lambda content, calls: {"role": "assistant", **content, "tool_calls": calls},
              st.sampled_from([{}, {"content": None}, {"content": ""}]) | st.builds(lambda c: {"content": c}, CONTENT),
              CALLS),
    st.builds(lambda id_, content: {"role": "tool", "tool_call_id": id_, "content": content}, IDS, CONTENT),
    st.builds(lambda arguments: {"role": "assistant", "content": None,
                                 "function_call": {"name": "weather", "arguments": arguments}}, ARGUMENTS),
    st.builds(lambda content: {"role": "function", "name": "weather", "content": content}, TEXTS),
    st.builds(lambda text: {"role": "assistant", "content": None, "refusal": text}, TEXTS),
    st.builds(lambda text: {"role": "assistant", "content": [{"type": "refusal", "refusal": text}]}, TEXTS),
    st.builds(lambda text: {"role": "assistant", "content": "So.", "reasoning_content": text}, TEXTS),
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=examples.of(120), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=st.lists(MESSAGE, min_size=1, max_size=6), with_tools=st.booleans())
def test_any_conversation_is_rendered_or_refused_in_the_template_s_words(
    name: str, messages: Conversation, with_tools: bool
) -> None:
    text = words = ""
    try:
        text = prompt_of(name, messages, tools=[WEATHER] if with_tools else None)
    except BadRequest as refused:
        words = refused.message
    if words:
        said = words.removeprefix("the model's chat template refuses these messages: ")
        assert said != words, words
        assert said.split(": ")[0] in FAMILIES[name]
        return
    assert "{'type'" not in text
    for message in messages:
        if message["role"] == "user":  # whatever else a family omits
            parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
            for part in parts:
                # Some templates write a single line break instead of two.
                assert "".join(part["text"].split()) in "".join(text.split()), part


def reference(name: str, messages: Conversation) -> str:
    """Return the text that transformers renders for a conversation whose last message is to be continued."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), chat_template=FAMILIES[name], **SPECIAL
    )
    text = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert isinstance(text, str)
    return text


FINALS = [
    "The answer is",
    "The answer is ",
    "  indented\n",
    "",
    "two\n\nparts",
    "<think>\nHm",
    "<think>a</think>\n\nSo",
]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("final", [*FINALS, [{"type": "text", "text": "a "}, {"type": "text", "text": "b "}]])
def test_a_message_is_continued_as_transformers_does(name: str, final: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": final}]
    wanted, refused = "", False
    try:
        wanted = reference(name, next(in_forms(normalize_messages(messages), TEMPLATES[name]._form)))
    except ValueError:
        refused = True
    how: dict[str, Any] = {"continue_final": True, "add_generation_prompt": False}
    if refused:
        with pytest.raises(BadRequest, match="does not show the whole of the last message"):
            prompt_of(name, messages, **how)
        return
    text = prompt_of(name, messages, **how)
    assert text == wanted
    end = final if isinstance(final, str) else final[-1]["text"]
    assert text.endswith((end, end.strip(), end.lstrip()))
