"""A real fleet with API keys, an honest tenant as victim, and the evaluation of an attack's effect on both."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
from helpers.factories import make_adapter, make_tiny_model
from helpers.hub_stub import HubStub, Repo, run_hub
from helpers.waiting import wait_until
from hostile import hostile_adapters
from hostile.adapter_attacks import ADAPTER_ATTACKS, HIDDEN, SECRET, asking, peeping, stealing
from hostile.memory import Crowd, growth_bytes
from hostile.path_attacks import unlocking
from hostile.victim import Seen, Victim

from chaos.attackers.attacker import Attack, Attacker, Round
from chaos.attackers.attacks import BODY_ATTACKS, COMPLETIONS, MANY_LOGPROBS, completion
from chaos.attackers.reading_attacks import READING_ATTACKS
from chaos.attackers.webhook_attacks import WEBHOOK_ATTACKS, silent_dns
from chaos.attackers.wire_attacks import WIRE_ATTACKS
from chaos.fleet import ProcessFleet, Shape
from protocol.queue.books.api_keys import Tenant

MULTIPLE = 20.0
"""Maximum ratio of the victim's p99 gap during an attack to that alone."""

FLOOR_S = 0.1
"""Minimum p99 gap alone that is used in the ratio: a busy machine causes pauses of its own."""

FLEET_TOKEN = "hf_fleet"
FATAL_BYTES = 4 << 30
"""A member with this much memory is killed, which fails its trial, to protect the machine."""

SAMPLE_S = 0.1
SETTLE_S = 60.0

CROWD = Crowd(holders=4, connections=540)
"""The victim, at most one attacker, and their addresses."""

GATEWAY_MEMORY = 256 << 20
"""Bytes that calls may hold: few enough that an attack which exceeded them would be noticed."""


@dataclass(slots=True)
class Trial:
    """One attack and its effects."""

    name: str
    alone: Seen
    beside: Seen
    told: Mapping[str, int]
    before: dict[str, int]  # bytes, by member
    largest: dict[str, int]
    cpu_s: dict[str, float]  # used during the attack, by member, including its children
    wrong: list[str] = field(default_factory=list)


def judged(trial: Trial, first_rss: Mapping[str, int], growth_bytes: Mapping[str, int]) -> list[str]:
    """Return the violations that a trial shows. Pure.

    first_rss: bytes of each member before all attacks. growth_bytes: maximum bytes that it may take beyond that.
    """
    alone, beside = trial.alone, trial.beside
    wrong = [f"the victim: {error}" for error in beside.errors[:5]]
    if not beside.num_healthy:
        wrong.append("/health did not answer")
    for what, took_s, alone_s in (
        ("the victim's p99 gap", beside.gap_s(0.99), alone.gap_s(0.99)),
        ("the victim's longest wait for a first token", beside.first_s(1.0), alone.first_s(1.0)),
        ("/health's p99", beside.answer_s(0.99), alone.answer_s(0.99)),
    ):
        limit_s = MULTIPLE * max(alone_s, FLOOR_S)
        if took_s > limit_s:
            wrong.append(f"{what} took {took_s:.2f} s; the limit is {limit_s:.2f}")
    for name, num_bytes in trial.largest.items():
        grown = num_bytes - first_rss[name]
        if grown > growth_bytes[name]:
            wrong.append(f"{name} grew by {grown >> 20} MB; the limit is {growth_bytes[name] >> 20}")
    return wrong


