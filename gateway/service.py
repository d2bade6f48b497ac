"""The gateway process: its parts, its loops, and how it ends.

Order of the end: refuse new calls (the port stays open, so that they get a 503), let running ones finish within
`grace_s`, fail the rest with an error their clients may retry, close the port, stop the loops, leave the fleet.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn

from gateway.adapters.catalogue import Catalogue, Fleet
from gateway.adapters.life import AdapterLife
from gateway.adapters.names import Names
from gateway.adapters.routes import AdapterEndpoints
from gateway.auth.gate import Gate, is_loopback
from gateway.calls.calls import Calls
from gateway.calls.jobs import Jobs
from gateway.calls.replies import Replies
from gateway.encoders.routes import EncoderEndpoints
from gateway.http.app import Envelope, build_app
from gateway.http.routes import Endpoints
from gateway.http.server import BACKLOG, HttpServer, allow_connections
from gateway.lorax.routes import NativeEndpoints, shape_of
from gateway.overload.door import Door
from gateway.overload.pulse import Pulse
from gateway.text.grammar_check import GrammarCheck
from gateway.text.own_files import OwnFiles
from gateway.text.sandbox import Sandbox
from gateway.text.tokenizer import load_model_files
from peft_adapters.texts import TOKENIZER
from protocol.queue.bus import Bus
from protocol.runtime.fleet_secret import FleetSecret
from protocol.runtime.model_files import TOKENIZER_FILES, model_folder
from protocol.runtime.settings import Settings
from protocol.wire.errors import Unavailable

logger = logging.getLogger(__name__)

LAST_WORDS_S = 5  # for error frames to reach their clients once the grace is over
KEEP_ALIVE_S = 75  # longer than the usual 60 s of load balancers, so that they close first


async def serve(settings: Settings, stop: asyncio.Event) -> int:
    """Run a gateway until `stop`, then drain. Returns the exit code. Raises BadRequest on a wrong model."""
    secret = FleetSecret.of(settings)
    files = await asyncio.to_thread(load_model_files, settings)
    bus = Bus(settings.redis_url)
    # What is looked at once a second has connections of its own: behind hundreds of calls that wait for one of `bus`'s
    # it would be late.
    beats = Bus(settings.redis_url)
    try:
        await bus.check()
        replies = Replies(bus, uuid.uuid4().hex, beats)
        fleet = Fleet(beats, settings.beat_timeout_s)
        names = Names(bus, settings, secret)
        sandbox = Sandbox()
        own = OwnFiles(bus, files, sandbox, secret.bearer if secret else "")
        tokenizer = model_folder(settings.model, TOKENIZER_FILES) / TOKENIZER
        grammars = GrammarCheck(str(tokenizer), settings.grammar_timeout_s)
        catalogue = Catalogue(bus, names, own, settings.adapters)
        calls = Calls(settings, bus, files, fleet, catalogue, replies, grammars)
        endpoints = Endpoints(calls, Jobs(calls))
        adapters = AdapterEndpoints(AdapterLife(bus, settings, names, secret))
        native = NativeEndpoints(endpoints, calls)
        if not settings.api_keys and not is_loopback(settings.host):
            logger.warning(
                "API KEYS ARE OFF, and this gateway listens on %s: whoever reaches it may use, load and unload every"
                " adapter. Turn keys on with --api-keys, and make one with `lorafleet keys create`",
                settings.host or "every address",
            )
        encoders = EncoderEndpoints(endpoints, calls)
        keys = bus.api_keys if settings.api_keys else None
        door = Door(settings.max_open_calls, lambda: fleet.status)
        guard = partial(Gate, keys=keys, door=door, shape_of=shape_of)
        app = build_app(endpoints, native, adapters, encoders, settings, guard)
        with _listen(settings.host, settings.port) as listener:
            address = _address(listener)
            pulse = Pulse(settings.redis_url, replies.gid, address, lambda: door.looked_s)
            await replies.open()
            await pulse.beat_once(beats)
            parts = _Parts(app, endpoints, replies, fleet, names, door)
            async with pulse.beating():
                logger.info("listening on %s", address)
                await _run(_server(app), listener, parts, settings.grace_s, stop)
        await replies.close()
        await own.close()
        await sandbox.close()
        await grammars.close()
    finally:
        await beats.close()
        await bus.close()
    return 0


@dataclass(frozen=True, slots=True)
class _Parts:
    """What runs, and what has to be told of the end."""

    app: Envelope
    endpoints: Endpoints
    replies: Replies
    fleet: Fleet
    names: Names
    door: Door

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        return [self.replies.read(), self.replies.keep(), self.fleet.watch(), self.names.listen(), self.door.watch()]


async def _run(server: HttpServer, listener: socket.socket, parts: _Parts, grace_s: float, stop: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as group:
        loops = [group.create_task(loop) for loop in parts.loops()]
        serving = group.create_task(server.serve([listener]))
        await stop.wait()
        parts.endpoints.draining = True
        logger.info("draining")
        if not await _idle(parts.app, grace_s):
            for waiters in (parts.replies, parts.names):
                waiters.fail_all(Unavailable("this gateway is shutting down", code="shutting_down"))
            await _idle(parts.app, LAST_WORDS_S)
        server.should_exit = True
        await serving
        for loop in loops:
            loop.cancel()


async def _idle(app: Envelope, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await app.wait_idle()
    except TimeoutError:
        return False
    return True


def _server(app: Envelope) -> HttpServer:
    config = uvicorn.Config(
        app, http="httptools", ws="none", lifespan="off", access_log=False, log_config=None, server_header=False,
        proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=LAST_WORDS_S,
    )  # fmt: skip
    server = HttpServer(config)
    server.max_connections = allow_connections()
    return server


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    listener.setblocking(False)
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
