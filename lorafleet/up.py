"""`lorafleet up`: a whole fleet on this machine, with a queue of its own, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import re
import shlex
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
import orjson
from rich.markup import escape

from lorafleet.child import Child
from lorafleet.embedded import EmbeddedServer, start_embedded
from lorafleet.flags import add_settings, load_settings
from lorafleet.fleet import Fleet, local_url, service_specs
from lorafleet.machine import claim_port
from lorafleet.screen import Screen
from protocol.queue.redis_client import QueueError, ping
from protocol.runtime.model_files import WEIGHT_FILES, model_folder, served_name
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest, Unavailable

MAIN_FLAGS = ("adapters", "host", "port", "data", "workers", "device", "dtype")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a fleet is started with."""

    settings: Settings
    folder: Path  # of the model

    def curl(self, model: str, question: str = "Who are you?", does: str = "text-generation") -> str:
        """Return a shell command that asks `model` a question, indented by two. does: its `model_pipeline_tag`."""
        body: dict[str, object] = {"model": model, "max_tokens": 60}
        if does == "feature-extraction":
            route = "/v1/embeddings"
            body = {"model": model, "input": question}
        elif does == "token-classification":
            route = "/classify"
            body = {"inputs": question, "parameters": {"adapter_id": model}}
        elif has_chat_template(self.folder):
            route, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": question}]
        else:
            route, body["prompt"] = "/v1/completions", question
        head = f"curl {local_url(self.settings)}{route} -H 'Content-Type: application/json'"
        return f"  {head} \\\n    -d {shlex.quote(orjson.dumps(body).decode())}"


OnReady = Callable[[Prepared, Screen], Awaitable[bool]]
"""Called once the fleet answers; tells whether to go on serving."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.usage = f"{parser.prog} MODEL [flags]"
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=argparse.SUPPRESS, help="a Hub id or a local folder"
    )
    # A worker's name and the store's address are the launcher's own affair.
    add_settings(parser, first=MAIN_FLAGS, skip=("model", "worker_name", "store_url"))


def run(args: argparse.Namespace) -> int:
    """Run the fleet until a signal; return the exit code."""
    return launch(load_settings(args), announce)


def launch(settings: Settings, on_ready: OnReady) -> int:
    """Run a fleet until a signal; `on_ready` is awaited once it can answer. Returns the exit code.

    Raises LorafleetError when it can't start. Whatever happens, nothing of it is left running.
    """
    prepared = prepare(settings)
    screen = Screen()
    queue: EmbeddedServer | None = None
    lifeline, held = os.pipe()
    try:
        if not _has_queue(settings):
            queue = start_embedded(prepared.settings.data / "queue" / fleet_name(prepared.settings))
            prepared = replace(prepared, settings=prepared.settings.model_copy(update={"redis_url": queue.url}))
            screen.say(f"[green]✓[/] {'queue':10} {queue.url}")
        specs = service_specs(prepared.settings, _fresh_logs(prepared.settings))
        children = [Child(spec, lifeline, screen.say) for spec in specs]
        fleet = Fleet(prepared.settings, children, queue, screen, lambda: on_ready(prepared, screen))
        return asyncio.run(fleet.run())
    finally:
        os.close(held)
        os.close(lifeline)
        if queue is not None:
            queue.stop()


def prepare(settings: Settings) -> Prepared:
    """Check what can be checked before anything is started; a Hub model is fetched, with its progress bar.

    The settings come back with a port that is free and absolute folders. Raises BadRequest, Conflict or Unavailable.
    """
    if not settings.model:
        raise BadRequest("MODEL is missing: give a Hub id or a local folder")
    if settings.adapters is not None and not settings.adapters.is_dir():
        raise BadRequest(f"--adapters: {settings.adapters} is not a folder")
    if _has_queue(settings):
        _check_queue(settings.redis_url)
    port = claim_port(settings.host, settings.port)
    try:
        folder = model_folder(settings.model, WEIGHT_FILES)
    except OSError as error:  # of the Hub: not found, gated, not reachable
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadRequest(f"cannot fetch {settings.model} from the Hub: {reason}") from error
    try:
        settings.data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"--data: cannot make {settings.data}: {error.strerror}") from error
    local = Path(settings.model).expanduser()
    update = {
        "port": port,
        "data": settings.data.resolve(),
        "secret_file": (settings.secret_file or settings.data / "secret").resolve(),
        "adapters": settings.adapters and settings.adapters.resolve(),
        "model": str(local.resolve()) if local.is_dir() else settings.model,
        "served_name": served_name(settings.model, settings.served_name),
    }
    return Prepared(settings.model_copy(update=update), folder)


def fleet_name(settings: Settings) -> str:
    """Return the name of the folders that belong to this model alone: requests queued for it can't meet another."""
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", settings.served_name).strip("-.")[:40]
    return f"{slug}-{hashlib.sha256(settings.model.encode()).hexdigest()[:8]}"


async def announce(prepared: Prepared, screen: Screen) -> bool:
    """Say where the fleet answers, and show how to ask it."""
    settings = prepared.settings
    url = local_url(settings)
    if settings.api_keys:
        screen.say(f"\n[bold green]ready[/] [bold]{url}[/] answers to API keys; make one with\n")
        screen.say(escape(f"  REDIS_URL={shlex.quote(settings.redis_url)} lorafleet keys create --tenant NAME"))
    else:
        async with httpx2.AsyncClient(base_url=url, trust_env=False) as client:
            models = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
            does = (await client.get("/info")).json()["model_pipeline_tag"]
        screen.say(f"\n[bold green]ready[/] [bold]{url}[/] serves {models[0]} and {len(models) - 1} adapters; try\n")
        screen.say(escape(prepared.curl(models[-1], does=does)))
    variables = {"REDIS_URL": settings.redis_url, "LORAFLEET_SECRET_FILE": str(settings.secret_file)}
    shared = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    screen.say(f"\nAnother worker joins with\n  {shared} lorafleet serve worker --model {shlex.quote(settings.model)}")
    screen.say("Ctrl-C finishes what was accepted and stops; a second one stops at once.")
    return True


def has_chat_template(folder: Path) -> bool:
    """Tell whether a model's tokenizer comes with a chat template."""
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        config.is_file() and "chat_template" in orjson.loads(config.read_bytes())
    )


def _fresh_logs(settings: Settings) -> Path:
    """Return the folder of the logs, with those of the run before renamed to `*.log.1`."""
    logs = settings.data / "logs" / fleet_name(settings)
    logs.mkdir(parents=True, exist_ok=True)
    for log in logs.glob("*.log"):
        log.rename(log.with_suffix(".log.1"))
    return logs


def _has_queue(settings: Settings) -> bool:
    """Tell whether the user names a queue to use instead of the embedded one."""
    return "redis_url" in settings.model_fields_set


def _check_queue(url: str) -> None:
    try:
        ping(url, timeout_s=5)
    except ValueError as error:
        raise BadRequest(f"--redis-url: {error}") from error
    except QueueError as error:
        raise Unavailable(f"no queue answers at {url}: {error}") from error
