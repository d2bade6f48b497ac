"""The gateway process: its parts, its loops, and its shutdown.

Shutdown: refuse new calls (the port stays open, so that they get a 503), wait up to `grace_s` for running ones, fail
the rest with a retryable error, close the port, stop the loops, leave the fleet.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import uvicorn

from gateway.adapters.aliases import Aliases
from gateway.adapters.operations import AdapterOperations
from gateway.adapters.resolver import Resolver
from gateway.answers.respond import Answers
from gateway.anthropic.anthropic_routes import AnthropicEndpoints
from gateway.app.app import DISCARDED_BODIES, Envelope, Handlers, build_app
from gateway.app.service_routes import Endpoints
from gateway.app.shapes import shape_of
from gateway.auth.authentication import is_loopback
from gateway.batches.batch_routes import BatchEndpoints
from gateway.batches.batches import BatchService
from gateway.batches.run import BatchMeans, BatchPace
from gateway.batches.runner import BatchRunner
from gateway.books.audit_routes import AuditEndpoints
from gateway.books.prometheus import PrometheusCharts
from gateway.books.timeseries_routes import TimeSeriesEndpoints
from gateway.books.usage_routes import UsageEndpoints
from gateway.calls import observe
from gateway.calls.pipeline import Pipeline
from gateway.calls.replies import KEEP_S, Replies
from gateway.console.console_routes import ConsolePages, DocsPages
from gateway.encoders.encoder_calls import EncoderCalls
from gateway.encoders.encoder_routes import EncoderEndpoints
from gateway.files.file_routes import FileEndpoints
from gateway.files.files import SWEEP_S, FileService
from gateway.files.place import open_storage
from gateway.fleet.bases import GatewayBases, open_bases
from gateway.fleet.sampler import SAMPLE_S, Sampler
from gateway.fleet.view import REFRESH_S, FleetView
from gateway.http.http_client import HttpClient
from gateway.http.paths import RESPONSES
from gateway.lorax.lorax_routes import NativeEndpoints
from gateway.ollama.ollama_routes import OllamaEndpoints
from gateway.openai.openai_calls import OpenAICalls
from gateway.openai.openai_routes import OpenAIEndpoints
from gateway.operators.adapter_routes import OperatorEndpoints
from gateway.operators.bases import BaseAdministration
from gateway.operators.operator_routes import FleetEndpoints
from gateway.overload.admission import Admission, OverloadLimits
from gateway.overload.heartbeat import Heartbeat, HeartbeatDied, Pace
from gateway.overload.memory import MemoryAccount
from gateway.requests.archiver import Archiver
from gateway.requests.refusals import FLUSH_S, Refusals
from gateway.requests.request_routes import RequestEndpoints
from gateway.responses.conversation_routes import ConversationEndpoints
from gateway.responses.conversations import SWEEP_S as CONVERSATION_SWEEP_S
from gateway.responses.conversations import Conversations
from gateway.responses.response_routes import ResponseEndpoints
from gateway.responses.response_write import job_api
from gateway.responses.service import Responses
from gateway.responses.stored import StoredResponses
from gateway.server.connection import ConnectionLimits
from gateway.server.server import BACKLOG, HttpServer, allow_connections
from gateway.tokenizer.tokenizer_routes import TokenizerEndpoints
from gateway.webhooks.endpoints import WebhookService
from gateway.webhooks.names import HostNames
from gateway.webhooks.outside import Outside
from gateway.webhooks.sender import SenderPace, WebhookSender
from gateway.webhooks.webhook_routes import WebhookRoutes
from protocol.metrics.series import GATEWAY_HELD_BYTES
from protocol.queue.bus import CONNECTION_ERRORS, Bus
from protocol.runtime.fleet_secret import FleetSecret
from protocol.runtime.free_space import Reserve
from protocol.runtime.guarded import BRISK, Loop, guarded
from protocol.runtime.sealing import Seal
from protocol.runtime.service import unending
from protocol.runtime.settings import Settings
from protocol.runtime.tracing import tracing
from protocol.wire.errors import BadRequest, Unavailable

if TYPE_CHECKING:  # its packages are optional
    from gateway.requests.database import Database

logger = logging.getLogger(__name__)

LAST_WORDS_S = 5  # seconds for error frames to reach clients after the grace period
KEEP_ALIVE_S = 75  # longer than the usual 60 s of load balancers, so that they close first


SWITCH_S = 0.0001
"""Switch interval of the GIL, in seconds: how long a thread that reads or checks a body keeps it from the event loop.
In Python's default of 5 ms, the loop passes on the tokens of a hundred streams."""


@dataclass(frozen=True, slots=True)
class GatewayTimings:
    """Timings that tests set, not operators."""

    overload: OverloadLimits = field(default_factory=OverloadLimits)
    pace: Pace = field(default_factory=Pace)
    batches: BatchPace = field(default_factory=BatchPace)
    webhooks: SenderPace = field(default_factory=SenderPace)
    conversation_sweep_s: float = CONVERSATION_SWEEP_S
    alias_poll_s: float = 2.0  # seconds after which an awaited alias is read, in case its event was lost


