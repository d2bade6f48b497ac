"""A gateway decodes a text only with the files of the base that generated it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.text.bases import BaseTexts, GatewayBases
from protocol.wire import messages as m
from protocol.wire.errors import NotFound, Unavailable


def texts_of(name: str) -> BaseTexts:
    async def close() -> None:
        await asyncio.sleep(0)

    own = SimpleNamespace(base=SimpleNamespace(name=name), close=close)
    return BaseTexts(cast(Any, own), cast(Any, None), cast(Any, SimpleNamespace(close=close)))


def added(**models: str) -> m.AddedBases:
    return m.AddedBases(bases={name: m.AddedBase(model=model, added_ms=1) for name, model in models.items()})


async def test_a_base_that_is_replaced_is_read_by_no_other_meanwhile() -> None:
    """When it is removed and added again with another model, it is fetched again, which may take long."""
    is_reading, go_on = asyncio.Event(), asyncio.Event()

    async def read(name: str, model: str) -> BaseTexts:
        if model == "/new":
            is_reading.set()
            await go_on.wait()
        return texts_of(f"{name} of {model}")

    known = [added(x="/old")]
    bases = GatewayBases(texts_of("a"), {}, read, added=lambda: known[-1])
    await bases.read()
    assert bases.of("x").files.name == "x of /old"
    known.append(added(y="/new", x="/new"))
    assert bases.names == ["y", "x"]
    reading = asyncio.create_task(bases.read())
    await is_reading.wait()
    for name in "xy":
        with pytest.raises(Unavailable, match=f"`{name}` is still loading"):
            bases.of(name)
    go_on.set()
    await reading
    assert bases.of("x").files.name == "x of /new"


async def test_what_changes_while_it_is_read_is_read_again() -> None:
    known = [added(x="/first")]

    async def read(name: str, model: str) -> BaseTexts:
        await asyncio.sleep(0)
        if model == "/first":
            known.append(added(x="/second"))
        return texts_of(f"{name} of {model}")

    bases = GatewayBases(texts_of("a"), {}, read, added=lambda: known[-1])
    await bases.read()
    with pytest.raises(Unavailable, match="`x` is still loading"):
        bases.of("x")
    await bases.read()
    assert bases.of("x").files.name == "x of /second"
    known.append(m.AddedBases(removed=["x"]))
    with pytest.raises(NotFound, match="`x` was removed"):
        bases.of("x")


def test_a_name_of_none_of_several_is_not_the_default_one() -> None:
    """Nor is a base that was removed so long ago that it is forgotten."""
    several = GatewayBases(texts_of("a"), {"b": texts_of("b")})
    assert {name: several.of(name).files.name for name in ("", "a", "b")} == {"": "a", "a": "a", "b": "b"}
    with pytest.raises(NotFound, match="`gone` is not served here"):
        several.of("gone")
    assert GatewayBases(texts_of("a"), {}).of("its earlier name").files.name == "a"
