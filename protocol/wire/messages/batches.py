"""Gateway to gateway: uploaded files, and batches of calls."""

from __future__ import annotations

from typing import Literal

from protocol.wire.messages.base import Record, Wire

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]

ENDED_BATCH = ("failed", "completed", "expired", "cancelled")
"""States of a batch for which no work remains."""


class File(Record, frozen=True):
    """A file that a client has uploaded or a batch has written. Its bytes are in the gateways' storage."""

    id: str
    tenant: str
    filename: str
    purpose: str
    num_bytes: int
    created_ms: int
    expires_ms: int


class BatchProblem(Wire, frozen=True):
    """Why a batch has failed: an error in its input file, or a limit of its tenant."""

    code: str
    message: str
    line: int | None = None  # counted from 1
    param: str | None = None


class BatchUsage(Wire, frozen=True):
    """Token counts of a batch's answers."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0


class Batch(Record, frozen=True):
    """A batch: its request and its progress. Only the gateway that runs it writes this record."""

    id: str
    tenant: str
    endpoint: str
    input_file: str
    created_ms: int
    expires_ms: int  # unix ms at which unanswered lines expire
    window: str = "24h"
    metadata: dict[str, str] | None = None
    output_life_s: int = 0  # retention of its output files; 0: the setting's
    status: BatchStatus = "validating"
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: BatchUsage = BatchUsage()
    problems: list[BatchProblem] = []
    output_file: str = ""
    error_file: str = ""
    model: str = ""  # model of all its lines; "": several
    cancelling_ms: int = 0
    in_progress_ms: int = 0
    finalizing_ms: int = 0
    ended_ms: int = 0
    end: Literal["", "expired", "cancelled"] = ""  # how it is ending; "": lines without an answer are still submitted
