"""Any value at any position of a body results in an answer: an error is a 4xx with its reason, never a fault.

`tests/hostile/test_fuzz.py` draws bodies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from helpers import examples, good_bodies
from helpers.scripted_fleet import Script, ScriptedFleet

from gateway.anthropic.anthropic_errors import ANTHROPIC_ERRORS
from gateway.app.shapes import shape_of
from gateway.http.errors import OPENAI_ERRORS

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "enum": [1]}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
MESSAGES = [
    {"role": "system", "content": "be brief", "name": "s"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
    {"role": "user", "content": "hi"},
]
BLOCKS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "x"},
        {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
    ]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "1", "is_error": True}]},
]  # fmt: skip
ITEMS = [
    {"role": "user", "content": "hi"},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "x", "annotations": []}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": 1}'},
    {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "1"}]},
    {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
]
SAMPLING = {
    "temperature": 1.0, "top_p": 0.5, "top_k": 4, "min_p": 0.1, "typical_p": 0.9, "seed": 7, "min_tokens": 1, "n": 1,
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1, "logit_bias": {"5": 1.0},
    "stop": ["x"], "stop_token_ids": [5], "ignore_eos": False, "max_tokens": 2, "stream": False, "metadata": {"a": "b"},
    "service_tier": "auto", "merged_adapters": None, "lora_scale": None, "api_token": "t", "background": False,
}  # fmt: skip
MERGED = {"ids": ["nobody", "none"], "weights": [0.5, 0.5], "merge_strategy": "ties", "density": 0.5, "svd_rank": 4}
NATIVE = {
    "max_new_tokens": 2, "best_of": 1, "temperature": 0.5, "repetition_penalty": 1.1, "top_k": 5, "top_p": 0.9,
    "typical_p": 0.9, "do_sample": True, "return_full_text": True, "stop": ["x"], "truncate": 5, "watermark": False,
    "details": True, "decoder_input_details": False, "return_k_alternatives": 2, "seed": 7, "adapter_id": "",
    "response_format": {"type": "json_object", "schema": SCHEMA}, "merged_adapters": None, "adapter_source": "local",
}  # fmt: skip

GOOD: dict[str, dict[str, Any]] = {
    **good_bodies.GOOD,
    "/v1/chat/completions": {
        "model": "base", "messages": MESSAGES, **SAMPLING, "logprobs": True, "top_logprobs": 2, "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}}, "chat_template_kwargs": {"a": 1},
        "parallel_tool_calls": True, "stream_options": None,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
    },
    "/v1/completions": {
        "model": ["base", "base"], "prompt": [[5, 6], [7]], **SAMPLING, "best_of": 1, "echo": True, "logprobs": 2,
        "structured_outputs": {"regex": "a+"}, "stream_options": {"include_usage": True},
    },
    "/generate": {"inputs": "hi", "parameters": NATIVE},
    "/generate_stream": {"inputs": "hi", "parameters": NATIVE},
    "/invocations": {"inputs": "hi", "parameters": NATIVE, "stream": False},
    "/": {"inputs": "hi", "parameters": {**NATIVE, "merged_adapters": MERGED}},
    "/tokenize": {"inputs": "hi", "add_special_tokens": True, "adapter_id": "", "api_token": "t"},
    "/v1/embeddings": {"model": "base", "input": ["hi"], "dimensions": 2, "encoding_format": "float"},
    "/v1/classify": {"model": "base", "input": ["hi"], "use_activation": False},
    "/v1/rerank": {
        "model": "base", "query": "hi", "documents": ["a", {"text": "b"}], "top_n": 1, "return_documents": False,
        "max_tokens_per_doc": 1,
    },
    "/embed": {"inputs": "hi", "parameters": {"adapter_id": ""}},
    "/classify": {"inputs": "hi", "parameters": {"adapter_id": ""}},
    "/classify_batch": {"inputs": ["hi"], "parameters": {"adapter_id": ""}},
    "/v1/messages": {
        "model": "base", "max_tokens": 2, "messages": BLOCKS, "system": [{"type": "text", "text": "be brief"}],
        "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA, "strict": True}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "thinking": {"type": "adaptive"},
        "output_config": {"effort": "low"}, "stop_sequences": ["x"], "temperature": 0.5, "top_p": 0.5, "top_k": 4,
    },
    "/v1/messages/count_tokens": {"model": "base", "messages": BLOCKS, "chat_template_kwargs": {"a": 1}},
    "/v1/responses": {
        "model": "base", "input": ITEMS, "instructions": "be brief",
        "tools": [{"type": "function", **TOOL["function"]}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
        "parallel_tool_calls": True, "text": {"format": {"type": "text"}}, "reasoning": {"effort": "low"},
        "max_output_tokens": 2, "temperature": 0.5, "top_p": 0.5, "top_k": 4, "seed": 7, "top_logprobs": 2,
        "include": ["message.output_text.logprobs"], "truncation": "auto", "metadata": {"a": "b"}, "store": False,
        "service_tier": "auto", "chat_template_kwargs": {"a": 1},
    },
    "/v1/responses/input_tokens": {
        "model": "base", "input": ITEMS, "instructions": "be brief", "reasoning": {"effort": "low"},
        "tools": [{"type": "function", **TOOL["function"]}], "tool_choice": "auto", "parallel_tool_calls": True,
        "text": {"format": {"type": "text"}}, "truncation": "auto", "chat_template_kwargs": {"a": 1},
    },
    "/v1/conversations": {"items": ITEMS, "metadata": {"a": "b"}},
    "/v1/batches": {
        "input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h", "metadata": {"a": "b"},
        "output_expires_after": {"anchor": "created_at", "seconds": 3600},
    },
    "/v1/keys": {"tenant": "nobody", "scopes": ["infer"], "expires_in_s": 60, "note": "n"},
    "/v1/adapters": {"name": "nobody", "source": "nobody", "token": "t", "wait_s": 0.0, "pin": False, "preload": False},
    "/v1/load_lora_adapter": {"lora_name": "base", "lora_path": "nobody", "load_inplace": False},
}  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all parts of a JSON value, at any depth."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*at, key)
        yield from places(inner, (*at, key))


def put(value: Any, at: tuple[Any, ...], part: Any) -> None:
    """Replace the part at a path."""
    for key in at[:-1]:
        value = value[key]
    value[at[-1]] = part


def check_shape(path: str, answer: httpx2.Response) -> None:
    """Check that an error is short and in the format of the path's API."""
    error, shape = answer.json()["error"], shape_of({"path": path, "headers": []})
    assert isinstance(error, str) == (shape not in (OPENAI_ERRORS, ANTHROPIC_ERRORS))
    assert shape is not OPENAI_ERRORS or set(error) == {"message", "type", "param", "code"}
    message = error if isinstance(error, str) else error["message"]
    assert isinstance(message, str)
    assert 0 < len(message) < 2000


