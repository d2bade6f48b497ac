"""Records of other releases, and damaged ones: reported and counted, ended for their owner, and hiding no others."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from helpers.waiting import wait_until
from prometheus_client import REGISTRY

from protocol.queue.bus import Bus, now_ms
from protocol.queue.kept.batches import MAX_KEPT
from protocol.queue.kept.conversations import Turn
from protocol.queue.kept.webhooks import UNREADABLE
from protocol.wire import messages as m
from protocol.wire.codec import decode_record
from protocol.wire.errors import LorafleetError, NewerRecord, UnreadableRecord

RECORDS: dict[str, m.Record] = {
    "batch": m.Batch(id="batch_1", tenant="t", endpoint="/v1/x", input_file="f", created_ms=1, expires_ms=2),
    "file": m.File(
        id="file-1", tenant="t", filename="a", purpose="batch", num_bytes=1, created_ms=1, expires_ms=2
    ),
    "job": m.Job(
        jid="job-1", endpoint="/v1/x", tenant="t", model="base", created_ms=1, expires_ms=2, rids=["r"]
    ),
    "conversation": m.Conversation("conv_1", "t", 1),
    "idempotent call": m.Idempotent(body_hash="h", created_ms=1, rids=["r"]),
    "endpoint": m.WebhookEndpoint(
        id="we_1", tenant="t", name="n", url="https://a", events=["job.failed"], secret="s", hint="s", created_ms=1,
        updated_ms=1,
    ),
    "delivery": m.Delivery(
        id="e:we_1", event="e", endpoint="we_1", tenant="t", type="job.failed", subject="job-1", created_ms=1
    ),
    "alias": m.Alias(name="a", state="on_disk"),
    "registration": m.Registration(name="a", source="hub:a/b"),
    "adapter": m.AdapterRecord(digest="d", rank=8, num_bytes=1, config={}, modules=[], source="s", created_ms=1),
}  # fmt: skip
"""Every kind of record that outlives the process which wrote it."""


def fields_of(record: m.Record) -> dict[str, Any]:
    return msgspec.msgpack.decode(m.encode(record))


def damaged(record: m.Record) -> dict[str, bytes]:
    """Return invalid values that may be stored in place of a record."""
    fields = fields_of(record)
    required = [field.name for field in msgspec.structs.fields(type(record)) if field.required]
    older = {name: value for name, value in fields.items() if name != required[-1]}  # written before this field existed
    wrong = {**fields, required[0]: ["another type"]}
    return {
        "older": msgspec.msgpack.encode(older), "another type": msgspec.msgpack.encode(wrong),
        "cut": m.encode(record)[:-3], "no message": b"\xc1", "text": b"{}", "empty list": b"\x90",
        "deep": b"\x91" * 5000, "no UTF-8": b"\x81\xa1\xff\x01",
    }  # fmt: skip


@pytest.mark.parametrize("kind", RECORDS)
def test_every_kind_of_record_is_read_or_said_to_be_unreadable(kind: str) -> None:
    record = RECORDS[kind]
    assert decode_record(m.encode(record), type(record)) == record
    with_more = {**fields_of(record), "of_a_newer_release": 1}
    assert decode_record(msgspec.msgpack.encode(with_more), type(record)) == record, "new fields are no new form"
    for what, raw in damaged(record).items():
        with pytest.raises(UnreadableRecord) as raised:
            decode_record(raw, type(record))
        assert not isinstance(raised.value, NewerRecord), what


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_in_a_newer_form_is_known_as_one(kind: str) -> None:
    """Even if this release could decode it, since it would misread it."""
    record = RECORDS[kind]
    for fields in ({**fields_of(record), "form": 2}, {"form": 2}):
        with pytest.raises(NewerRecord, match="form 2"):
            decode_record(msgspec.msgpack.encode(fields), type(record))


def unreadable(kind: str) -> float:
    return REGISTRY.get_sample_value("lorafleet_unreadable_records_total", {"kind": kind}) or 0.0


async def letters(bus: Bus) -> list[tuple[str, bytes]]:
    return [(letter.stream, letter.raw) for _, letter in await bus.dead_letters.newest(100)]


async def open_batch(bus: Bus, id_: str, tenant: str = "t", max_kept: int = MAX_KEPT) -> m.Batch:
    batch = m.Batch(
        id=id_, tenant=tenant, endpoint="/v1/x", input_file="f", created_ms=now_ms(), expires_ms=now_ms() + 60_000
    )
    assert await bus.batches.open(batch, ttl_ms=60_000, max_open=10, max_kept=max_kept) == -1
    return batch


async def test_only_so_many_batches_of_a_tenant_are_kept(bus: Bus) -> None:
    """The oldest ended ones are dropped, and names of expired ones; open ones and other tenants' stay."""

    async def kept(tenant: str = "t") -> list[str]:
        return sorted(await bus.batches.newest(tenant, 0, 100))

    for number, tenant in enumerate(("t", "t", "t", "t", "other"), 1):
        batch = await open_batch(bus, f"batch_{number}", tenant, max_kept=4)
        if number != 1:
            claimed = await bus.batches.claim(batch.id, tenant, "g", 1000)
            assert claimed is not None
            assert await bus.batches.save(msgspec.structs.replace(batch, status="completed"), claimed.epoch)
    await open_batch(bus, "batch_6", max_kept=4)
    assert await kept() == ["batch_1", "batch_3", "batch_4", "batch_6"]
    assert await bus.batches.get("batch_2", "t") is None
    assert await kept("other") == ["batch_5"]
    await bus._redis.delete(bus.keys.batch("batch_3"))  # as its TTL does
    await open_batch(bus, "batch_7")
    assert await kept() == ["batch_1", "batch_4", "batch_6", "batch_7"]
    await open_batch(bus, "batch_8", max_kept=1)
    assert await kept() == ["batch_1", "batch_6", "batch_7", "batch_8"]


