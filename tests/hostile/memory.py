"""Maximum memory that a fleet's members may take beyond that before an attack; explained in docs/threat-model.md.

Numbers with a limit come from settings and from the code that enforces them, so that raising a limit has an effect
here.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.adapters import catalogue
from gateway.batches.lines import MAX_LINES
from gateway.batches.run import BatchPace
from gateway.fleet import timeseries
from gateway.http.paths import SMALL_BODY_BYTES
from gateway.overload.gate import LargeLimits
from gateway.overload.memory import SHARE
from gateway.sandbox.turns import MAX_TENANT_BYTES, MAX_WAITING_BYTES
from gateway.server.connection import FREE_BYTES, UNSENT_BYTES
from gateway.text.own_files import MAX_KEPT_BYTES, NUM_READ, READ_BYTES
from protocol.queue.adapters import MAX_REGISTERED
from protocol.runtime.settings import Settings

CONNECTION_BYTES = 30 << 10
"""Bytes of an idle connection."""

PARSED = 25
"""Bytes that parsing a large body takes per byte of the body."""

TOKENIZED = 200
"""Bytes that tokenizing a body takes per byte, with one token per character and with offsets."""

MAX_THREADS = 32
"""Maximum number of small texts tokenized at a time: threads of the event loop's executor."""

CATALOGUE_BYTES = 3 << 10
"""Bytes of an adapter in the list of all adapters, decoded and as JSON."""

LINE_BYTES = 640
"""Bytes held per line of a batch."""

SANDBOX_BYTES = 1100 << 20
"""Memory of a process that runs untrusted programs: 1 GiB beyond its 70 MB at the start."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """The clients of a gateway at one time."""

    holders: int  # number of tenants plus addresses
    connections: int


def gateway_bytes(settings: Settings, crowd: Crowd) -> dict[str, int]:
    """Return the maximum bytes that a gateway takes for a crowd, beyond its start, by their use."""
    turns = LargeLimits().num_turns
    connections = min(crowd.connections, settings.max_connections)
    return {
        "calls": settings.gateway_memory * min(crowd.holders, SHARE) // SHARE,
        "connections": connections * (CONNECTION_BYTES + FREE_BYTES + UNSENT_BYTES),
        "parsing": turns * PARSED * settings.max_body_bytes,
        "tokenizing": turns * TOKENIZED * settings.max_body_bytes,
        "tokenizing small": MAX_THREADS * TOKENIZED * SMALL_BODY_BYTES,
        "catalogue": CATALOGUE_BYTES * MAX_REGISTERED,
        "time series": timeseries.MAX_BYTES,
        "lists": catalogue.MAX_KEPT_BYTES,
        "jobs for sandboxes": min(crowd.holders * MAX_TENANT_BYTES, MAX_WAITING_BYTES),
        "adapters' texts": MAX_KEPT_BYTES,
        "adapters' texts being read": min(crowd.holders - 1, NUM_READ) * READ_BYTES,  # a holder may also be an address
        "lines of batches": BatchPace().max_batches * MAX_LINES * LINE_BYTES,
        "lines that run": settings.max_batch_calls * SMALL_BODY_BYTES,
    }


def growth_bytes(settings: Settings, crowd: Crowd) -> dict[str, int]:
    """Return the maximum bytes that each member of a fleet, and its children, may take beyond their start."""
    pools = settings.kv_cache_bytes + settings.adapter_pool_bytes + settings.adapter_host_bytes
    return {
        "gateway": sum(gateway_bytes(settings, crowd).values()),
        "gateway's children": settings.sandboxes * SANDBOX_BYTES,
        "w0": (192 << 20) + pools, "w0's children": 512 << 20,
        "store": 192 << 20, "store's children": 192 << 20, "scheduler": 64 << 20, "scheduler's children": 0,
        "queue": 160 << 20, "queue's children": 160 << 20,
    }  # fmt: skip
