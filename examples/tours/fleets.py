"""The fleets that `make tour` starts where the environment names none: one that writes texts, one that embeds them."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from protocol.runtime.environment import COMPUTE, child_environment

ROOT = Path(__file__).parents[2]
READY_S = 300.0
LORAFLEET = (sys.executable, "-m", "lorafleet")


@contextmanager
def text_fleet(data: Path) -> Iterator[tuple[str, Path]]:
    """Run a fleet of the quickstart model with the example adapters for a block; yields its URL and model folder."""
    fetched = subprocess.run([*LORAFLEET, "fetch"], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    model = Path(fetched.stdout.splitlines()[-1])
    with _fleet(model, ROOT / "examples" / "adapters", data) as url:
        yield url, model


@contextmanager
def embedding_fleet(data: Path) -> Iterator[str]:
    """Run a fleet of a small random BERT with an adapter until the block ends; yields its URL."""
    from helpers.factories import make_encoder_adapter, make_tiny_encoder  # torch is imported only here
    from transformers import AutoModel

    model = make_tiny_encoder(data / "encoder")
    make_encoder_adapter(data / "adapters" / "legal", AutoModel.from_pretrained(model))
    with _fleet(model, data / "adapters", data) as url:
        yield url


def first_adapter(url: str, key: str) -> str:
    """Return the name of the first adapter that the fleet lists. Raises SystemExit where there is none."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        models = httpx2.get(f"{url}/v1/models", headers=headers, timeout=30, trust_env=False).raise_for_status().json()
    except httpx2.HTTPError as error:
        raise SystemExit(f"no fleet answers at {url}: {error}") from error
    names = [model["id"] for model in models["data"] if model["parent"]]
    if not names:
        raise SystemExit(f"the fleet at {url} lists no adapter; a tour compares one with the base model")
    return names[0]


@contextmanager
def _fleet(model: Path, adapters: Path, data: Path) -> Iterator[str]:
    data.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        *LORAFLEET, "up", str(model), "--adapters", str(adapters), "--data", str(data), "--port", str(port),
        "--dtype", "float32",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with (data / "fleet.log").open("w") as log:
        fleet = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=child_environment(*COMPUTE))
        try:
            end = time.monotonic() + READY_S
            while not _is_ready(url):
                if fleet.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"the fleet does not start; see {log.name}")
                time.sleep(0.5)
            yield url
        finally:
            fleet.terminate()
            fleet.wait()


def _is_ready(url: str) -> bool:
    """Return whether a worker is ready, and the store has read its adapters."""
    try:
        healthy = httpx2.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
        models = httpx2.get(f"{url}/v1/models", timeout=5, trust_env=False).json()
    except httpx2.HTTPError:
        return False
    return healthy and any(model["parent"] for model in models["data"])
