"""Streams to clients of other servers, compared byte by byte with the files in `golden/`.

Only ids and times are replaced. After an intended change, `GOLDEN=write` rewrites the files.
"""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client, make_model_folder

from protocol.queue.bus import Bus
from protocol.wire.errors import LorafleetError, WorkerLost

GOLDEN = Path(__file__).parent / "golden"
QWEN = (Path(__file__).parents[1] / "templates" / "qwen.jinja").read_text()
CHAT, COMPLETIONS, MESSAGES_PATH = "/v1/chat/completions", "/v1/completions", "/v1/messages"
RESPONSES = "/v1/responses"
MESSAGES = [{"role": "user", "content": "hi"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"p": {"type": "string"}}}},
}
CALLS = "<think>\nHm.\n</think>\n\nLet me see.\n" + "\n".join(
    f'<tool_call>\n{{"name": "add", "arguments": {{"p": "{value}"}}}}\n</tool_call>' for value in ("ö", "😀")
)
LORAX = {
    "adapter_id": None, "adapter_source": None, "merged_adapters": None, "api_token": None, "do_sample": False,
    "max_new_tokens": 5, "ignore_eos_token": False, "repetition_penalty": None, "return_full_text": False, "stop": [],
    "seed": None, "temperature": None, "top_k": None, "top_p": None, "truncate": None, "typical_p": None,
    "best_of": None, "watermark": False, "details": True, "decoder_input_details": False,
    "return_k_alternatives": None, "response_format": None,
}  # fmt: skip
TGI = {
    "do_sample": False, "max_new_tokens": 5, "repetition_penalty": None, "frequency_penalty": None,
    "return_full_text": False, "stop": [], "seed": None, "temperature": None, "top_k": None, "top_p": None,
    "truncate": None, "typical_p": None, "best_of": None, "watermark": False, "details": True,
    "decoder_input_details": False, "top_n_tokens": None, "grammar": None,
}  # fmt: skip
ANTHROPIC = {"model": "fox", "messages": MESSAGES, "max_tokens": 60, "stream": True}
ASKED = {"model": "fox", "input": "hi", "temperature": 0.0, "max_output_tokens": 60, "stream": True}
GREEDY = {"model": "base", "messages": MESSAGES, "temperature": 0.0, "max_tokens": 12, "stream": True}


@dataclass(frozen=True, slots=True)
class Stream:
    """A request and the worker's answer to it, in two steps."""

    path: str
    body: dict[str, Any]
    says: str = 'é "so"\n<b>, you?'
    error: LorafleetError | None = None
    is_cancelled: bool = False  # after the first step