@pytest.mark.parametrize("what", damaged(RECORDS["batch"]))
async def test_a_batch_that_cannot_be_read_has_failed_and_is_put_aside(bus: Bus, what: str) -> None:
    raw, before = damaged(RECORDS["batch"])[what], unreadable("Batch")
    await open_batch(bus, "batch_bad")
    good = await open_batch(bus, "batch_good")
    await bus._redis.hset(bus.keys.batch("batch_bad"), "b", raw)
    assert await bus.batches.get_many(["batch_bad", "batch_good"]) == [good]
    with pytest.raises(UnreadableRecord):
        await bus.batches.get("batch_bad", "t")
    assert await bus.batches.get("batch_bad", "another tenant") is None
    assert await bus.batches.claim("batch_bad", "t", "g", 1000) is None
    failed = await bus.batches.get("batch_bad", "t")
    assert failed is not None
    assert (failed.status, [problem.code for problem in failed.problems]) == ("failed", ["record_unreadable"])
    assert await letters(bus) == [(bus.keys.batch("batch_bad"), raw)]
    assert [batch_id for _, batch_id in await bus.batches.waiting(10)] == ["batch_good"]
    assert await bus._redis.smembers(bus.keys.open_batches_of("t")) == {b"batch_good"}, (
        "it is one of its tenant's no more"
    )
    assert unreadable("Batch") >= before + 2


async def test_a_batch_of_a_newer_release_is_left_to_newer_gateways(bus: Bus) -> None:
    batch = await open_batch(bus, "batch_new")
    raw = msgspec.msgpack.encode({**fields_of(batch), "form": 2})
    await bus._redis.hset(bus.keys.batch("batch_new"), "b", raw)
    with pytest.raises(NewerRecord):
        await bus.batches.claim("batch_new", "t", "old", 1)
    assert await bus._redis.hget(bus.keys.batch("batch_new"), "b") == raw
    assert await letters(bus) == []

    async def is_free() -> bool:
        return bool(await bus.batches.waiting(10))

    await wait_until(is_free, "a newer gateway may run it")


async def test_a_file_that_cannot_be_read_hides_no_other(bus: Bus) -> None:
    file = msgspec.structs.replace(RECORDS["file"], created_ms=now_ms(), expires_ms=now_ms() + 60_000)
    assert isinstance(file, m.File)
    for id_ in ("file-1", "file-2"):
        await bus.files.keep(msgspec.structs.replace(file, id=id_), max_bytes=0, max_files=0)
    await bus._redis.set(bus.keys.file("file-1"), b"\xc1", px=60_000)
    assert [one.id for one in await bus.files.get_many(["file-1", "file-2"])] == ["file-2"]
    with pytest.raises(UnreadableRecord):
        await bus.files.get("file-1", "t")
    assert await bus.files.get("file-1", "another tenant") is None


