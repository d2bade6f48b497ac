"""Registered names in a complete store: served, updated, moved, private, refused, retried, unregistered."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from helpers.adapter_files import BASE, adapter_bytes, write_adapter
from helpers.hub_stub import HubStub, Repo
from helpers.reported import report
from helpers.store_run import RunStore, ask, get, in_state
from helpers.waiting import wait_until

from adapter_store.sources.retry import Retries
from adapter_store.timings import StoreTimings
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from protocol.queue.adapters import MAX_ON_REQUEST, NameLimits
from protocol.queue.bus import Bus, now_ms
from protocol.runtime.backoff import Backoff
from protocol.runtime.fleet_secret import FleetSecret
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import Conflict, Overloaded
from protocol.wire.keys import private_name

SECRET = "a secret of the tests"


@pytest_asyncio.fixture
async def hub(hub: HubStub, bus: Bus, timings: StoreTimings) -> HubStub:
    """A Hub that stores use, with short pauses, while the fleet has a base model."""
    timings.trouble = timings.refusal = timings.content = Backoff(0.05, 0.1)
    timings.retries = Retries(max_tries=1)
    await report(bus, BASE)
    hub.repos["org/a"] = Repo()
    hub.repos["org/a"].commit(adapter_bytes())
    return hub


@pytest.fixture
def settings(settings: Settings, hub: HubStub) -> Settings:
    return settings.model_copy(update={"hub_endpoint": hub.url, "secret": SECRET})


async def register(bus: Bus, name: str = "a", source: str = "hub:org/a", token: str = "", **fields: Any) -> None:
    sealed = FleetSecret(SECRET).seal(token, private_name(name, fields.get("tenant", "")))
    await bus.adapters.register(m.Registration(name=name, source=source, token=sealed, asked_ms=now_ms(), **fields))


async def is_gone(bus: Bus, name: str, tenant: str = "") -> None:
    async def look() -> bool:
        return await bus.adapters.alias(name, tenant) is None

    await wait_until(look, f"{name} is gone")


async def test_a_registered_name_is_served_and_kept_fresh(bus: Bus, hub: HubStub, run_store: RunStore) -> None:
    store = run_store(refresh_s=0.1)
    url = await store.url()
    await register(bus)
    first = await in_state(bus, "a", "on_disk")
    assert first.source == f"hub:org/a@{hub.repos['org/a'].refs['main']}"
    hub.repos["org/a"].commit(adapter_bytes(1))
    second = await in_state(bus, "a", "on_disk", not_digest=first.digest)
    for alias in (first, second):
        await ask(url, alias.digest, SECRET)
    await bus.adapters.unregister("a")
    await is_gone(bus, "a")
    assert await bus.adapters.registrations() == {}


async def test_a_name_can_be_pointed_elsewhere(bus: Bus, hub: HubStub, run_store: RunStore) -> None:
    """To another repository or a commit: the content changes in one step and is never missing."""
    old_commit = hub.repos["org/a"].refs["main"]
    hub.repos["org/a"].commit(adapter_bytes(1))
    hub.repos["org/b"] = Repo()
    hub.repos["org/b"].commit(adapter_bytes(2))
    run_store()
    digests = set()
    for source in ("hub:org/a", "hub:org/b", f"hub:org/a@{old_commit}"):
        await register(bus, source=source)

        async def is_there(source: str = source) -> m.Alias | None:
            alias = await bus.adapters.alias("a")
            assert alias is None or alias.state != "failed"
            assert not digests or (alias is not None and alias.state == "on_disk")
            return alias if alias and alias.state == "on_disk" and alias.source.startswith(source) else None

        digests.add((await wait_until(is_there, f"the name refers to {source}")).digest)
    assert len(digests) == 3


async def test_stale_is_said_and_fresh_again_too(bus: Bus, hub: HubStub, run_store: RunStore) -> None:
    store = run_store(refresh_s=0.1)
    await register(bus)
    first = await in_state(bus, "a", "on_disk")
    hub.down = True

    async def says(text: str) -> bool:
        alias = await bus.adapters.alias("a")
        assert alias is not None
        assert (alias.state, alias.digest) == ("on_disk", first.digest)
        return alias.reason == "" if text == "" else text in alias.reason

    await wait_until(lambda: says("may be out of date: the Hub answered 503"), "it is marked stale")
    await ask(await store.url(), first.digest, SECRET)
    hub.down = False
    await wait_until(lambda: says(""), "it is fresh again")


async def test_refusals_say_why_and_are_looked_at_again_when_asked(
    bus: Bus, hub: HubStub, run_store: RunStore, timings: StoreTimings
) -> None:
    timings.refusal = Backoff(3600.0, 3600.0)
    hub.repos["org/bad"] = Repo()
    hub.repos["org/bad"].commit(adapter_bytes(use_qalora=True))
    run_store()
    await register(bus, "bad", "hub:org/bad")
    await register(bus, "none", "hub:org/none")
    await register(bus, "nowhere", "ftp://x")
    await register(bus, "bucket", "s3://secret/adapters/a")
    assert "use_qalora" in (await in_state(bus, "bad", "failed")).reason
    assert "does not exist" in (await in_state(bus, "none", "failed")).reason
    assert "not a supported" in (await in_state(bus, "nowhere", "failed")).reason
    assert "not a supported" in (await in_state(bus, "bucket", "failed")).reason
    hub.repos["org/bad"].commit(adapter_bytes(3))
    hub.seen.clear()
    await register(bus)
    await in_state(bus, "a", "on_disk")
    assert not hub.requests("org/bad"), "it was not requested again"
    await register(bus, "bad", "hub:org/bad")
    await in_state(bus, "bad", "on_disk")


@pytest.mark.parametrize("source", ["hub:org/a", "hub:org/a@main"])
async def test_a_repository_that_goes_away_is_not_served_on(
    bus: Bus, hub: HubStub, run_store: RunStore, source: str
) -> None:
    run_store(refresh_s=0.1)
    await register(bus, source=source)
    await in_state(bus, "a", "on_disk")
    gone = hub.repos.pop("org/a")
    assert (await in_state(bus, "a", "failed")).digest == ""
    hub.repos["org/a"] = gone
    await in_state(bus, "a", "on_disk")


async def test_refused_content_that_is_mended_is_served_by_itself(bus: Bus, hub: HubStub, run_store: RunStore) -> None:
    hub.repos["org/a"].commit(adapter_bytes(use_qalora=True))
    run_store()
    await register(bus)
    await in_state(bus, "a", "failed")
    hub.repos["org/a"].commit(adapter_bytes(3))
    await in_state(bus, "a", "on_disk")


async def test_refused_content_is_fetched_again_seldom(
    bus: Bus, hub: HubStub, run_store: RunStore, timings: StoreTimings
) -> None:
    timings.content = Backoff(3600.0, 3600.0)
    hub.repos["org/a"].commit(adapter_bytes(use_qalora=True))
    run_store()
    await register(bus)
    assert (await in_state(bus, "a", "failed")).retry_ms > now_ms() + 3_000_000
    hub.repos["org/a"].commit(adapter_bytes(3))
    await register(bus)  # once more: at once
    await in_state(bus, "a", "on_disk")


async def test_trouble_passes_by_itself(bus: Bus, hub: HubStub, run_store: RunStore) -> None:
    hub.down = True
    run_store()
    await register(bus)
    assert "503" in (await in_state(bus, "a", "failed")).reason
    hub.down = False
    await in_state(bus, "a", "on_disk")


async def test_private_names(bus: Bus, hub: HubStub, run_store: RunStore) -> None:
    """Fetched with the registration's token and visible to its tenant alone; revoking the token ends that."""
    hub.repos["org/p"] = Repo(private=True)
    hub.repos["org/p"].commit(adapter_bytes(7))
    hub.tokens = {"hf_mine": {"org/p"}, "hf_other": set()}
    store = run_store(refresh_s=0.1)
    await register(bus, "p", "hub:org/p", token="hf_mine", tenant="me")
    await register(bus, "p", "hub:org/p", token="hf_other", tenant="you")

    async def of(tenant: str, state: str) -> m.Alias:
        async def look() -> m.Alias | None:
            alias = await bus.adapters.alias("p", tenant)
            return alias if alias is not None and alias.state == state else None

        return await wait_until(look, f"{tenant}'s name is {state}")

    mine = await of("me", "on_disk")
    await of("you", "failed")
    assert await bus.adapters.alias("p") is None
    assert [alias.tenant for alias in await bus.adapters.aliases("me")] == ["me"]
    assert await bus.adapters.aliases() == []
    await ask(await store.url(), mine.digest, SECRET)
    hub.tokens["hf_mine"] = set()
    await of("me", "failed")
    shown = [await bus._redis.hgetall(bus.keys.adapters), await bus.streams.entries(bus.keys.adapter_events)]
    assert "hf_" not in repr(shown)


