"""`lorafleet up` announces its fleet once it answers, even if the default base is not up yet or never will be."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import pytest
from helpers.scripted_fleet import ScriptedFleet, make_model_folder, running_gateway
from rich.console import Console
from tokenizers import Tokenizer

from lorafleet.launcher.screen import Screen
from lorafleet.up import LaunchPlan, announce
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from tests.gateway.test_bases import add, base, set_bases


async def announced(bus: Bus, tmp_path: Path, up: str, adapters: Mapping[str, str]) -> str:
    """Return what is announced of two bases, of which those in `up` have a worker. adapters: name -> base."""
    one, other = make_model_folder(tmp_path / "a"), make_model_folder(tmp_path / "b")
    await set_bases(bus, *map(base, up), **dict.fromkeys(up, 1))
    for name, of in adapters.items():
        await add(bus, name, of)
    ScriptedFleet(bus, Tokenizer.from_file(str(one / "tokenizer.json")))
    said = io.StringIO()
    async with running_gateway(bus, one, more_models=str(other)) as gateway:
        port = int(gateway.url.rpartition(":")[2])
        settings = Settings(
            redis_url=bus.url, model=str(one), more_models=str(other), draft_model="org/small", port=port, data=tmp_path
        )  # fmt: skip
        plan = LaunchPlan(settings, one, (other,))
        assert await announce(plan, Screen(Console(file=said, soft_wrap=True)))
    return said.getvalue()


@pytest.mark.parametrize("up", ["a", "b", "ab", "ba"])
async def test_a_fleet_is_announced_whichever_base_is_up(bus: Bus, tmp_path: Path, up: str) -> None:
    """In the order in which their workers have come."""
    lines = await announced(bus, tmp_path, up, {"first": "a", "second": "b"})
    one, other = tmp_path / "a", tmp_path / "b"
    assert f"serves {', '.join(sorted(up))} and 2 adapters" in lines
    assert ("first" in lines) == ("a" in up)  # the printed command asks an adapter of the default base, which answers
    assert f"serve worker --model {one} --more-models {other} --draft-model org/small" in lines


async def test_one_adapter_is_announced_in_the_singular(bus: Bus, tmp_path: Path) -> None:
    assert "and 1 adapter; try:" in await announced(bus, tmp_path, "a", {"first": "a"})
