"""Adapters in a fleet on two hosts: the metadata that workers have, bad adapters, and early fetches."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import warnings
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

import httpx2
import pytest
import pytest_asyncio
import torch
from helpers.factories import make_adapter, make_tiny_model
from helpers.fleets import chunks, completion
from helpers.hosts import two_hosts
from helpers.preloaded import fork
from helpers.text_oracle import Oracle
from helpers.waiting import wait_until
from oracle.adapters import virtual_cases
from oracle.adapters.kind_cases import CASES
from oracle.adapters.peft_kinds import LLAMA, Kind
from peft import PromptLearningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chaos.fleet import ProcessFleet, Shape
from scheduler.workers import QUEUED_AHEAD

GOOD = ("one", "two", "three")
PROMPT = "Once upon a time"
NUM_RUNNING = 2

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),  # from PEFT's SHiRA
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated"),  # PEFT passes prefixes by it
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(240),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ProcessFleet]:
    """The worker runs on its own host, without the adapter folder and the store's files."""
    folder: Path = tmp_path_factory.mktemp("fleet")
    model = make_tiny_model(folder / "model", max_len=12_000)
    for seed, name in enumerate(GOOD, start=1):
        make_adapter(folder / "adapters" / name, model, seed=seed)
    with two_hosts() as (near, far):
        running = ProcessFleet.prepare(
            folder, model, folder / "adapters", durable=False, spawn=fork, secret="of this test's fleet",
            scan_interval_s=0.2, max_num_seqs=NUM_RUNNING, keepalive_s=0.1,
        )  # fmt: skip
        running.add("store", store_host=near.address).within = near.within
        hide = "; ".join(f"mkdir -p '{hidden}'; mount -t tmpfs none '{hidden}'" for hidden in hidden_folders(running))
        running.add("worker", "w0").within = (*far.within, "unshare", "--mount", "sh", "-ec", f'{hide}; exec "$@"', "-")
        try:
            await running.start_all(Shape())
            yield running
        finally:
            await running.close()


def hidden_folders(fleet: ProcessFleet) -> list[Path]:
    return [fleet.folder / "adapters", blobs(fleet)]


def blobs(fleet: ProcessFleet) -> Path:
    """Return the folder in which the store keeps fetched adapters."""
    return fleet.folder / "data" / "adapters" / "blobs"


@pytest_asyncio.fixture(loop_scope="module")
async def http(fleet: ProcessFleet) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=fleet.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def right(fleet: ProcessFleet) -> dict[str, str]:
    oracle = Oracle(fleet.folder / "model")
    texts = {name: oracle.greedy(PROMPT, 12, fleet.folder / "adapters" / name) for name in GOOD}
    texts["model"] = oracle.greedy(PROMPT, 12)
    assert len(set(texts.values())) == len(texts), "each adapter must change the answer"
    return texts


async def text_of(http: httpx2.AsyncClient, name: str) -> str:
    async with http.stream("POST", "/v1/completions", json=completion(name, PROMPT, stream=True)) as response:
        return "".join([chunk async for chunk in chunks(response)])


async def test_a_worker_on_another_host_has_adapters_from_the_store_alone(
    fleet: ProcessFleet, http: httpx2.AsyncClient, right: dict[str, str]
) -> None:
    worker, store = fleet.members["w0"], fleet.members["store"]
    networks = {os.readlink(f"/proc/{process}/ns/net") for process in ("self", worker.pid, store.pid)}
    assert len(networks) == 3
    assert {name: await text_of(http, name) for name in right} == right
    for hidden in hidden_folders(fleet):
        assert os.listdir(hidden)
        assert not os.listdir(f"/proc/{worker.pid}/root{hidden}")


