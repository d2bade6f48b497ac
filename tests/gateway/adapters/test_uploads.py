"""Adapters uploaded through a real gateway, with a real store and scheduler; only the worker's engine is a fake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
import pytest_asyncio
from helpers.adapter_files import BASE, adapter_bytes, zipped
from helpers.reported import report
from helpers.scripted_fleet import gateway_client
from helpers.waiting import wait_until

from adapter_store.service import serve as serve_store
from adapter_store.uploads import FOLDER
from benchmarks.common.fake_worker import fake_served
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings

SECRET = "a secret of the tests"
ZIP = {"content-type": "application/zip"}


def mine(seed: int = 0, **fields: Any) -> bytes:
    return zipped({f"mine/{name}": raw for name, raw in adapter_bytes(seed, **fields).items()})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest_asyncio.fixture
async def http(bus: Bus, model_folder: Path, root: Path, tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    stop = asyncio.Event()
    own: dict[str, Any] = {"secret": SECRET, "adapters": str(root), "max_file_bytes": 1 << 20, "api_keys": True}
    settings = Settings(redis_url=bus.url, data=tmp_path / "data", scan_interval_s=0.05, upload_bytes=4 << 20, **own)
    served = msgspec.structs.replace(fake_served(vocab_size=300), sites=BASE.sites)
    await report(bus, served)
    secret, _ = await bus.api_keys.create("ops", ["admin"])
    async with asyncio.TaskGroup() as group:
        group.create_task(serve_store(settings, stop))

        async def is_there() -> bool:
            return bool(await bus.members.store_urls())

        await wait_until(is_there, "the store is there")
        try:
            async with gateway_client(bus, model_folder, **own, key=secret) as client:
                yield client
        finally:
            stop.set()


async def upload(http: httpx2.AsyncClient, status: int, raw: bytes, **query: Any) -> Any:
    answer = await http.post("/v1/adapters/upload", params=query, content=raw, headers=ZIP)
    assert answer.status_code == status, answer.text
    return answer.json()


def kept(root: Path) -> list[str]:
    return sorted(path.name for path in (root / FOLDER).iterdir()) if (root / FOLDER).exists() else []


async def test_a_zip_is_served_replaced_and_unloaded(http: httpx2.AsyncClient, root: Path) -> None:
    shown = await upload(http, 201, mine(), name="mine")
    assert (shown["name"], shown["state"], shown["rank"]) == ("mine", "on_disk", 4)
    assert kept(root) == [shown["source"].rpartition("/")[2]]
    taken = await upload(http, 409, mine(), name="mine")
    assert taken["error"]["code"] == "name_taken"
    other = await upload(http, 200, mine(seed=5), name="mine", replace=True)
    assert other["digest"] != shown["digest"]
    assert (await http.post("/v1/adapters/mine/refresh?wait_s=30")).status_code == 200
    assert (await http.delete("/v1/adapters/mine")).status_code == 200
    assert (await http.get("/v1/adapters/mine")).status_code == 404


async def test_what_a_store_refuses_is_told_and_not_kept(http: httpx2.AsyncClient, root: Path) -> None:
    refused = await upload(http, 422, mine(peft_type="PREFIX_TUNING"), name="mine")
    assert refused["error"]["code"] == "adapter_refused"
    assert kept(root) == []
    assert (await upload(http, 400, b"no zip at all", name="mine"))["error"]["code"] == "bad_zip"
    assert (await upload(http, 400, mine(), name="no such name!"))["error"]["param"] == "name"
    assert (await http.get("/v1/adapters/mine")).status_code == 404


async def test_uploads_have_limits_before_they_are_read(http: httpx2.AsyncClient, root: Path) -> None:
    assert (await upload(http, 413, bytes(2 << 20), name="mine"))["error"]["code"] == "body_too_large"
    for number in range(3):
        (root / FOLDER / f"u{number:024}").mkdir(parents=True, exist_ok=True)
        (root / FOLDER / f"u{number:024}" / "x").write_bytes(bytes(1_397_000))
    assert "upload_bytes is 4194304" in (await upload(http, 413, mine(), name="mine"))["error"]["message"]
    unsized = await http.post("/v1/adapters/upload?name=mine", content=_pieces(), headers=ZIP)
    assert (unsized.status_code, unsized.json()["error"]["code"]) == (400, "bad_zip")
    plain = await http.post("/v1/adapters/upload?name=mine", content=b"x")
    assert plain.status_code == 400


async def test_only_operators_upload(bus: Bus, http: httpx2.AsyncClient, root: Path) -> None:
    secret, _ = await bus.api_keys.create("acme", ["infer", "adapters"])
    http.headers["authorization"] = f"Bearer {secret}"
    assert (await upload(http, 403, mine(), name="mine"))["error"]["code"] == "insufficient_scope"
    assert kept(root) == []


async def _pieces() -> AsyncIterator[bytes]:
    yield mine()


async def test_no_tenant_replaces_what_all_share(bus: Bus, http: httpx2.AsyncClient, root: Path) -> None:
    """However the path is spelled, an upload that all tenants share is refused before any of it is stored."""
    before = await upload(http, 201, mine(), name="shared")
    audited = await bus.audit.newest(100)
    secret, _ = await bus.api_keys.create("acme", ["infer", "adapters"])
    tenant = {**ZIP, "authorization": f"Bearer {secret}"}
    for path in ("upload", "upload%0A", "upload/", "upload%0D", "%0Aupload", "upload%00", "uploa%64", "upload;x=1"):
        answer = await http.post(
            f"/v1/adapters/{path}", params={"name": "shared", "replace": True}, content=mine(seed=7), headers=tenant
        )  # fmt: skip
        assert answer.status_code in (400, 403, 404, 405), (path, answer.text)
    for act in ("pin", "unpin", "evict"):
        for end in ("", "%0A", "/", "%0D%0A"):
            answer = await http.post(f"/v1/adapters/shared/{act}{end}", headers=tenant)
            assert answer.status_code in (400, 403), (act, end, answer.text)
    after = (await http.get("/v1/adapters/shared")).json()
    assert (after["digest"], after["source"], after["pinned"]) == (before["digest"], before["source"], None)
    assert kept(root) == [before["source"].rpartition("/")[2]]
    assert await bus.audit.newest(100) == audited
    assert await bus.audit.newest(100, of_tenants=True) == []
