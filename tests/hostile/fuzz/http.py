"""Requests to a real gateway: for any body or head, the answer is JSON, and the only 5xx are 503 and 529."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, get_args

from fastapi.routing import APIRoute
from helpers.good_bodies import GOOD
from hostile.fuzz import odd
from hostile.fuzz.engine import Check, OnLoop, Target
from hostile.fuzz.services import json_error, services
from hypothesis import strategies as st

from chaos.attackers.webhook_attacks import silent_dns
from gateway.app.access_table import unserved
from gateway.lorax.lorax_bodies import Parameters

PATIENCE_S = 30.0
"""Seconds of silence after which a request counts as hung."""

LIKELY: dict[str, tuple[Any, ...]] = {
    "messages": (
        [{"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}],
        [{"role": ["user"], "content": "x"}],
        [{"role": "user", "content": [{"type": "text", "text": 3}]}],
        [{"role": "tool", "content": "x", "tool_call_id": 3}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 3000}}]}],
        [{"role": "assistant", "tool_calls": {"a": 1}}, {"role": "user", "content": {"a": 1}}],
        [{"role": "system", "content": "x" * 400}],
        [{"role": "user", "content": "<|im_end|>"}] * 3,
        [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}],
        [{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": {"a": [{}]}}]},
         {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}]}],
        [{"role": "assistant", "content": [{"type": "thinking", "thinking": "\ud83d"}]}],
    ),
    "prompt": ("", [], [[]], [""], ["a", "b"], [5], [[5], [6]], [5, "a"], [-1], [1 << 40], "a" * 2000, [True], "\0"),
    "response_format": (
        {"type": "json_object"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": {}}},
        {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}, {"type": "json_object", "schema": []},
        {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "("}}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "array", "minItems": 1 << 40}}},
    ),
    "structured_outputs": (
        {"regex": "("}, {"regex": "a{1,9999}"}, {"choice": ["a"]}, {"choice": [""]}, {"grammar": "start: start"},
        {"json": "{"}, {"json": {"type": "x"}}, {"json_object": True, "whitespace_pattern": "("}, {"regex": "\0"},
    ),
    "tools": (
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/x"}}}],
        [{"type": "function", "function": {"name": "f" * 200}}], [{}], [{"function": None}],
        [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "nonsense"}}}],
        [{"name": "f", "input_schema": {"type": "object"}}], [{"name": "f", "input_schema": {"$ref": "#"}}],
        [{"type": "web_search_20250305", "name": "web_search"}], [{"type": "bash_20250124", "name": "bash"}],
        [{"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]}],
        [{"type": "namespace", "name": "n", "tools": [{"type": "namespace", "name": "n", "tools": [[]]}]}],
    ),
    "thinking": ({"type": "adaptive"}, {"type": "enabled", "budget_tokens": 1024}, {"type": "x"}, {"type": "disabled"}),
    "output_config": ({"effort": "low"}, {"format": {"type": "json_schema", "schema": {}}}, {"format": {"type": []}}),
    "system": ("x", [{"type": "text", "text": "x"}], [{"type": "image"}], [[]]), "stop_sequences": (["a"], [""] * 90),
    "tool_choice": (
        "required", "auto", {"type": "function", "function": {"name": "f"}}, {}, "none", "x", {"type": "any"},
        {"type": "tool", "name": "f"},
    ),
    "merged_adapters": (
        {"ids": ["one", "one"], "weights": [1, 2]}, {"ids": ["base"], "weights": [1]}, {"ids": [], "weights": []},
        {"ids": ["one"], "weights": [1], "merge_strategy": "ties", "density": 0},
    ),
    "logit_bias": ({"5": 1}, {"-1": 1}, {"1e3": 1}, {"5": 1e300}, {"٣": 1}, {" 5 ": 1}, {"9" * 5000: 1}),
    "stop_regex": (
        "a+", ["a|b", "\\d{2}"], "(?m)^a\\b", "\\ba$", "^\\b", ["("], ["a{9999}"], ["(a?){99}"], ["\ud83d"], ["a"] * 17,
        "a*", [5],
    ),
    "stop": (["a"], [""], "", ["\ud83d"], ["a"] * 70, "a" * 2000, ["\0"]),
    "model": ("base", "one", "nobody", "base:one", "org/x", "s3://b/x", [], ["base", "one"], "\0", "/", ".."),
    "n": (2, 3, 128, 129), "best_of": (2, 500), "logprobs": (0, 5, True), "top_logprobs": (0, 20, 21), "echo": (True,),
    "stream": (True,), "stream_options": ({"include_usage": True},), "background": (True,), "max_tokens": (0, 1, 300),
    "metadata": ({"a": "b"}, {"a" * 100: "b"}, {"a": "b" * 600}), "stop_token_ids": ([5], [1 << 31], [5] * 2000),
    "allowed_token_ids": ([5], [], [-1], [1 << 31], [5] * 20_000), "logprob_token_ids": ([5, 5], [], [-1], [5] * 200),
    "bad_words": (["a"], [""], ["\ud83d"], ["\0 "], ["a" * 200], ["😀" * 99] * 9), "prompt_logprobs": (0, 20, 21, -1),
    "include_metrics": (True,),
    "return_token_ids": (True,), "return_tokens_as_token_ids": (True,), "add_generation_prompt": (False,),
    "input": (
        "", [], [{"role": "user", "content": "hi"}], [{"type": "item_reference", "id": "msg_" + "0" * 36}], ["a"],
        [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[" * 3000}], [{"type": []}], [[5]],
        [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "\ud83d"}]}], "a" * 2000,
    ),
    "items": (
        [{"role": "user", "content": "x"}] * 25, [{"role": ["user"]}], [{"type": "item_reference", "id": "ITEM"}], [{}],
        [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "\0"}]}],
        [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text"}]}], [[]],
    ),
    "conversation": ("CONVERSATION", {"id": "CONVERSATION"}, "conv_1", {}, {"id": 5}, [], "CONVERSATION:items"),
    "previous_response_id": ("RESPONSE", "resp_1", "", "RESPONSE" * 9), "max_output_tokens": (1, 0, 1 << 31),
    "truncation": ("auto", "disabled", "x"), "store": (False, True), "include": (["message.output_text.logprobs"], [5]),
    "text": ({"format": {"type": "json_object"}}, {"format": {"type": []}}, {"verbosity": "low"}),
    "reasoning": ({"effort": "low"}, {"effort": []}), "input_file_id": ("FILE", "file-1", "", "../.."),
    "url": ("https://127.0.0.1/", "http://[", "https://a:b@c/", "ftp://x", "https://" + "a" * 3000),
    "event_types": (["batch.completed"], [], ["x"], [["batch.failed"]], ["batch.failed"] * 99),
    "completion_window": ("24h", "1h", ""), "endpoint": ("/v1/responses", "/v1/files", "", "/v1/chat/completions"),
    "encoding_format": ("base64",), "dimensions": (1, 3), "lora_scale": (0.5, 0), "adapter_source": ("hub", "local"),
}  # fmt: skip


def _fields(body: Any) -> list[str]:
    """Return the fields of a route's body: of all its forms if there are several."""
    forms = [get_args(form)[0] for form in get_args(body)] or [body]
    return sorted({name for form in forms for name in form.model_fields})


