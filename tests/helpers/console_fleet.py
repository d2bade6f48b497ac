"""A real fleet behind API keys, for the tests of the console."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2

from chaos.fleet import ProcessFleet, Shape
from helpers.factories import make_adapter, make_tiny_model
from helpers.preloaded import fork


class ConsoleFleet:
    """The processes, and an operator's API key."""

    def __init__(self, processes: ProcessFleet, key: str, model: Path) -> None:
        self.processes = processes
        self.key = key
        self.model = model
        self.http = httpx2.AsyncClient(base_url=processes.url, timeout=60, headers={"authorization": f"Bearer {key}"})

    async def ask(self, model: str, num_tokens: int = 8) -> Any:
        body = {"model": model, "prompt": "the dog", "max_tokens": num_tokens, "ignore_eos": True}
        answer = await self.http.post("/v1/completions", json=body)
        return answer.json()

    def adapter(self, folder: Path, seed: int) -> Path:
        """Write another adapter of the fleet's model."""
        return make_adapter(folder, self.model, seed=seed)

    async def long(self) -> str:
        """Start a long request; return its id once it runs."""
        body = {"model": "alpha", "prompt": "fox", "max_tokens": 480, "ignore_eos": True, "background": True, "n": 8}
        job = (await self.http.post("/v1/completions", json=body)).json()
        return f"{job['id'].removeprefix('job_')}-0"


@asynccontextmanager
async def console_fleet(folder: Path) -> AsyncIterator[ConsoleFleet]:
    """Run two workers with three valid adapters and one that is refused."""
    model = make_tiny_model(folder / "model")
    for seed, name in enumerate(("alpha", "beta", "acme/gamma"), start=1):
        make_adapter(folder / "adapters" / name, model, seed=seed)
    bad = folder / "adapters" / "broken"
    bad.mkdir()
    (bad / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    (bad / "adapter_model.safetensors").write_bytes(bytes(8) + b"{}")
    processes = ProcessFleet.prepare(
        folder, model, folder / "adapters", durable=False, spawn=fork, api_keys=True, console_keys=True
    )
    try:
        await processes.start_all(Shape(workers=("one", "two")))
        key, _ = await processes.bus.api_keys.create("ops", ["admin"], note="the operator's")
        await processes.bus.api_keys.create("acme", ["infer", "adapters"])
        fleet = ConsoleFleet(processes, key, model)
        yield fleet
        await fleet.http.aclose()
    finally:
        await processes.close()