async def test_the_fleets_token_is_for_what_operators_register(
    bus: Bus, hub: HubStub, run_store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant's registration gets it only if a gateway has lent it; an adapter fetched with it stays closed."""
    monkeypatch.setenv("HF_TOKEN", "hf_fleet")
    hub.repos["org/p"] = Repo(private=True)
    commit = hub.repos["org/p"].commit(adapter_bytes(7))
    hub.tokens = {"hf_fleet": {"org/p"}}
    run_store(request_sources="hub")
    await register(bus, "ops", f"hub:org/p@{commit}")
    await in_state(bus, "ops", "on_disk")
    await register(bus, "mine", f"hub:org/p@{commit}", tenant="acme")
    await register(bus, "lent", f"hub:org/p@{commit}", tenant="acme", as_fleet=True)
    await register(bus, f"org/p@{commit}", f"hub:org/p@{commit}", on_request=True)

    async def states() -> list[str]:
        aliases = [await bus.adapters.alias(name, "acme") for name in ("mine", "lent")]
        aliases.append(await bus.adapters.alias(f"org/p@{commit}"))
        return [alias.state if alias is not None else "" for alias in aliases]

    async def are_settled() -> bool:
        return not {"", "downloading"} & set(await states())

    await wait_until(are_settled, "all are settled")
    assert await states() == ["failed", "on_disk", "failed"]


async def test_how_long_a_tenants_token_is_believed(bus: Bus, hub: HubStub, run_store: RunStore) -> None:
    """While the Hub is down, a tenant keeps access for as long as the setting says; an operator's name stays."""
    hub.tokens = {"hf_mine": {"org/a"}}
    run_store(refresh_s=0.05, access_check_s=0.01)
    await register(bus, "mine", token="hf_mine", tenant="acme")
    await register(bus, "ops", token="hf_mine")
    operators = await in_state(bus, "ops", "on_disk")
    assert operators.confirmed_ms == 0

    async def is_confirmed() -> bool:
        alias = await bus.adapters.alias("mine", "acme")
        return alias is not None and alias.state == "on_disk" and alias.confirmed_ms > 0

    await wait_until(is_confirmed, "the tenant's name is served")
    hub.down = True

    async def has_failed() -> bool:
        alias = await bus.adapters.alias("mine", "acme")
        return alias is not None and (alias.state, alias.status) == ("failed", 503)

    await wait_until(has_failed, "the token is not believed any more")

    async def is_stale() -> bool:
        alias = await bus.adapters.alias("ops")
        return alias is not None and alias.state == "on_disk" and "out of date" in alias.reason

    await wait_until(is_stale, "the operator's name stays")


async def test_tenants_have_a_share_of_the_registrations(bus: Bus) -> None:
    """Both the tenant's own names and those created by its requests are limited; other tenants are not affected."""

    async def new(name: str, tenant: str, *, on_request: bool = False, max_own: int = 2, rate: int = 9) -> bool:
        owner = "" if on_request else tenant
        wanted = m.Registration(name=name, source="hub:org/a", tenant=owner, on_request=on_request)
        return await bus.adapters.register(wanted, limits=NameLimits(tenant, max_own, rate))

    for name in ("a", "b", "a"):
        assert await new(name, "acme")
    with pytest.raises(Conflict, match="tenant acme has 2 registered adapters"):
        await new("c", "acme")
    assert await new("c", "acm")
    assert await new("org/x", "acme", on_request=True), "which is nobody's own"
    for name, on_request in (("org/y", True), ("a", False)):
        with pytest.raises(Overloaded, match="4 adapters a minute") as raised:
            await new(name, "acme", on_request=on_request, rate=4)
        assert raised.value.status == 429
    assert await new("org/x", "acme", on_request=True, rate=4), "it is there already"
    assert await new("org/y", "corp", on_request=True, rate=4)


async def test_what_requests_name_leaves_room_for_registrations(bus: Bus) -> None:
    pipe = bus._redis.pipeline(transaction=False)
    for i in range(MAX_ON_REQUEST):
        pipe.hset(bus.keys.registrations, f"org/{i}", b"x")
    await pipe.execute()
    wanted = m.Registration(name="org/one-more", source="hub:org/one-more", on_request=True)
    assert not await bus.adapters.register(wanted)
    assert await bus.adapters.register(msgspec.structs.replace(wanted, on_request=False))


async def test_a_look_is_asked_for_without_changing_the_name(bus: Bus) -> None:
    await register(bus, "mine", token="hf_mine", tenant="acme")
    before = await bus.adapters.registration("mine", "acme")
    assert before is not None
    assert await bus.adapters.ask_again("mine", "acme", before.asked_ms + 5)
    assert not await bus.adapters.ask_again("mine", "corp", before.asked_ms + 5)
    after = await bus.adapters.registration("mine", "acme")
    assert after == msgspec.structs.replace(before, asked_ms=before.asked_ms + 5)
    assert await bus.adapters.ask_again("mine", "acme", before.asked_ms)
    assert await bus.adapters.registration("mine", "acme") == after, "never back in time"


@pytest.mark.parametrize(
    ("changes", "on_request", "part"),
    [({}, True, "requests may not name hub"), ({"hub_orgs": "acme"}, False, "organisation"),
     ({"request_sources": "hub", "hub_orgs": "acme, corp"}, True, "organisation")],
)  # fmt: skip
async def test_policy(
    bus: Bus, hub: HubStub, run_store: RunStore, changes: dict[str, Any], on_request: bool, part: str
) -> None:
    run_store(**changes)
    await register(bus, on_request=on_request)
    assert part in (await in_state(bus, "a", "failed")).reason
    assert hub.seen == []


async def test_requests_may_name_what_policy_lets_them(bus: Bus, hub: HubStub, run_store: RunStore) -> None:
    run_store(request_sources="hub", hub_orgs="org")
    await register(bus, "org/a", on_request=True)
    await in_state(bus, "org/a", "on_disk")


async def test_refused_requests_are_forgotten(
    bus: Bus, hub: HubStub, run_store: RunStore, timings: StoreTimings
) -> None:
    """Names created by requests are forgotten; a registered name stays, with its reason."""
    timings.forget_refused_ms, timings.reload_s = 0, 0.05
    run_store(request_sources="hub")
    await register(bus, "kept", "hub:org/none")
    await register(bus, "org/typo", "hub:org/typo", on_request=True)
    await in_state(bus, "kept", "failed")
    await wait_until(lambda: hub.requests("org/typo"), "it was looked up")
    await is_gone(bus, "org/typo")
    assert list(await bus.adapters.registrations()) == ["kept"]


async def test_what_a_newer_release_has_registered_is_left_to_it(
    bus: Bus, hub: HubStub, run_store: RunStore, timings: StoreTimings
) -> None:
    """An older store that cannot read the registration removes neither its name nor the adapter behind it."""
    timings.reload_s, timings.record_kept_s = 0.05, 0.0
    store = run_store()
    for name in ("newer", "older", "last"):
        await register(bus, name)
        await in_state(bus, name, "on_disk")
    raw = await bus._redis.hget(bus.keys.registrations, "newer")
    newer = msgspec.msgpack.encode({**msgspec.msgpack.decode(raw), "form": 1000})
    await bus._redis.hset(bus.keys.registrations, mapping={"newer": newer, "older": b"\xc1"})
    await store.url()
    await is_gone(bus, "older")
    await bus.adapters.unregister("last")
    await is_gone(bus, "last")
    kept = await bus.adapters.alias("newer")
    assert kept is not None
    assert kept.state == "on_disk"
    assert await bus._redis.hget(bus.keys.registrations, "newer") == newer
    await bus._redis.hdel(bus.keys.registrations, "newer")
    await is_gone(bus, "newer")


async def test_registrations_are_bounded(bus: Bus) -> None:
    for i in range(2):
        assert await bus.adapters.register(m.Registration(name=f"n{i}", source="hub:org/a"), max_registered=2)
    assert not await bus.adapters.register(m.Registration(name="n2", source="hub:org/a"), max_registered=2)
    assert await bus.adapters.register(m.Registration(name="n1", source="hub:org/b"), max_registered=2), (
        "it is there already"
    )


async def test_a_folder_of_that_name_comes_first(
    bus: Bus, hub: HubStub, settings: Settings, run_store: RunStore
) -> None:
    assert settings.adapters is not None
    run_store()
    await register(bus)
    remote = await in_state(bus, "a", "on_disk")
    write_adapter(settings.adapters / "a", seed=50)
    local = await in_state(bus, "a", "on_disk", not_digest=remote.digest)
    assert local.source == "local:a"
    shutil.rmtree(settings.adapters / "a")
    assert (await in_state(bus, "a", "on_disk", not_digest=local.digest)).digest == remote.digest


async def test_slow_ones_keep_nobody_waiting(bus: Bus, hub: HubStub, settings: Settings, run_store: RunStore) -> None:
    """While every download from the Hub hangs, folders are still served, and the hanging names are "downloading"."""
    assert settings.adapters is not None
    hub.gate = asyncio.Event()
    for i in range(10):
        hub.repos[f"slow/{i}"] = Repo()
        hub.repos[f"slow/{i}"].commit(adapter_bytes(10 + i))
    store = run_store(max_downloads=4)
    for i in range(10):
        await register(bus, f"slow{i}", f"hub:slow/{i}")
    await wait_until(lambda: len(hub.requests(WEIGHTS_FILE)) == 4, "four downloads have begun")
    write_adapter(settings.adapters / "folder", seed=60)
    await ask(await store.url(), (await in_state(bus, "folder", "on_disk")).digest, SECRET)
    assert {(await in_state(bus, f"slow{i}", "downloading")).digest for i in range(10)} == {""}
    assert len(hub.requests(WEIGHTS_FILE)) == 4
    hub.gate.set()
    for i in range(10):
        await in_state(bus, f"slow{i}", "on_disk")


async def test_one_of_two_stores_fetches(bus: Bus, hub: HubStub, tmp_path: Path, run_store: RunStore) -> None:
    """One at a time; and each store can serve the content, from its disk or by fetching it."""
    hub.gate = asyncio.Event()
    stores = [run_store(data=tmp_path / f"data{i}", adapters=None) for i in range(2)]
    await wait_until(lambda: _num_stores(bus, 2), "both have registered")
    await register(bus)
    await wait_until(lambda: hub.requests(WEIGHTS_FILE), "a download has begun")
    assert await bus._redis.exists(bus.keys.fetching("a"))
    write = await bus._redis.set(bus.keys.fetching("a"), "2", nx=True)
    assert not write
    assert len(hub.requests(WEIGHTS_FILE)) == 1
    hub.gate.set()
    alias = await in_state(bus, "a", "on_disk")
    for sid in await bus.members.ids(bus.keys.stores):
        await ask((await bus._redis.get(bus.keys.store_beat(sid))).decode(), alias.digest, SECRET)
    assert len(stores) == 2


async def _num_stores(bus: Bus, num: int) -> bool:
    return len(await bus.members.ids(bus.keys.stores)) == num


async def test_a_restart_fetches_nothing_and_serves_on_without_a_hub(
    bus: Bus, hub: HubStub, run_store: RunStore
) -> None:
    store = run_store()
    await register(bus)
    alias = await in_state(bus, "a", "on_disk")
    await store.end()
    hub.down = True
    hub.seen.clear()
    again = run_store()

    async def is_stale() -> bool:
        now = await bus.adapters.alias("a")
        assert now is not None
        assert (now.state, now.digest) == ("on_disk", alias.digest)
        return "may be out of date" in now.reason

    await wait_until(is_stale, "it is marked stale")
    await ask(await again.url(), alias.digest, SECRET)
    assert not hub.requests("/resolve/")


async def test_evicted_content_is_fetched_again_with_the_registrations_token(
    bus: Bus, hub: HubStub, settings: Settings, run_store: RunStore
) -> None:
    hub.repos["org/p"] = Repo(private=True)
    hub.repos["org/p"].commit(adapter_bytes(7))
    hub.tokens = {"hf_mine": {"org/p"}}
    store = run_store()
    await register(bus, "p", "hub:org/p", token="hf_mine", tenant="me")
    digest = (await wait_until(lambda: _on_disk(bus, "p", "me"), "p is there")).digest
    shutil.rmtree(settings.data / "adapters" / "blobs" / digest)
    await ask(await store.url(), digest, SECRET)
    assert (await get(f"{await store.url()}/adapters/{'0' * 64}/{CONFIG_FILE}", SECRET)).status_code == 404


async def _on_disk(bus: Bus, name: str, tenant: str) -> m.Alias | None:
    alias = await bus.adapters.alias(name, tenant)
    return alias if alias is not None and alias.state == "on_disk" else None


def test_backoff() -> None:
    backoff = Backoff(5.0, 600.0)
    assert [backoff.pause_s(n) for n in (1, 2, 3, 8, 9, 10_000)] == [5.0, 10.0, 20.0, 600.0, 600.0, 600.0]