STREAMS = {
    "lorax-client": Stream("/", {"inputs": "the dog", "parameters": LORAX, "stream": True}),
    "text-generation": Stream("/", {"inputs": "the dog", "parameters": TGI, "stream": True}),
    "generate_stream": Stream("/generate_stream", {"inputs": "the dog"}),
    "generate_stream-adapter": Stream(
        "/generate_stream",
        {"inputs": "the dog", "parameters": {"adapter_id": "fox", "adapter_source": "local", "details": True,
         "return_k_alternatives": 2, "return_full_text": True, "do_sample": True, "seed": 7, "stop": ["so"]}},
    ),
    "generate_stream-error": Stream("/generate_stream", {"inputs": "the dog"}, error=WorkerLost("three died")),
    "openai-chat": Stream(CHAT, {**GREEDY, "stream_options": {"include_usage": True}}),
    "openai-chat-logprobs": Stream(CHAT, {**GREEDY, "max_tokens": 4, "logprobs": True, "top_logprobs": 1}),
    "openai-chat-tools": Stream(CHAT, {**GREEDY, "tools": [TOOL], "max_tokens": 200}, CALLS),
    "openai-chat-error": Stream(CHAT, GREEDY, error=WorkerLost("three died")),
    "openai-completions": Stream(
        COMPLETIONS,
        {"model": "fox", "prompt": "the dog", "max_tokens": 60, "stream": True, "stop": "you", "echo": True},
    ),
    "openai-completions-logprobs": Stream(
        COMPLETIONS,
        {"model": "base", "prompt": "hi", "max_tokens": 4, "stream": True, "echo": True, "logprobs": 1,
         "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "ollama-chat": Stream(
        "/api/chat",
        {"model": "base:latest", "messages": MESSAGES, "tools": [], "stream": True, "options": {"num_predict": 12},
         "logprobs": True, "top_logprobs": 1},
    ),
    "ollama-chat-tools": Stream("/api/chat", {"model": "base", "messages": MESSAGES, "tools": [TOOL]}, CALLS),
    "ollama-chat-error": Stream("/api/chat", {"model": "base", "messages": MESSAGES}, error=WorkerLost("three died")),
    "ollama-generate": Stream("/api/generate", {"model": "fox", "prompt": "hi", "options": {"stop": ["you"]}}),
    "openai-responses": Stream(RESPONSES, ASKED),
    "openai-responses-logprobs": Stream(
        RESPONSES,
        {**ASKED, "max_output_tokens": 4, "include": ["message.output_text.logprobs"], "top_logprobs": 1},
    ),
    "openai-responses-tools": Stream(
        RESPONSES, {**ASKED, "max_output_tokens": 300, "tools": [{"type": "function", **TOOL["function"]}]}, CALLS
    ),
    "openai-responses-incomplete": Stream(RESPONSES, {**ASKED, "max_output_tokens": 4, "background": True}),
    "openai-responses-failed": Stream(RESPONSES, ASKED, error=WorkerLost("three died")),
    "openai-responses-cancelled": Stream(RESPONSES, {**ASKED, "background": True}, is_cancelled=True),
    "anthropic-messages": Stream(MESSAGES_PATH, {**ANTHROPIC, "stop_sequences": ["you", "?"]}),
    "anthropic-messages-tools": Stream(
        MESSAGES_PATH,
        {**ANTHROPIC, "max_tokens": 300, "tools": [{"name": "add", "input_schema": TOOL["function"]["parameters"]}]},
        CALLS,
    ),
    "anthropic-messages-limit": Stream(MESSAGES_PATH, {**ANTHROPIC, "max_tokens": 4}),
    "anthropic-messages-error": Stream(MESSAGES_PATH, ANTHROPIC, error=WorkerLost("three died")),
    "litellm": Stream(CHAT, GREEDY),
    "langchain": Stream(
        CHAT,
        {"messages": MESSAGES, "model": "base", "max_completion_tokens": 12, "stream": True, "temperature": 0.0},
    ),
}  # fmt: skip
REPLACED = [
    (rb"cmpl-[0-9a-f]{32}", b"cmpl-ID"),
    (rb'"created":\d+', b'"created":0'),
    (rb'"(created|completed)_at":\d+', rb'"\1_at":0'),
    (rb"(resp|rs|fc)_[0-9a-f]{32}", rb"\1_ID"),
    (rb"(call|toolu)_[0-9a-f]{24}", rb"\1_ID"),
    (rb"msg_[0-9a-f]{32}", b"msg_ID"),
    (rb"req_[0-9a-f]{32}", b"req_ID"),
    (rb'"created_at":"[^"]*"', b'"created_at":"ANY"'),
    (rb'_duration":\d+', b'_duration":0'),
    (rb"(?m)^(date|(?:x-)?request-id|openai-processing-ms): .*$", rb"\1: ANY"),
]


async def bytes_of(http: httpx2.AsyncClient, fleet: ScriptedFleet, stream: Stream) -> bytes:
    """Return headers and body of a streamed answer, with varying parts replaced."""
    num = len(fleet.tokenizer.encode(stream.says).ids) + 1
    half = -(-min(num, stream.body.get("max_tokens") or stream.body.get("max_output_tokens") or num) // 2)
    fleet.go.clear()
    fleet.script = lambda submit, body: Script(stream.says, chunk=half, hold_after=half, error=stream.error)
    raw, cancelling = b"", None
    async with http.stream("POST", stream.path, json=stream.body) as answer:
        lines = [f"{name}: {value}" for name, value in sorted(answer.headers.items())]
        head = "\n".join([f"HTTP {answer.status_code}", *lines, "", ""]).encode()
        async for part in answer.aiter_raw():
            raw += part
            if stream.is_cancelled:
                if b".delta" in raw and cancelling is None:
                    response_id = raw[raw.index(b"resp_") :][:37].decode()
                    cancelling = asyncio.create_task(fleet.cancel(http, response_id))
                continue
            fleet.go.set()  # the second step comes after the first has been delivered
    if cancelling is not None:
        assert (await cancelling)["status"] == "cancelled"
    shown = head + raw
    for pattern, value in REPLACED:
        shown = re.sub(pattern, value, shown)
    return shown


@pytest.mark.parametrize("template", ["plain", "qwen"])
async def test_streams_are_as_committed(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, tmp_path: Path, template: str
) -> None:
    folder = model_folder
    if template == "qwen":
        folder = make_model_folder(tmp_path / "model", QWEN)
        fleet.max_model_len = 1024
        await fleet.register()
    await fleet.add_adapter("fox", "ab" * 32)
    async with gateway_client(bus, folder, keepalive_s=60.0) as http:
        for name, stream in STREAMS.items():
            if ("tools" in name) != (template == "qwen"):
                continue
            found, path = await bytes_of(http, fleet, stream), GOLDEN / f"{name}.http"
            if os.environ.get("GOLDEN") == "write":
                path.write_bytes(found)
            assert found == path.read_bytes(), name


def test_every_committed_stream_is_held_to() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(STREAMS)
