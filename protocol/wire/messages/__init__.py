"""The messages that cross the queue, one file per pair of sender and receiver."""

from protocol.wire.messages.adapters import AdapterEvent, AdapterRecord, AdapterState, Alias, Converted, Registration
from protocol.wire.messages.assignments import REASONS, Assigned, Control, Option, Placed
from protocol.wire.messages.base import MAX_LABELS, TERMINAL, FinishReason, Packed, Record, Task, Wire, encode
from protocol.wire.messages.batches import ENDED_BATCH, Batch, BatchProblem, BatchStatus, BatchUsage, File
from protocol.wire.messages.dead_letters import DeadLetter, Death
from protocol.wire.messages.deliveries import (
    WHOLE,
    Delta,
    ErrorInfo,
    RequestUsage,
    Timing,
    logprob_record_bytes,
    prompt_record_bytes,
)
from protocol.wire.messages.history import HistoryEntry, KeptText
from protocol.wire.messages.jobs import Conversation, Idempotent, Job
from protocol.wire.messages.model import OPAQUE, Activation, AddedBase, AddedBases, ServedModel, SiteShape
from protocol.wire.messages.requests import Body, RequestHead, Sampling
from protocol.wire.messages.webhooks import Delivery, WebhookEndpoint
from protocol.wire.messages.workers import (
    LOAD_BUCKETS_S,
    BaseLoad,
    Ended,
    SchedulerStatus,
    StepModel,
    TenantLoad,
    WorkerBeat,
    WorkerCounters,
)

__all__ = [
    "ENDED_BATCH",
    "LOAD_BUCKETS_S",
    "MAX_LABELS",
    "OPAQUE",
    "REASONS",
    "TERMINAL",
    "WHOLE",
    "Activation",
    "AdapterEvent",
    "AdapterRecord",
    "AdapterState",
    "AddedBase",
    "AddedBases",
    "Alias",
    "Assigned",
    "BaseLoad",
    "Batch",
    "BatchProblem",
    "BatchStatus",
    "BatchUsage",
    "Body",
    "Control",
    "Conversation",
    "Converted",
    "DeadLetter",
    "Death",
    "Delivery",
    "Delta",
    "Ended",
    "ErrorInfo",
    "File",
    "FinishReason",
    "HistoryEntry",
    "Idempotent",
    "Job",
    "KeptText",
    "Option",
    "Packed",
    "Placed",
    "Record",
    "Registration",
    "RequestHead",
    "RequestUsage",
    "Sampling",
    "SchedulerStatus",
    "ServedModel",
    "SiteShape",
    "StepModel",
    "Task",
    "TenantLoad",
    "Timing",
    "WebhookEndpoint",
    "Wire",
    "WorkerBeat",
    "WorkerCounters",
    "encode",
    "logprob_record_bytes",
    "prompt_record_bytes",
]
