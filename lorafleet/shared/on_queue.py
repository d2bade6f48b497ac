"""Commands that work on the queue itself: those of `lorafleet keys` and `lorafleet dlq`. No gateway needs to run."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lorafleet.launcher.embedded import with_queue
from lorafleet.launcher.records import running, the_only
from lorafleet.shared.api import add_json_flag, print_json
from lorafleet.shared.flags import add_settings, load_settings
from lorafleet.shared.parser import Parser
from protocol.queue.bus import CONNECTION_ERRORS, Bus, QueueError
from protocol.runtime.settings import Settings
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest, PermissionDenied, Unavailable

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0"})

FLAGS = ("redis_url", "redis_password_file", "data")


def load_local_settings(args: argparse.Namespace, url: str | None = None) -> Settings:
    """Return the settings; without a queue and a data folder in them, with the folder of the fleet on this machine.

    url: of its gateway, as a command was given it, "" if it was not; None for a command that takes none.
    Raises BadRequest, also where several fleets could be meant.
    """
    settings = load_settings(args)
    if {"redis_url", "data"} & settings.model_fields_set:
        return settings
    if url:
        fleet = next((one for one in running() if _address(one.url) == _address(url)), None)
    else:
        fleet = the_only("--data" if url is None else "--url")
    return settings if fleet is None else settings.model_copy(update={"data": Path(fleet.data)})


def check_is_here(settings: Settings, url: str) -> None:
    """Raise BadRequest where nothing names a queue, and the gateway at `url`, "" for this machine's, is elsewhere."""
    is_named = bool({"redis_url", "data"} & settings.model_fields_set)
    if url and not is_named and _address(url)[0] != "localhost":
        raise BadRequest(f"{brief(url)} is another machine's, and no queue of it is on this machine")


def _address(url: str) -> tuple[str, int | None]:
    """Return host and port of a URL; this machine has one name. Raises BadRequest where the port is no number."""
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    try:
        return "localhost" if host in LOOPBACK else host, parts.port
    except ValueError as error:
        raise BadRequest(f"--url {brief(url)}: {error}") from error


def add_flags(parser: Parser, *more: str) -> None:
    """Declare how the queue is reached, other settings by name, and `--json`."""
    add_json_flag(parser)
    add_settings(parser, first=(*FLAGS, *more), skip=tuple(Settings.model_fields))


def run_action(args: argparse.Namespace) -> int:
    """Run `args.do` with the queue; return the exit code. With `--json` its answer is printed, else it prints.

    Raises what it raises, and Unavailable, PermissionDenied.
    """
    answer = asyncio.run(_done(with_queue(load_local_settings(args)), args))
    if args.json:
        print_json(answer)
    return 0


async def _done(settings: Settings, args: argparse.Namespace) -> Any:
    do: Callable[[Bus, Settings, argparse.Namespace], Awaitable[Any]] = args.do
    bus = Bus(settings.queue_url())
    try:
        return await do(bus, settings, args)
    except CONNECTION_ERRORS as error:
        raise Unavailable(f"cannot reach the queue at {settings.redis_url}: {error}") from error
    except QueueError as error:
        raise PermissionDenied(f"the queue refused: {error}") from error
    finally:
        await bus.close()
