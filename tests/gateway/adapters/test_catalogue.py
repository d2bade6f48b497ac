"""Lists of adapters come from a sorted copy that matches the catalogue and is shared by concurrent readers."""

from __future__ import annotations

import asyncio

import httpx2
import pytest
from helpers.scripted_fleet import ScriptedFleet

from gateway.adapters.catalogue import CatalogueCopy
from gateway.auth.callers import Caller
from protocol.queue.books.api_keys import Tenant
from protocol.queue.bus import Bus
from protocol.wire import messages as m


def alias(name: str, tenant: str = "", state: m.AdapterState = "on_disk") -> tuple[m.Alias, None]:
    return m.Alias(name=name, state=state, digest="d", source=f"local:{name}", tenant=tenant), None


class CountingCatalogue(CatalogueCopy):
    """Counts how often the whole catalogue is read."""

    num_read = 0

    async def _read(self) -> None:
        self.num_read += 1
        await super()._read()


async def names(catalogue: CatalogueCopy) -> list[str]:
    found = (await catalogue.copy()).after("", "")
    return [one.name async for one in found]


async def test_a_list_has_every_change_and_is_read_only_after_one(bus: Bus) -> None:
    catalogue = CountingCatalogue(bus)
    await bus.adapters.publish([alias("b"), alias("a")])
    for _ in range(20):
        assert await names(catalogue) == ["a", "b"]
    assert catalogue.num_read == 1
    await bus.adapters.publish([alias("c")])
    assert await names(catalogue) == ["a", "b", "c"]
    await bus.adapters.withdraw("a")
    assert await names(catalogue) == ["b", "c"]
    assert catalogue.num_read == 3


async def test_all_who_list_at_once_share_a_reading(bus: Bus) -> None:
    catalogue = CountingCatalogue(bus)
    await bus.adapters.publish([alias(f"n{number}") for number in range(600)])
    found = await asyncio.gather(*(names(catalogue) for _ in range(50)))
    assert {len(one) for one in found} == {600}
    assert catalogue.num_read == 1
    waiting = [asyncio.create_task(names(catalogue)) for _ in range(5)]
    await bus.adapters.publish([alias("new")])
    late = await asyncio.gather(*(names(catalogue) for _ in range(50)))
    assert {len(one) for one in late} == {601}, "a change before the question is in the answer"
    await asyncio.gather(*waiting)
    assert catalogue.num_read <= 3


async def test_a_page_costs_a_page_and_pages_together_are_the_list(bus: Bus) -> None:
    catalogue = CountingCatalogue(bus)
    some = [alias(f"n{number:03}") for number in range(300)]
    await bus.adapters.publish([*some, alias("n005", "acme"), alias("n005", "other"), alias("own", "acme")])
    acme, shown, looked = Caller(Tenant(name="acme"), scopes=("infer",)), list[tuple[str, str]](), 0

    def sees(one: m.Alias) -> bool:
        nonlocal looked
        looked += 1
        return acme.sees(one)

    after, more = "", True
    while more:
        looked = 0
        page, more = await catalogue.page(after, 7, sees)
        assert looked <= 9
        shown += [(one.name, one.tenant) for one in page]
        after = f"{page[-1].name},{page[-1].tenant}"
    wanted = [(f"n{number:03}", "") for number in range(300)]
    wanted[6:6] = [("n005", "acme")]
    assert shown == [*wanted, ("own", "acme")]
    assert [one.name for one in (await catalogue.page("n005", 1, sees))[0]] == ["n006"], "a name leaves all its own out"
    assert catalogue.num_read == 1


@pytest.fixture
async def shared(bus: Bus) -> CatalogueCopy:
    await bus.adapters.publish(
        [alias("acme-de"), alias("common"), alias("common", "acme"), alias("broken", "", "failed")]
    )
    return CatalogueCopy(bus)


async def test_what_was_written_is_for_those_alone_who_see_the_same(shared: CatalogueCopy) -> None:
    made: list[str] = []

    def show(one: m.Alias, _: m.AdapterRecord | None) -> dict[str, str]:
        made.append(one.name)
        return {"name": one.name, "of": one.tenant}

    async def listed(caller: Caller, view: str = "v") -> str:
        return (await shared.listed(caller, view, [{"first": view}], show)).decode()

    plain = [Caller(Tenant(name=name), scopes=("infer",)) for name in ("b", "c")]
    acme = Caller(Tenant(name="acme"), scopes=("infer",))
    narrow = Caller(Tenant(name="b", adapters=("acme-*",)), scopes=("infer",))
    first = await listed(plain[0])
    num = len(made)
    assert await listed(plain[1]) == first
    assert len(made) == num, "it was written before"
    assert '"of":"acme"' in await listed(acme)
    assert '"of":"acme"' not in await listed(plain[0])
    assert "common" not in await listed(narrow)
    assert await listed(plain[0], "w") != first
    assert [one.name for one in await shared.served(narrow)] == ["acme-de"]
    assert [(one.name, one.tenant) for one in await shared.served(acme)] == [("acme-de", ""), ("common", "acme")]


async def test_lists_over_http_follow_each_change(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    for number in range(3):
        await fleet.add_adapter(f"a{number}", f"{number}" * 8)
        models = (await http.get("/v1/models")).json()["data"]
        tags = (await http.get("/api/tags")).json()["models"]
        adapters = (await http.get("/v1/adapters")).json()
        info = (await http.get("/info")).json()
        wanted = [f"a{one}" for one in range(number + 1)]
        assert [one["id"] for one in models[1:]] == wanted
        assert [one["name"].partition(":")[0] for one in tags[1:]] == wanted
        assert [one["name"] for one in adapters["data"]] == info["adapters"] == wanted
        assert adapters["last_id"] == f"{wanted[-1]},"
    assert (await http.get("/v1/adapters?limit=1001")).status_code in (400, 422)
