"""The most memory that a fleet's members may take beyond what they had before an attack; docs/threat-model.md explains.

The numbers for which there is a limit come from settings and from the code that enforces them, so that a limit that is
raised is seen here.
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
"""A connection that idles."""

PARSED = 25
"""Bytes that parsing a large body takes for each of its bytes."""

TOKENIZED = 200
"""The same of tokenizing it: of a token a character, with offsets."""

MAX_THREADS = 32
"""Most texts of small bodies that are tokenized at a time: threads of the event loop's executor."""

CATALOGUE_BYTES = 3 << 10
"""An adapter in the list of all, as it was read and as JSON."""

LINE_BYTES = 640
"""What is held of a line of a batch."""

SANDBOX_BYTES = 1100 << 20
"""The memory of a process that runs what strangers wrote: 1 GiB beyond its start, which is 70 MB."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """What clients have at a gateway at once."""

    holders: int  # tenants, and addresses
    connections: int


def gateway_bytes(settings: Settings, crowd: Crowd) -> dict[str, int]:
    """Return the most bytes that a gateway takes for a crowd, beyond what it has at its start, by what takes them."""
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
        "adapters' texts being read": min(crowd.holders - 1, NUM_READ) * READ_BYTES,  # a holder is an address, too
        "lines of batches": BatchPace().max_batches * MAX_LINES * LINE_BYTES,
        "lines that run": settings.max_batch_calls * SMALL_BODY_BYTES,
    }


def growth_bytes(settings: Settings, crowd: Crowd) -> dict[str, int]:
    """Return the most bytes that each member of a fleet, and its processes, may take beyond their start."""
    pools = settings.kv_cache_bytes + settings.adapter_pool_bytes + settings.adapter_host_bytes
    return {
        "gateway": sum(gateway_bytes(settings, crowd).values()),
        "gateway's children": settings.sandboxes * SANDBOX_BYTES,
        "w0": (192 << 20) + pools, "w0's children": 512 << 20,
        "store": 192 << 20, "store's children": 192 << 20, "scheduler": 64 << 20, "scheduler's children": 0,
        "queue": 160 << 20, "queue's children": 160 << 20,
    }  # fmt: skip
