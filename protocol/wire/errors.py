"""The one error hierarchy. What a client, an adapter or a message can cause is raised as one of these.

LorafleetError
├── ClientError                     4xx: the request is wrong, and repeating it will not help
│   ├── BadRequest (400)
│   ├── Unauthorized (401)
│   ├── PermissionDenied (403)
│   ├── NotFound (404)
│   │   └── ModelNotFound
│   ├── Conflict (409)
│   ├── TooLarge (413)
│   ├── AdapterRefused (422)        the adapter cannot be served exactly; with the list of reasons
│   ├── IdempotencyKeyReused (422)
│   ├── HttpError                   gateway/http/errors.py: invalid HTTP, with the matching status
│   └── GenerationFailed (424)      gateway/lorax/lorax_errors.py: another error in the form of LoRAX's clients
├── ServerError                     5xx and 429: the request was valid and may be retried
│   ├── Overloaded (429)
│   ├── Unavailable (503)
│   │   ├── QueueFull
│   │   └── NoRoom (507)            a disk has no space beyond its free-space reserve
│   ├── DeadlineExceeded (504)
│   ├── WorkerLost (500)
│   └── Internal (500)              a fault of the fleet; not retried
├── ProtocolError (500)             a message that cannot be decoded
│   └── UnreadableRecord            a record that another release has written, or that is damaged
│       └── NewerRecord             a record of a newer form, which only a newer release can read
├── QuickstartError                 lorafleet/quickstart.py: the quickstart model cannot be fetched
└── ServiceFailed                   lorafleet/launcher/child.py: a service ended while the fleet started

Classes listed with a file are defined there and never cross the queue.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager


class LorafleetError(Exception):
    """An error with the HTTP status and OpenAI's `type` and `code`, as the client sees them."""

    status = 500
    type = "server_error"
    code: str | None = None
    retryable = False
    retry_after_s: float | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        """param: the invalid field of the request. code: replaces the class's code."""
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class ClientError(LorafleetError):
    """The request is wrong."""

    status = 400
    type = "invalid_request_error"


class BadRequest(ClientError):
    """A value is out of range, of the wrong type, or not understood."""


class Unauthorized(ClientError):
    """No API key was given, or one that is unknown or has expired."""

    status = 401
    code = "invalid_api_key"


class PermissionDenied(ClientError):
    """The caller may not do this."""

    status = 403
    type = "permission_error"


class NotFound(ClientError):
    """What the request names does not exist, or the caller may not know of it."""

    status = 404


class ModelNotFound(NotFound):
    """No base model or adapter that the caller may use has this name."""

    code = "model_not_found"

    def __init__(self, name: str, more: str = "") -> None:
        """more: a sentence appended to the message."""
        text = f"The model `{name}` does not exist or you do not have access to it."
        super().__init__(f"{text} {more}".strip(), param="model")


class Conflict(ClientError):
    """The request conflicts with the current state, for example with an earlier request."""

    status = 409


class TooLarge(ClientError):
    """The request has more bytes than allowed."""

    status = 413


class AdapterRefused(ClientError):
    """An adapter that cannot be served exactly as PEFT computes it; the message lists every reason."""

    status = 422
    code = "adapter_refused"

    def __init__(self, reasons: list[str]) -> None:
        """Join the reasons into the message."""
        super().__init__("; ".join(reasons), param="model")
        self.reasons = reasons


class IdempotencyKeyReused(ClientError):
    """An Idempotency-Key was used again with a different body."""

    status = 422
    code = "idempotency_key_reused"


class ServerError(LorafleetError):
    """The request was valid and may be retried."""

    retryable = True


class Overloaded(ServerError):
    """The queue is full; `retry_after_s` comes from the measured drain rate."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    reason = "gateway"

    def __init__(self, message: str, retry_after_s: float, reason: str = "gateway") -> None:
        """retry_after_s: when a retry may succeed. reason: the exhausted resource, one word for metrics."""
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason


class Unavailable(ServerError):
    """No worker can take the request now."""

    status = 503
    type = "service_unavailable_error"
    code = "no_worker"
    retry_after_s = 2.0


class QueueFull(Unavailable):
    """The queue's memory is full. Memory is freed as requests end and results expire."""

    code = "queue_full"
    retry_after_s = 5.0


class NoRoom(Unavailable):
    """A disk has no space beyond its free-space reserve. Deleting always works and frees space."""

    status = 507
    code = "no_room"
    retry_after_s = 60.0


class WorkerLost(ServerError):
    """The workers that ran the request died, more often than a request is retried."""

    code = "worker_lost"


class DeadlineExceeded(ServerError):
    """The request's deadline has passed."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class Internal(ServerError):
    """A fault of the fleet; the log has the traceback."""

    code = "internal_error"
    retryable = False


class ProtocolError(LorafleetError):
    """A message from Redis that cannot be decoded, or a reply that the protocol does not allow."""


class UnreadableRecord(ProtocolError):
    """A stored record cannot be read: another release has written it, or it is damaged."""

    code = "record_unreadable"


class NewerRecord(UnreadableRecord):
    """A newer release has written the record in a form that this release does not know."""


@contextmanager
def panics_as(error: Callable[[str], LorafleetError]) -> Generator[None]:
    """Raise `error`, with the panic's text, in place of the BaseException of a panic in a Rust library."""
    try:
        yield
    except BaseException as panic:
        if type(panic).__name__ != "PanicException":
            raise
        raise error(f"a library failed: {' '.join(str(panic).split())[:200]}") from panic
