"""Attacks by request bodies that cost far more to serve than to send; they need only a gateway and a key."""

from __future__ import annotations

import asyncio
import itertools
import random
import uuid
from collections.abc import AsyncIterator
from typing import Any

import orjson

from chaos.attackers.attacker import CLOSED, Attack, Attacker, together

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ANSWERED = frozenset({"200", "202"})

_numbers = itertools.count()


def completion(**fields: Any) -> dict[str, Any]:
    """Return the body of a short completion of the base model; `fields` override its own."""
    return {"model": "base", "prompt": "hi", "max_tokens": 2, **fields}


def chat(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    """Return the body of a short chat with the base model; `fields` override its own."""
    return {"model": "base", "messages": [{"role": "user", "content": content}], "max_tokens": 2, **fields}


def _new() -> int:
    """Return a number not used before, so that no cache knows the grammar or key made from it."""
    return next(_numbers)


def _many_models(num: int) -> Any:
    raw = orjson.dumps(completion(model=["base"] * num, prompt=[5] * 600_000))

    async def once(attacker: Attacker) -> None:
        await attacker.post(COMPLETIONS, raw)

    return once


async def _tokenize(attacker: Attacker) -> None:
    raw = orjson.dumps({"inputs": "a b " * ((1 << 20) - 10)})
    await together(*(attacker.post("/tokenize", raw) for _ in range(4)))


async def _stop_ids(attacker: Attacker) -> None:
    await attacker.post(COMPLETIONS, completion(stop_token_ids=[5] * 500_000, n=64))


async def _stop_strings(attacker: Attacker) -> None:
    stops = [chr(97 + number % 26) * 1000 + f"{number:024}" for number in range(64)]
    await attacker.post(COMPLETIONS, completion(stop=stops, n=16, max_tokens=200, ignore_eos=True))


async def _slow_grammars(attacker: Attacker) -> None:
    def body() -> dict[str, Any]:
        patterns = [{"type": "string", "pattern": f"a[ab]{{{length}}}b"} for length in range(10, 40)]
        return completion(structured_outputs={"json": {"allOf": patterns, "title": str(_new())}})

    await together(*(attacker.post(COMPLETIONS, body()) for _ in range(10)))


async def _heavy_masks(attacker: Attacker) -> None:
    body = completion(structured_outputs={"regex": "(a|b)?" * 400 + f"c{_new()}"}, max_tokens=100, n=4)
    await together(*(attacker.post(COMPLETIONS, body) for _ in range(4)))


async def _large_schemas(attacker: Attacker) -> None:
    properties = {f"p{number}": {"type": "string", "pattern": "(a|b)*" * 4} for number in range(800)}
    schema = {"type": "object", "properties": properties, "title": str(_new())}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    wide = {"whitespace_pattern": "[ \n]{0,9000}([ ]|\t)*" * 40, "json": {"type": "object", "title": str(_new())}}
    deep: dict[str, Any] = {}
    for _ in range(60):
        deep = {"type": "array", "items": deep}
    await together(
        attacker.post(COMPLETIONS, completion(response_format=form)),
        attacker.post(COMPLETIONS, completion(structured_outputs=wide)),
        attacker.post(COMPLETIONS, completion(structured_outputs={"json": deep})),
        attacker.post(COMPLETIONS, completion(structured_outputs={"choice": ["x" * 60] * 1000})),
        attacker.post(COMPLETIONS, completion(structured_outputs={"grammar": 'start: start start | "a"'})),
    )


async def _jobs(attacker: Attacker) -> None:
    waste = {f"field{number}": "x" * 1000 for number in range(1000)}
    bodies = [
        completion(background=True, **waste),
        completion(background=True, metadata={f"key{number}": "x" * 500 for number in range(2000)}),
        completion(background=True, metadata={"k": "x" * 512}, prompt="a" * 200),
        completion(background=True, prompt="a" * 1_000_000),
        completion(background=True, n=100),
    ]
    await together(*(attacker.post(COMPLETIONS, body) for body in bodies * 4))
    await together(*(attacker.get("/v1/jobs?limit=100") for _ in range(4)))
    page = await attacker.get("/v1/jobs?limit=100")
    made = [job["id"] for job in (page or {}).get("data", [])]
    await together(*(attacker.post(f"/v1/jobs/{jid}/cancel", b"") for jid in made[:20]))


async def _idempotency_keys(attacker: Attacker) -> None:
    def call() -> Any:
        return attacker.post(COMPLETIONS, completion(max_tokens=1), idempotency_key=uuid.uuid4().hex)

    for _ in range(4):
        await together(*(call() for _ in range(50)))
    same = uuid.uuid4().hex
    bodies = (completion(max_tokens=1, prompt=f"p{number}") for number in range(30))
    await together(*(attacker.post(COMPLETIONS, body, idempotency_key=same) for body in bodies))
    await attacker.post(COMPLETIONS, completion(), idempotency_key="k" * 60_000)


async def _odd_bodies(attacker: Attacker) -> None:
    nest = "[" * 200_000 + "]" * 200_000
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": nest}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    bodies: list[dict[str, Any]] = [
        {"model": "base", "messages": [said]},
        {"model": "base", "messages": [{"role": ["user"], "content": "hi"}]},
        {"model": "base", "messages": [{"role": {"a": 1}, "content": "hi"}]},
        {"model": "base", "messages": [{"role": "user", "content": "hi"}] * 100_000},
        chat([{"type": "text", "text": "a"}] * 100_000),
        chat(tools=[{"type": "function", "function": {"name": f"f{n}", "parameters": {}}} for n in range(5000)]),
        chat(chat_template_kwargs={"messages": "x" * 100_000, "tools": [[]] * 1000}),
        chat(logit_bias={str(n): 1 for n in range(5000)}),
        completion(n=1 << 30),
        completion(best_of=128, n=1, logprobs=20),
        completion(max_tokens=(1 << 31) - 1),
        completion(prompt=["hi"] * 100_000),
        completion(prompt=[[]] * 100_000),
        completion(prompt=[[5]] * 10_000, n=100),
        completion(seed=1 << 63, temperature=1e308),
        completion(model="a/" * 50_000),
        completion(model="x" * 1_000_000),
        {"model": "base", "prompt": "hi", "merged_adapters": {"ids": ["base"] * 5000, "weights": [1.0] * 5000}},
    ]
    await together(*(attacker.post(CHAT if "messages" in body else COMPLETIONS, body) for body in bodies))
    raw = [b'{"model": "base", "prompt": ' + nest.encode() + b"}", b"[" * 1_000_000, b'"' * 1_000_000, b"\0" * 100_000,
           b'{"model": "base", "prompt": "' + b"\xff" * 100_000 + b'"}', b'{"a":' * 100_000, b"1" * 1_000_000,
           b'{"n": ' + b"9" * 1_000_000 + b"}"]  # fmt: skip
    paths = (COMPLETIONS, CHAT, "/generate", "/tokenize", "/v1/embeddings", "/classify_batch", "/v1/adapters")
    await together(*(attacker.post(path, body) for path in paths for body in raw[:4]))
    await together(*(attacker.post(COMPLETIONS, body) for body in raw[4:]))


