"""The commands for operators against a real fleet: their output for people and their JSON for scripts."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from helpers.fleets import tiny_fleet
from helpers.waiting import wait_until

from chaos.fleet import ProcessFleet
from lorafleet.__main__ import main

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

Command = Callable[..., Awaitable[str]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ProcessFleet]:
    async with tiny_fleet(tmp_path_factory.mktemp("fleet"), ["one", "two"]) as running:

        async def are_mirrored() -> bool:
            aliases = await running.bus.adapters.aliases()
            return len(aliases) == 2 and all(alias.digest for alias in aliases)

        await wait_until(are_mirrored, "the store has both adapters")
        yield running


@pytest.fixture
def command(fleet: ProcessFleet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs a command on the fleet as a user would and returns its output."""
    monkeypatch.setenv("LORAFLEET_URL", fleet.url)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    async def run(*words: str, code: int = 0, typed: str = "", out: bool = False) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        capsys.readouterr()
        assert await asyncio.to_thread(main, words) == code, capsys.readouterr()
        told = capsys.readouterr()
        return told.out if out or not code else told.err

    return run


async def read(command: Command, *words: str) -> Any:
    return json.loads(await command(*words, "--json"))


async def sources(command: Command, *flags: str) -> dict[str, str]:
    """Return the source of each listed adapter by name; other columns, like the last use, change by themselves."""
    return {one["name"]: one["source"] for one in await read(command, "adapters", "list", *flags)}


async def test_adapters_are_listed_added_moved_and_removed(command: Command, fleet: ProcessFleet) -> None:
    listed = await read(command, "adapters", "list")
    assert await sources(command) == {"one": "local:one", "two": "local:two"}
    assert await sources(command, "--limit", "1") == {"one": "local:one"}
    assert "local:one" in await command("adapters", "list")
    added = await read(command, "adapters", "add", "mine", "local:one", "--preload")
    assert (added["name"], added["digest"]) == ("mine", next(one["digest"] for one in listed if one["name"] == "one"))
    assert (await read(command, "adapters", "pin", "mine"))["pinned"] == "api"
    assert "is resident" in await command("adapters", "pin", "mine")
    assert "is pinned" in await command("adapters", "evict", "mine", code=2)
    assert (await read(command, "adapters", "unpin", "mine"))["pinned"] is None
    assert (await read(command, "adapters", "refresh", "mine"))["digest"] == added["digest"]
    assert (await read(command, "adapters", "preload", "two"))["state"] in ("resident", "loading", "host")
    assert "is resident" in await command("adapters", "preload", "two", "--wait", "30")
    assert "requests end on w0" in await command("adapters", "evict", "two", "--wait", "0")
    assert (await read(command, "adapters", "evict", "mine"))["freed"]["pool_bytes"] > 0
    assert "no longer served" in await command("adapters", "remove", "mine")
    assert {one["name"] for one in await read(command, "adapters", "list")} == {"one", "two"}
    assert "nobody" in await command("adapters", "pin", "nobody", code=2)
    assert "did you mean two?" in await command("adapters", "pin", "twoo", code=2)


async def test_a_folder_that_is_not_there_leaves_no_name(command: Command) -> None:
    before, one = await sources(command), (await read(command, "adapters", "list"))[0]
    for flags in ((), ("--replace",)):
        assert "no adapter folder" in await command("adapters", "add", "absent", *flags, code=2)
        assert await sources(command) == before
    assert "does not exist" in await command("adapters", "remove", "absent", code=2)
    assert (await read(command, "adapters", "add", "absent", "local:one"))["digest"] == one["digest"]
    assert "no adapter folder" in await command("adapters", "add", "absent", "local:absent", "--replace", code=2)
    assert (await sources(command))["absent"] == "local:one"
    assert "no longer served" in await command("adapters", "remove", "absent")
    assert await sources(command) == before


async def test_workers_are_listed_drained_and_resumed(command: Command) -> None:
    (worker,) = await read(command, "workers", "list")
    assert worker["state"] == "ready"
    assert worker["name"] in await command("workers", "list")
    assert f"{worker['name']} is draining" in await command("workers", "drain", worker["name"], "--wait", "30")
    assert (await read(command, "workers", "resume", worker["id"], "--wait", "30"))["state"] == "ready"
    assert "no live worker" in await command("workers", "drain", "nobody", code=2)


async def test_the_worker_that_costs_least_is_drained(command: Command, fleet: ProcessFleet) -> None:
    async def named() -> str | None:
        return (await fleet.http.get(f"{fleet.url}/v1/fleet")).json()["drain_next"]

    async def is_named() -> bool:
        return await named() == "w0"

    async def nobody_is_named() -> bool:
        return await named() is None

    await wait_until(is_named, "the scheduler names the only worker")
    assert "w0 is draining" in await command("workers", "drain", "--least-valuable", "--wait", "30")
    await wait_until(nobody_is_named, "the scheduler names none that drains")
    assert "proposes no worker" in await command("workers", "drain", "--least-valuable", code=1)
    assert "w0 is ready" in await command("workers", "resume", "w0", "--wait", "30")