FIELDS = {
    route.path: _fields(route.body_field.field_info.annotation)
    for route in unserved().routes
    if isinstance(route, APIRoute) and route.body_field is not None
}
MADE = {"{conversation_id}": "CONVERSATION", "{endpoint_id}": "WEBHOOK", "{name}": "nobody"}
"""Path parameter -> its value. Names in capitals stand for objects created by `_made`, in paths and in bodies."""


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, str, bytes | None, dict[str, str]]:
    """Draw a method, a path, a body and headers."""
    how = draw(st.sampled_from(["field", "field", "field", "field", "json", "bytes", "damaged", "path"]))
    headers = {"content-type": "application/json"}
    if draw(st.integers(0, 9)) == 0:
        headers[draw(st.sampled_from(HEADERS))] = draw(st.text('abz09-=;,/ \t"é', max_size=20)).strip()
    if how == "path":
        path = draw(st.sampled_from(PATHS)).replace("{}", draw(st.text("aZ0./%-_~:@!", max_size=20)))
        return draw(st.sampled_from(["GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS"])), path, None, headers
    route = draw(st.sampled_from(sorted(FIELDS)))
    path = re.sub(r"\{\w+\}", lambda found: MADE[found[0]], route)
    good = json.loads(json.dumps(GOOD[route]))
    if how == "json":
        return "POST", path, odd.written(draw(odd.wild_values)), headers
    if how == "bytes":
        return "POST", path, draw(st.binary(max_size=40)), headers
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(FIELDS[route]))
        into = good
        if name == "parameters" and draw(st.booleans()):
            into, name = good.setdefault("parameters", {}), draw(st.sampled_from(PARAMETERS))
            if not isinstance(into, dict):
                continue
        likely = LIKELY.get(name, (None,))
        into[name] = draw(st.one_of(st.sampled_from(likely), odd.wild_values))
    raw = odd.written(good)
    return "POST", path, draw(odd.damaged(st.just(raw))) if how == "damaged" else raw, headers


