"""The account of a gateway's memory is charged before the work and freed exactly once, however a call ends."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client, running_gateway
from helpers.waiting import wait_until
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from prometheus_client import REGISTRY

from gateway.bodies import json_values
from gateway.calls.parsed_call import CallOptions
from gateway.calls.size import TEXT_BYTES, TextGrowth, call_bytes
from gateway.calls.tokenize import Prompt
from gateway.overload.memory import CALL_BYTES, SHARE, Charge, MemoryAccount, values_bytes
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, LorafleetError, Overloaded, Unavailable
from protocol.wire.stop_regex import automaton_of
from protocol.wire.text import RegexMatcher

LONG = {"prompt": "the quick brown fox", "max_tokens": 200, "model": "base"}

# ---------------------------------------------------------------- the account


class Account(RuleBasedStateMachine):
    """Charges and releases in any order keep sums correct and never exceed a limit."""

    charges = Bundle("charges")

    def __init__(self) -> None:
        super().__init__()
        self.account = MemoryAccount(1000)
        self.open: list[tuple[str, Charge]] = []

    @rule(target=charges, holder=st.sampled_from(["a", "b", "c", "d", "e"]))
    def begin(self, holder: str) -> tuple[str, Charge]:
        self.open.append((holder, self.account.open(holder)))
        return self.open[-1]

    @rule(charge=charges, num=st.integers(0, 300))
    def hold(self, charge: tuple[str, Charge], num: int) -> None:
        holder, held = charge
        before = held.num_bytes
        others, all_others = self.account.held_by(holder) - before, self.account.num_bytes - before
        refused = ""
        try:
            held.hold(num)
        except LorafleetError as error:
            refused = f"{type(error).__name__}: {error.message}"
        share = self.account.max_share
        if num > share:
            assert refused.startswith("BadRequest")
        elif num > before and others + num > share:
            assert refused.startswith("Overloaded")
            assert str(share) in refused
        elif num > before and all_others + num > 1000:
            assert refused.startswith("Unavailable")
            assert "1000" in refused
        else:
            assert not refused
        assert held.num_bytes == (before if refused else num)

    @rule(charge=consumes(charges))
    def close(self, charge: tuple[str, Charge]) -> None:
        charge[1].close()
        charge[1].close()
        charge[1].hold(1)
        assert charge[1].num_bytes == 0

    @invariant()
    def sums_are_right(self) -> None:
        assert self.account.num_bytes == sum(charge.num_bytes for _, charge in self.open) <= 1000
        for holder in "abcde":
            of_holder = sum(charge.num_bytes for whose, charge in self.open if whose == holder)
            assert self.account.held_by(holder) == of_holder <= 1000 // SHARE

    def teardown(self) -> None:
        for _, charge in self.open:
            charge.close()
        assert self.account.num_bytes == 0
        assert not self.account._of


TestAccount = Account.TestCase


def test_one_holder_leaves_room_for_others() -> None:
    account = MemoryAccount(400)
    account.open("a").hold(100)
    with pytest.raises(Overloaded, match="a holds 100 bytes of this gateway's memory, and this call may take 1 more"):
        account.open("a").hold(1)
    for holder in "bcd":
        account.open(holder).hold(100)
    with pytest.raises(Unavailable, match=r"calls hold 400 bytes .* may take 1 more; the limit is 400"):
        account.open("e").hold(1)
    with pytest.raises(BadRequest, match=r"this call may take 101 bytes .* the limit per caller is 100"):
        account.open("e").hold(101)


# ---------------------------------------------------------------- charges

KEPT_BYTES = 2048
"""Memory that the interpreter keeps after any parse."""

TEXTS: dict[str, Callable[[], bytes]] = {
    "empty objects": lambda: b"[" + b",".join([b"{}"] * 16_000) + b"]",
    "objects of an empty name": lambda: b"[" + b",".join([b'{"":[]}'] * 8000) + b"]",
    "lists of lists": lambda: b"[" + b",".join([b"[[[1]]]"] * 5000) + b"]",
    "numbers": lambda: b"[" + b",".join([b"123456789"] * 10_000) + b"]",
    "floats": lambda: b"[" + b",".join([b"1.5"] * 20_000) + b"]",
    "short strings": lambda: b"[" + b",".join([b'"ab"'] * 20_000) + b"]",
    "names": lambda: b"[{" + b",".join(b'"k%d":%d' % (i, i + 300) for i in range(8000)) + b"}]",
    "one text of wide characters": lambda: orjson.dumps("😀" + "a" * 100_000),
    "a chat": lambda: orjson.dumps({"messages": [{"role": "user", "content": "hé" * 50}] * 300}),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_values_of_a_text_take_no_more_than_is_charged(name: str) -> None:
    raw = TEXTS[name]()
    tracemalloc.start()
    try:
        value = json_values.loads(raw)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert value
    assert taken < values_bytes(raw) + KEPT_BYTES


@given(n=st.integers(1, 8), new=st.integers(1, 5000), top=st.none() | st.integers(0, 20), stream=st.booleans())
def test_a_longer_answer_is_charged_more(n: int, new: int, top: int | None, stream: bool) -> None:
    def of(n: int, new: int, top: int | None) -> int:
        options = CallOptions(m.Sampling(num_logprobs=top), n=n, stream=stream)
        return call_bytes(options, [prompt_of(new)])

    whole = of(n, new, top)
    assert whole >= CALL_BYTES + n * new * 4
    if top is not None:  # the maximum for the logprobs
        assert whole >= 2 * n * new * m.logprob_record_bytes(top)
    assert of(n + 1, new, top) > whole
    assert of(n, new + 1, top) > whole
    assert of(n, new, 0 if top is None else top + 1) > whole


def test_what_looks_for_expressions_takes_no_more_than_is_charged() -> None:
    """Including streams, in which the whole answer may become a match."""
    expressions = ["(?i)" + "".join(f"[{chr(97 + i % 26)}{chr(0x4E00 + i)}é]" for i in range(85))] * 2 + ["a[^z]*z"]
    text = "".join(chr(0x4E00 + i) for i in range(300, 0, -1)) + "a" * 700
    plain = CallOptions(m.Sampling(), stream=True)
    asked = CallOptions(m.Sampling(stop_regex=expressions), stream=True)
    charged = call_bytes(asked, [prompt_of(250)]) - call_bytes(plain, [prompt_of(250)])
    automaton_of.cache_clear()
    tracemalloc.start()
    try:
        matcher = RegexMatcher([], expressions)
        shown = "".join(matcher.add(text[at : at + 4]) for at in range(0, len(text), 4))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert matcher.matched is None
    assert len(shown) <= 300
    assert taken < charged


def prompt_of(new: int) -> Prompt:
    return Prompt(None, b"", 5, max_new_tokens=new)  # type: ignore[arg-type]


def test_only_a_text_beyond_what_is_charged_is_charged_again() -> None:
    growth = TextGrowth(CallOptions(m.Sampling(), stream=False), [prompt_of(100)])
    growth.add("a" * 100 * TEXT_BYTES)  # outside a call, so nothing is charged
    assert growth._room == 0
    growth.add("ä")
    assert growth._room > 0
    streamed = TextGrowth(CallOptions(m.Sampling(), stream=True), [prompt_of(1)])
    streamed.add("a" * 10_000)
    assert streamed._room == 0


# ---------------------------------------------------------------- with a gateway


def held_bytes() -> float:
    return REGISTRY.get_sample_value("lorafleet_gateway_held_bytes") or 0.0


async def until_free() -> None:
    await wait_until(lambda: held_bytes() == 0, "nothing is held any more")


def enough(num_calls: int, **fields: Any) -> int:
    """Return a limit of which one holder's share is enough for exactly `num_calls` concurrent calls."""
    sampling = m.Sampling(num_logprobs=fields.get("logprobs"))
    options = CallOptions(sampling, n=fields.get("n", 1), stream=bool(fields.get("stream")))
    of_call = call_bytes(options, [prompt_of(fields["max_tokens"])])
    return SHARE * (num_calls * of_call + CALL_BYTES + 16_384)


