"""An attack on operators' routes: every spelling of each of their paths, with an ordinary key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from hostile.adapter_attacks import STRANGER

from chaos.attackers.attacker import Attack, Attacker, together
from gateway.app.access_table import SPELLINGS, example_of, unserved
from gateway.http.access import RouteTable

AT_ONCE = 32
NAMES = {"/v1/adapters/": "one", "/v1/workers/": "w0", "/v1/tenants/": "attacker"}
"""Path prefix -> a name that exists below it."""

BODIES = {
    "/v1/keys": b'{"tenant":"attacker","scopes":["infer"]}', "/v1/tenants/{name}": b'{"concurrency":9}',
    "/v1/adapters/upload": b"PK\x05\x06" + bytes(18),
}  # fmt: skip


def operators_requests() -> list[tuple[str, str, bytes]]:
    """Return method, path as in a request line, and body of every request that an ordinary key must not make."""
    found: list[tuple[str, str, bytes]] = []
    for method, match in RouteTable(unserved().routes).matches:
        if match.scopes == ("admin",):
            name = next((name for start, name in NAMES.items() if match.path.startswith(start)), "name")
            path = example_of(match.path).replace("/name", f"/{name}")
            body = BODIES.get(match.path, b"") if method == "POST" else b""
            found += [(method, raw, body) for spell in SPELLINGS.values() for raw in spell(path)]
    return found


def unlocking(state: Callable[[], Awaitable[Any]]) -> Attack:
    """Return the attack. state: returns everything that only operators may change; a change is counted."""

    async def once(attacker: Attacker) -> None:
        before = await state()
        requests = operators_requests()
        for begin in range(0, len(requests), AT_ONCE):
            await together(*(_ask(attacker, *request) for request in requests[begin : begin + AT_ONCE]))
        if await state() != before:
            attacker.told[STRANGER] += 1

    return Attack("operators' routes by every spelling", once, frozenset({"405"}))


async def _ask(attacker: Attacker, method: str, raw: str, body: bytes) -> None:
    query = "?name=one&replace=true" if "upload" in raw else ""
    kind = "application/zip" if query else "application/json"

    async def do(reader: Any, writer: Any) -> None:
        lines = (f"content-type: {kind}", f"content-length: {len(body)}", "connection: close")
        writer.write(attacker.head(method, raw + query, *lines) + b"\r\n" + body)
        await attacker.status_of(reader)

    await attacker.connect(do)
