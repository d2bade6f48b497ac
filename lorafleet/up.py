"""`lorafleet up` runs a whole fleet on this machine, with its own queue, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import re
import shlex
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
import orjson
from rich.markup import escape

from lorafleet.fetch import fetch_model
from lorafleet.launcher.child import Child
from lorafleet.launcher.embedded import EmbeddedServer, start_embedded
from lorafleet.launcher.fleet import FleetLauncher, local_url, service_specs
from lorafleet.launcher.machine import claim_port
from lorafleet.launcher.records import LocalFleet, registered
from lorafleet.launcher.screen import Screen
from lorafleet.shared.flags import add_settings, load_settings
from lorafleet.shared.parser import Parser
from lorafleet.shared.tables import count_text
from protocol.queue.books.api_keys import SCOPES
from protocol.queue.bus import Bus
from protocol.queue.connection.redis_client import QueueError, ping
from protocol.runtime.model_files import base_settings, cache_folder, hold_folder, is_gguf, served_name
from protocol.runtime.private_files import private_folder
from protocol.runtime.redaction import redact
from protocol.runtime.settings import Settings, names_of
from protocol.wire.errors import BadRequest, Unavailable

TOKENIZER = "tokenizer.json"

CONSOLE = "/console/"
"""Path of the web console."""

LOCAL_TENANT = "local"
"""Tenant of the key with which commands on this machine call a fleet that requires keys."""

MAIN_FLAGS = (
    "adapters", "adapter_roots", "request_sources", "host", "port", "api_keys", "served_name", "workers", "device",
    "dtype", "quantization", "max_model_len", "max_num_seqs", "kv_cache_bytes", "adapter_pool_bytes", "pin",
    "data", "redis_url", "log_level",
)  # fmt: skip
"""The settings that `--help` shows first."""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """The checked settings of a fleet that is about to start, and the folder of its model."""

    settings: Settings
    folder: Path  # folder of the base model
    others: tuple[Path, ...] = ()  # folders of the further base models and of the draft model
    queue: EmbeddedServer | None = None  # None: the user has named an external queue

    def curl(self, model: str, question: str = "Who are you?", does: str = "text-generation") -> str:
        """Return a shell command that asks `model` a question, indented by two spaces.

        does: the `model_pipeline_tag` of the base model.
        """
        body: dict[str, object] = {"model": model, "max_tokens": 60}
        if does == "feature-extraction":
            route = "/v1/embeddings"
            body = {"model": model, "input": question}
        elif does == "text-classification":
            route = "/v1/classify"
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


OnReady = Callable[[LaunchPlan, Screen], Awaitable[bool]]
"""Called once the fleet is ready; returns whether it should continue to serve."""


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.usage = f"{parser.prog} MODEL [MODEL ...] [flags]"
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        help="a Hub id, a local folder or a GGUF file; several are served by one fleet",
    )
    # The launcher itself sets the names of workers and the URL of the store.
    add_settings(parser, first=MAIN_FLAGS, skip=("model", "more_models", "worker_name", "store_url"))


def run(args: argparse.Namespace) -> int:
    """Run the fleet until a signal; return the exit code."""
    given: dict[str, str] = {}
    if args.models:
        if commas := [model for model in args.models[1:] if "," in model]:
            raise BadRequest(f"MODEL: {commas[0]} has a comma, which separates further base models; only the first may")
        given = {"model": args.models[0], "more_models": ",".join(args.models[1:])}
    return launch(load_settings(args, **given), announce)


def launch(settings: Settings, on_ready: OnReady) -> int:
    """Run a fleet until a signal, and return the exit code. on_ready: awaited once the fleet is ready.

    Raises LorafleetError if it cannot start. However it ends, none of its processes is left running.
    """
    plan = prepare(settings)
    for folder in (plan.folder, *plan.others):
        if folder.is_relative_to(cache_folder()):
            hold_folder(folder)  # restarted services read it again
    screen = Screen()
    queue: EmbeddedServer | None = None
    lifeline, held = os.pipe()
    try:
        if not _has_queue(settings):
            folder = private_folder(plan.settings.data / "queue") / fleet_name(plan.settings)
            queue = start_embedded(
                folder, guarded=True, max_bytes=plan.settings.queue_bytes, console_keys=plan.settings.console_keys
            )
            plan = replace(plan, settings=plan.settings.model_copy(update=queue.door("operator")), queue=queue)
            screen.say(f"[green]✓[/] {'queue':10} unix://{queue.socket}")
        specs = service_specs(plan.settings, _fresh_logs(plan.settings), queue)
        children = [Child(spec, lifeline, screen.say) for spec in specs]
        key_file = own_key(plan.settings) if plan.settings.api_keys else None
        record = LocalFleet(
            os.getpid(),
            local_url(plan.settings),
            plan.settings.served_name,
            str(plan.settings.data),
            str(specs[0].log.parent),
            time.time(),
            str(key_file or ""),
        )
        fleet = FleetLauncher(plan.settings, children, queue, screen, lambda: on_ready(plan, screen))
        with registered(record):
            return asyncio.run(fleet.run())
    finally:
        os.close(held)
        os.close(lifeline)
        if queue is not None:
            queue.stop()


def own_key(settings: Settings) -> Path:
    """Return the file with an API key for this user's commands; create a key unless the file has a valid one.

    The user who starts a fleet has the passwords of its queue, and so all rights; the file is beside them in the data
    folder.
    """
    path = settings.data / "local.key"

    async def make() -> None:
        bus = Bus(settings.queue_url())
        try:
            keys = bus.api_keys
            if path.is_file() and await keys.find(path.read_text().strip()) is not None:
                return
            secret, _ = await keys.create(LOCAL_TENANT, SCOPES, 0, "commands on the machine of `lorafleet up`")
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(secret)
        finally:
            await bus.close()

    asyncio.run(make())
    return path


def prepare(settings: Settings) -> LaunchPlan:
    """Check everything that can be checked before a process starts, and download models from the Hub.

    The plan's settings have a free port and absolute folders. Raises BadRequest, Conflict or Unavailable.
    """
    if not settings.model:
        raise BadRequest("MODEL is missing: give a Hub id, a local folder or a GGUF file")
    if settings.adapters is not None and not settings.adapters.is_dir():
        raise BadRequest(f"--adapters: {settings.adapters} is not a folder")
    roots = [Path(root).expanduser() for root in names_of(settings.adapter_roots)]
    for root in roots:
        if not root.is_dir():
            raise BadRequest(f"--adapter-roots: {root} is not a folder")
    if _has_queue(settings):
        _check_queue(settings)
    port = claim_port(settings.host, settings.port)
    folder = fetch_model(settings)
    names = names_of(settings.more_models)
    further = tuple(fetch_model(settings.model_copy(update={"model": name})) for name in names)
    for name, one in zip(names, further, strict=True):
        if not (one / TOKENIZER).is_file():
            raise BadRequest(f"{name} has no {TOKENIZER}: a base without a tokenizer cannot be served")
    draft_model, others = settings.draft_model, further
    if draft_model:
        others += (fetch_model(settings.model_copy(update={"model": draft_model})),)
        draft_model = _given(draft_model, others[-1])
    try:
        settings.data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"--data: cannot make {settings.data}: {error.strerror}") from error
    update = {
        "port": port,
        "data": settings.data.resolve(),
        "secret_file": (settings.secret_file or settings.data / "secret").resolve(),
        "adapters": settings.adapters and settings.adapters.resolve(),
        "adapter_roots": ",".join(str(root.resolve()) for root in roots),
        "model": _given(settings.model, folder),
        "more_models": ",".join(map(_absolute, names)),
        "draft_model": draft_model,
        "served_name": served_name(settings.model, settings.served_name),
    }
    checked = settings.model_copy(update=update)
    base_settings(checked)  # refuses two bases of one name
    return LaunchPlan(checked, folder, others)


def _given(model: str, folder: Path) -> str:
    """Return a model in the form in which services get it. folder: its folder, which replaces a GGUF file."""
    return str(folder) if is_gguf(Path(model).expanduser()) else _absolute(model)


def _absolute(model: str) -> str:
    """Return a model in the form in which services get it: a Hub id unchanged, a path as an absolute one."""
    local = Path(model).expanduser()
    return str(local.resolve()) if local.exists() else model


def fleet_name(settings: Settings) -> str:
    """Return the name of this model's folders, so that requests queued for it never reach another model."""
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", settings.served_name).strip("-.")[:40]
    return f"{slug}-{hashlib.sha256(settings.model.encode()).hexdigest()[:8]}"


