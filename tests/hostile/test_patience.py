"""An attacker counts a request as hung after a silence: no correct answer to its attacks may take that long."""

from __future__ import annotations

from typing import Any

import orjson
from hostile.arena import NAMES, attacks_of

from chaos.attackers.attacker import Attacker

LIMITS = ("max_tokens", "max_new_tokens")


class Noting(Attacker):
    """Records the request bodies instead of sending them."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1")
        self.bodies: list[tuple[str, Any]] = []

    async def send(self, method: str, path: str, raw: bytes | None, **headers: str) -> Any:
        if raw and path in ("/v1/completions", "/v1/chat/completions", "/generate"):
            self.bodies.append((path, raw))
        return None


def limit_of(raw: bytes) -> Any:
    """Return the maximum tokens that a body requests; 0 if it is not a JSON object, and so is refused."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return 0
    if not isinstance(body, dict):
        return 0
    asked = {**body, **(body.get("parameters") or {})}
    return next((asked[name] for name in LIMITS if name in asked), None)


async def test_what_attackers_ask_for_whole_has_a_limit() -> None:
    adapters = [pair for pair in attacks_of("", _nothing, _nothing) if pair[0].name.startswith("adapter `")]
    assert len(adapters) == sum(name.startswith("adapter `") for name in NAMES) > 3
    for attack, _ in adapters:
        attacker = Noting()
        await attack.once(attacker)
        await attacker.close()
        assert len(attacker.bodies) == 6
        for path, raw in attacker.bodies:
            limit = limit_of(raw)
            assert limit is not None, (attack.name, path, raw)
            assert limit <= 400


async def _nothing(*_: Attacker) -> None:
    pass
