"""With a seal, a reader of the queue gets no prompts, and nobody can exchange or change them unnoticed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from helpers.script_queue import GATEWAY, Queue, ids, make_submit, row
from hypothesis import given
from hypothesis import strategies as st

from protocol.queue.bus import Bus, now_ms
from protocol.queue.kept.conversations import ConversationLimits
from protocol.queue.kept.jobs import NewJob
from protocol.runtime.fleet_secret import FleetSecret
from protocol.runtime.sealing import MARK, Seal
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, ProtocolError

OURS, THEIRS = FleetSecret("a secret of the fleet"), FleetSecret("a secret of another fleet")
PROMPT = ids(*range(7000, 7040))
STOP = "a stop string that nobody should read"
ASKED = b'{"messages": "what the client asked"}'
SAID = b'{"content": "what is said in a conversation"}'


def sealed_by(secret: FleetSecret) -> Seal:
    return Seal(secret.bodies_key)


def body(seed: int = 0) -> m.Body:
    return m.Body(prompt=PROMPT, sampling=m.Sampling(seed=seed), max_new_tokens=8, stop=[STOP])


@pytest_asyncio.fixture
async def sealed(bus: Bus) -> AsyncIterator[Bus]:
    client = Bus(bus.url, seal=sealed_by(OURS))
    for stream in (bus.keys.out(GATEWAY), bus.keys.work("w"), bus.keys.ctl("w")):
        await bus.streams.create(stream, 300)
    yield client
    await client.close()


async def everything(bus: Bus) -> bytes:
    """Return the values of all strings, hashes and streams, as in the queue's files."""
    found: list[object] = []
    for key in await bus._redis.keys():
        kind = (await bus._redis.type(key)).decode()
        if kind in ("string", "hash", "stream"):
            read = {"string": bus._redis.get, "hash": bus._redis.hvals, "stream": bus._redis.xrange}[kind]
            found.append(await read(key))
    return b"".join(_texts(found))


def _texts(value: object) -> Iterator[bytes]:
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict):
        yield from _texts([*value.values()])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


async def submit(client: Bus, *rids: str, job: NewJob | None = None) -> None:
    shared = body()
    others = [body(seed=number) for number in range(1, len(rids))]
    pairs = list(zip([make_submit(rid) for rid in rids], [shared, *others], strict=True))
    assert (await client.submit("interactive", pairs, max_queued=10, job=job))[0] == "ok"


@pytest.mark.parametrize("is_sealed", [True, False])
async def test_a_dump_holds_prompts_only_without_a_seal(
    bus: Bus, sealed: Bus, is_sealed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = sealed if is_sealed else bus
    job = m.Job(
        jid="j", endpoint="completions", tenant="t", model="base", created_ms=now_ms(), expires_ms=now_ms(), rids=["r"]
    )
    await submit(client, "r", "r2", job=NewJob(job, ASKED, 60_000))
    found = await client.inputs([make_submit("r"), make_submit("r2", call="r", part=1)])
    assert [part.body() for part in found] == [body(), body(seed=1)]
    assert await client.jobs.request("j") == ASKED
    await Queue(client).assign("r", "r2")
    step = row("r", 0, 5)
    step.prompt_logprobs = PROMPT + b"\0" * 8 * (len(PROMPT) // 4)
    assert await Queue(client).write(step) == []
    assert await client.prompt_logprobs("r", 8) == (PROMPT, b"\0" * 8 * (len(PROMPT) // 4))

    async def expired(*_: object) -> bytes:
        return b""

    with monkeypatch.context() as patch:
        patch.setattr(client._redis, "getrange", expired)
        assert await client.prompt_logprobs("r", 8) is None
    limits, made = ConversationLimits(60_000, 9, 9, 99_999, 0), m.Conversation("conv_1", "t", 1)
    await client.conversations.change("conv_1", "t", limits, record=made, is_new=True, items=[("a", SAID)])
    assert await client.conversations.item("conv_1", "a") == SAID
    raw = await everything(bus)
    for text in (PROMPT, STOP.encode(), ASKED, SAID):
        assert (text in raw) is not is_sealed


async def test_what_another_secret_sealed_fails_its_request_alone(bus: Bus, sealed: Bus) -> None:
    other = Bus(bus.url, seal=sealed_by(THEIRS))
    await submit(sealed, "r")
    await submit(other, "r2")
    mine, theirs = await sealed.inputs([make_submit("r"), make_submit("r2")])
    assert mine.body() == body()
    with pytest.raises(ProtocolError, match="another secret"):
        theirs.body()
    (unsealed,) = await bus.inputs([make_submit("r")])
    with pytest.raises(ProtocolError):
        unsealed.body()
    await submit(bus, "r3")
    (plain,) = await sealed.inputs([make_submit("r3")])
    with pytest.raises(ProtocolError, match="--seal-bodies"):
        plain.body()  # otherwise a writer to the queue could omit the seal
    await other.close()


async def test_a_body_put_in_anothers_place_is_noticed(bus: Bus, sealed: Bus) -> None:
    await submit(sealed, "r")
    await submit(sealed, "r2")
    raw = await bus._redis.hget(bus.keys.body("r"), "0")
    await bus._redis.hset(bus.keys.body("r2"), "0", raw)
    (found,) = await sealed.inputs([make_submit("r2")])
    with pytest.raises(ProtocolError, match="modified"):
        found.body()


async def test_the_bodies_go_with_the_last_request_of_a_call(bus: Bus, sealed: Bus) -> None:
    await submit(sealed, "r", "r2")
    ends = [await bus._redis.pexpiretime(key) for key in (bus.keys.body("r"), bus.keys.call("r"))]
    assert 0 < ends[0] <= ends[1]
    await sealed.cancel("r")
    assert await bus._redis.exists(bus.keys.body("r"))
    await sealed.cancel("r2")
    assert not await bus._redis.exists(bus.keys.body("r"))


@given(st.binary(max_size=200), st.text(max_size=20), st.integers(0, 10_000), st.integers(1, 255))
def test_every_changed_byte_is_noticed(text: bytes, place: str, at: int, change: int) -> None:
    seal = sealed_by(OURS)
    sealed = seal.seal(text, place)
    assert sealed.startswith(MARK)
    assert seal.open(sealed, place) == text
    assert sealed != seal.seal(text, place)  # equal texts have different ciphertexts
    changed = bytearray(sealed)
    changed[at % len(sealed)] ^= change
    for wrong in (bytes(changed), sealed[:-1], sealed + b"\0", sealed[:5], b""):
        with pytest.raises(ProtocolError):
            seal.open(wrong, place)


def test_the_setting_needs_a_secret() -> None:
    assert Seal.of(Settings(), OURS) is None
    assert Seal.of(Settings(seal_bodies=True), OURS) is not None
    with pytest.raises(BadRequest, match="seal_bodies"):
        Seal.of(Settings(seal_bodies=True), None)
