"""Gateway to gateway: uploaded files, and batches of calls."""

from __future__ import annotations

from typing import Literal

from protocol.wire.messages.base import Wire

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]  # fmt: skip

ENDED_BATCH = ("failed", "completed", "expired", "cancelled")
"""States of a batch in which nothing is done for it any more."""


class File(Wire, frozen=True):
    """A file as a client uploaded it, or as a batch has written it. Its bytes are in the gateways' storage."""

    id: str
    tenant: str
    filename: str
    purpose: str
    num_bytes: int
    created_ms: int
    expires_ms: int


class BatchProblem(Wire, frozen=True):
    """Why a batch has failed: something in its input file, or a limit of its tenant's."""

    code: str
    message: str
    line: int | None = None  # counted from 1
    param: str | None = None


class BatchUsage(Wire, frozen=True):
    """Tokens of the answers of a batch."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0


class Batch(Wire, frozen=True):
    """A batch: what was asked for, and how far it is. Only the gateway that runs it writes it."""

    id: str
    tenant: str
    endpoint: str
    input_file: str
    created_ms: int
    expires_ms: int  # by then what has no answer is given up
    window: str = "24h"
    metadata: dict[str, str] | None = None
    output_life_s: int = 0  # of its output files; 0: as the settings say
    status: BatchStatus = "validating"
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: BatchUsage = BatchUsage()
    problems: list[BatchProblem] = []
    output_file: str = ""
    error_file: str = ""
    model: str = ""  # that all of its lines name; "": several
    cancelling_ms: int = 0
    in_progress_ms: int = 0
    finalizing_ms: int = 0
    ended_ms: int = 0
