"""The life of adapters over HTTP with a real gateway, store, scheduler and worker; only the engine is a fake."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
import pytest_asyncio
from helpers.adapter_files import BASE, adapter_bytes, write_adapter
from helpers.hub_stub import HubStub, Repo, run_hub
from helpers.scripted_fleet import gateway_client
from helpers.waiting import wait_until

from adapter_store.service import serve as serve_store
from adapter_store.sources.retry import Retries
from adapter_store.timings import StoreTimings
from benchmarks.common.fake_worker import ADAPTER_BYTES, FakeEngine, fake_served, serve_fake
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from scheduler.service import serve as serve_scheduler

SECRET = "a secret of the tests"


class Fleet:
    """A running fleet and helpers to call its gateway."""

    def __init__(self, http: httpx2.AsyncClient, hub: HubStub, root: Path, bus: Bus, engine: FakeEngine) -> None:
        self.http = http
        self.engine = engine
        self.hub = hub
        self.root = root
        self.bus = bus

    async def do(self, method: str, path: str, status: int, body: dict[str, Any] | None = None) -> Any:
        """Send a request that must be answered with `status`; return the body."""
        answer = await self.http.request(method, path, json=body)
        assert answer.status_code == status, f"{answer.status_code} {answer.text}"
        return answer.json() if "json" in answer.headers["content-type"] else answer.text

    async def register(self, name: str, source: str = "", status: int = 201, **more: Any) -> Any:
        return await self.do("POST", "/v1/adapters", status, {"name": name, "source": source, **more})

    async def ask(self, model: str, status: int = 200) -> Any:
        body = {"model": model, "prompt": "fox", "max_tokens": 2}
        return await self.do("POST", "/v1/completions", status, body)

    async def shows(self, name: str, **fields: Any) -> Any:
        """Wait until an adapter is shown with these fields; return it."""

        async def look() -> Any:
            shown = await self.do("GET", f"/v1/adapters/{name}", 200)
            return shown if fields.items() <= shown.items() else None

        return await wait_until(look, f"{name} is shown with {fields}")

    async def uses(self, name: str, count: int) -> Any:
        """Wait until workers have reported `count` requests for an adapter; return its use."""

        async def look() -> Any:
            use = (await self.do("GET", f"/v1/adapters/{name}", 200))["use"]
            return use if use["hits"] + use["misses"] >= count else None

        return await wait_until(look, f"{count} requests for {name} are told")

    @asynccontextmanager
    async def stream(self, model: str, num_tokens: int) -> AsyncIterator[AsyncIterator[str]]:
        """Start a stream and stop the engine; yield the lines after the first token."""
        body = {"model": model, "prompt": "fox", "max_tokens": num_tokens, "stream": True}
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.aiter_lines()
            async for line in lines:
                if line.startswith("data: "):
                    break
            self.engine.steps.clear()
            yield lines


@pytest_asyncio.fixture
async def fleet(bus: Bus, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    root = tmp_path / "root"
    root.mkdir()
    stop = asyncio.Event()
    async with run_hub() as hub, asyncio.TaskGroup() as group:
        hub.repos["org/a"], hub.repos["org/b"] = Repo(), Repo()
        hub.repos["org/a"].commit(adapter_bytes(1))
        hub.repos["org/b"].commit(adapter_bytes(2))
        own: dict[str, Any] = {"hub_endpoint": hub.url, "secret": SECRET, "adapters": str(root), "hub_orgs": "org"}
        own["adapter_roots"] = f"{tmp_path / 'runs'},{tmp_path / 'more'}"
        settings = Settings(
            redis_url=bus.url, data=tmp_path / "data", scan_interval_s=0.05, worker_name="w", grace_s=0.0, **own
        )
        served = msgspec.structs.replace(fake_served(vocab_size=300), sites=BASE.sites)
        group.create_task(serve_store(settings, stop, StoreTimings(retries=Retries(max_tries=1))))
        group.create_task(serve_scheduler(settings, stop))
        engine = FakeEngine(step_s=0.01, vocab_size=300)
        group.create_task(serve_fake(settings, engine, served, stop))
        try:
            async with gateway_client(bus, model_folder, **own) as http:
                fleet = Fleet(http, hub, root, bus, engine)

                async def ready() -> bool:
                    return (await http.get("/health")).status_code == 200

                await wait_until(ready, "the fleet is ready")
                yield fleet
        finally:
            stop.set()


async def test_folders_of_further_roots_are_loaded_by_path(fleet: Fleet, tmp_path: Path) -> None:
    """Folders with any name are loaded, but none outside the roots, and none without a request."""

    async def load(name: str, path: Path | str, status: int = 200) -> Any:
        return await fleet.do("POST", "/v1/load_lora_adapter", status, {"lora_name": name, "lora_path": str(path)})

    runs = tmp_path / "runs"
    write_adapter(runs / "step_1" / "policy", seed=4)
    write_adapter(tmp_path / "more" / "b", seed=5)
    write_adapter(tmp_path / "secret", seed=6)
    await load("rl", runs / "step_1" / "policy")
    await load("b", f"local:{tmp_path / 'more' / 'b'}")
    for name in ("rl", "b"):
        await fleet.ask(name)
    assert (await fleet.shows("rl"))["source"] == f"local:{runs}/step_1/policy"
    models = {model["id"]: model["root"] for model in (await fleet.http.get("/v1/models")).json()["data"]}
    assert models["rl"] == f"{runs}/step_1/policy"
    assert "policy" not in models
    (runs / "away").symlink_to(tmp_path / "secret")
    write_adapter(runs / "linked", seed=7)
    (runs / "linked" / CONFIG_FILE).unlink()
    (runs / "linked" / CONFIG_FILE).symlink_to(tmp_path / "secret" / CONFIG_FILE)
    assert "leaves the adapter root" in (await load("x", runs / "away", 422))["error"]["message"]
    assert "leaves the adapter root" in (await load("x", runs / "linked", 422))["error"]["message"]
    assert "no adapter folder" in (await load("x", runs / "none", 404))["error"]["message"]
    for outside in (tmp_path / "secret", f"{runs}x", "/etc/passwd", "local:/etc"):
        await load("x", outside, 404)
    for odd in (f"{runs}/../secret", f"{runs}/step_1/../../secret", runs, f"{runs}//step_1/.hidden"):
        await load("x", odd, 400)


async def test_all_operations_in_turn(fleet: Fleet) -> None:
    """An adapter is registered, used, pinned, evicted and unloaded; eviction and unloading report what they freed."""
    shown = await fleet.register("mine", "org/a")
    assert (shown["state"], shown["rank"], shown["pinned"]) == ("on_disk", 4, None)
    assert shown["source"].startswith("hub:org/a@")
    assert shown["bytes"] > 0
    assert shown["modules"] == ["q_proj", "v_proj"]
    assert shown["workers"] == {"w": {"tier": "on_disk", "pinned": False}}
    await fleet.ask("mine")
    await fleet.ask("mine")
    shown = await fleet.shows("mine", state="resident")
    assert shown["workers"]["w"]["tier"] == "resident"
    use = await fleet.uses("mine", 2)
    assert (use["hits"], use["misses"]) == (1, 1)
    assert use["last_used_ms"] > shown["created_ms"]

    shown = await fleet.do("POST", "/v1/adapters/mine/pin?wait_s=30", 200)
    assert shown["pinned"] == "api"
    assert shown["workers"]["w"] == {"tier": "resident", "pinned": True}
    refusal = await fleet.do("POST", "/v1/adapters/mine/evict", 409)
    assert refusal["error"]["code"] == "adapter_pinned"
    assert (await fleet.do("POST", "/v1/adapters/mine/unpin", 200))["pinned"] is None
    gone = await fleet.do("POST", "/v1/adapters/mine/evict", 200)
    both = {"pool_bytes": ADAPTER_BYTES, "host_bytes": ADAPTER_BYTES, "disk_bytes": 0}
    assert gone == {"name": "mine", "freed": both, "waiting": []}
    assert (await fleet.shows("mine", state="on_disk"))["workers"]["w"]["tier"] == "on_disk"
    shown = await fleet.do("POST", "/v1/adapters/mine/preload?wait_s=30", 200)
    assert shown["state"] == "host"

    gone = await fleet.do("DELETE", "/v1/adapters/mine?blob=true", 200)
    assert gone["freed"]["host_bytes"] == ADAPTER_BYTES
    assert gone["freed"]["disk_bytes"] > shown["bytes"]
    assert (gone["waiting"], gone["kept_by"], gone["num_ended"]) == ([], [], 0)
    await fleet.ask("mine", 404)
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/pin"), ("POST", "/unpin"), ("POST", "/evict")):
        await fleet.do(method, f"/v1/adapters/mine{path}", 404)
    await fleet.register("mine", "org/a")
    await fleet.ask("mine")


async def test_pages_of_the_list(fleet: Fleet) -> None:
    for name in ("c", "a", "b"):
        await fleet.register(name, "org/a", pin=name == "b")
    page = await fleet.do("GET", "/v1/adapters?limit=2", 200)
    assert [shown["name"] for shown in page["data"]] == ["a", "b"]
    assert [shown["pinned"] for shown in page["data"]] == [None, "api"]
    assert page["has_more"]
    page = await fleet.do("GET", "/v1/adapters?limit=2&after=b", 200)
    assert [shown["name"] for shown in page["data"]] == ["c"]
    assert not page["has_more"]


async def test_what_runs_ends_before_its_adapter_goes(fleet: Fleet) -> None:
    """New requests are refused at once; memory is freed only after the running stream has completed."""
    await fleet.register("mine", "org/a")
    async with fleet.stream("mine", 50) as lines:
        gone = await fleet.do("DELETE", "/v1/adapters/mine?wait_s=0", 202)
        assert gone["waiting"] == ["w"]
        assert gone["freed"]["pool_bytes"] == 0
        await fleet.ask("mine", 404)
        fleet.engine.steps.set()
        text = [line async for line in lines if line]
    assert text[-1] == "data: [DONE]"
    last = json.loads(text[-2].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] == "length", "all of its tokens came"

    async def resident() -> list[str]:
        return [
            digest for beat in (await fleet.bus.members.worker_beats()).values() if beat for digest in beat.resident
        ]

    async def is_gone() -> bool:
        return not await resident()

    await wait_until(is_gone, "the worker has given it back")


async def test_force_ends_what_runs(fleet: Fleet) -> None:
    await fleet.register("mine", "org/a")
    async with fleet.stream("mine", 50) as lines:
        gone = await fleet.do("DELETE", "/v1/adapters/mine?force=true", 200)
        fleet.engine.steps.set()
        text = [line async for line in lines]
    assert gone["num_ended"] == 1
    assert gone["freed"]["pool_bytes"] == ADAPTER_BYTES
    (error,) = [json.loads(line.removeprefix("data: "))["error"] for line in text if '"error"' in line]
    assert error["code"] == "adapter_unloaded"


async def test_content_stays_while_another_name_stands_for_it(fleet: Fleet) -> None:
    await fleet.register("one", "org/a")
    await fleet.register("two", "org/a")
    await fleet.ask("one")
    gone = await fleet.do("DELETE", "/v1/adapters/one?blob=true", 200)
    assert gone["kept_by"] == ["two"]
    assert set(gone["freed"].values()) == {0}
    await fleet.ask("two")
    await fleet.ask("one", 404)
    assert (await fleet.uses("two", 2))["hits"] >= 1


async def test_a_name_is_replaced_only_on_demand_and_only_by_what_is_good(fleet: Fleet) -> None:
    fleet.hub.repos["org/bad"] = Repo()
    fleet.hub.repos["org/bad"].commit(adapter_bytes() | {WEIGHTS_FILE: b"no weights"})
    first = (await fleet.register("mine", "org/a"))["digest"]
    assert (await fleet.register("mine", "org/a", 200))["digest"] == first, "again, for the same place"
    assert (await fleet.register("mine", "org/b", 409))["error"]["code"] == "name_taken"
    refusal = await fleet.register("mine", "org/bad", 422, replace=True)
    assert "header claims" in refusal["error"]["message"]
    await fleet.register("mine", "org/none", 404, replace=True)
    await fleet.ask("mine")
    shown = await fleet.shows("mine", state="resident")
    assert (shown["digest"], shown["reason"]) == (first, None), "as if nothing had been"
    second = (await fleet.register("mine", "org/b", 200, replace=True))["digest"]
    assert second != first
    fleet.hub.repos["org/b"].commit(adapter_bytes(3))
    assert (await fleet.register("mine", "org/b", 200))["digest"] not in (first, second), "the branch has moved"


async def test_nothing_stays_of_what_could_not_be_registered(fleet: Fleet) -> None:
    fleet.hub.repos["org/gated"] = Repo(gated=True)
    fleet.hub.repos["org/gated"].commit(adapter_bytes(4))
    for source, status in (("org/none", 404), ("org/gated", 403), ("acme/a", 403), ("s3://bucket/a", 403)):
        await fleet.register("new", source, status)
        await fleet.do("GET", "/v1/adapters/new", 404)
    assert await fleet.bus.adapters.registrations() == {}
    fleet.hub.tokens["hf_right"] = {"org/gated"}
    await fleet.register("new", "org/gated", 201, token="hf_right")
    assert "hf_right" not in str(await fleet.bus.adapters.registrations()), "tokens lie sealed"
    await fleet.ask("new")


async def test_orders_that_make_no_sense(subtests: pytest.Subtests, fleet: Fleet) -> None:
    for body, part in [
        ({"name": "base", "source": "org/a"}, "is not a valid adapter name"),
        ({"source": "org/a"}, "name: it is missing"),
        ({"name": "a b", "source": "org/a"}, "is not a valid adapter name"),
        ({"name": "a", "source": "./"}, "not an adapter source"),
        ({"name": "a", "source": "../x"}, "not an adapter source"),
        ({"name": "a", "source": "local:../x"}, "not an adapter source"),
        ({"name": "a", "source": "org/a", "wait": 3}, "wait"),
        ({"name": "a", "source": "a\0b"}, "not an adapter source"),
        ({"name": "a", "source": "org/a", "wait_s": -1}, "wait_s"),
        ({"name": "a:b", "source": "org/a"}, "is not a valid adapter name"),
    ]:
        with subtests.test(body=body, part=part):
            assert part in (await fleet.do("POST", "/v1/adapters", 400, body))["error"]["message"]


async def test_folders_are_unloaded_by_removing_them(fleet: Fleet) -> None:
    write_adapter(fleet.root / "folder", seed=5)
    await wait_until(lambda: _is_listed(fleet, "folder"), "the folder is served")
    assert (await fleet.do("DELETE", "/v1/adapters/folder", 409))["error"]["code"] == "adapter_folder"
    assert (await fleet.register("folder", "org/a", 409, replace=True))["error"]["code"] == "name_taken"
    shown = await fleet.register("other", str(fleet.root / "folder"))
    assert shown["source"] == "local:folder"
    await fleet.do("DELETE", "/v1/adapters/other", 200)


async def _is_listed(fleet: Fleet, name: str) -> bool:
    return (await fleet.http.get(f"/v1/adapters/{name}")).status_code == 200


async def test_as_vllm_has_it(fleet: Fleet) -> None:
    """Texts and status codes are vLLM's, except that the status of the actual error replaces vLLM's 500."""

    async def load(name: str, path: str, status: int = 200, **more: Any) -> Any:
        body = {"lora_name": name, "lora_path": path, **more}
        return await fleet.do("POST", "/v1/load_lora_adapter", status, body)

    async def unload(name: str, status: int = 200) -> Any:
        return await fleet.do("POST", "/v1/unload_lora_adapter", status, {"lora_name": name})

    assert await load("l", "org/a", lora_int_id=3) == "Success: LoRA adapter 'l' added successfully."
    await fleet.ask("l")
    assert "has already been loaded" in (await load("l", "org/a", 400))["error"]["message"]
    assert "must be provided" in (await load("l", "", 400))["error"]["message"]
    await fleet.do("POST", "/v1/load_lora_adapter", 400, {"lora_name": "l"})
    fleet.hub.repos["org/cut"] = Repo()
    fleet.hub.repos["org/cut"].commit(adapter_bytes() | {WEIGHTS_FILE: adapter_bytes()[WEIGHTS_FILE][:-1]})
    assert "bytes" in (await load("x", "org/cut", 422))["error"]["message"]
    await load("x", "org/none", 404)
    for outside in ("/etc/passwd", f"{fleet.root}-not", "local:/etc", "/"):
        said = (await load("x", outside, 404))["error"]["message"]
        assert "is in no adapter folder; these are set by --adapters and --adapter-roots" in said
    write_adapter(fleet.root / "run" / "seed" / "checkpoint-10", seed=8)
    await load("deep", str(fleet.root / "run" / "seed" / "checkpoint-10"))
    await fleet.ask("deep")
    assert (await fleet.shows("deep"))["source"] == "local:run/seed/checkpoint-10"
    assert "no adapter folder" in (await load("x", "run/seed/checkpoint-11", 404))["error"]["message"]
    odd = await load("x", str(fleet.root / "run" / ".hidden"), 400)
    assert "is under an adapter root, but cannot be served" in odd["error"]["message"]
    (fleet.root / "run" / "seed" / "away").symlink_to("/etc")
    assert "leaves the adapter root" in (await load("x", "run/seed/away", 422))["error"]["message"]

    write_adapter(fleet.root / "trained", seed=6)
    await load("rl", str(fleet.root / "trained"))
    before = (await fleet.shows("rl"))["digest"]
    write_adapter(fleet.root / "trained", seed=7)
    await load("rl", str(fleet.root / "trained"), load_inplace=True)
    shown = await fleet.do("GET", "/v1/adapters/rl", 200)
    assert shown["digest"] != before, "at once"
    assert shown["state"] in ("on_disk", "host")

    for seed in (8, 9):  # trainers load each step's adapter in place, on the route without /v1
        write_adapter(fleet.root / "trained", seed=seed)
        body = {"lora_name": "rl", "lora_path": str(fleet.root / "trained")}
        told = await fleet.do("POST", "/load_lora_adapter", 200, body)
        assert (told["success"], told["loaded_adapters"]) == (True, {"rl": str(fleet.root / "trained")})
        assert (await fleet.shows("rl"))["digest"] != shown["digest"]
        shown = await fleet.shows("rl")
    assert (
        "pin pins" in (await fleet.do("POST", "/load_lora_adapter", 400, {**body, "pinned": True}))["error"]["message"]
    )
    assert (await fleet.do("POST", "/unload_lora_adapter", 200, {"lora_name": "rl"}))["success"] is True
    await fleet.do("POST", "/unload_lora_adapter", 404, {"lora_name": "rl"})

    assert (await unload("l")).startswith("Success: LoRA adapter 'l' removed successfully. Freed 1000 bytes")
    assert "cannot be found" in (await unload("l", 404))["error"]["message"]
    await fleet.ask("l", 404)
    await unload("", 400)
    await unload("trained", 400)