async def serve(settings: Settings, stop: asyncio.Event, timings: GatewayTimings | None = None) -> int:
    """Run a gateway until `stop`, then drain. Return the exit code. Raises BadRequest for an invalid model."""
    timings = timings or GatewayTimings()
    secret = FleetSecret.of(settings)
    gid = uuid.uuid4().hex
    with tracing(settings, "gateway", gid):
        return await _serve(settings, stop, timings, secret, gid)


async def _serve(
    settings: Settings, stop: asyncio.Event, timings: GatewayTimings, secret: FleetSecret | None, gid: str
) -> int:
    """Run a gateway with this id; see `serve`."""
    sys.setswitchinterval(SWITCH_S)
    bus = Bus(settings.queue_url(), seal=Seal.of(settings, secret))
    # Periodic work has its own connections: on those of `bus`, it would wait behind hundreds of calls.
    beats = Bus(settings.queue_url())
    try:
        if not await bus.server.reach(stop):
            return 0
        replies = Replies(bus, gid, beats)
        fleet = FleetView(beats, settings)
        sampler = Sampler(beats, fleet, observe.SERIES)
        heartbeat = Heartbeat(settings.queue_url(), replies.gid, timings.pace)
        admission = Admission(settings, lambda: fleet.status, lambda: heartbeat.lag_s, timings.overload)
        memory = MemoryAccount(settings.gateway_memory)
        for names in (observe.ADAPTERS, observe.TENANTS):
            names.set_limit(settings.metrics_named)
        GATEWAY_HELD_BYTES.set_function(lambda: memory.num_bytes)
        aliases = Aliases(bus, settings, secret, admission.leave_inbound, timings.alias_poll_s)
        aliases.listeners.append(observe.adapter_event)
        stores = HttpClient(secret.bearer if secret else "")
        fleet.set_added(await bus.added_bases.get())
        bases = await open_bases(settings, fleet, bus, stores, admission.leave_inbound)
        resolver = Resolver(bus, aliases, bases, settings.adapters, shows_paths=not settings.api_keys)
        pipeline = Pipeline(settings, bus, fleet, resolver, replies, admission)
        answers = Answers(settings.keepalive_s)
        http = HttpClient()
        prometheus = None
        if settings.prometheus_url:
            prometheus = PrometheusCharts(settings.prometheus_url, settings.prometheus_matchers, http)
        calls = OpenAICalls(pipeline, {RESPONSES: job_api(settings)})
        database = _database(settings)
        archiver = Archiver(bus, gid, settings, database, bases) if database is not None else None
        endpoints = Endpoints(
            answers, pipeline, admission, lambda: heartbeat.disk_full, lambda: bool(archiver and archiver.problem)
        )
        openai = OpenAIEndpoints(answers, calls)
        encoder_calls = EncoderCalls(pipeline, calls.jobs)
        operators = OperatorEndpoints(AdapterOperations(bus, settings, aliases, resolver.catalogue, stores))
        native = NativeEndpoints(answers, pipeline, openai, encoder_calls.probe)
        if not settings.api_keys and not is_loopback(settings.host):
            logger.warning(
                "API KEYS ARE OFF, and this gateway listens on %s: anyone who can reach it may use, load and unload"
                " every adapter. Turn keys on with --api-keys, and create one with `lorafleet keys create`",
                settings.host or "every address",
            )
        encoders = EncoderEndpoints(answers, encoder_calls)
        tokenizers = TokenizerEndpoints(answers, pipeline)
        ollama = OllamaEndpoints(answers, pipeline)
        anthropic = AnthropicEndpoints(answers, pipeline)
        keys = bus.api_keys if settings.api_keys else None
        storage = open_storage(settings.files, settings.data / "files", settings.s3_endpoint, settings.keep_free)
        uploads = FileService(bus, storage, settings)
        jobs = calls.jobs
        stored = StoredResponses(pipeline, jobs)
        conversations = Conversations(bus, settings, jobs, stored, pipeline.checks, timings.conversation_sweep_s)
        batch_wake = asyncio.Event()
        outside = Outside(private=settings.private_webhooks, names=HostNames(settings.webhook_dns))
        sender = WebhookSender(bus, replies.gid, outside, secret, timings.webhooks)
        requests = RequestEndpoints(answers, pipeline, database)
        handlers = Handlers(
            endpoints, openai, native, operators, encoders, tokenizers, ollama,
            FileEndpoints(uploads, settings.max_file_bytes),
            BatchEndpoints(BatchService(bus, uploads, settings), batch_wake.set),
            anthropic, ResponseEndpoints(answers, Responses(pipeline, jobs, stored, conversations)),
            ConversationEndpoints(conversations),
            WebhookRoutes(WebhookService(bus, outside, sender, secret)),
            requests, FleetEndpoints(bus, settings, BaseAdministration(bus, settings, fleet, bases)),
            UsageEndpoints(bus.usage), AuditEndpoints(bus.audit),
            TimeSeriesEndpoints(observe.SERIES, sampler, prometheus), ConsolePages(), DocsPages(),
        )  # fmt: skip
        app, inner = build_app(handlers, settings, admission, memory, pipeline.checks, keys, secret)
        means = BatchMeans(bus, replies.gid, uploads, storage, settings, inner, pipeline.checks, timings.batches)
        runner = BatchRunner(means, batch_wake)
        with listen(settings.host, settings.port) as listener:
            address = _address(listener)
            await replies.open()
            parts = _Parts(
                app, answers, replies, fleet, aliases, heartbeat, uploads, runner, sender, conversations,
                requests.refusals, sampler, archiver, bases,
            )  # fmt: skip
            async with heartbeat.beating(beats, address):
                logger.info("listening on %s", address)
                await _run(_server(app, settings, memory), listener, parts, settings.grace_s, stop)
        await replies.close()
        await bases.close()
        await stores.close()
        await http.close()
    finally:
        await beats.close()
        await bus.close()
    return 0


