"""The gateway process: its parts, its loops, and how it ends.

Order of the end: refuse new calls (the port stays open, so that they get a 503), let running ones finish within
`grace_s`, fail the rest with an error their clients may retry, close the port, stop the loops, leave the fleet.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid

import uvicorn

from gateway.adapter_life import AdapterLife
from gateway.adapter_routes import AdapterEndpoints
from gateway.app import Envelope, build_app
from gateway.calls import Calls
from gateway.catalogue import Catalogue, Fleet
from gateway.encoder_routes import EncoderEndpoints
from gateway.gate import is_loopback
from gateway.grammar_check import GrammarCheck
from gateway.http_server import BACKLOG, HttpServer
from gateway.jobs import Jobs
from gateway.lorax_routes import NativeEndpoints
from gateway.names import Names
from gateway.own_files import OwnFiles
from gateway.replies import Replies
from gateway.routes import Endpoints
from gateway.sandbox import Sandbox
from gateway.tokenizer import load_model_files
from protocol.adapter_texts import TOKENIZER
from protocol.api_keys import ApiKeys
from protocol.bus import Bus
from protocol.errors import Unavailable
from protocol.fleet_secret import FleetSecret
from protocol.model_files import TOKENIZER_FILES, model_folder
from protocol.settings import Settings

logger = logging.getLogger(__name__)

LAST_WORDS_S = 5  # for error frames to reach their clients once the grace is over
KEEP_ALIVE_S = 75  # longer than the usual 60 s of load balancers, so that they close first


async def serve(settings: Settings, stop: asyncio.Event) -> int:
    """Run a gateway until `stop`, then drain. Returns the exit code. Raises BadRequest on a wrong model."""
    secret = FleetSecret.of(settings)
    files = await asyncio.to_thread(load_model_files, settings)
    bus = Bus(settings.redis_url)
    # Signs of life have connections of their own. Behind hundreds of calls that wait for one of `bus`'s a beat would be
    # late, the gateway taken for dead, and all that it has let in cancelled.
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
        keys = ApiKeys(bus) if settings.api_keys else None
        app = build_app(endpoints, native, adapters, encoders, settings, keys)
        with _listen(settings.host, settings.port) as listener:
            replies.address = _address(listener)
            await replies.open()
            await replies.beat_once()
            await _run(_server(app), listener, (app, endpoints, replies, (fleet, names)), settings, stop)
        await replies.close()
        await own.close()
        await sandbox.close()
        await grammars.close()
    finally:
        await beats.close()
        await bus.close()
    return 0


async def _run(
    server: HttpServer,
    listener: socket.socket,
    parts: tuple[Envelope, Endpoints, Replies, tuple[Fleet, Names]],
    settings: Settings,
    stop: asyncio.Event,
) -> None:
    app, endpoints, replies, (fleet, names) = parts
    async with asyncio.TaskGroup() as group:
        loops = [group.create_task(loop) for loop in (replies.read(), replies.beat(), fleet.watch(), names.listen())]
        serving = group.create_task(server.serve([listener]))
        logger.info("listening on %s", replies.address)
        await stop.wait()
        endpoints.draining = True
        logger.info("draining")
        if not await _idle(app, settings.grace_s):
            for waiters in (replies, names):
                waiters.fail_all(Unavailable("this gateway is shutting down", code="shutting_down"))
            await _idle(app, LAST_WORDS_S)
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
    return HttpServer(config)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    listener.setblocking(False)
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