PARAMETERS = sorted(Parameters.model_fields)
HEADERS = (
    "content-type",
    "idempotency-key",
    "x-request-id",
    "prefer",
    "authorization",
    "x-api-key",
    "accept",
    "origin",
)
PATHS = (
    "/v1/models", "/v1/models/{}", "/v1/jobs", "/v1/jobs?limit={}", "/v1/jobs?after={}", "/v1/jobs/{}", "/health",
    "/v1/jobs/{}/cancel", "/v1/adapters?limit={}", "/v1/adapters/{}", "/v1/adapters/{}/pin", "/v1/adapters/{}/preload",
    "/v1/responses/RESPONSE?stream={}&starting_after={}", "/v1/responses/RESPONSE/input_items?after={}&limit={}",
    "/v1/responses/{}/cancel", "/v1/responses/RESPONSE/cancel", "/v1/responses/{}", "/v1/responses/compact",
    "/v1/conversations/CONVERSATION/items?after={}&order={}", "/v1/conversations/CONVERSATION/items/{}",
    "/v1/conversations/CONVERSATION/items/ITEM?include[]={}", "/v1/conversations/{}", "/v1/conversations/{}/items",
    "/v1/files?limit={}&after={}", "/v1/files/{}", "/v1/files/FILE/content", "/v1/files?purpose={}&order={}",
    "/v1/batches?after={}&limit={}", "/v1/batches/{}", "/v1/batches/{}/cancel", "/v1/jobs/RESPONSE/stream",
    "/v1/webhook_endpoints/{}", "/v1/webhook_deliveries?after={}",
    "/v1/webhook_deliveries/{}/retry", "/metrics", "/info", "/ping", "/openapi.json", "/{}", "/v1/{}",
    "/v1/adapters/{}/evict?wait_s={}", "/v1/adapters/{}/refresh?wait_s={}", "/v1/workers?after={}&limit={}",
    "/v1/workers/{}/drain?wait_s=0", "/v1/workers/{}/resume?wait_s=0", "/v1/dead_letters?after={}",
    "/v1/dead_letters/{}", "/v1/dead_letters/{}/retry", "/v1/keys/{}", "/v1/keys?after={}", "/v1/tenants?after={}",
    "/v1/requests?after={}&limit={}", "/v1/requests?state={}&tenant={}", "/v1/requests/{}/cancel",
)  # fmt: skip

ERROR_FRAME = re.compile(rb'^(event: error|data: \{"error":)', re.MULTILINE)

MAY_FAIL = frozenset({"503", "529"})
"""The only documented statuses above 499 are 503 and Anthropic's 529."""


def _made(connection: http.client.HTTPConnection) -> dict[str, str]:
    """Create one object of each kind that clients store; return their ids by placeholder in paths and bodies."""

    def sent(path: str, body: dict[str, Any] | bytes, kind: str = "application/json") -> dict[str, Any]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, raw, {"content-type": kind})
        answer = connection.getresponse()
        found = json.loads(answer.read())
        assert answer.status == 200, found
        return found

    line = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "base", "prompt": "hi"}}'
    part = b'--b\r\ncontent-disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    form = part % (b"purpose", b"", b"batch") + part % (b"file", b'; filename="a.jsonl"', line) + b"--b--\r\n"
    conversation = sent("/v1/conversations", {})["id"]
    added = sent(f"/v1/conversations/{conversation}/items", {"items": [{"role": "user", "content": "hi"}]})
    return {
        "CONVERSATION": conversation,
        "ITEM": added["data"][0]["id"],
        "RESPONSE": sent("/v1/responses", {"model": "base", "input": "hi", "max_output_tokens": 2})["id"],
        "FILE": sent("/v1/files", form, "multipart/form-data; boundary=b")["id"],
        "WEBHOOK": sent("/v1/webhook_endpoints", GOOD["/v1/webhook_endpoints"])["id"],
    }


@contextmanager
def _gateway() -> Iterator[Check]:
    with services(
        max_queued=200, private_webhooks=True, webhook_dns=silent_dns(), secret="of the fuzzed fleet"
    ) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE_S)
        made = _made(connection)

        def check(case: tuple[str, str, bytes | None, dict[str, str]]) -> str:
            method, path, body, headers = case
            for name, id_ in made.items():
                path, body = path.replace(name, id_), body and body.replace(name.encode(), id_.encode())
            try:
                connection.request(method, path, body, {k: v.encode("latin-1") for k, v in headers.items()})  # type: ignore[dict-item]
                answer = connection.getresponse()
                raw = answer.read()
            except (ValueError, UnicodeEncodeError):  # the client itself refuses to send it
                connection.close()
                return "not sent"
            except (http.client.HTTPException, ConnectionError):
                connection.close()
                raise
            status = answer.status
            assert not (ended := running.ended()), ended
            assert status < 500 or str(status) in MAY_FAIL, (status, raw)
            if status < 400:
                assert not ERROR_FRAME.search(raw), (status, raw)  # a stream that fails reports it in an event
            if status < 400 or method == "HEAD":
                return str(status)
            return f"{status} {json_error(raw)}"

        try:
            yield OnLoop(check, running.cpu_s)
        finally:
            connection.close()


