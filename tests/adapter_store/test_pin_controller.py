"""The pin controller compares the adapters that workers should hold with their heartbeats, and sends the difference."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.adapter_files import BASE, write_adapter
from helpers.reported import report
from helpers.store_run import RunStore, in_state
from helpers.waiting import wait_until

from adapter_store.catalogue import Catalogue
from adapter_store.pin_controller import REPEAT_S, PinController
from protocol.queue.bus import Bus, decode
from protocol.runtime.settings import Settings
from protocol.wire import messages as m


def beat(wid: str, **fields: object) -> m.WorkerBeat:
    return m.WorkerBeat(wid=wid, name=wid, capacity=1, **fields)  # type: ignore[arg-type]


@pytest.fixture
def controller(bus: Bus, settings: Settings) -> PinController:
    return PinController(bus, Catalogue(bus, "s"), settings)


def kinds(messages: list[tuple[str, m.Control]]) -> list[tuple[str, str, str]]:
    return [(wid, order.kind, order.digest) for wid, order in messages]


def test_a_pin_is_sent_until_the_worker_has_it(controller: PinController) -> None:
    beats = {"w1": beat("w1"), "w2": beat("w2", pinned={"d": ""})}
    assert kinds(controller.messages(beats, {("d", "")}, set(), 0.0)) == [("w1", "pin", "d")]
    assert controller.messages(beats, {("d", "")}, set(), REPEAT_S - 0.1) == [], "it may be on its way"
    assert kinds(controller.messages(beats, {("d", "")}, set(), REPEAT_S)) == [("w1", "pin", "d")]
    failed = {"w1": beat("w1", pinned={"d": "no room"})}
    assert kinds(controller.messages(failed, {("d", "")}, set(), 2 * REPEAT_S)) == [("w1", "pin", "d")]


def test_what_is_no_longer_pinned_is_unpinned(controller: PinController) -> None:
    """Also if the name now refers to other content."""
    beats = {"w1": beat("w1", pinned={"old": ""})}
    assert kinds(controller.messages(beats, {("new", "")}, set(), 0.0)) == [
        ("w1", "pin", "new"),
        ("w1", "unpin", "old"),
    ]


def test_a_preload_is_sent_once_for_each_worker_and_content(controller: PinController) -> None:
    beats = {"w1": beat("w1"), "w2": beat("w2", host=["d"])}
    assert kinds(controller.messages(beats, set(), {("d", "")}, 0.0)) == [("w1", "prefetch", "d")]
    assert controller.messages(beats, set(), {("d", "")}, 9.0) == []
    assert kinds(controller.messages(beats | {"w3": beat("w3")}, set(), {("d", "")}, 9.0)) == [("w3", "prefetch", "d")]
    beats["w2"] = beat("w2")  # evicted by the worker itself; no order to fetch it was sent
    assert kinds(controller.messages(beats, set(), {("e", "")}, 9.0)) == [
        ("w1", "prefetch", "e"),
        ("w2", "prefetch", "e"),
    ]


async def test_settings_pin_and_preload_beside_what_comes_later(
    bus: Bus, settings: Settings, run_store: RunStore, tmp_path: Path
) -> None:
    """A store with `pin` and `preload` sends both to each worker; it ends only pins of earlier settings."""
    await report(bus, BASE)
    await bus.adapters.pin("gone", "settings")
    await bus.adapters.pin("c", "api")
    assert settings.adapters is not None
    for seed, name in enumerate("abc"):
        write_adapter(settings.adapters / name, seed=seed)
    await bus.streams.create(bus.keys.ctl("w1"), 60)
    await bus.members.beat(bus.keys.worker_beat("w1"), bus.keys.workers, "w1", m.encode(beat("w1")), 3_600_000)
    run_store(pin="a", preload="b, a", refresh_s=3600)
    digests = {name: (await in_state(bus, name, "on_disk")).digest for name in "abc"}

    async def told() -> set[tuple[str, str]]:
        orders = [decode(fields[b"b"], m.Control) for _, fields in await bus.streams.entries(bus.keys.ctl("w1"))]
        return {(order.kind, order.digest) for order in orders}

    wanted = {("pin", digests["a"]), ("prefetch", digests["b"]), ("pin", digests["c"])}

    async def all_told() -> bool:
        return wanted <= await told()

    await wait_until(all_told, "the worker has its messages")
    assert await told() == wanted
    assert await bus.adapters.pins() == {"a": "settings", "c": "api"}
    write_adapter(settings.adapters / "a", seed=7)
    new = (await in_state(bus, "a", "on_disk", not_digest=digests["a"])).digest
    wanted |= {("pin", new)}
    await wait_until(all_told, "the pin has moved with the name")


def test_each_base_holds_its_own(controller: PinController) -> None:
    beats = {base: beat(base, base=base) for base in ("a", "b")}
    pinned, preloaded = {("da", "a"), ("both", "a"), ("both", "b")}, {("db", "b"), ("any", "")}
    assert kinds(controller.messages(beats, pinned, preloaded, 0.0)) == [
        ("a", "pin", "both"), ("a", "pin", "da"), ("a", "prefetch", "any"),
        ("b", "pin", "both"), ("b", "prefetch", "any"), ("b", "prefetch", "db"),
    ]  # fmt: skip