NUMBERS = ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 400, "0x10", "01", "1.", "--1"]


HALVES = ['"\\ud800"', '"\\udfff\\ud800"', '"a\\udc00b"']


FUZZED = examples.some(
    sorted(GOOD), "/v1/chat/completions", "/generate", "/v1/messages", "/v1/responses", "/v1/batches", "/v1/adapters",
)  # fmt: skip
"""One path of each dialect and of the operators' API; `tests/hostile/test_fuzz.py` tries all, with fewer values."""


@pytest.mark.parametrize("path", FUZZED)
async def test_odd_values_are_no_fault_in_any_place(http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str) -> None:
    """Invalid numbers and half characters are client errors at each position of a valid body, read or not."""
    fleet.script = lambda submit, body: Script(text="hi", chunk=64)
    wrong = []
    for i, at in enumerate([*places(GOOD[path]), ("unknown",)]):
        good = json.loads(json.dumps(GOOD[path]))
        put(good, at, "@")
        for odd in (NUMBERS[i % len(NUMBERS)], HALVES[i % len(HALVES)], '"\\u0000"', "9" * 30):
            body = json.dumps(good).replace('"@"', odd).encode()
            answer = await http.post(path, content=body, headers={"content-type": "application/json"})
            if answer.status_code >= 500 or (answer.status_code < 400 and odd in (*NUMBERS, *HALVES)):
                wrong.append((at, odd[:20], answer.status_code, answer.content[:200]))
            elif answer.status_code >= 400:
                check_shape(path, answer)
    assert not wrong
