"""The real Hub client and our download against a small Hub: access, revisions, faults, resumption."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.adapter_files import BASE, adapter_bytes, lora_tensors, safetensors
from helpers.hub_stub import HubStub, Repo, run_hub
from helpers.store_run import QUICK
from helpers.waiting import wait_until

from adapter_store.blobs import Blobs
from adapter_store.mirror import Mirror
from adapter_store.sources import FLEET, Changed, SourceAccess
from adapter_store.sources.hub import HubSource
from peft_adapters.format import CONFIG_FILE, MAX_HEADER_BYTES, WEIGHTS_FILE
from protocol.wire.errors import AdapterRefused, NotFound, PermissionDenied, Unavailable


def adapter(seed: int = 0, **fields: Any) -> dict[str, bytes]:
    return {**adapter_bytes(seed, **fields), "README.md": b"hello"}


@pytest.fixture
def hub(hub: HubStub) -> HubStub:
    hub.repos["org/public"] = Repo()
    hub.repos["org/public"].commit(adapter())
    return hub


async def test_a_branch_becomes_a_commit(hub: HubStub, source: HubSource, mirror: Mirror) -> None:
    """Only the two files are fetched, by commit; a new commit on the branch does not change the resolved version."""
    repo = hub.repos["org/public"]
    first = repo.refs["main"]
    old = await source.resolve("org/public")
    assert old.source == f"hub:org/public@{first}"
    repo.commit(adapter(1))
    new = await mirror.take(source, "org/public", BASE)
    assert new.version.target == f"org/public@{repo.refs['main']}"
    pinned = await mirror.take(source, f"org/public@{first}", BASE)
    assert pinned.version.key == old.key
    assert pinned.digest != new.digest
    assert {seen.path.rpartition("/")[2] for seen in hub.requests("/resolve/")} == {CONFIG_FILE, WEIGHTS_FILE}
    assert not any("/resolve/main/" in seen.path for seen in hub.seen)


async def test_what_is_known_is_not_fetched_again(hub: HubStub, source: HubSource, mirror: Mirror) -> None:
    first = await mirror.take(source, "org/public", BASE)
    hub.seen.clear()
    assert await mirror.take(source, "org/public", BASE) == first
    assert [seen.path for seen in hub.seen] == ["/api/models/org/public"]
    hub.down = True
    commit = hub.repos["org/public"].refs["main"]
    assert (await mirror.take(source, f"org/public@{commit}", BASE)).digest == first.digest
    assert len(hub.seen) == 1, "a commit never changes: the Hub is not asked"


async def test_single_flight(hub: HubStub, source: HubSource, mirror: Mirror) -> None:
    async with asyncio.TaskGroup() as tasks:
        taken = [tasks.create_task(mirror.take(source, "org/public", BASE)) for _ in range(8)]
    assert len({task.result().digest for task in taken}) == 1
    fetched = Counter(seen.path for seen in hub.seen if "/resolve/" in seen.path)
    assert 1 in fetched.values(), "every file was fetched again, not one of them tried again"


# ---------------------------------------------------------------- access


@pytest.fixture
def closed(hub: HubStub) -> HubStub:
    hub.repos["org/private"] = Repo(private=True)
    hub.repos["org/gated"] = Repo(gated=True)
    for seed, name in enumerate(("org/private", "org/gated")):
        hub.repos[name].commit(adapter(seed))
    hub.tokens = {"hf_member": {"org/private", "org/gated"}, "hf_stranger": set()}
    return hub


@pytest.mark.parametrize(
    ("name", "token", "error", "part"),
    [
        ("org/private", "", NotFound, "is private"),
        ("org/private", "hf_stranger", NotFound, "is private"),
        ("org/private", "hf_wrong", PermissionDenied, "does not accept the token"),
        ("org/public", "hf_wrong", PermissionDenied, "does not accept the token"),
        ("org/gated", "", PermissionDenied, "gated"),
        ("org/gated", "hf_stranger", PermissionDenied, "gated"),
        ("org/nothing", "", NotFound, "does not exist"),
        ("org/public@v9", "", NotFound, "no revision 'v9'"),
        ("org/public@" + "0" * 40, "", NotFound, "no revision"),
        ("org/../x", "", NotFound, "not an id"),
    ],
)
async def test_no_access(
    closed: HubStub, source: HubSource, mirror: Mirror, name: str, token: str, error: type[Exception], part: str
) -> None:
    with pytest.raises(error, match=part) as raised:
        await mirror.take(source, name, BASE, SourceAccess(token))
    assert token == "" or token not in str(raised.value)
    assert len(mirror.blobs) == 0


@pytest.mark.parametrize("name", ["org/private", "org/gated"])
async def test_access(closed: HubStub, source: HubSource, mirror: Mirror, name: str) -> None:
    assert (await mirror.take(source, name, BASE, SourceAccess("hf_member"))).digest in mirror.blobs
    with pytest.raises((NotFound, PermissionDenied)):
        await source.fetch(
            await source.resolve(name, SourceAccess("hf_member")), CONFIG_FILE, Path(os.devnull), 10, SourceAccess()
        )  # the first caller's access is not kept for others


@pytest.mark.parametrize("name", ["org/private", "org/gated"])
async def test_what_a_token_opened_stays_closed_to_others(
    closed: HubStub, source: HubSource, mirror: Mirror, name: str
) -> None:
    """Also for its commit, although its content never changes, and even if the Hub lists the repository publicly."""
    closed.tokens["hf_other"] = {name}
    commit = f"{name}@{closed.repos[name].refs['main']}"
    taken = await mirror.take(source, commit, BASE, SourceAccess("hf_member"))
    for target in (name, commit):
        for access in (SourceAccess(), FLEET, SourceAccess("hf_stranger")):
            with pytest.raises((NotFound, PermissionDenied)):
                await mirror.take(source, target, BASE, access)
    assert (await mirror.take(source, commit, BASE, SourceAccess("hf_other"))).digest == taken.digest
    closed.tokens["hf_member"] = set()
    with pytest.raises((NotFound, PermissionDenied)):
        await mirror.take(source, commit, BASE, SourceAccess("hf_member"))
    assert len(closed.requests(WEIGHTS_FILE)) == 1, "nobody fetched it again"


@pytest.mark.parametrize("name", ["org/private", "org/gated"])
async def test_what_a_token_has_begun_to_fetch_is_ended_by_no_other(
    closed: HubStub, source: HubSource, mirror: Mirror, name: str
) -> None:
    version = await source.resolve(name, SourceAccess("hf_member"))
    folder = mirror.blobs.staging(version.key)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        await source.fetch(version, file, folder / file, version.files[file].num_bytes, SourceAccess("hf_member"))
    with pytest.raises((NotFound, PermissionDenied)):
        await mirror.take(source, name, BASE, SourceAccess("hf_stranger"))
    assert len(mirror.blobs) == 0
    assert (await mirror.take(source, name, BASE, SourceAccess("hf_member"))).digest in mirror.blobs


async def test_a_repository_that_moved_is_confirmed_at_its_new_place(closed: HubStub, source: HubSource) -> None:
    version = await source.resolve("org/private", SourceAccess("hf_member"))
    closed.repos["org/new"] = closed.repos.pop("org/private")
    closed.moved["org/private"] = "org/new"
    closed.tokens["hf_member"] = {"org/new"}
    await source.confirm(version, SourceAccess("hf_member"))
    with pytest.raises(NotFound):
        await source.confirm(version, SourceAccess("hf_stranger"))
    closed.moved["org/private"] = "org/private"
    with pytest.raises(Unavailable, match="more than 5 times"):
        await source.confirm(version, SourceAccess("hf_member"))


async def test_no_token_goes_to_another_host(closed: HubStub, source: HubSource, tmp_path: Path) -> None:
    """The Hub redirects downloads of large files to other hosts after its access check, so they need no token."""
    version = await source.resolve("org/private", SourceAccess("hf_member"))
    async with run_hub() as other:
        other.repos["org/private"] = Repo()
        other.repos["org/private"].commits = closed.repos["org/private"].commits
        closed.elsewhere = other.url.replace("127.0.0.1", "localhost")
        await source.confirm(version, SourceAccess("hf_member"))
        assert other.seen == [], "it is not needed to know"
        await source.fetch(version, CONFIG_FILE, tmp_path / "c", 10, SourceAccess("hf_member"))
        assert [seen.token for seen in other.seen] == [""]
    assert {seen.token for seen in closed.requests("/resolve/")} == {"hf_member"}


async def test_no_cookie_is_kept(closed: HubStub, source: HubSource, tmp_path: Path) -> None:
    """A cookie may identify the caller whose token obtained it; the next caller may be another tenant."""
    member = SourceAccess("hf_member")
    for _ in range(2):
        version = await source.resolve("org/private", member)
        await source.confirm(version, member)
        await source.fetch(version, CONFIG_FILE, tmp_path / "c", 10, member)
    assert {"/api/models/org/private"} < {seen.path for seen in closed.seen}
    assert {seen.cookie for seen in closed.seen} == {""}


async def test_what_the_fleet_may_read_is_not_everybodys(closed: HubStub, mirror: Mirror) -> None:
    source = HubSource(closed.url, token="hf_member", retries=QUICK)
    commit = f"org/private@{closed.repos['org/private'].refs['main']}"
    taken = await mirror.take(source, commit, BASE)
    with pytest.raises(NotFound):
        await mirror.take(source, commit, BASE, SourceAccess())
    closed.down = True
    assert (await mirror.take(source, commit, BASE)).digest == taken.digest, "the fleet has read it before"


async def test_what_anyone_has_read_is_read_without_the_hub(hub: HubStub, source: HubSource, mirror: Mirror) -> None:
    commit = f"org/public@{hub.repos['org/public'].refs['main']}"
    taken = await mirror.take(source, commit, BASE, SourceAccess())
    hub.seen.clear()
    for access in (SourceAccess(), FLEET, SourceAccess("hf_any")):
        assert (await mirror.take(source, commit, BASE, access)).digest == taken.digest
    assert hub.seen == []


async def test_a_tenants_slow_downloads_leave_room_for_others(hub: HubStub, source: HubSource, tmp_path: Path) -> None:
    """Nor do slow downloads delay calls that only resolve a version."""
    hub.gate = asyncio.Event()
    mirror = Mirror(Blobs(tmp_path / "blobs"), max_bytes=1 << 20, max_parallel=4)
    for i in range(8):
        hub.repos[f"org/{i}"] = Repo()
        hub.repos[f"org/{i}"].commit(adapter(i))
    hub.repos["org/small"] = Repo()
    hub.repos["org/small"].commit(adapter_bytes(9, rank=1))  # small enough to pass the gate
    async with asyncio.TaskGroup() as tasks:
        slow = [tasks.create_task(mirror.take(source, f"org/{i}", BASE, tenant="greedy")) for i in range(8)]
        await wait_until(lambda: len(hub.requests(WEIGHTS_FILE)) == 3, "three are being fetched")
        await wait_until(lambda: len(hub.requests("/api/models/")) == 8, "all have been looked at")
        assert (await mirror.take(source, "org/small", BASE, tenant="modest")).digest in mirror.blobs
        assert not any(task.done() for task in slow)
        hub.gate.set()


async def test_the_servers_token_is_used_where_the_caller_has_none(closed: HubStub, mirror: Mirror) -> None:
    source = HubSource(closed.url, token="hf_member", retries=QUICK)
    await mirror.take(source, "org/private", BASE)
    assert {seen.token for seen in closed.seen} == {"hf_member"}
    with pytest.raises(NotFound):
        await source.resolve("org/private", SourceAccess("hf_stranger"))
    await source.close()


async def test_offline(hub: HubStub, source: HubSource, mirror: Mirror) -> None:
    known = await mirror.take(source, "org/public", BASE)
    offline = HubSource(hub.url, retries=QUICK, offline=True)
    hub.seen.clear()
    with pytest.raises(Unavailable, match="offline"):
        await mirror.take(offline, "org/public", BASE)
    assert (await mirror.take(offline, known.version.target, BASE)).digest == known.digest
    assert hub.seen == []
    await offline.close()


# ---------------------------------------------------------------- contents


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({CONFIG_FILE: b"{}"}, "no adapter_model.safetensors"),
        ({CONFIG_FILE: b"{}", "adapter_model.bin": b"\x80"}, "adapter_model.bin is a pickle"),
        ({"model.safetensors": b"x"}, "not a PEFT adapter"),
        (adapter(use_qalora=True), "use_qalora"),
        (adapter() | {WEIGHTS_FILE: b"x"}, "too short"),
    ],
)
async def test_refusals(hub: HubStub, source: HubSource, mirror: Mirror, files: dict[str, bytes], part: str) -> None:
    hub.repos["org/bad"] = Repo()
    hub.repos["org/bad"].commit(files)
    with pytest.raises(AdapterRefused, match=part):
        await mirror.take(source, "org/bad", BASE)
    assert not hub.requests(".bin")


async def test_a_bad_header_costs_no_body(hub: HubStub, source: HubSource, mirror: Mirror) -> None:
    hub.repos["org/big"] = Repo()
    hub.repos["org/big"].commit(adapter() | {WEIGHTS_FILE: safetensors(lora_tensors())[:50] + bytes(6 << 20)})
    mirror = Mirror(mirror.blobs, max_bytes=8 << 20)
    with pytest.raises(AdapterRefused):
        await mirror.take(source, "org/big", BASE)
    assert [seen.range for seen in hub.requests(WEIGHTS_FILE)] == [f"bytes=0-{MAX_HEADER_BYTES + 7}"]


async def test_size_is_checked_before_anything_is_fetched(hub: HubStub, source: HubSource, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match="the limit is 100"):
        await Mirror(Blobs(tmp_path), max_bytes=100).take(source, "org/public", BASE)
    assert not hub.requests("/resolve/")


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_passing_trouble_is_waited_out(hub: HubStub, source: HubSource, mirror: Mirror, status: int) -> None:
    hub.failures = [(status, {"Retry-After": "0"}), (status, {})]
    assert await mirror.take(source, "org/public", BASE)
    hub.seen.clear()
    hub.repos["org/public"].commit(adapter(5))
    version = await source.resolve("org/public")
    hub.failures = [(status, {}), (status, {})]
    await source.fetch(version, CONFIG_FILE, mirror.blobs.staging("x") / CONFIG_FILE, 10)
    assert len(hub.requests(CONFIG_FILE)) == 3


async def test_lasting_trouble_is_told(hub: HubStub, source: HubSource, mirror: Mirror) -> None:
    """Also for an adapter in the blobs: an old version is never served as the current one."""
    await mirror.take(source, "org/public", BASE)
    hub.down = True
    with pytest.raises(Unavailable, match="503, 5 times"):
        await mirror.take(source, "org/public", BASE)


async def test_a_long_retry_after_is_not_waited_for(hub: HubStub, source: HubSource, mirror: Mirror) -> None:
    hub.failures = [(429, {"Retry-After": "3600"})]
    with pytest.raises(Unavailable, match="429"):
        await mirror.take(source, "org/public", BASE)


async def test_nobody_there(mirror: Mirror) -> None:
    source = HubSource("http://127.0.0.1:9", retries=QUICK)
    with pytest.raises(Unavailable, match="cannot be reached"):
        await mirror.take(source, "org/public", BASE)
    await source.close()


@pytest.mark.parametrize("ignore_ranges", [False, True])
async def test_cut_bodies_are_resumed(hub: HubStub, source: HubSource, mirror: Mirror, ignore_ranges: bool) -> None:
    """After a cut only the rest is fetched, or everything if ranges are not supported; the content is correct."""
    expected = hub.repos["org/public"].commits[hub.repos["org/public"].refs["main"]][WEIGHTS_FILE]
    hub.cut_at, hub.num_cuts, hub.ignore_ranges = 1000, 2, ignore_ranges
    taken = await mirror.take(source, "org/public", BASE)
    folder = mirror.blobs.verified(taken.digest)
    assert folder is not None
    assert (folder / WEIGHTS_FILE).read_bytes() == expected
    last = len(expected) - 1
    assert [seen.range for seen in hub.requests(WEIGHTS_FILE)] == [
        f"bytes=0-{last}", f"bytes=1000-{last}", f"bytes={1000 if ignore_ranges else 2000}-{last}"
    ]  # fmt: skip


async def test_an_unfinished_download_goes_on_in_the_next_process(
    hub: HubStub, source: HubSource, tmp_path: Path
) -> None:
    hub.cut_at, hub.num_cuts = 700, 1
    hub.failures = []
    with pytest.raises(Unavailable):
        await Mirror(Blobs(tmp_path), max_bytes=1 << 20).take(_Failing(source, hub), "org/public", BASE)
    hub.down = False
    hub.seen.clear()
    assert await Mirror(Blobs(tmp_path), max_bytes=1 << 20).take(source, "org/public", BASE)
    assert [seen.range.partition("-")[0] for seen in hub.requests(WEIGHTS_FILE)] == ["bytes=700"]
    assert not hub.requests(CONFIG_FILE)


class _Failing(HubSource):
    """A source whose Hub goes down at the first cut."""

    def __init__(self, real: HubSource, hub: HubStub) -> None:
        self.__dict__.update(real.__dict__)
        self._hub = hub

    async def _read(self, url: str, file: Any, end: int, num_bytes: int, token: str) -> None:
        try:
            await super()._read(url, file, end, num_bytes, token)
        except Exception:
            self._hub.down = True
            raise


async def test_a_caller_without_access_deletes_no_download(
    source: HubSource, mirror: Mirror, tmp_path: Path
) -> None:  # fmt: skip
    class Closing(HubSource):
        def __init__(self) -> None:
            self.__dict__.update(source.__dict__)

        async def fetch(
            self, version: Any, name: str, path: Path, end: int, access: SourceAccess = FLEET
        ) -> None:  # fmt: skip
            if name == WEIGHTS_FILE:
                raise NotFound("it does not exist, or is private")
            await super().fetch(version, name, path, end, access)

    with pytest.raises(NotFound):
        await mirror.take(Closing(), "org/public", BASE)
    assert list((tmp_path / "blobs" / "staging").iterdir())  # another may have begun it


async def test_changed_content_is_not_taken(hub: HubStub, source: HubSource, mirror: Mirror) -> None:
    """Bytes whose checksum is not the Hub's are refused, and fetched again the next time."""
    repo = hub.repos["org/public"]
    version = await source.resolve("org/public")
    files = repo.commits[repo.refs["main"]]
    good = files[WEIGHTS_FILE]

    class Replaced(HubSource):
        def __init__(self) -> None:
            self.__dict__.update(source.__dict__)

        async def resolve(self, target: str, access: SourceAccess = FLEET) -> Any:
            return version

    files[WEIGHTS_FILE] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(Changed, match="sha256"):
        await mirror.take(Replaced(), "org/public", BASE)
    files[WEIGHTS_FILE] = good + b"x"
    with pytest.raises(Changed, match="did not return"):
        await mirror.take(Replaced(), "org/public", BASE)
    files[WEIGHTS_FILE] = good
    assert await mirror.take(Replaced(), "org/public", BASE)
