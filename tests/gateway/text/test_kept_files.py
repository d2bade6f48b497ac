"""The tokenizers of adapters that a gateway keeps, and reads, have a limit of bytes whatever their sizes."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any, cast

import msgspec
import pytest

from gateway.sandbox.child import ReadTokenizer
from gateway.sandbox.sandbox import SandboxPool
from gateway.text.own_files import OwnFiles
from gateway.text.tokenizer import ModelFiles, load_model_files
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire.tokens import TokenTable

MOST = 100_000


class Answer(msgspec.Struct):
    tokens: bytes
    id: int | None = None
    refusal: str = ""


class Sandbox:
    """Reads a tokenizer as one that has the key of its bytes."""

    async def do(self, job: ReadTokenizer, *, tenant: str, limit_s: float) -> Answer:
        return Answer(msgspec.msgpack.encode(TokenTable([b"a"], key=hashlib.sha256(job.file).hexdigest())))


class Files(OwnFiles):
    """Adapters whose tokenizers are as large as their digests say, in bytes that cannot be packed."""

    num_reading = most_reading = 0
    go: asyncio.Event | None = None

    def raw_of(self, digest: str) -> bytes:
        random = Random(digest)
        return json.dumps({"tokenizer.json": random.randbytes(int(digest.partition("-")[0]) // 2).hex()}).encode()

    async def _fetch(self, digest: str) -> bytes:
        self.num_reading += 1
        self.most_reading = max(self.most_reading, self.num_reading)
        if self.go is not None:
            await self.go.wait()
        self.num_reading -= 1
        return self.raw_of(digest)

    async def ask(self, digest: str, tenant: str = "t") -> ModelFiles:
        return await self.files(digest, hashlib.sha256(self.raw_of(digest)).hexdigest(), tenant)


@pytest.fixture
def files(bus: Bus, model_folder: Path) -> Files:
    base = load_model_files(Settings(redis_url=bus.url, model=str(model_folder)))
    return Files(bus, base, cast("SandboxPool", cast("Any", Sandbox())), max_kept_bytes=MOST)


async def test_kept_tokenizers_never_pass_their_limit(files: Files) -> None:
    """Many small ones first, then large ones: one that came must not drop one that went alone."""
    for number in range(30):
        await files.ask(f"100-{number}")
    most = 0
    for number in range(32):
        await files.ask(f"60000-{number}")
        most = max(most, files.num_bytes)
    assert 30_000 < most <= MOST
    alone = await files.ask("900000-0")
    assert alone.encoder is (await files.ask("900000-0")).encoder  # the newest one is kept, whatever it has
    await files.ask("100-0")
    assert files.num_bytes < MOST


async def test_a_tenant_reads_one_after_the_other(files: Files) -> None:
    files.go = asyncio.Event()
    greedy = [asyncio.create_task(files.ask(f"100-{number}", "greedy")) for number in range(8)]
    await asyncio.sleep(0)
    other = asyncio.create_task(files.ask("100-other", "other"))
    third = asyncio.create_task(files.ask("100-third", "third"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert files.num_reading == 2  # one of the greedy one's, and the other's
    files.go.set()
    await asyncio.gather(*greedy, other, third)
    assert files.most_reading == 2
