"""The most memory that a fleet's members may take beyond what they had before an attack; docs/threat-model.md explains.

The numbers for which there is a limit come from settings and from the code that enforces them, so that a limit that is
raised is seen here.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.calls.admit import MAX_LOGPROB_BYTES
from gateway.http.connection import MAX_HEAD_BYTES
from gateway.http.paths import SMALL_BODY_BYTES
from gateway.overload.large import LargeLimits
from gateway.sandbox.turns import MAX_TENANT_BYTES, MAX_WAITING_BYTES
from protocol.runtime.settings import Settings

UNREAD_BYTES = 320 << 10
"""What uvicorn and the event loop hold of a body that nobody reads, and of an answer that its client does not read."""

AS_VALUES = 32
"""Bytes of a body's values for each byte of a small one: `{"":[]},` again and again."""

AS_LARGE_VALUES = 16
"""The same for a large one, whose lists and objects `json_values` bounds, and the body itself."""

PARSED = 25
"""Bytes that parsing a large body takes for each of its bytes."""

TOKENIZED = 200
"""The same of tokenizing it: of a token a character, with offsets."""

AS_LOGPROBS = 20
"""Bytes of logprobs as values for each byte of them in a log."""

OWN_TEXTS_BYTES = 128 << 20
"""Adapters' own tokenizers and templates."""

SANDBOX_BYTES = 1100 << 20
"""The memory of a process that runs what strangers wrote: 1 GiB beyond its start, which is 70 MB."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """What clients have at a gateway at once."""

    tenants: int
    connections: int
    calls: int  # in flight
    logprob_bytes: int = 1 << 62  # that their logs may hold


def gateway_bytes(settings: Settings, crowd: Crowd) -> dict[str, int]:
    """Return the most bytes that a gateway takes for a crowd, beyond what it has at its start, by what takes them."""
    limits = LargeLimits()
    connections = min(crowd.connections, settings.max_connections)
    calls = min(crowd.calls, settings.max_open_calls)
    large = min(limits.num_bodies, crowd.tenants * limits.num_of_tenant)
    logprobs = min(crowd.logprob_bytes, crowd.tenants * settings.tenant_bytes, calls * MAX_LOGPROB_BYTES)
    return {
        "connections": connections * (MAX_HEAD_BYTES + UNREAD_BYTES),
        "calls": calls * AS_VALUES * SMALL_BODY_BYTES,
        "large bodies": large * AS_LARGE_VALUES * settings.max_body_bytes,
        "parsing": limits.num_turns * PARSED * settings.max_body_bytes,
        "tokenizing": limits.num_turns * TOKENIZED * settings.max_body_bytes,
        "answers": logprobs * AS_LOGPROBS,
        "jobs for sandboxes": min(crowd.tenants * MAX_TENANT_BYTES, MAX_WAITING_BYTES),
        "adapters' texts": OWN_TEXTS_BYTES,
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
