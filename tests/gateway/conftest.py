"""A scripted fleet with a real gateway in front of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio
from helpers.scripted_fleet import (
    RunningGateway,
    ScriptedFleet,
    gateway_client,
    make_model_folder,
    playing,
    running_gateway,
)
from openai import AsyncOpenAI
from tokenizers import Tokenizer

from protocol.queue.bus import Bus


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_folder / "tokenizer.json"))


@pytest_asyncio.fixture
async def fleet(bus: Bus, tokenizer: Tokenizer) -> AsyncIterator[ScriptedFleet]:
    """A fleet that answers every request with the default script."""
    async with playing(bus.url, tokenizer) as scripted:
        yield scripted


@pytest_asyncio.fixture
async def qwen(bus: Bus, fleet: ScriptedFleet, tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a gateway whose model reasons, and calls tools in the format of Hermes."""
    folder = make_model_folder(tmp_path / "model", (Path(__file__).parent / "templates" / "qwen.jinja").read_text())
    fleet.max_model_len = 1024
    await fleet.register()
    async with gateway_client(bus, folder) as http:
        yield http


@pytest_asyncio.fixture
async def agent(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a gateway whose model has room for the tools of an agent."""
    fleet.max_model_len = 1 << 18
    await fleet.register()
    async with gateway_client(bus, model_folder) as http:
        yield http


@pytest_asyncio.fixture
async def gateway(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> AsyncIterator[RunningGateway]:
    async with running_gateway(bus, model_folder) as running:
        yield running


@pytest_asyncio.fixture
async def client(gateway: RunningGateway) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as openai:
        yield openai


@pytest_asyncio.fixture
async def http(gateway: RunningGateway) -> AsyncIterator[httpx2.AsyncClient]:
    async with gateway.client() as plain:
        yield plain