async def announce(plan: LaunchPlan, screen: Screen) -> bool:
    """Show the fleet's URL and an example command; return True, to continue serving."""
    settings = plan.settings
    url = local_url(settings)
    if settings.api_keys:
        screen.say(f"\n[bold green]ready[/] [bold]{url}[/] requires API keys; create one:\n")
        screen.say(escape("  lorafleet keys create --tenant NAME"))
    else:
        async with httpx2.AsyncClient(base_url=url, trust_env=False) as client:
            models = (await client.get("/v1/models")).json()["data"]
            info = await client.get("/info")  # 503 while the default base has no worker, even if another has
        bases = [model["id"] for model in models if model["parent"] is None]
        num = count_text(len(models) - len(bases), "adapter")
        offer = "; try:\n" if info.is_success else ""
        screen.say(f"\n[bold green]ready[/] [bold]{url}[/] serves {', '.join(bases)} and {num}{offer}")
        if info.is_success:
            adapters = [model["id"] for model in models if model["parent"] == bases[0]]
            screen.say(escape(plan.curl([bases[0], *adapters][-1], does=info.json()["model_pipeline_tag"])))
    joining = settings.model_copy(update=plan.queue.door("worker")) if plan.queue is not None else settings
    secret = f"LORAFLEET_SECRET_FILE={shlex.quote(str(settings.secret_file))}"
    command = f"{_shared(joining)} {secret} lorafleet serve worker --model {shlex.quote(settings.model)}"
    if settings.more_models:
        command += f" --more-models {shlex.quote(settings.more_models)}"
    if settings.draft_model:
        command += f" --draft-model {shlex.quote(settings.draft_model)}"
    screen.say(f"\nconsole: {url}{CONSOLE}")
    screen.say("commands: lorafleet chat MODEL, status, adapters list, logs, stop")
    screen.say(f"to add another worker:\n  {command}")
    screen.say("Ctrl-C finishes accepted requests and stops; a second Ctrl-C stops immediately.")
    return True