async def test_what_is_too_much_is_refused_with_value_and_limit(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    fleet.script = lambda submit, body: Script(hold_after=1)
    body = {**LONG, "logprobs": 20, "stream": False}
    memory = enough(3, **body)
    async with gateway_client(bus, model_folder, gateway_memory=memory) as http:
        asked: list[asyncio.Task[httpx2.Response]] = []
        for num in range(1, 4):  # sequentially, as a call is charged for its body until it is submitted
            asked.append(asyncio.create_task(http.post("/v1/completions", json=body)))
            await wait_until(lambda num=num: len(fleet.seen) == num, f"{num} calls run")
        refused = await http.post("/v1/completions", json=body)
        assert refused.status_code == 429
        assert str(memory // SHARE) in refused.json()["error"]["message"]
        assert "address localhost holds" in refused.json()["error"]["message"]
        assert len(fleet.seen) == 3  # no work was done for it
        never = await http.post("/v1/completions", json={**body, "n": 8})
        assert (never.status_code, never.json()["error"]["code"]) == (400, "limit_exceeded")
        assert (await http.get("/health")).status_code == 200
        fleet.go.set()
        assert [(await task).status_code for task in asked] == [200] * 3
        await until_free()
        assert (await http.post("/v1/completions", json=body)).status_code == 200
        await until_free()


async def test_every_end_of_a_call_frees_what_it_held_once(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    error: list[LorafleetError] = []
    fleet.script = lambda submit, body: Script(
        hold_after=1, error=error[0] if error else None, text="ab" * body.max_new_tokens
    )
    async with gateway_client(bus, model_folder) as http:
        for stream in (True, False):
            async with asyncio.TaskGroup() as group:  # a client that leaves
                task = group.create_task(http.post("/v1/completions", json={**LONG, "stream": stream}))
                await wait_until(lambda: held_bytes() > CALL_BYTES, "it is charged")
                task.cancel()
            await until_free()
        fleet.go.set()
        for ends in (LONG, {**LONG, "stream": True}, {**LONG, "max_tokens": 0, "echo": True}, {**LONG, "n": 3}):
            assert (await http.post("/v1/completions", json=ends)).status_code == 200
            await until_free()
        error.append(Overloaded("too much", 1.0))
        assert (await http.post("/v1/completions", json=LONG)).status_code == 429
        await until_free()
        for wrong in (b"{", b"", b'{"model": "nobody", "prompt": "x"}', b'{"prompt": 5}', b"[" * 5000):
            headers = {"content-type": "application/json"}
            assert (await http.post("/v1/completions", content=wrong, headers=headers)).status_code >= 400
            await until_free()
        error.clear()
        key = {"idempotency-key": "k"}
        for _ in range(2):
            assert (await http.post("/v1/completions", json=LONG, headers=key)).status_code == 200
            await until_free()
        job = await http.post("/v1/completions", json={**LONG, "background": True, "logprobs": 3})
        await until_free()
        found = await http.get(f"/v1/jobs/{job.json()['id']}", headers={"prefer": "wait=20"})
        assert found.json()["status"] == "completed"
        await until_free()


async def test_an_answer_of_long_words_ends_when_there_is_no_room(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    words = "ä" + " the" * 140  # in one piece, each character takes as much memory as the widest
    fleet.script = lambda submit, body: Script(text=words, eos=False, finish="length", chunk=1000)
    body = {**LONG, "prompt": "a", "max_tokens": 150, "n": 60}
    memory = enough(1, **body)
    async with gateway_client(bus, model_folder, gateway_memory=memory) as http:
        refused = await http.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "limit_exceeded")
        assert str(memory // SHARE) in refused.json()["error"]["message"]
        await until_free()
        assert (await http.post("/v1/completions", json={**body, "stream": True})).status_code == 200
        await until_free()


@pytest.mark.thorough
async def test_eight_hundred_short_chats_meet_no_limit(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    fleet.script = lambda submit, body: Script(text="ok", hold_after=1)
    chat = {"model": "base", "stream": True, "max_tokens": 100, "messages": [{"role": "user", "content": "Hi you!"}]}
    settings = Settings()
    share = settings.gateway_memory // SHARE
    limits = httpx2.Limits(max_connections=1000)
    async with (
        running_gateway(bus, model_folder) as gateway,
        gateway.client(limits=limits) as http,
    ):
        asked = [asyncio.create_task(http.post("/v1/chat/completions", json=chat)) for _ in range(800)]
        await wait_until(lambda: len(fleet.seen) == 800, "all are running")
        of_call = held_bytes() / 800
        assert 8000 * of_call < share, of_call  # for a single address; ten times as many fit
        assert settings.max_open_calls * of_call < settings.gateway_memory
        fleet.go.set()
        answers = [await task for task in asked]
        assert {answer.status_code for answer in answers} == {200}
        assert all(answer.text.endswith("[DONE]\n\n") for answer in answers)
        await until_free()
