"""Adapters' added tokens that a gateway keeps and reads are limited in bytes, whatever their sizes."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from gateway.http.http_client import HttpClient
from gateway.sandbox.sandbox import SandboxPool
from gateway.text.own_files import OwnFiles
from gateway.text.tokenizer import ModelFiles, load_model_files
from peft_adapters.texts.files import OwnTexts
from peft_adapters.texts.tokenizer_json import AddedToken, OwnTokenizer
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings

MOST = 1_000_000


class Files(OwnFiles):
    """Adapters that add as many tokens as their digests say."""

    num_reading = most_reading = 0
    go: asyncio.Event | None = None

    def raw_of(self, digest: str) -> bytes:
        size = len(self.base.tokens.pieces)
        num = int(digest.partition("-")[0])
        added = [AddedToken(size + i, f"<|{digest} {i}|>", special=True) for i in range(num)]
        return msgspec.json.encode(OwnTexts(tokenizer=OwnTokenizer({}, [*self.own, *added])))

    @property
    def own(self) -> list[AddedToken]:
        """Return the base's added tokens."""
        return [AddedToken(id_, token, special=True, normalized=False) for token, id_ in self.base.tokens.added.items()]

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
    return Files(
        bus, base, cast("SandboxPool", cast("Any", None)), HttpClient(), cast("Any", None), max_kept_bytes=MOST
    )


async def test_kept_tokens_never_pass_their_limit(files: Files) -> None:
    """Many small adapters first, then large ones: each large one must evict several small ones."""
    for number in range(30):
        await files.ask(f"1-{number}")
    most = 0
    for number in range(32):
        await files.ask(f"100-{number}")
        most = max(most, files.num_bytes)
    assert MOST // 2 < most <= MOST
    alone = await files.ask("2000-0")
    assert files.num_bytes > MOST
    assert alone.encoder is (await files.ask("2000-0")).encoder  # the newest is kept, whatever its size
    await files.ask("1-0")
    assert files.num_bytes < MOST


async def test_those_with_the_same_tokens_share_them(files: Files) -> None:
    base = await files.ask("0-0")
    assert (base.encoder, base.tokens) == (files.base.encoder, files.base.tokens)
    texts = msgspec.json.decode(files.raw_of("3-0"), type=OwnTexts)
    texts.template = "{{ messages }}"
    first, second = await files.ask("3-0"), files._made(texts)
    assert first.encoder is second.encoder is not files.base.encoder
    assert first.tokens is second.tokens
    assert second.template is not first.template


async def test_a_tenant_reads_one_after_the_other(files: Files) -> None:
    files.go = asyncio.Event()
    greedy = [asyncio.create_task(files.ask(f"1-{number}", "greedy")) for number in range(8)]
    await asyncio.sleep(0)
    other = asyncio.create_task(files.ask("1-other", "other"))
    third = asyncio.create_task(files.ask("1-third", "third"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert files.num_reading == 2  # one of the greedy tenant, and one of the other
    files.go.set()
    await asyncio.gather(*greedy, other, third)
    assert files.most_reading == 2
