"""The streams committed in `golden/` have the fields of OpenAI's, vLLM's and TGI's, each with a value of its kind.

The forms are from OpenAI's API reference, vLLM 0.33 (`entrypoints/openai/*/protocol.py` and `serving.py`, where a field
that was set is sent, null or not) and TGI 3.3 (`router/src/lib.rs`). Left out: what a fleet has not, such as OpenAI's
`service_tier` and `obfuscation`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.tours.tools.suite import differences

GOLDEN = Path(__file__).parent / "golden"
USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


def chunk(kind: str, *choices: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": "i", "object": kind, "created": 1, "model": "m", "choices": list(choices), **more}


def chat(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, **more}


def text(finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"index": 0, "text": "a", "logprobs": None, "finish_reason": finish, **more}


CHUNK, TEXT = "chat.completion.chunk", "text_completion"
ROLE = {"role": "assistant", "content": ""}
CALL = {"index": 0, "id": "call", "type": "function", "function": {"name": "add", "arguments": ""}}
ARGUMENTS = {"index": 0, "function": {"arguments": "{"}}
OPENAI = {"system_fingerprint": "fp"}
ENDS = {"stop_reason": None, "token_ids": None}
LOGPROBS = {"content": [{"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": [
    {"token": "a", "logprob": -1.0, "bytes": [97]}]}]}  # fmt: skip
TOKEN = {"id": 1, "text": "a", "logprob": -1.0, "special": False}

FORMS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("openai-chat", "OpenAI"): [
        chunk(CHUNK, chat({**ROLE, "refusal": None}), usage=None, **OPENAI),
        chunk(CHUNK, chat({"content": "a"}), usage=None, **OPENAI),
        chunk(CHUNK, chat({}, "stop"), usage=None, **OPENAI),
        chunk(CHUNK, usage={**USAGE, "prompt_tokens_details": {"cached_tokens": 0}}, **OPENAI),
    ],
    ("openai-chat", "vLLM"): [
        chunk(CHUNK, chat(ROLE), prompt_token_ids=None),
        chunk(CHUNK, chat({"content": "a"}, token_ids=None)),
        chunk(CHUNK, chat({"content": "a"}, "stop", **ENDS)),
        chunk(CHUNK, usage=USAGE),
    ],
    ("openai-chat-logprobs", "OpenAI"): [
        chunk(CHUNK, chat({**ROLE, "refusal": None}), **OPENAI),
        chunk(CHUNK, {**chat({"content": "a"}), "logprobs": LOGPROBS}, **OPENAI),
        chunk(CHUNK, {**chat({"content": "a"}, "length"), "logprobs": LOGPROBS}, **OPENAI),
    ],
    ("openai-chat-tools", "OpenAI"): [
        chunk(CHUNK, chat({**ROLE, "refusal": None}), **OPENAI),
        chunk(CHUNK, chat({}), **OPENAI),  # for the reasoning, which OpenAI does not show
        chunk(CHUNK, chat({"content": "a"}), **OPENAI),
        chunk(CHUNK, chat({"tool_calls": [CALL]}), **OPENAI),
        chunk(CHUNK, chat({"tool_calls": [ARGUMENTS]}), **OPENAI),
        chunk(CHUNK, chat({}, "tool_calls"), **OPENAI),
    ],
    ("openai-chat-tools", "vLLM"): [
        chunk(CHUNK, chat(ROLE), prompt_token_ids=None),
        chunk(CHUNK, chat({"reasoning": "a"}, token_ids=None)),
        chunk(CHUNK, chat({"content": "a"}, token_ids=None)),
        chunk(CHUNK, chat({"tool_calls": [CALL]}, token_ids=None)),
        chunk(CHUNK, chat({"tool_calls": [ARGUMENTS]}, token_ids=None)),
        chunk(CHUNK, chat({"tool_calls": [ARGUMENTS]}, "tool_calls", **ENDS)),
    ],
    ("openai-completions", "OpenAI"): [chunk(TEXT, text(), **OPENAI), chunk(TEXT, text("stop"), **OPENAI)],
    ("openai-completions", "vLLM"): [
        chunk(TEXT, text(prompt_token_ids=None, **ENDS)),
        chunk(TEXT, text("stop", **{**ENDS, "stop_reason": "you"})),
    ],
    ("generate_stream", "TGI"): [
        {"index": 1, "token": TOKEN, "generated_text": None, "details": None},
        {"index": 1, "token": TOKEN, "generated_text": "a", "details": None},
    ],
    ("text-generation", "TGI"): [
        {"index": 1, "token": TOKEN, "generated_text": None, "details": None},
        {"index": 1, "token": TOKEN, "generated_text": "a",
         "details": {"finish_reason": "length", "generated_tokens": 5, "seed": None, "input_length": 3}},
    ],
}  # fmt: skip


def events(name: str) -> list[Any]:
    lines = (GOLDEN / f"{name}.http").read_text().splitlines()
    return [json.loads(line.removeprefix("data:")) for line in lines if line.startswith(("data: {", "data:{"))]


@pytest.mark.parametrize(("name", "server"), FORMS, ids=["-".join(key) for key in FORMS])
def test_each_event_has_the_fields_of_an_event_of_the_other_server(name: str, server: str) -> None:
    forms, sent = FORMS[name, server], events(name)
    assert differences(forms, sent) == []
    for form in forms:
        assert any(differences(form, event) == [] for event in sent), form