BAD_FILES = (b"no colon", b"t:", b"t:files/x", b"t:..", b"t:file-../../x", b"\xff:file-1", b":batches", b"t:file-a/b")


@pytest.mark.parametrize("member", BAD_FILES)
async def test_what_is_no_file_s_name_never_becomes_a_place(bus: Bus, member: bytes) -> None:
    """An empty id would mean the folder of all files, which a sweep would delete."""
    await bus._redis.zadd(bus.keys.file_expiry, {member: 1, b"t:file-1": 2})
    assert await bus.files.expired(now_ms(), 10) == [("t", "file-1")]
    assert await letters(bus) == [("file", member)]
    assert await bus.files.expired(now_ms(), 10) == [("t", "file-1")]
    await bus._redis.delete(bus.keys.file_expiry)


@pytest.mark.parametrize("member", [b"a", b"a:b", b"a:b:c:d"])
async def test_what_is_no_turn_s_name_is_put_aside(bus: Bus, member: bytes) -> None:
    await bus._redis.zadd(bus.keys.turns, {member: 1, b"t:conv_1:resp_1": 2})
    assert await bus.conversations.due(now_ms(), 10) == [Turn("t", "conv_1", "resp_1")]
    assert await letters(bus) == [("turn", member)]
    await bus._redis.delete(bus.keys.turns)


@pytest.mark.parametrize("member", [b"\xff", b"\xff:batch_1", b"", b"a:b:c", b":", b"t:"])
async def test_what_is_no_name_holds_up_no_tenant_s_turn(bus: Bus, member: bytes) -> None:
    keys, redis = bus.keys, bus._redis
    places: dict[str, tuple[str, Any, list[Any]]] = {
        keys.open_batches: ("t:batch_1", bus.batches.waiting, [("t", "batch_1")]),
        keys.ends: ("t", bus.webhooks.tenants_with_ends, ["t"]),
        keys.outboxes: ("t", bus.webhooks.tenants_with_deliveries, ["t"]),
    }
    for register, (good, asked, told) in places.items():
        await redis.zadd(register, {member: 0, good: 0})
        assert await asked(9) == told
        assert (register, member) in await letters(bus)
        assert await redis.zrange(register, 0, -1) == [good.encode()]
        await redis.delete(register)


async def test_what_is_no_member_s_name_hides_no_member(bus: Bus) -> None:
    for register in (bus.keys.workers, bus.keys.gateways, bus.keys.stores, bus.keys.histories):
        await bus._redis.zadd(register, {b"\xff": now_ms(), "one": now_ms()})
    assert "one" in await bus.archive.tenants(0)
    for register in (bus.keys.workers, bus.keys.gateways, bus.keys.stores):
        assert await bus.members.ids(register) == ["one"]
    await bus._redis.delete(bus.keys.workers, bus.keys.gateways, bus.keys.stores, bus.keys.histories)


async def test_a_delivery_that_cannot_be_read_is_given_up(bus: Bus) -> None:
    delivery, webhooks = RECORDS["delivery"], bus.webhooks
    assert isinstance(delivery, m.Delivery)
    ids = ("bad:we_1", "new", "good")
    await webhooks.add("t", [msgspec.structs.replace(delivery, id=id_) for id_ in ids], 10)
    newer = msgspec.msgpack.encode({**fields_of(delivery), "form": 2})
    await bus._redis.hset(bus.keys.outbox("t"), mapping={"bad:we_1": b"\xc1", "new": newer})
    assert [one.id for one in await webhooks.take("t", 10, 60_000)] == ["good"]
    [lost] = await webhooks.given_up("t")
    assert (lost.id, lost.endpoint, lost.type, lost.error) == ("bad:we_1", "we_1", "", UNREADABLE), "its owner is told"
    assert await bus._redis.hkeys(bus.keys.outbox("t")) == [b"new", b"good"], "a newer gateway sends the newer one"
    assert [one.id for one in await webhooks.waiting("t")] == ["good"]