def _shared(settings: Settings) -> str:
    """Return the variables with which another process on this machine finds the queue, without a password."""
    variables = {"REDIS_URL": redact(settings.redis_url)}
    if settings.redis_password_file is not None:
        variables["LORAFLEET_REDIS_PASSWORD_FILE"] = str(settings.redis_password_file)
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())


def has_chat_template(folder: Path) -> bool:
    """Return whether a model's folder has a chat template."""
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        config.is_file() and "chat_template" in orjson.loads(config.read_bytes())
    )


def _fresh_logs(settings: Settings) -> Path:
    """Return the folder of the logs, after renaming those of the previous run to `*.log.1`."""
    logs = private_folder(settings.data / "logs") / fleet_name(settings)
    logs.mkdir(exist_ok=True)
    for log in logs.glob("*.log"):
        log.rename(log.with_suffix(".log.1"))
    return logs


def _has_queue(settings: Settings) -> bool:
    """Return whether the user has named a queue, which replaces the embedded one."""
    return "redis_url" in settings.model_fields_set


def _check_queue(settings: Settings) -> None:
    """Raise BadRequest for a malformed URL, Unavailable if the queue cannot be reached."""
    try:
        ping(settings.queue_url(), timeout_s=5)
    except ValueError as error:
        raise BadRequest(f"--redis-url: {error}") from error
    except QueueError as error:
        raise Unavailable(f"cannot reach the queue at {settings.redis_url}: {error}") from error
