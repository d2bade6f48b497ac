"""Large bodies: fair slots, work that does not block the event loop, and costs that are known in advance."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import httpx2
import pytest
from helpers import examples
from helpers.scripted_fleet import MAX_MODEL_LEN, RunningGateway, ScriptedFleet, gateway_client
from helpers.waiting import wait_until
from msgspec import structs

from gateway.adapters.resolver import CallTarget
from gateway.app.shapes import shape_of
from gateway.auth.authentication import Authentication
from gateway.auth.callers import CALLER, EVERYBODY
from gateway.calls.parsed_call import CallOptions, ChatPrompt, Models, ParsedCall, Rules, Sent, Texts, Truncation
from gateway.calls.resolve import ResolvedCall
from gateway.calls.size import check_logprobs
from gateway.calls.tokenize import Prompt, check_size, tokenize
from gateway.http.access import MATCH, RouteMatch
from gateway.http.paths import SMALL_BODY_BYTES
from gateway.overload import large
from gateway.overload.admission import Admission
from gateway.overload.cost import COST, LargeBody, RequestCost, free_slowly, held, hold
from gateway.overload.gate import Gate, LargeLimits
from gateway.overload.memory import MemoryAccount
from gateway.text.tokenizer import ModelFiles, load_model_files
from protocol.queue.bus import Bus
from protocol.runtime.fair_slots import FairSlots
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest
from protocol.wire.tokens import UNKNOWN_CHARACTERS

MAX_BODY = 4 << 20


# ---------------------------------------------------------------- prompts


@dataclass
class Counting:
    """The files of a tokenizer, counting encoded texts."""

    files: ModelFiles
    num: list[int] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.files, name)

    @property
    def encoder(self) -> Counting:
        return self

    async def encode(self, texts: list[str], **options: Any) -> list[list[int]]:
        self.num.append(len(texts))
        return await self.files.encoder.encode(texts, **options)


@pytest.fixture
def files(model_folder: Path) -> Counting:
    return Counting(load_model_files(Settings(model=str(model_folder))))


def call_of(files: Any, *sources: str | list[int], models: int = 1, n: int = 1, truncate: int | None = None) -> Any:
    base = m.ServedModel(
        model="b", name="b", fingerprint="f", model_type="tiny", vocab_size=300, max_model_len=MAX_MODEL_LEN,
        sites=[], created_ms=1,
    )  # fmt: skip
    texts = Texts(sources, None if truncate is None else Truncation(truncate))
    parsed = ParsedCall(EVERYBODY, Models(["b"] * models), texts, CallOptions(m.Sampling(), n=n), Rules("prompt", 128))
    return ResolvedCall(parsed, base, [CallTarget(f"m{i}", f"d{i}", files) for i in range(models)])


async def test_models_with_one_tokenizer_share_one_encoding(files: Counting) -> None:
    made = await tokenize(call_of(files, "the dog", [5, 6, 7], models=128))
    assert files.num == [1]
    assert [prompt.target.name for prompt in made.prompts] == [f"m{i}" for i in range(128) for _ in range(2)]
    assert len({id(prompt.ids) for prompt in made.prompts}) == 2


async def test_vocabularies_of_different_size_are_checked_each(files: Counting) -> None:
    call = call_of(files, [299], models=2)
    await tokenize(call)
    larger, smaller = call.targets
    with pytest.raises(BadRequest, match="whose 10 tokens count from 0"):
        await tokenize(structs.replace(call, targets=[larger, replace(smaller, vocab_size=10)]))


def test_what_cannot_fit_the_context_is_not_tokenized(files: Counting) -> None:
    limit = 1 << 30
    check_size(call_of(files, [5] * (MAX_MODEL_LEN - 1), "a" * UNKNOWN_CHARACTERS * (MAX_MODEL_LEN - 1)), limit)
    for source in ([5] * MAX_MODEL_LEN, "a" * UNKNOWN_CHARACTERS * MAX_MODEL_LEN):
        with pytest.raises(BadRequest, match="maximum context length is 256") as caught:
            check_size(call_of(files, "a", source), limit)
        assert caught.value.code == "context_length_exceeded"
    check_size(call_of(files, "a" * UNKNOWN_CHARACTERS * MAX_MODEL_LEN, truncate=5), limit)
    assert files.num == []


def test_models_prompts_and_choices_are_multiplied_before_any_work(files: Counting) -> None:
    call = call_of(files, [5] * 200, [5] * 50, models=8, n=2)
    check_size(call, 4000)
    with pytest.raises(BadRequest, match="4000 tokens in total; the limit per call is 3999"):
        check_size(call, 3999)


def test_an_answer_does_not_hold_its_body(files: Counting) -> None:
    parsed = structs.replace(call_of(files, "a" * 1000, [5] * 1000).parsed, sent=Sent("/x", b"{}" * 1000))
    light = parsed.without_prompts()
    assert (len(light.sources), light.sent, light.key) == (2, None, "")
    assert not any(light.sources)
    keyed = structs.replace(parsed, sent=Sent("/x", b"{}" * 1000, "key")).without_prompts()
    assert keyed.sent is not None
    assert (keyed.sent.raw, keyed.key) == (b"", "key")
    assert keyed.sent.hash == Sent("/x", b"{}" * 1000).hash
    assert structs.replace(parsed, inputs=ChatPrompt([{"a": 1}])).without_prompts().inputs == ChatPrompt([])


# ---------------------------------------------------------------- with a gateway


@pytest.mark.thorough
async def test_the_gateway_answers_while_it_works_on_large_bodies(gateway: RunningGateway) -> None:
    text = "the quick brown fox "
    body = json.dumps({"inputs": text * (1_000_000 // len(text))}).encode()
    headers = {"content-type": "application/json"}
    async with gateway.client() as http, asyncio.TaskGroup() as group:
        asked = [group.create_task(http.post("/tokenize", content=body, headers=headers)) for _ in range(4)]
        num_answered = 0
        while not all(task.done() for task in asked):
            assert (await http.get("/health")).status_code == 200
            num_answered += 1
    assert num_answered >= 20
    assert {task.result().status_code for task in asked} == {422}
    assert "`inputs` must have at most 65536 tokens. Given: 4" in asked[0].result().text


async def test_a_text_too_long_to_tokenize_is_refused_before(http: httpx2.AsyncClient) -> None:
    body = json.dumps({"inputs": "a" * (MAX_BODY - 100)}).encode()
    answer = await http.post("/tokenize", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert f"Given: {(MAX_BODY - 100) // 16}" in answer.text


async def test_many_models_and_ids_are_refused_at_once(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    async with gateway_client(bus, model_folder, max_choices=1000) as http:
        for num_models in (130, 600):
            body = {"model": ["base"] * num_models, "prompt": [1] * 600_000}
            answer = await http.post("/v1/completions", json=body)
            assert answer.json()["error"]["code"] == "context_length_exceeded"
        num_prompts = 7 if examples.are_many else 1
        body = {"model": ["base"] * 130, "prompt": [[1] * 200] * num_prompts}
        assert (await http.post("/v1/completions", json=body)).status_code == 200
    assert len(fleet.seen) == 130 * num_prompts


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"model": ["base"] * 130}),  # refused because of its size
        pytest.param("/v1/completions", {"model": "base"}, marks=pytest.mark.thorough),  # longer than the context
        pytest.param("/v1/completions", {"model": "nobody"}, marks=pytest.mark.thorough),
        pytest.param("/v1/completions", {"model": "base", "max_tokens": "many"}, marks=pytest.mark.thorough),
        pytest.param("/v1/completions", {"model": "base", "maxtokens": 1}, marks=pytest.mark.thorough),
        ("/v1/chat/completions", {"model": "base", "messages": [], "stop_token_ids": True}),
        pytest.param("/generate", {"inputs": 1}, marks=pytest.mark.thorough),
    ],
)
async def test_nothing_of_a_refused_body_stays(http: httpx2.AsyncClient, path: str, fields: dict[str, Any]) -> None:
    ids = list(range(300, 600_300))
    body = json.dumps(
        {**fields, ("stop_token_ids" if fields.get("stop_token_ids") else "prompt"): ids}, separators=(",", ":")
    )
    gc.collect()
    gc.disable()  # reference cycles would remain until it runs
    try:
        answer = await http.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 404, 422)

        async def is_gone() -> bool:
            large_lists = (kept for kept in gc.get_objects() if type(kept) is list and len(kept) == len(ids))
            return all(kept is ids for kept in large_lists)

        await wait_until(is_gone, "the ids are gone")
    finally:
        gc.enable()


async def test_what_waits_for_a_place_is_not_read(gateway: RunningGateway, http: httpx2.AsyncClient) -> None:
    """With four slow senders of one address, the next is not read, but small calls are answered."""

    async def slow() -> AsyncIterator[bytes]:
        yield b'{"model":"base","prompt":"'
        await asyncio.Event().wait()

    headers = {"content-type": "application/json", "content-length": str(2 * SMALL_BODY_BYTES)}
    async with gateway.client() as other:
        senders = [
            asyncio.create_task(other.post("/v1/completions", content=slow(), headers=headers)) for _ in range(5)
        ]
        body = json.dumps({"model": "base", "prompt": [1] * SMALL_BODY_BYTES}).encode()
        waiting = asyncio.create_task(
            http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        )
        assert (await http.post("/v1/completions", json={"model": "base", "prompt": "hi"})).status_code == 200
        assert not waiting.done()
        for sender in senders:
            sender.cancel()
        assert (await waiting).json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "path", ["/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter"]
)
async def test_routes_that_need_little_take_little(http: httpx2.AsyncClient, path: str) -> None:
    body = json.dumps({"name": "a", "lora_name": "a", "lora_path": "b", "x": "x" * SMALL_BODY_BYTES}).encode()
    answer = await http.post(path, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


async def test_a_large_chat_is_answered(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    """A large body of little cost, as fields without effect are skipped."""
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "user": "x" * 10 * SMALL_BODY_BYTES}
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    await wait_until(lambda: len(fleet.seen) == 1, "it ran")


async def test_who_hangs_up_has_no_more_done_at_a_time() -> None:
    """Threads can't be cancelled, so a turn lasts until its work is done."""
    work, go, begun = FairSlots(1), asyncio.Event(), 0

    async def do() -> None:
        nonlocal begun
        begun += 1
        await go.wait()

    async def call() -> None:
        cost = RequestCost()
        cost.body = LargeBody("a", None, work)
        COST.set(cost)
        await large.work(do)

    tasks = [asyncio.create_task(call()) for _ in range(3)]
    await wait_until(lambda: begun == 1, "the first works")
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert (begun, work._held.total()) == (1, 1)
    go.set()
    await wait_until(lambda: not work._held, "all turns are over")