async def test_an_endpoint_or_a_given_up_delivery_hides_no_other(bus: Bus) -> None:
    endpoint, delivery = RECORDS["endpoint"], RECORDS["delivery"]
    assert isinstance(endpoint, m.WebhookEndpoint)
    assert isinstance(delivery, m.Delivery)
    await bus.webhooks.keep_endpoint(endpoint, 20)
    await bus._redis.hset(bus.keys.hooks("t"), "we_2", b"\xc1")
    assert await bus.webhooks.endpoints("t") == [endpoint]
    with pytest.raises(UnreadableRecord):
        await bus.webhooks.endpoint("t", "we_2")
    await bus.webhooks.give_up("t", [delivery])
    await bus._redis.hset(bus.keys.undelivered("t"), "other", b"\xc1")
    assert await bus.webhooks.given_up("t") == [delivery]


async def test_newer_records_are_not_taken_for_deleted_ones(bus: Bus) -> None:
    def newer(kind: str) -> bytes:
        return msgspec.msgpack.encode({**fields_of(RECORDS[kind]), "form": 2})

    await bus._redis.hset(bus.keys.hooks("t"), "we_1", newer("endpoint"))
    await bus._redis.hset(bus.keys.job("job-1"), "b", newer("job"))
    await bus._redis.expire(bus.keys.job("job-1"), 60)
    await bus._redis.hset(bus.keys.adapters, "a", newer("alias"))
    await bus._redis.set(bus.keys.adapter("d"), m.encode(RECORDS["adapter"]), ex=60)
    assert await bus.webhooks.endpoints("t") == await bus.jobs.get_many(["job-1"]) == []
    for asked in (
        bus.webhooks.endpoints("t", leave_newer=True), bus.jobs.get_many(["job-1"], leave_newer=True),
        bus.adapters.delete_records(["d"]),
    ):  # fmt: skip
        with pytest.raises(NewerRecord):
            await asked
    assert await bus._redis.exists(bus.keys.adapter("d"))
    await bus._redis.hset(bus.keys.registrations, mapping={"a": newer("registration"), "b": b"\xc1"})
    assert [await bus.adapters.is_newer(name) for name in ("a", "b", "c")] == [True, False, False]


async def test_a_job_or_an_adapter_hides_no_other(bus: Bus) -> None:
    job = RECORDS["job"]
    for jid, raw in (("job-1", m.encode(job)), ("job-2", b"\xc1")):
        await bus._redis.hset(bus.keys.job(jid), "b", raw)
        await bus._redis.expire(bus.keys.job(jid), 60)
    assert await bus.jobs.get_many(["job-2", "job-1"]) == [job]
    with pytest.raises(UnreadableRecord):
        await bus.jobs.get("job-2")
    await bus._redis.set(bus.keys.adapter("d"), m.encode(RECORDS["adapter"]), ex=60)
    await bus._redis.set(bus.keys.adapter("e"), b"\xc1", ex=60)
    assert list(await bus.adapters.records(["e", "d"])) == ["d"]


async def test_a_conversation_that_cannot_be_read_is_said_to_be_so(bus: Bus) -> None:
    await bus._redis.hset(bus.keys.conversation("conv_1"), mapping={"tenant": "t", "b": b"\xc1"})
    await bus._redis.expire(bus.keys.conversation("conv_1"), 60)
    with pytest.raises(LorafleetError) as raised:
        await bus.conversations.get("conv_1", "t")
    assert raised.value.code == "record_unreadable"


async def test_rows_of_usage_that_cannot_be_read_hide_no_other(bus: Bus) -> None:
    key = bus.keys.usage(1, "t")
    row = msgspec.json.encode(["base", "", "base", 0])
    await bus._redis.hset(
        key, mapping={row: b"1 2 3 4", b"no json": b"1 2 3 4", b'["a"]': b"1", b'["a","","",0]': b"x y"}
    )
    await bus._redis.expire(key, 60)
    rows = await bus.usage.rows(1, "t")
    assert [(one.model, one.requests, one.output_tokens) for one in rows] == [("base", 1, 4)]


async def test_a_call_s_record_that_cannot_be_read_hides_no_other(bus: Bus) -> None:
    """Hundreds of records of a batch's lines are read together."""
    call = RECORDS["idempotent call"]
    keys = [bus.keys.idem("t", key) for key in "abc"]
    await bus._redis.set(keys[0], b"\xc1", ex=60)
    await bus._redis.set(keys[1], m.encode(call), ex=60)
    assert await bus.get_many(keys, m.Idempotent) == [None, call, None]