class Arena:
    """The fleet under attack."""

    def __init__(self, fleet: ProcessFleet, hub: HubStub, victim: Victim, keys: Mapping[str, str]) -> None:
        self.fleet = fleet
        self.hub = hub
        self.victim = victim
        self.keys = keys
        self.pids = {name: member.pid for name, member in fleet.members.items()}
        self.pids["queue"] = fleet.queue.process.pid
        self.first_rss = self.rss()
        self.alone = Seen()

    # ------------------------------------------------------------ monitoring

    def rss(self) -> dict[str, int]:
        """Return the RSS in bytes of each member, and the sum of its children's; 0 for ended processes."""
        found: dict[str, int] = {}
        for name, pid in self.pids.items():
            found[name] = found[f"{name}'s children"] = 0
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                found[name] = process.memory_info().rss
                found[f"{name}'s children"] = sum(map(_rss_of, process.children(recursive=True)))
        return found

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds used by each member with its children, and by this process."""
        found = {"attacker": time.process_time()}
        for name, pid in self.pids.items():
            found[name] = 0.0
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                found[name] = sum(process.cpu_times()[:4]) + sum(map(_cpu_s_of, process.children(recursive=True)))
        return found

    def ended(self) -> list[str]:
        """Return the members whose process has ended."""
        return [name for name, member in self.fleet.members.items() if not member.is_running]

    async def rest(self, seconds: float) -> Seen:
        """Leave the victim alone for `seconds`; return what it saw."""
        await self.victim.seen()
        await asyncio.sleep(seconds)
        self.alone = await self.victim.seen()
        return self.alone

    # ------------------------------------------------------------ attacks

    async def attack(self, attack: Attack, seconds: float, key: str = "attacker") -> Trial:
        """Attack the fleet for `seconds` while its victim runs; return the evaluated trial."""
        before, cpu_s = self.rss(), self.cpu_s()
        largest = dict(before)
        watch = asyncio.create_task(self._watch(largest))
        attacker = Attacker(self.fleet.url, self.keys.get(key, ""))
        await self.victim.seen()
        try:
            await attack.run(attacker, seconds)
        finally:
            await attacker.close()
        beside = await self._recovered()
        watch.cancel()
        used_s = {name: used_s - cpu_s[name] for name, used_s in self.cpu_s().items()}
        trial = Trial(attack.name, self.alone, beside, attacker.told, before, largest, used_s)
        trial.wrong = [f"{name} has ended: {self.fleet.members[name].log_tail()}" for name in self.ended()]
        growth = growth_bytes(self.fleet.settings, CROWD)
        trial.wrong += judged(trial, self.first_rss, growth) + attack.wrongly_told(attacker.told)
        return trial

    async def _recovered(self) -> Seen:
        """Return what the victim saw since the attack began, once it has a complete answer after the attack."""
        parts = [await self.victim.seen()]

        async def has_answer() -> bool:
            parts.append(await self.victim.seen())
            return parts[-1].num_answers > 0 or bool(parts[-1].errors)

        try:
            await wait_until(has_answer, "the victim is answered", timeout_s=SETTLE_S, every_s=SAMPLE_S)
        except AssertionError as error:
            parts[-1].errors.append(str(error))
        return sum(parts, start=Seen())

    async def _watch(self, largest: dict[str, int]) -> None:
        while True:
            for name, num_bytes in self.rss().items():
                largest[name] = max(largest[name], num_bytes)
                if num_bytes > FATAL_BYTES and name in self.fleet.members:
                    self.fleet.kill(name)
            await asyncio.sleep(SAMPLE_S)

    # ------------------------------------------------------------ attacks that need this fleet

    async def read_configs(self, attacker: Attacker) -> None:
        """Make the store find configs that expand enormously, and request the results."""
        root = self.fleet.folder / "adapters"
        if not (root / "sparse").exists():
            hostile_adapters.add_sparse(root, root / "one")

        async def is_refused(name: str) -> bool:
            alias = await self.fleet.bus.adapters.alias(name)
            return alias is not None and alias.state == "failed"

        for name in hostile_adapters.CONFIGS:
            await wait_until(lambda name=name: is_refused(name), f"the store has refused {name}", timeout_s=SETTLE_S)
            await attacker.post(COMPLETIONS, completion(model=name))

    async def operators_state(self) -> Any:
        """Return everything that only operators may change: keys, limits, pins, all tenants' adapters, draining
        workers, and the newest audit entry."""
        bus = self.fleet.bus
        aliases = [await bus.adapters.alias(name) for name in ("one", "two")]
        beats = [beat.draining for beat in (await bus.members.worker_beats()).values() if beat is not None]
        keys = [(key.id, key.scopes, tenant) for key, tenant in await bus.api_keys.all()]
        return keys, await bus.adapters.pins(), aliases, beats, await bus.audit.newest(1)

    def attacks(self) -> list[tuple[Attack, str]]:
        """Return every attack with the name of the key that it uses."""
        return attacks_of(self.hub.repos[SECRET].refs["main"], self.read_configs, self.operators_state)


def attacks_of(commit: str, read_configs: Round, state: Callable[[], Awaitable[Any]]) -> list[tuple[Attack, str]]:
    """Return every attack with the name of the key that it uses.

    commit: of the private adapter. state: returns everything that only operators may change.
    """
    adapters = [*map(asking, hostile_adapters.TOKENIZERS), *ADAPTER_ATTACKS]
    configs = Attack("configs of 1.5 GB and of 20,000 modules", read_configs)
    return [
        *((attack, "attacker") for attack in (*BODY_ATTACKS, *WEBHOOK_ATTACKS, *adapters, configs)),
        *((attack, "" if attack.keyless else "attacker") for attack in WIRE_ATTACKS),
        (stealing(commit), "thief"),
        (peeping(["two", HIDDEN]), "peeper"),
        (unlocking(state), "attacker"),
        (MANY_LOGPROBS, "attacker"),
        *((attack, "attacker") for attack in READING_ATTACKS),
    ]


async def _nothing(*_: Attacker) -> None:
    pass


NAMES = tuple(attack.name for attack, _ in attacks_of("", _nothing, _nothing))


@asynccontextmanager
async def arena_in(folder: Path, model: Path | None = None, **settings: Any) -> AsyncIterator[Arena]:
    """Start a fleet with a victim; both end with the block.

    model: served in place of a tiny one. settings: of the fleet, and other arguments of `ProcessFleet.prepare`.
    """
    model = model or make_tiny_model(folder / "model", max_len=2048)
    root = folder / "adapters"
    for seed, name in enumerate(("one", "two"), start=1):
        make_adapter(root / name, model, seed=seed, rank=8)
    hostile_adapters.write_all(root, root / "one", model)
    async with run_hub() as hub:
        files = {name: (root / "one" / name).read_bytes() for name in hostile_adapters.GOOD_FILES}
        for name in (SECRET, HIDDEN):
            hub.repos[name] = Repo(private=True)
            hub.repos[name].commit(files)
        hub.tokens |= {"hf_owner": {SECRET}, FLEET_TOKEN: {HIDDEN}}
        values: dict[str, Any] = {"api_keys": True, "request_sources": "hub", "hub_endpoint": hub.url}
        values |= {"grammar_timeout_s": 0.25, "template_timeout_s": 0.25}
        values |= {"gateway_memory": GATEWAY_MEMORY, "private_webhooks": True, "webhook_dns": silent_dns()}
        values |= {"tenant_places": "org"}  # content read with the fleet's own token is for all who may see its name
        fleet = ProcessFleet.prepare(
            folder, model, root, durable=True, secret="the secret of the arena", **values | settings
        )
        victim: Victim | None = None
        try:
            with patch.dict(os.environ, {"HF_TOKEN": FLEET_TOKEN}):
                await fleet.start_all(Shape())
            keys = await _keys(fleet)
            await _fetch_secret(fleet, hub, keys)
            victim = Victim(fleet.members["gateway"].settings.port, keys["victim"], fleet.settings.dtype)
            arena = Arena(fleet, hub, victim, keys)
            await wait_until(lambda: _has_answered(victim), "the victim is answered", timeout_s=SETTLE_S)
            arena.first_rss = arena.rss()
            yield arena
        finally:
            if victim is not None:
                victim.end()
            await fleet.close()
            shutil.rmtree(root / "sparse", ignore_errors=True)


async def _keys(fleet: ProcessFleet) -> dict[str, str]:
    keys = fleet.bus.api_keys
    await keys.set_tenant(Tenant(name="peeper", adapters=("one",)))
    ordinary = ["infer", "adapters"]
    scopes = dict.fromkeys(("attacker", "thief", "peeper", "owner"), ordinary)
    scopes |= {"victim": ["infer"], "operator": [*ordinary, "admin"]}
    return {tenant: (await keys.create(tenant, of))[0] for tenant, of in scopes.items()}


async def _fetch_secret(fleet: ProcessFleet, hub: HubStub, keys: Mapping[str, str]) -> None:
    """Have the owner use its private adapter, and the operator register one that some tenants must not see."""
    operator, owner = (Attacker(fleet.url, keys[name]) for name in ("operator", "owner"))
    try:
        registered = {"name": HIDDEN, "source": f"hub:{HIDDEN}", "wait_s": SETTLE_S}
        await operator.post("/v1/adapters", registered)
        secret = f"{SECRET}@{hub.repos[SECRET].refs['main']}"
        answer = await owner.post(COMPLETIONS, completion(model=secret, api_token="hf_owner"))
        assert answer is not None, owner.told
        assert answer.get("choices"), answer
    finally:
        await operator.close()
        await owner.close()


async def _has_answered(victim: Victim) -> bool:
    seen = await victim.seen()
    assert not seen.errors, seen.errors
    return seen.num_answers > 0


def _cpu_s_of(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        return sum(process.cpu_times()[:4])
    return 0.0


def _rss_of(process: psutil.Process) -> int:
    with suppress(psutil.NoSuchProcess):
        return process.memory_info().rss
    return 0