async def test_a_conversation_goes_on_and_can_begin_anew(command: Command) -> None:
    flags = ("--max-tokens", "4", "--temperature", "0", "--json")
    typed = "hello\nand now?\n/undo\nand now?\n/reset\nhello\n/nonsense\n\n/model one\nhello\n/quit\nnever asked\n"
    told = [json.loads(line) for line in (await command("chat", "base", *flags, typed=typed)).splitlines()]
    assert [one["model"] for one in told] == ["base", "base", "base", "base", "one"]
    first, second, again, anew, other = told
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
    assert (again["content"], again["usage"]["prompt_tokens"]) == (second["content"], second["usage"]["prompt_tokens"])
    assert anew["content"] == first["content"]
    assert other["content"] != first["content"]
    shown = await command("chat", "base", "--max-tokens", "4", "--temperature", "0", typed="hello\n")
    assert shown == f"{first['content']} [length]\n" or first["finish_reason"] == "stop"
    asked = await command("chat", "base", "hello", "--max-tokens", "4", "--temperature", "0")
    assert asked == shown
    lost = "hello\n/model nobody\nand now?\n"  # an unknown model leaves the question in the conversation
    told = [
        json.loads(line) for line in (await command("chat", "base", *flags, typed=lost, code=1, out=True)).splitlines()
    ]
    assert [one["usage"]["prompt_tokens"] for one in told] == [one["usage"]["prompt_tokens"] for one in (first, second)]
    assert "no message" in await command("chat", "base", typed="\n", code=2)
    for typed in ("hello\n", ""):
        assert "does not exist" in await command("chat", "nobody", typed=typed, code=2)
        assert "cannot reach the gateway" in await command(
            "chat", "one", "--url", "http://127.0.0.1:9", typed=typed, code=1
        )
    assert "did you mean two?" in await command("chat", "tow", code=2)


async def test_top_shows_a_frame(command: Command, fleet: ProcessFleet) -> None:
    async def is_idle() -> bool:
        return (await fleet.http.get(f"{fleet.url}/v1/fleet")).json()["queued"] == 0

    await wait_until(is_idle, "the scheduler's last report is of a moment after every other test's requests")
    shown = await command("top", "--once", "--every", "0.2")
    (worker,) = await read(command, "workers", "list")
    for text in (worker["name"], "tokens/s", "no dead letters", "queued 0"):
        assert text in shown
    assert "…" not in shown, "a pipe has no width"
    told = json.loads(await command("top", "--once", "--every", "0.2", "--json"))
    assert told["fleet"]["queued"] == 0
    assert told["workers"][0]["tokens_per_s"] >= 0


async def test_the_audit_log_tells_who_did_what(command: Command) -> None:
    await command("adapters", "pin", "one")
    await command("adapters", "unpin", "one")
    await command("adapters", "pin", "nobody", code=2)
    told = await read(command, "audit", "--limit", "3")
    assert [(entry["action"], entry["target"], entry["outcome"]) for entry in told] == [
        ("adapter.pin", "nobody", "model_not_found"), ("adapter.unpin", "one", "done"), ("adapter.pin", "one", "done"),
    ]  # fmt: skip
    assert "adapter.unpin" in await command("audit", "--limit", "3")


async def test_usage_is_told_by_model(command: Command) -> None:
    await command("chat", "two", "--max-tokens", "3", typed="hello\n")
    told = await read(command, "usage")
    (row,) = [row for bucket in told["data"] for row in bucket["results"] if row["model"] == "two"]
    assert row["num_model_requests"] == 1
    assert "tenant" in (shown := await command("usage"))
    assert "two" in shown
    assert (await command("usage", "--csv")).startswith("date,")


async def test_the_doctor_finds_a_fleet_well_and_its_queue_at_risk(
    command: Command, fleet: ProcessFleet, tmp_path: Path
) -> None:
    flags = ("--redis-url", fleet.bus.url, "--data", str(tmp_path), "--workers", "1")
    told = json.loads(await command("doctor", *flags, "--json"))
    levels = {one["name"]: one["level"] for one in told}
    for name in ("gateway", "queue", "queue eviction", "queue clock", "scheduler", "workers", "versions"):
        assert levels[name] == "ok", told
    assert levels["queue persistence"] == "warning"  # this queue has no file
    assert "→ CONFIG SET appendonly yes" in await command("doctor", *flags)
    told = json.loads(await command("doctor", "--data", str(tmp_path), "--json"))
    assert {one["level"] for one in told if one["name"] == "gateway"} == {"ok"}
    assert {one["level"] for one in told if one["name"] == "queue"} == {"skipped"}
    gone = await command("doctor", "--redis-url", f"unix://{tmp_path}/none.sock", "--data", str(tmp_path), code=1)
    assert gone == ""


@pytest.mark.parametrize("words", ["jobs list", "batch list", "keys list", "dlq list", "keys create --tenant one"])
async def test_what_scripts_read_is_json(command: Command, fleet: ProcessFleet, words: str) -> None:
    flags = ["--redis-url", fleet.bus.url] if words.startswith("keys") else []
    told = await read(command, *words.split(), *flags)
    if words == "keys create --tenant one":
        assert (told["tenant"], told["scopes"]) == ("one", ["infer"])
        (listed,) = await read(command, "keys", "list", *flags)
        assert (listed["id"], listed["limits"]["weight"]) == (told["id"], 1.0)
        assert await read(command, "keys", "revoke", told["id"], *flags) == {
            name: value for name, value in listed.items() if name != "limits"
        }
    else:
        assert told == []


async def test_a_fleet_that_is_not_there_is_said(command: Command) -> None:
    for words in (("top", "--once"), ("workers", "list"), ("audit",), ("adapters", "list")):
        assert "cannot reach the gateway" in await command(*words, "--url", "http://127.0.0.1:9", code=1)
