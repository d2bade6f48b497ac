"""The fleets that `make tour` starts if the environment names none: for texts, for embeddings, and for agents."""

from __future__ import annotations

import os
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


def quickstart_model() -> Path:
    """Return the folder of the quickstart model, downloading it if necessary."""
    fetched = subprocess.run([*LORAFLEET, "fetch"], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return Path(fetched.stdout.splitlines()[-1])


@contextmanager
def text_fleet(model: Path, data: Path) -> Iterator[str]:
    """Run a fleet of the quickstart model with the example adapters during the block; yield its URL."""
    with _fleet(model, ROOT / "examples" / "adapters", data) as url:
        yield url


@contextmanager
def acting_fleet(model: Path, data: Path) -> Iterator[str]:
    """Run a fleet whose model follows scripts in prompts during the block, see `actor.py`; yield its URL."""
    words = [sys.executable, "-m", "examples.tours.actor", "--model", str(model), "--data", str(data)]
    with running(words, data) as url:
        yield url


@contextmanager
def embedding_fleet(data: Path) -> Iterator[str]:
    """Run a fleet of a small random BERT with an adapter during the block; yield its URL."""
    from helpers.factories import make_encoder_adapter, make_tiny_encoder  # torch is imported only here
    from transformers import AutoModel

    model = make_tiny_encoder(data / "encoder")
    make_encoder_adapter(data / "adapters" / "legal", AutoModel.from_pretrained(model))
    with _fleet(model, data / "adapters", data) as url:
        yield url


def first_adapter(url: str, key: str) -> str:
    """Return the name of the first adapter that the fleet lists. Raises SystemExit if there is none."""
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
    words = [*LORAFLEET, "up", str(model), "--adapters", str(adapters), "--data", str(data), "--dtype", "float32"]
    with running(words, data, lists_adapters=True) as url:
        yield url


@contextmanager
def running(words: list[str], data: Path, *, lists_adapters: bool = False, port: int = 0) -> Iterator[str]:
    """Run a command that starts a fleet on `port`, 0 for any free one, during the block; yield its URL."""
    data.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an earlier fleet's connections may still close
        probe.bind(("127.0.0.1", port))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = child_environment(*COMPUTE) | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    with (data / "fleet.log").open("w") as log:
        fleet = subprocess.Popen(
            [*words, "--port", str(port)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            end = time.monotonic() + READY_S
            while not _is_ready(url, lists_adapters):
                if fleet.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"the fleet does not start; see {log.name}")
                time.sleep(0.5)
            yield url
        finally:
            fleet.terminate()
            fleet.wait()


def _is_ready(url: str, lists_adapters: bool) -> bool:
    """Return whether a worker is ready, and the store has read its adapters if it has any."""
    try:
        healthy = httpx2.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
        models = httpx2.get(f"{url}/v1/models", timeout=5, trust_env=False).json()
    except httpx2.HTTPError:
        return False
    return healthy and any(model["parent"] or not lists_adapters for model in models["data"])
