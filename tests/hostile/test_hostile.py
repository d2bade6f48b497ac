"""A hostile tenant gets nowhere: beside every attack an honest one is answered as if it were alone.

Asserted are counts and generous multiples, never times: `hostile.arena` has them. `make hostile` attacks for longer and
writes a table.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from helpers.preloaded import fork
from hostile.arena import NAMES, Arena, arena_in

SECONDS = float(os.environ.get("LORAFLEET_HOSTILE_S", "0.1"))
"""How long rounds of an attack are begun; each has one at least."""

ALONE_S = 1.0

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def arena(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Arena]:
    async with arena_in(tmp_path_factory.mktemp("arena"), spawn=fork) as arena:
        await arena.rest(ALONE_S)
        yield arena


@pytest.mark.parametrize("name", NAMES)
async def test_the_victim_notices_nothing_of(arena: Arena, name: str) -> None:
    attack, key = next(pair for pair in arena.attacks() if pair[0].name == name)
    trial = await arena.attack(attack, SECONDS, key)
    assert trial.told, "nothing was sent"
    assert trial.wrong == []