async def test_work_that_outlives_its_call_leaves_nothing_charged() -> None:
    """A client leaves while its texts are tokenized, and the resulting tokens are charged afterwards."""
    work, account, go = FairSlots(1), MemoryAccount(1 << 30), asyncio.Event()
    charge = account.open("a")

    async def do() -> None:
        await go.wait()
        hold(held() + 1000)

    async def call() -> None:
        cost = RequestCost(charge)
        cost.body = LargeBody("a", None, work)
        COST.set(cost)
        try:
            await large.work(do)
        finally:
            cost.close()

    task = asyncio.create_task(call())
    await wait_until(lambda: work._held.total() == 1, "it works")
    task.cancel()
    await asyncio.wait([task])
    go.set()
    await wait_until(lambda: not work._held, "its turn is over")
    assert account.num_bytes == 0


async def test_small_bodies_take_no_turn() -> None:
    assert await large.work(lambda: asyncio.sleep(0, "done")) == "done"
    async with large.Working():
        pass
    large.release()


def test_logprobs_of_all_choices_are_bounded(files: Counting) -> None:
    def check(n: int, num_logprobs: int | None, *, of_prompt: int | None = None) -> None:
        prompt = Prompt(CallTarget("b", "", files), b"", 1 << 17, max_new_tokens=1 << 15)  # type: ignore[arg-type]
        sampling = m.Sampling(num_logprobs=num_logprobs, prompt_logprobs=20 if of_prompt else None)
        check_logprobs(CallOptions(sampling, n=n), [prompt])

    check(128, None)
    check(16, 20)
    check(4, 20, of_prompt=20)
    check(5, None, of_prompt=20)
    for refused in ((64, 20, None), (8, 20, 20), (1, 1000, None), (7, None, 20)):
        with pytest.raises(BadRequest, match="ask for fewer tokens, choices or likely tokens"):
            check(refused[0], refused[1], of_prompt=refused[2])