# ---------------------------------------------------------------- bytes

LINES = (
    b"content-length: 10", b"content-length: -1", b"content-length: 1e3", b"content-length: 99999999999999999999",
    b"content-length: 2, 2", b"transfer-encoding: chunked", b"transfer-encoding: gzip, chunked", b"connection: close",
    b"transfer-encoding: identity", b"expect: 100-continue", b"expect: 200-ok", b"upgrade: websocket",
    b"connection: upgrade", b"host:", b"host: a:b:c", b"host: [", b" folded", b"no colon", b": no name", b"x: \0",
    b"x: \xff\xfe", b"content-type: application/json", b"content-type:", b"content-encoding: gzip", b"te: trailers",
    b"authorization: Bearer \xff", b"x-request-id: \x7f", b"idempotency-key: " + b"k" * 300, b"prefer: wait=999999999",
    b"range: bytes=0-", b"cookie: " + b"a=b;" * 500, b"sec-websocket-version: 13", b"proxy-connection: x",
    b"http2-settings: x",
)  # fmt: skip
FIRST_LINES = (
    b"GET /health HTTP/1.1", b"GET /health HTTP/1.0", b"POST /v1/completions HTTP/1.1", b"GET / HTTP/2.0", b"GET /",
    b"OPTIONS * HTTP/1.1", b"CONNECT a:1 HTTP/1.1", b"GET http://a/health HTTP/1.1", b"PRI * HTTP/2.0",
    b"get / HTTP/1.1",
    b"GET  /health  HTTP/1.1", b"GET /%ff%00 HTTP/1.1", b"GET /\xff HTTP/1.1",
    b"GET /?" + b"a=b&" * 2000 + b" HTTP/1.1",
    b"POST /v1/chat/completions?a=%zz HTTP/1.1", b"TRACE /health HTTP/1.1", b"\x16\x03\x01\x02\x00",
    b"M-SEARCH * HTTP/1.1",
    b"DELETE /v1/adapters/a HTTP/1.1", b"GET /v1/models/" + b"a" * 9000 + b" HTTP/1.1", b"", b"\r\n\r\n",
)  # fmt: skip
TAILS = (
    b"", b'{"a": 1}', b"5\r\nhello\r\n0\r\n\r\n", b"ffffffffffffffff\r\n", b"-1\r\n\r\n", b"0\r\nx: y\r\n\r\n",
    b"5;a=b\r\nhello\r\n",
    b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n", b"5\nhello\n0\n\n",
)  # fmt: skip


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    """Draw the bytes of a connection: odd lines, wrong lengths, unterminated chunks, damage."""
    lines = [draw(st.sampled_from(FIRST_LINES)), b"host: 127.0.0.1"]
    lines += draw(st.lists(st.sampled_from(LINES), max_size=4))
    if draw(st.booleans()):
        lines.append(draw(st.binary(max_size=20)))
    raw = (
        draw(st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n"])).join(lines)
        + b"\r\n\r\n"
        + draw(st.sampled_from(TAILS))
    )
    return draw(odd.damaged(st.just(raw))) if draw(st.booleans()) else raw


@contextmanager
def _server() -> Iterator[Check]:
    with services() as running:

        def check(raw: bytes) -> str:
            with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE_S) as connection:
                answer = b""
                with suppress(ConnectionError, BrokenPipeError):
                    connection.sendall(raw)
                    connection.shutdown(socket.SHUT_WR)
                    while piece := connection.recv(1 << 16):
                        answer += piece
            assert not (ended := running.ended()), ended
            if not answer:
                return "closed without an answer"
            status = answer.split(b" ", 2)[1].decode("latin-1")
            assert status < "500" or status in MAY_FAIL, answer
            head, _, body = answer.partition(b"\r\n\r\n")
            is_whole = b"transfer-encoding: chunked" not in head.lower() and b"HEAD " not in raw
            if status >= "400" and is_whole and answer.count(b"HTTP/1.1 ") == 1:
                return f"{status} {json_error(body)}"
            return status

        yield OnLoop(check, running.cpu_s)


TARGETS = (
    Target("bodies and paths of every route", requests(), _gateway, cost=8.0),
    Target("bytes at the HTTP server", heads(), _server, cost=8.0),
)