async def _large_body(attacker: Attacker) -> None:
    await together(*(attacker.post(COMPLETIONS, b'{"a": "' + b"x" * (20 << 20) + b'"}') for _ in range(3)))


async def _scanners(attacker: Attacker) -> None:
    """Send large grammars, schemas, patterns, tools and earlier turns, which a parser might scan repeatedly."""

    def filled(unit: str, before: str = "", after: str = "") -> str:
        return before + unit * ((65_000 - len(before) - len(after)) // len(unit)) + after

    wide = {"type": "object", "properties": {f"a{n}": {} for n in range(4000)}}
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": wide}} for n in range(16)]
    grammars = [filled('\\"'), filled("\\/"), filled("1", "a{"), filled("%json {"), filled("[", "root ::= ")]
    one = {"type": "thinking", "thinking": "t"}
    thoughts = [{"type": "thinking", "thinking": "t" * 2_000_000}, *[one] * 16_000]
    calls = [{"function": {"name": f"f{n}", "arguments": {}}} for n in range(15_000)]
    results = [{"role": "tool", "content": "", "tool_name": "x"}] * 2000
    await together(
        *(attacker.post(COMPLETIONS, completion(structured_outputs={"grammar": grammar})) for grammar in grammars),
        *(attacker.post(COMPLETIONS, completion(structured_outputs={"regex": filled(unit)})) for unit in ("[", "{1")),
        attacker.post(COMPLETIONS, completion(structured_outputs={"json": {**wide, "title": str(_new())}})),
        attacker.post(CHAT, chat(tools=tools)),
        attacker.post("/v1/messages", {**chat(), "messages": [{"role": "assistant", "content": thoughts}]}),
        attacker.post(
            "/api/chat", {"model": "base", "messages": [{"role": "assistant", "tool_calls": calls}, *results]}
        ),
    )


async def _nested_lines(attacker: Attacker) -> None:
    """Submit batches with lines of 4 MB that consist of lists, or of deeply nested lists."""
    values = ["[" + "[]," * 1_390_000 + "1]", "[" * 300 + "]" * 300, "[" * 1_000_000 + "]" * 1_000_000]
    rows = [
        f'{{"custom_id":"{n}","method":"POST","url":"{COMPLETIONS}","body":{{"model":"base","prompt":"hi","x":{value}}}}}'
        for n, value in enumerate([*values, *values[:1] * 3])
    ]
    mark = f"mark{_new()}"
    parts = [("purpose", "", "batch"), ("file", '; filename="a.jsonl"', "\n".join(rows))]
    form = "".join(
        f'--{mark}\r\ncontent-disposition: form-data; name="{name}"{more}\r\n\r\n{text}\r\n'
        for name, more, text in parts
    )
    raw = f"{form}--{mark}--\r\n".encode()
    file = await attacker.send("POST", "/v1/files", raw, content_type=f"multipart/form-data; boundary={mark}")
    if not file or "id" not in file:
        return
    asked = {"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "24h"}
    made = await attacker.post("/v1/batches", asked)
    for _ in range(200 if made and "id" in made else 0):
        batch = await attacker.get(f"/v1/batches/{made['id']}")
        if not batch or batch.get("status") in ("completed", "failed", "expired", "cancelled"):
            break
    await attacker.send("DELETE", f"/v1/files/{file['id']}", None)


async def _cancel_storm(attacker: Attacker) -> None:
    async def leave(after: int) -> None:
        async def read(pieces: AsyncIterator[bytes]) -> None:
            for _ in range(after):
                await anext(pieces, b"")

        await attacker.stream(COMPLETIONS, completion(max_tokens=400, ignore_eos=True, stream=True), read)

    await together(*(leave(number % 3) for number in range(60)))


async def _flood(attacker: Attacker) -> None:
    async def read(pieces: AsyncIterator[bytes]) -> None:
        async for _ in pieces:
            pass

    body = completion(max_tokens=60, ignore_eos=True, stream=True)
    await together(*(attacker.stream(COMPLETIONS, body, read) for _ in range(200)))


async def _long_prompts(attacker: Attacker) -> None:
    def body() -> dict[str, Any]:
        return completion(prompt=[random.randrange(5, 200) for _ in range(1500)], max_tokens=1)

    await together(*(attacker.post(COMPLETIONS, body()) for _ in range(4)))


async def _choices(attacker: Attacker) -> None:
    body = completion(max_tokens=60, ignore_eos=True, n=64, logprobs=20, temperature=1, prompt="a" * 200)
    bias = {str(number): 1 for number in range(200)}
    await together(*(attacker.post(COMPLETIONS, {**body, "logit_bias": bias, "echo": True}) for _ in range(2)))


async def _waiters(attacker: Attacker) -> None:
    job = await attacker.post(COMPLETIONS, completion(background=True, max_tokens=200, ignore_eos=True))
    path = f"/v1/jobs/{(job or {}).get('id', 'job_none')}"
    waiting = [asyncio.ensure_future(attacker.get(path, prefer="wait=600")) for _ in range(100)]
    await attacker.post(f"{path}/cancel", b"")
    await together(*waiting)
    await together(*(attacker.get("/v1/models") for _ in range(50)))


async def _wrong_keys(attacker: Attacker) -> None:
    await together(*(attacker.get("/v1/models", authorization=f"Bearer sk-lf-{number}") for number in range(200)))
    await together(*(attacker.post(COMPLETIONS, b"x" * 1_000_000, authorization="Bearer x") for _ in range(10)))


async def _names(attacker: Attacker) -> None:
    names = ["../../etc/passwd", "%2e%2e%2fetc", "..%00", "local:../..", "s3://b/" + "a/" * 400, "org/" + "a" * 90_000]
    await together(*(attacker.post(COMPLETIONS, completion(model=name)) for name in names))
    await together(*(attacker.get(f"/v1/models/{name[:2000]}") for name in names))
    await together(*(attacker.post(COMPLETIONS, completion(model=f"nobody/{_new()}")) for _ in range(100)))


async def _many_logprobs(attacker: Attacker) -> None:
    body = completion(max_tokens=1500, n=16, logprobs=20, temperature=1, ignore_eos=True)
    calls = [asyncio.ensure_future(attacker.post(COMPLETIONS, body)) for _ in range(100)]
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.wait(calls, timeout=2)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)


MANY_LOGPROBS = Attack("100 × 24,000 tokens with logprobs", _many_logprobs, frozenset({"200"}))
"""Complete answers whose logprobs together exceed what a gateway may hold."""

BODY_ATTACKS = (
    Attack("130 models × 600,000 ids", _many_models(130)),
    Attack("600 models × 600,000 ids", _many_models(600)),
    Attack("4 × 4 MB to /tokenize", _tokenize, frozenset({"200"})),
    Attack("500,000 stop_token_ids × 64 choices", _stop_ids, frozenset({"200"})),
    Attack("64 stops × 1,024 letters × 16 choices", _stop_strings, frozenset({"200"})),
    Attack("ten slow grammars", _slow_grammars, frozenset({"200"})),
    Attack("400 × (a|b)? as output", _heavy_masks, frozenset({"200"})),
    Attack("large schemas", _large_schemas, frozenset({"200"})),
    Attack("jobs with large bodies, listed", _jobs, ANSWERED),
    Attack("idempotency keys", _idempotency_keys, frozenset({"200"})),
    Attack("bodies of every wrong kind", _odd_bodies, frozenset({"200"})),
    Attack("bodies of 20 MB", _large_body, frozenset({CLOSED})),
    Attack("cancel storm", _cancel_storm, frozenset({"200"})),
    Attack("200 streams of one tenant", _flood, frozenset({"200"})),
    Attack("4 long prompts at a time", _long_prompts, frozenset({"200"})),
    Attack("64 choices with logprobs and bias", _choices, frozenset({"200"})),
    Attack("many who wait for a job", _waiters, ANSWERED),
    Attack("wrong keys", _wrong_keys, frozenset({CLOSED})),
    Attack("odd names of models", _names, frozenset({"200"})),
    Attack("what is read over and over", _scanners, frozenset({"200"})),
    Attack("batches of nested lines", _nested_lines, frozenset({"200"})),
)