async def test_addresses_of_one_network_share_places_as_they_share_memory() -> None:
    """An IPv6 /64 has 2^64 addresses, which share the slots of one."""
    inside: list[str] = []
    go = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        inside.append(scope["client"][0])
        await go.wait()

    async def never(message: Any = None) -> Any:
        raise AssertionError

    admission, limits = Admission(Settings(), lambda: None, lambda: 0.0), LargeLimits(num_bodies=4, num_of_tenant=1)
    gate = Gate(app, shape_of, admission, Authentication(None), MemoryAccount(1 << 30), MAX_BODY, limits)
    match = RouteMatch("/v1/chat/completions", kind="call")
    tasks: list[asyncio.Task[None]] = []
    for address in ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "10.0.0.1", "::ffff:10.0.0.1"):
        headers = [(b"content-length", b"1000000")]
        scope = {"type": "http", "headers": headers, MATCH: match, CALLER: EVERYBODY, "client": (address, 1)}
        tasks.append(asyncio.create_task(gate.inner(scope, never, never)))
        await asyncio.sleep(0)
    assert inside == ["2001:db8::1", "2001:db8:0:1::1", "10.0.0.1"]
    go.set()
    await asyncio.gather(*tasks)
    assert len(inside) == 5


# ---------------------------------------------------------------- freeing


