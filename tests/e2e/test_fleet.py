"""The whole path as separate processes: load, a killed worker, a joining one, a thousand adapters."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from helpers.factories import make_adapter, make_tiny_model
from helpers.preloaded import fork
from helpers.waiting import wait_until
from openai import AsyncOpenAI
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chaos.fleet import ProcessFleet, Shape

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

RANKS = {"one": 1, "three": 3, "eight": 8, "sixteen": 16}
PROMPTS = ["The first prompt", "Another", "and a third, rather longer one: " + 20 * "abc ", "x"]


class Oracle:
    """The answers of transformers and PEFT, one request at a time."""

    def __init__(self, model: Path, adapters: Path, names: list[str]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        base.generation_config.eos_token_id = None  # as with `ignore_eos`: the end token is an ordinary token
        self.model = PeftModel.from_pretrained(base, str(adapters / names[0]), adapter_name=names[0])
        for name in names[1:]:
            self.model.load_adapter(str(adapters / name), adapter_name=name)
        self._known: dict[tuple[str, str, int], str] = {}

    def text(self, name: str, prompt: str, num: int) -> str:
        key = (name, prompt, num)
        if key not in self._known:
            self._known[key] = self._generate(*key)
        return self._known[key]

    def _generate(self, name: str, prompt: str, num: int) -> str:
        ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        options = {"max_new_tokens": num, "do_sample": False}
        with torch.no_grad():
            if name == "base":
                with self.model.disable_adapter():
                    out = self.model.generate(**ids, **options)
            else:
                self.model.set_adapter(name)
                out = self.model.generate(**ids, **options)
        return self.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_len=2048)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate(RANKS.items(), start=1):
        make_adapter(folder / name, model, rank=rank, seed=seed)
    return folder


@pytest.fixture(scope="module")
def oracle(model: Path, adapters: Path) -> Oracle:
    oracle = Oracle(model, adapters, list(RANKS))
    texts = {name: oracle.text(name, PROMPTS[0], 24) for name in ("base", *RANKS)}
    assert len(set(texts.values())) == len(texts), "each adapter must change the answer"
    return oracle


@asynccontextmanager
async def openai_client(services: ProcessFleet) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{services.url}/v1", api_key="none", timeout=200, max_retries=0) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def client(services: ProcessFleet) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(services) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory, model: Path, adapters: Path) -> AsyncIterator[ProcessFleet]:
    fleet = ProcessFleet.prepare(tmp_path_factory.mktemp("fleet"), model, adapters, durable=False, spawn=fork)
    try:
        await fleet.start_all(Shape(workers=("w0", "w1")))
        yield fleet
    finally:
        await fleet.close()


@pytest_asyncio.fixture(loop_scope="module")
async def services(fleet: ProcessFleet) -> ProcessFleet:
    """The fleet with both of its workers, whatever an earlier test did to them."""
    for name in ("w0", "w1"):
        if not fleet.members[name].is_running:
            fleet.start("worker", name)
    for name in ("w0", "w1"):
        await wait_until(lambda name=name: fleet.is_up(fleet.members[name]), f"{name} is back")
    return fleet


async def ask(client: AsyncOpenAI, name: str, prompt: str, num: int, seen: asyncio.Event | None = None) -> str:
    """Stream one completion; `seen` is set once some tokens are there."""
    text = ""
    stream = await client.completions.create(
        model=name, prompt=prompt, max_tokens=num, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    num_chunks = 0
    async for chunk in stream:
        text += chunk.choices[0].text
        num_chunks += 1
        if seen is not None and num_chunks == 5:
            seen.set()
    return text


async def test_500_requests_of_mixed_adapters_all_come_back_right(
    services: ProcessFleet, client: AsyncOpenAI, oracle: Oracle
) -> None:
    names = ["base", *RANKS]
    jobs = [(names[i % len(names)], PROMPTS[i % len(PROMPTS)], 8 + i % 5) for i in range(500)]
    room = asyncio.Semaphore(64)

    async def one(name: str, prompt: str, num: int) -> str:
        async with room:
            return await ask(client, name, prompt, num)

    texts = await asyncio.gather(*(one(*job) for job in jobs))
    assert [text for job, text in zip(jobs, texts, strict=True) if text != oracle.text(*job)] == []
    keys = services.bus.keys
    await wait_until(lambda: _is_idle(services), "nothing is queued or running")
    assert await services.bus._redis.xlen(keys.dlq) == 0
    assert await services.bus.untimed_keys() == []


async def test_no_client_notices_that_a_worker_is_killed_in_mid_stream(
    services: ProcessFleet, client: AsyncOpenAI, oracle: Oracle
) -> None:
    num = 400
    undisturbed = {name: await ask(client, name, PROMPTS[0], num) for name in ("base", *RANKS)}
    assert all(text.startswith(oracle.text(name, PROMPTS[0], 24)) for name, text in undisturbed.items())
    names = [*(["base", *RANKS] * 3)]
    streams: list[asyncio.Task[str]] = []
    victim = ""
    while not victim:  # on a busy machine all may have ended before their clients see that they have begun
        await asyncio.gather(*streams)
        started = [asyncio.Event() for _ in names]
        streams = [
            asyncio.create_task(ask(client, name, PROMPTS[0], num, event))
            for name, event in zip(names, started, strict=True)
        ]
        await started[-1].wait()
        # Nobody may end while it is found out who has work to lose.
        for worker in ("w0", "w1"):
            services.signal(worker, signal.SIGSTOP)
        victim = await _busiest(services)
        if not victim:
            for worker in ("w0", "w1"):
                services.signal(worker, signal.SIGCONT)
    services.kill(victim)
    other = "w1" if victim == "w0" else "w0"
    services.signal(other, signal.SIGCONT)
    services.start("worker", victim)
    texts = await asyncio.gather(*streams)
    assert texts == [undisturbed[name] for name in names]
    keys = [key async for key in services.bus._redis.scan_iter(services.bus.keys.req("*").encode())]
    epochs = [int(await services.bus._redis.hget(key, "epoch")) for key in keys]
    assert max(epochs) > 1, "no request was moved: the kill showed nothing"
    await wait_until(lambda: services.is_up(services.members[victim]), "the new worker has joined")
    services.kill(other)
    assert await ask(client, "eight", PROMPTS[1], 12) == oracle.text("eight", PROMPTS[1], 12)


@pytest.mark.thorough
async def test_any_of_a_thousand_registered_adapters_can_be_asked_at_once(
    tmp_path: Path, model: Path, adapters: Path
) -> None:
    many = tmp_path / "many"
    weights = load_file(adapters / "three" / "adapter_model.safetensors")
    config = json.loads((adapters / "three" / "adapter_config.json").read_text())
    for i in range(1000):
        folder = many / f"a{i:04}"
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(i)
        new = {name: torch.empty_like(t).normal_(0, 0.2, generator=generator) for name, t in weights.items()}
        save_file(new, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))
    # Only some fit, so the pool must load and evict adapters.
    services = ProcessFleet.prepare(
        tmp_path, model, many, durable=False, spawn=fork, adapter_pool_bytes=4 << 20, adapter_host_bytes=8 << 20
    )
    try:
        await services.start_all(Shape())
        chosen = [f"a{i:04}" for i in range(3, 1000, 13)]
        async with openai_client(services) as client:
            await wait_until(lambda: _all_listed(client, 1001), "all are listed", timeout_s=100, every_s=0.3)
            texts = await asyncio.gather(*(ask(client, name, PROMPTS[0], 12) for name in chosen))
        sample = chosen[::11]
        oracle = Oracle(model, many, sample)
        assert {name: text for name, text in zip(chosen, texts, strict=True) if name in sample} == {
            name: oracle.text(name, PROMPTS[0], 12) for name in sample
        }
        assert len(set(texts)) == len(chosen), "each adapter must change the answer"
    finally:
        await services.close()


async def _all_listed(client: AsyncOpenAI, num: int) -> bool:
    return len((await client.models.list()).data) == num


async def _busiest(services: ProcessFleet) -> str:
    """Return the name of the worker that has the most requests right now, "" if none has any."""
    bus = services.bus
    keys = [key async for key in bus._redis.scan_iter(bus.keys.req("*").encode())]
    facts = [await bus._redis.hmget(key, "state", "owner") for key in keys]
    owners = [owner.decode() for state, owner in facts if state == b"assigned"]
    names = {beat.wid: beat.name for beat in (await bus.members.worker_beats()).values() if beat is not None}
    return names[max(owners, key=owners.count)] if owners else ""


async def _is_idle(services: ProcessFleet) -> bool:
    bus = services.bus
    beats = (await bus.members.worker_beats()).values()
    queued = [await bus._redis.xlen(bus.keys.sub(cls)) for cls in ("interactive", "batch")]
    work = [await bus._redis.xlen(bus.keys.work(beat.wid)) for beat in beats if beat is not None]
    return not any(queued) and not any(work)
