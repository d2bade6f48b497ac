"""Attacks by adapters: hostile texts, merges, registrations, and names that belong to other tenants."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

from hostile.hostile_adapters import TEMPLATES

from chaos.attackers.attacker import Attack, Attacker, together
from chaos.attackers.attacks import CHAT, COMPLETIONS, chat, completion

SECRET, HIDDEN = "org/secret", "org/hidden"
STRANGER = "a stranger was served"
"""Counted when a tenant gets something that belongs to another one."""

NATIVE = {"stop": ["y"], "max_new_tokens": 40}
"""Without a limit an answer continues to the end of the context, and an unstreamed one is silent until then: 8,192
tokens at 17 ms take longer than an attacker's patience, and would count as a hung call."""

SERVED = frozenset({"200", "201", "202"})

_numbers = itertools.count()


def asking(name: str) -> Attack:
    """Return an attack that makes every kind of request that uses an adapter's tokenizer."""

    async def once(attacker: Attacker) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
        bodies = [
            completion(model=name, stop=["never", "xxy"], max_tokens=40, ignore_eos=True),
            completion(model=name, response_format=form),
            completion(model=name, prompt="aaaaaa", echo=True, logprobs=2),
            completion(model=name, prompt=[5, 6, 7], max_tokens=40, ignore_eos=True, n=4),
        ]
        await together(
            *(attacker.post(COMPLETIONS, body) for body in bodies),
            attacker.post(CHAT, chat(model=name, tools=[{"type": "function", "function": {"name": "f"}}])),
            attacker.post("/tokenize", {"inputs": "aaaaaa", "adapter_id": name}),
            attacker.post("/generate", {"inputs": "aaaaaa", "parameters": {"adapter_id": name, **NATIVE}}),
        )

    return Attack(f"adapter `{name}`", once, frozenset({"200", "424 generation"}))


async def _templates(attacker: Attacker) -> None:
    await together(*(attacker.post(CHAT, chat(f"{next(_numbers)}", model=name)) for name in TEMPLATES))


async def _merges(attacker: Attacker) -> None:
    async def leave(pieces: AsyncIterator[bytes]) -> None:
        await anext(pieces, b"")

    async def merge() -> None:
        number = next(_numbers)
        how = {"merge_strategy": "ties_svd", "density": 0.5, "svd_rank": 64}
        merged = {"ids": ["one", "two"], "weights": [1.0, number / 997], **how}
        await attacker.stream(COMPLETIONS, completion(merged_adapters=merged, stream=True), leave)

    await together(*(merge() for _ in range(16)))


async def _registrations(attacker: Attacker) -> None:
    async def register() -> None:
        number = next(_numbers)
        await attacker.post("/v1/adapters", {"name": f"n{number}", "source": f"hub:nobody/n{number}", "wait_s": 0})

    for _ in range(5):
        await together(*(register() for _ in range(100)))
    await together(*(attacker.get("/v1/adapters?limit=10000") for _ in range(4)))
    await together(*(attacker.post(COMPLETIONS, completion(model=f"nobody/m{next(_numbers)}")) for _ in range(50)))


def stealing(commit: str) -> Attack:
    """Return an attack that requests a private adapter, which its owner had fetched, under every possible name."""

    async def once(attacker: Attacker) -> None:
        names = [f"{SECRET}@{commit}", SECRET, f"hub:{SECRET}@{commit}", f"base:{SECRET}@{commit}"]
        answers = [await attacker.post(COMPLETIONS, completion(model=name)) for name in names]
        number = next(_numbers)
        for source in (f"{SECRET}@{commit}", f"hub:{SECRET}"):
            mine = {"name": f"mine-{number}", "source": source, "wait_s": 1}
            await attacker.post("/v1/adapters", mine)
            answers.append(await attacker.post(COMPLETIONS, completion(model=f"mine-{number}")))
        answers.append(await attacker.post(COMPLETIONS, completion(model=names[0], api_token="hf_wrong")))
        merged = {"ids": ["one", f"{SECRET}@{commit}"], "weights": [1.0, 1.0]}
        answers.append(await attacker.post(COMPLETIONS, completion(merged_adapters=merged)))
        _count_strangers(attacker, answers)

    return Attack("another tenant's private adapter", once, SERVED)


def peeping(hidden: Sequence[str]) -> Attack:
    """Return an attack that requests adapters which the tenant must not see, under every alternative name."""

    async def once(attacker: Attacker) -> None:
        answers: list[Any] = []
        for name in hidden:
            for spelling in (name, f"base:{name}", f"local:{name}", f"./{name}", f"hub:{name}"):
                answers.append(await attacker.post(COMPLETIONS, completion(model=spelling)))
            for source in (name, f"local:{name}", f"hub:{name}"):
                mine = f"seen-{next(_numbers)}"
                await attacker.post("/v1/adapters", {"name": mine, "source": source, "wait_s": 1})
                answers.append(await attacker.post(COMPLETIONS, completion(model=mine)))
            await attacker.send("DELETE", f"/v1/adapters/{name}", None)
        listed = (await attacker.get("/v1/models") or {}).get("data", [])
        _count_strangers(attacker, [*answers, *({"choices": 1} for model in listed if model["id"] in hidden)])

    return Attack("adapters hidden from the tenant", once, SERVED)


def _count_strangers(attacker: Attacker, answers: Sequence[Any]) -> None:
    """Count the answers that are completions."""
    for answer in answers:
        if isinstance(answer, dict) and answer.get("choices"):
            attacker.told[STRANGER] += 1


ADAPTER_ATTACKS = (
    Attack("chat templates without end", _templates, frozenset({"200"})),
    Attack("16 ties_svd merges", _merges, frozenset({"200"})),
    Attack("registrations without end", _registrations, SERVED),
)