class Noted(dict[str, Any]):
    """Counts its instances."""

    num: ClassVar[int] = 0

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        Noted.num += 1

    def __del__(self) -> None:
        Noted.num -= 1


def test_values_within_each_other_are_freed_a_few_at_a_time() -> None:
    left: list[int] = []

    class Watched(list[Any]):
        def __delitem__(self, where: Any) -> None:
            before = Noted.num
            super().__delitem__(where)
            left.append(before - Noted.num)

    free = [[Noted(a=[Noted(), {"b": Noted()}]) for _ in range(100)]]
    assert Noted.num == 300
    free_slowly(Watched(free.pop()), 10)
    assert Noted.num == 0
    assert sum(left) == 300
    assert max(left) <= 10


@pytest.mark.parametrize("num_bytes", [large.PLAIN_BYTES, large.PLAIN_BYTES + 1])
async def test_what_a_small_body_refers_to_is_freed_in_a_thread_if_it_is_large(num_bytes: int) -> None:
    freed_in: list[int] = []

    class Stored(dict[str, Any]):
        def __del__(self) -> None:
            freed_in.append(threading.get_ident())

    cost = RequestCost()
    token = COST.set(cost)
    large.keep([Stored()], num_bytes)
    COST.reset(token)
    cost.close()
    await wait_until(lambda: freed_in, "it is freed")
    assert (freed_in == [threading.get_ident()]) == (num_bytes <= large.PLAIN_BYTES)
