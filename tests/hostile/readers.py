"""The wait for a victim's first token while other clients only read: `python -m hostile.readers` measures it.

A gateway in its own process, with a scripted worker that answers instantly, has thousands of adapters in its catalogue.
The victim requests one token at a time, alone and while another tenant reads from another process. Both have a key.
With `--keyless` the fleet has no keys, and programs of this machine read without a limit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx2
from helpers.scripted_fleet import Script, ScriptedFleet, make_model_folder
from helpers.waiting import wait_until
from tokenizers import Tokenizer

from chaos.attackers.attacker import ADDRESS
from chaos.fleet import free_port
from lorafleet.launcher.embedded import start_embedded
from protocol.queue.bus import Bus
from protocol.wire import messages as m

LISTS = ("/v1/adapters?limit=1000", "/v1/models", "/v1/requests?limit=100", "/api/tags", "/api/ps", "/info")
NAMES = ("victim", "reader")
BODY = {"model": "base", "prompt": "hi", "max_tokens": 1, "stream": True}


async def attack(url: str, path: str, num: int, key: str) -> None:
    """Read a path repeatedly from `num` clients, until killed; print the counts of their answers once a second."""
    told: Counter[str] = Counter()
    transport = httpx2.AsyncHTTPTransport(local_address=ADDRESS, limits=httpx2.Limits(max_connections=num))
    async with httpx2.AsyncClient(base_url=url, timeout=60, transport=transport, headers=bearer(key)) as http:

        async def reader() -> None:
            while True:
                try:
                    answer = await http.get(path)
                    told[str(answer.status_code)] += 1
                except httpx2.HTTPError as error:
                    told[type(error).__name__] += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(num):
                group.create_task(reader())
            while True:
                await asyncio.sleep(1)
                print(dict(told), flush=True)


def bearer(key: str) -> dict[str, str]:
    """Return the headers with an API key; none if it is empty."""
    return {"authorization": f"Bearer {key}"} if key else {}


async def first_tokens(url: str, seconds: float, key: str) -> list[float]:
    """Return the times to first token, in ms, of one call after another."""
    found: list[float] = []
    until_s = time.monotonic() + seconds
    async with httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False, headers=bearer(key)) as http:
        while time.monotonic() < until_s:
            began_s = time.monotonic()
            async with http.stream("POST", "/v1/completions", json=BODY) as answer:
                pieces = answer.aiter_bytes()
                await anext(pieces)
                found.append(1000 * (time.monotonic() - began_s))
                async for _ in pieces:
                    pass
    return found


async def measure(folder: Path, num_adapters: int, num_readers: int, seconds: float, *, keyless: bool) -> None:
    """Print a row for each list, and one for a running job streamed by hundreds of clients."""
    server, model, port = (
        start_embedded(folder / "queue", durable=False),
        make_model_folder(folder / "model"),
        free_port(),
    )
    bus = Bus(server.url)
    fleet = ScriptedFleet(bus, Tokenizer.from_file(str(model / "tokenizer.json")))
    fleet.script = lambda submit, body: Script(hold_after=5 if submit.stored else None)
    fleet.assigning.set()
    await fleet.register()
    victim, reader = ["" if keyless else (await bus.api_keys.create(name, ["infer", "adapters"]))[0] for name in NAMES]
    command = [sys.executable, "-m", "lorafleet", "serve", "gateway", "--redis-url", server.url, "--model", str(model)]
    command += [] if keyless else ["--api-keys"]
    with (folder / "gateway.log").open("wb") as log:
        gateway = await asyncio.create_subprocess_exec(*command, "--port", str(port), stdout=log, stderr=log)
    running, url = asyncio.create_task(fleet.run()), f"http://127.0.0.1:{port}"
    try:
        for begin in range(0, num_adapters, 500):
            await bus.adapters.publish([_adapter(number) for number in range(begin, min(begin + 500, num_adapters))])
        async with httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False, headers=bearer(reader)) as http:

            async def is_up() -> bool:
                with contextlib.suppress(httpx2.HTTPError):
                    return (await http.get("/health")).status_code == 200
                return False

            await wait_until(is_up, "the gateway is up")
            job = await http.post(
                "/v1/completions", json={**BODY, "stream": False, "max_tokens": 40, "background": True}
            )
        print(
            "| read | clients | first token p50, ms: alone → beside | × | were told |\n| --- | --- | --- | --- | --- |"
        )
        for path in (*LISTS, f"/v1/jobs/{job.json()['id']}/stream"):
            num = 600 if path.endswith("/stream") else num_readers
            alone = statistics.median(await first_tokens(url, seconds / 2, victim))
            arguments = [sys.executable, "-m", "hostile.readers", "--attack", url, path, str(num), reader]
            attacker = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)
            assert attacker.stdout is not None
            await attacker.stdout.readline()  # it has been reading for a second
            beside = statistics.median(await first_tokens(url, seconds, victim))
            attacker.kill()
            told = (await attacker.communicate())[0].decode().strip().split("\n")[-1]
            shown = "/v1/jobs/ID/stream" if path.endswith("/stream") else path
            print(f"| `{shown}` | {num} | {alone:.1f} → {beside:.1f} | {beside / alone:.1f} | {told} |", flush=True)
    finally:
        gateway.terminate()
        await gateway.wait()
        running.cancel()
        await asyncio.wait([running])
        await bus.close()
        server.stop()


def _adapter(number: int) -> tuple[m.Alias, m.AdapterRecord]:
    name, digest = f"tenant-{number:05}/adapter", f"{number:064x}"
    alias = m.Alias(name=name, state="on_disk", digest=digest, source=f"hub:{name}@{number:040x}", created_ms=1000)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return alias, m.AdapterRecord(
        digest=digest, rank=8, num_bytes=10 << 20, config={}, modules=modules, source=alias.source, created_ms=1
    )


def main() -> None:
    """Measure, or run one attack in its own process."""
    parser = argparse.ArgumentParser(prog="python -m hostile.readers", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--adapters", type=int, default=5000)
    parser.add_argument("--readers", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--keyless", action="store_true", help="let programs of this machine read without a limit")
    parser.add_argument("--attack", nargs=4, metavar=("URL", "PATH", "NUM", "KEY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.attack:
        url, path, num, key = args.attack
        asyncio.run(attack(url, path, int(num), key))
        return
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder), args.adapters, args.readers, args.seconds, keyless=args.keyless))


if __name__ == "__main__":
    main()