def _database(settings: Settings) -> Database | None:
    """Return the history's database by the settings. Raises BadRequest if it cannot be used."""
    if not settings.history:
        if settings.history_text:
            raise BadRequest("--history-text needs --history: prompts and outputs are kept in a database only")
        return None
    try:
        from gateway.requests.database import Database

        return Database(settings.history, reserve=Reserve(settings.keep_free))
    except ImportError as error:
        raise BadRequest(f"--history needs `pip install 'lorafleet[history]'`: {error}") from error


@dataclass(frozen=True, slots=True)
class _Parts:
    """Background loops, and the parts involved in shutdown."""

    app: Envelope
    answers: Answers
    replies: Replies
    fleet: FleetView
    aliases: Aliases
    heartbeat: Heartbeat
    files: FileService
    batches: BatchRunner
    webhooks: WebhookSender
    conversations: Conversations
    refusals: Refusals
    sampler: Sampler
    archiver: Archiver | None
    bases: GatewayBases

    def loops(self) -> list[Loop]:
        """Return the loops that run until the end; `batches.loop` ends earlier."""
        return [
            Loop("replies", self.replies.read, 0.0, backoff=BRISK),  # blocks until there are entries
            Loop("out stream", self.replies.keep, KEEP_S, backoff=BRISK),
            Loop("fleet view", self.fleet.refresh, REFRESH_S, backoff=BRISK),
            Loop("added bases", self.bases.read, REFRESH_S, backoff=BRISK),
            Loop("time series", self.sampler.sample, SAMPLE_S, backoff=BRISK),
            Loop("adapter events", self.aliases.listen, 0.0, backoff=BRISK),
            # Its thread sends the heartbeats: without them the scheduler cancels all calls.
            Loop("event loop", self.heartbeat.tick, ends=(HeartbeatDied,)),
            Loop("expired files", self.files.sweep, SWEEP_S),
            Loop("conversations", self.conversations.add_due_turns, self.conversations.sweep_s),
            Loop("refused calls", self.refusals.flush, FLUSH_S),
            self.webhooks.loop(),
            *([self.archiver.loop()] if self.archiver is not None else []),
        ]


async def _run(server: HttpServer, listener: socket.socket, parts: _Parts, grace_s: float, stop: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as group:
        loops = [group.create_task(guarded(loop)) for loop in parts.loops()]
        # If the server stops, the process ends, so that its supervisor restarts it.
        serving = group.create_task(unending(partial(server.serve, [listener]), until=stop))
        batches = group.create_task(guarded(parts.batches.loop()))
        await stop.wait()
        parts.answers.draining = True
        logger.info("draining")
        batches.cancel()
        group.create_task(parts.batches.leave())
        if not await _idle(parts.app, grace_s):
            for waiters in (parts.replies, parts.aliases):
                waiters.fail_all(Unavailable("this gateway is shutting down", code="shutting_down"))
            await _idle(parts.app, LAST_WORDS_S)
        server.end()
        await serving
        for loop in loops:
            loop.cancel()
    await parts.webhooks.leave()
    with suppress(*CONNECTION_ERRORS):
        await parts.refusals.flush()
    if parts.archiver is not None:
        await parts.archiver.leave()


async def _idle(app: Envelope, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await app.wait_idle()
    except TimeoutError:
        return False
    return True


def _server(app: Envelope, settings: Settings, memory: MemoryAccount) -> HttpServer:
    config = uvicorn.Config(
        app, http="httptools", ws="none", lifespan="off", access_log=False, log_config=None, server_header=False,
        proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=LAST_WORDS_S,
    )  # fmt: skip
    limits = ConnectionLimits(
        KEEP_ALIVE_S,
        settings.head_timeout_s,
        settings.body_timeout_s,
        settings.send_timeout_s,
        max(DISCARDED_BODIES * settings.max_body_bytes, settings.max_file_bytes) + (1 << 20),
    )
    return HttpServer(
        config,
        min(settings.max_connections, allow_connections()),
        max_per_address=settings.max_connections_per_address,
        limits=limits,
        shape_of=shape_of,
        memory=memory,
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; for port 0, on a free port. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    listener.setblocking(False)
    # Accepted connections inherit the option. Unlike uvloop, asyncio sets it only on sockets created with a protocol.
    # Without it, the second part of an answer waits 40 ms for the client's acknowledgement of the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
