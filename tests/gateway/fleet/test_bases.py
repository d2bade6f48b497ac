"""A gateway decodes a text only with the files of the base that generated it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.fleet.bases import GatewayBases
from gateway.fleet.view import FleetView
from gateway.text.own_files import OwnFiles
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import NotFound, Unavailable


def texts_of(name: str) -> OwnFiles:
    async def close() -> None:
        await asyncio.sleep(0)

    base, sandbox = SimpleNamespace(name=name), SimpleNamespace(close=close)
    return OwnFiles(*cast(Any, (None, base, sandbox, None, None)))


def view(bus: Bus, **settings: str) -> FleetView:
    return FleetView(bus, Settings(model="a", **cast(Any, settings)))


def added(**models: str) -> m.AddedBases:
    return m.AddedBases(bases={name: m.AddedBase(model=model, added_ms=1) for name, model in models.items()})


async def test_a_base_that_is_replaced_is_read_by_no_other_meanwhile(bus: Bus) -> None:
    """When it is removed and added again with another model, it is fetched again, which may take long."""
    is_reading, go_on = asyncio.Event(), asyncio.Event()

    async def read(name: str, base: m.AddedBase) -> OwnFiles:
        if base.model == "/new":
            is_reading.set()
            await go_on.wait()
        return texts_of(f"{name} of {base.model}")

    fleet = view(bus)
    bases = GatewayBases(fleet, texts_of("a"), read)
    fleet.set_added(added(x="/old"))
    await bases.read()
    assert bases.of("x").base.name == "x of /old"
    fleet.set_added(added(y="/new", x="/new"))
    assert fleet.names == ("a", "y", "x")
    reading = asyncio.create_task(bases.read())
    await is_reading.wait()
    for name in "xy":
        with pytest.raises(Unavailable, match=f"`{name}` is still loading"):
            bases.of(name)
    go_on.set()
    await reading
    assert bases.of("x").base.name == "x of /new"


async def test_what_changes_while_it_is_read_is_read_again(bus: Bus) -> None:
    fleet = view(bus)
    fleet.set_added(added(x="/first"))

    async def read(name: str, base: m.AddedBase) -> OwnFiles:
        await asyncio.sleep(0)
        if base.model == "/first":
            fleet.set_added(added(x="/second"))
        return texts_of(f"{name} of {base.model}")

    bases = GatewayBases(fleet, texts_of("a"), read)
    await bases.read()
    with pytest.raises(Unavailable, match="`x` is still loading"):
        bases.of("x")
    await bases.read()
    assert bases.of("x").base.name == "x of /second"
    fleet.set_added(m.AddedBases(removed=["x"]))
    with pytest.raises(NotFound, match="`x` was removed"):
        bases.of("x")


async def test_a_name_of_none_of_several_is_not_the_default_one(bus: Bus) -> None:
    """Nor is a base that was removed so long ago that it is forgotten."""

    async def read(name: str, _: m.AddedBase) -> OwnFiles:
        await asyncio.sleep(0)
        return texts_of(name)

    several = GatewayBases(view(bus, more_models="b"), texts_of("a"), read)
    await several.read()
    assert {name: several.of(name).base.name for name in ("", "a", "b")} == {"": "a", "a": "a", "b": "b"}
    with pytest.raises(NotFound, match="`gone` is not served here"):
        several.of("gone")
    assert GatewayBases(view(bus), texts_of("a"), read).of("its earlier name").base.name == "a"