async def test_every_kind_that_peft_trains_is_asked_by_its_folders_name(
    fleet: ProcessFleet, http: httpx2.AsyncClient, right: dict[str, str]
) -> None:
    """Trained by PEFT, saved and copied into the folder, as a user does it; requested at the same time."""
    names: dict[str, Kind] = {}
    for name, kind in (CASES | virtual_cases.CASES).items():
        if kind.base == LLAMA:
            label = f"kind-{name}".replace(", ", "-")
            names[label] = kind
            train_on(fleet.folder / "model", kind, fleet.folder / "new" / label)
    oracle = Oracle(fleet.folder / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {name: oracle.greedy(PROMPT, 12, fleet.folder / "new" / name) for name in names}
    assert sum(text != right["model"] for text in expected.values()) >= len(names) - 2, "they must change the answer"
    for name in names:
        shutil.move(fleet.folder / "new" / name, fleet.folder / "adapters" / name)

    async def are_settled() -> bool:
        aliases = {alias.name: alias for alias in await fleet.bus.adapters.aliases()}
        assert not [alias.reason for name, alias in aliases.items() if name in names and alias.state == "failed"]
        return all(name in aliases and aliases[name].state == "on_disk" for name in names)

    await wait_until(are_settled, "the store has looked at all")
    texts = await asyncio.gather(*(text_of(http, name) for name in names))
    assert dict(zip(names, texts, strict=True)) == expected
    assert await text_of(http, "one") == right["one"]


def train_on(model: Path, kind: Kind, folder: Path) -> None:
    """Let PEFT train an adapter for a model for a few large steps, and save it."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    targets = {} if issubclass(kind.config, PromptLearningConfig) else {"target_modules": ["q_proj", "down_proj"]}
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", **targets, **kind.options}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for example about layers that PEFT does not know well
        torch.manual_seed(1)
        adapted: Any = get_peft_model(base, kind.config(**options))
        optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.2)
        for _ in range(5):
            ids = torch.randint(base.config.vocab_size, (2, 16))
            optimizer.zero_grad()
            adapted(input_ids=ids, labels=ids, **virtual_cases.task_of(kind)).loss.backward()
            optimizer.step()
        adapted.save_pretrained(str(folder))


async def test_fifty_bad_adapters_in_a_row_disturb_nobody(
    fleet: ProcessFleet, http: httpx2.AsyncClient, right: dict[str, str]
) -> None:
    """The store refuses half, the worker that loads them the other half; each client gets its own reason."""
    reasons = write_bad(fleet.folder / "adapters", fleet.folder / "adapters" / "one")
    done = asyncio.Event()
    answered = dict.fromkeys(right, 0)

    async def keep_asking(name: str) -> None:
        while not done.is_set():
            assert await text_of(http, name) == right[name]
            answered[name] += 1

    async def are_settled() -> bool:
        aliases = {alias.name: alias.state for alias in await fleet.bus.adapters.aliases()}
        return all(aliases.get(name) in ("on_disk", "failed") for name in reasons)

    async with asyncio.TaskGroup() as group:
        for name in right:
            group.create_task(keep_asking(name))
        await wait_until(are_settled, "the store has looked at all")
        before = dict(answered)
        for name, reason in reasons.items():
            response = await http.post("/v1/completions", json=completion(name, PROMPT))
            assert response.status_code == 422, response.text
            assert reason in response.json()["error"]["message"]
        assert all(answered[name] > before[name] for name in right), "the others went on meanwhile"
        done.set()


def write_bad(root: Path, good: Path) -> dict[str, str]:
    """Write 50 bad adapters, each different; return a part of the reason expected for each."""
    config = json.loads((good / "adapter_config.json").read_text())
    raw = (good / "adapter_model.safetensors").read_bytes()
    tensors = load_file(good / "adapter_model.safetensors")
    poisoned = {name: tensor.clone() for name, tensor in tensors.items()}
    next(tensor for name, tensor in poisoned.items() if "lora_B" in name)[0, 0] = float("nan")
    save_file(poisoned, root.parent / "poisoned")
    weights, poison = "adapter_model.safetensors", (root.parent / "poisoned").read_bytes()
    kinds: list[tuple[str, str, bytes, dict[str, Any], str]] = [
        ("pickle", "adapter_model.bin", raw, {}, "pickle"),
        ("cut", weights, raw[: len(raw) // 2], {}, "bytes where its header describes"),
        ("bomb", weights, (1 << 63).to_bytes(8, "little") + b"{}", {}, "the limit is"),
        ("rank", weights, raw, {"r": 0}, "rank 0"),
        ("kind", weights, raw, {"peft_type": "C3A"}, "C3A"),
        *[("nan", weights, poison, {}, "not finite")] * 5,
    ]
    reasons: dict[str, str] = {}
    for number in range(50):
        kind, file, content, changes, reason = kinds[number % len(kinds)]
        name = f"bad-{kind}-{number}"
        (root / name).mkdir()
        (root / name / file).write_bytes(content)
        (root / name / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 100 + number, **changes}))
        reasons[name] = reason
    return reasons


async def test_an_adapter_is_fetched_while_its_request_still_waits_in_the_queue(
    fleet: ProcessFleet, http: httpx2.AsyncClient
) -> None:
    """The worker is full, with requests that wait for adapters too. The store lost the files, so it fetches again."""
    cold = [f"cold-{number}" for number in range(NUM_RUNNING + 1)]
    for name in cold:
        write_variant(fleet.folder / "adapters", name, lora_alpha=20 + cold.index(name))
    digests = [await wait_until(lambda name=name: digest_of(fleet, name), "the store has it") for name in cold]
    for digest in digests:
        shutil.rmtree(blobs(fleet) / digest)
    async with AsyncExitStack() as stack:
        for _ in range(NUM_RUNNING + QUEUED_AHEAD):
            body = completion("model", PROMPT, max_tokens=11_000, stream=True)
            long = await stack.enter_async_context(http.stream("POST", "/v1/completions", json=body))
            assert long.status_code == 200
        fleet.signal("store", signal.SIGSTOP)
        asking = []
        for name, digest in zip(cold, digests, strict=True):
            asking.append(asyncio.create_task(text_of(http, name)))
            await wait_until(lambda digest=digest: is_in(fleet, digest, "loading"), "the worker fetches it")
        states = [await state_of_request(fleet, digest) for digest in digests]
        assert states == [b"assigned"] * NUM_RUNNING + [b"queued"]
        fleet.signal("store", signal.SIGCONT)
        for digest in digests:
            await wait_until(lambda digest=digest: is_in(fleet, digest, "resident"), "the worker has it")
            assert (blobs(fleet) / digest).is_dir()
    texts = await asyncio.gather(*asking)
    assert texts[-1] == Oracle(fleet.folder / "model").greedy(PROMPT, 12, fleet.folder / "adapters" / cold[-1])
    assert len(set(texts)) == len(texts)


def write_variant(root: Path, name: str, **changes: Any) -> None:
    """Write an adapter with the weights of the first good one and changed config fields."""
    shutil.copytree(root / GOOD[0], root.parent / name)
    config = root.parent / name / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    (root.parent / name).rename(root / name)


async def digest_of(fleet: ProcessFleet, name: str) -> str:
    alias = await fleet.bus.adapters.alias(name)
    return alias.digest if alias and alias.state == "on_disk" else ""


async def is_in(fleet: ProcessFleet, digest: str, tier: Literal["loading", "resident"]) -> bool:
    (beat,) = (await fleet.bus.members.worker_beats()).values()
    assert beat is not None
    return digest in getattr(beat, tier)


async def state_of_request(fleet: ProcessFleet, digest: str) -> bytes:
    """Return the state of the only request for an adapter."""
    bus = fleet.bus
    keys = [key async for key in bus._redis.scan_iter(bus.keys.req("*").encode())]
    (state,) = [s for s, d in [await bus._redis.hmget(key, "state", "digest") for key in keys] if d == digest.encode()]
    return state
