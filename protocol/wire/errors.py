"""The one error tree. What a client, an adapter or a message can cause is raised as one of these.

LorafleetError
├── ClientError      4xx: the request is wrong, repeating it will not help
│   ├── BadRequest · Unauthorized · PermissionDenied · NotFound · Conflict · TooLarge
│   └── AdapterRefused: the adapter cannot be served exactly, with the list of reasons
└── ServerError      5xx and 429: the request was fine, it may be retried
    ├── Overloaded (429) · Unavailable (503) · WorkerLost (500)
    └── Internal (500)
"""

from __future__ import annotations


class LorafleetError(Exception):
    """An error with the HTTP status, OpenAI `type` and `code` a client sees."""

    status = 500
    type = "server_error"
    code: str | None = None
    retryable = False

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class ClientError(LorafleetError):
    status = 400
    type = "invalid_request_error"


class BadRequest(ClientError):
    """A value is out of range, of the wrong type, or not understood."""


class Unauthorized(ClientError):
    """No API key was given, or one that is not good (any more)."""

    status = 401
    code = "invalid_api_key"


class PermissionDenied(ClientError):
    status = 403
    type = "permission_error"


class NotFound(ClientError):
    status = 404


class ModelNotFound(NotFound):
    """Neither the base model nor an adapter the caller may use has this name."""

    code = "model_not_found"

    def __init__(self, name: str, more: str = "") -> None:
        text = f"The model `{name}` does not exist or you do not have access to it."
        super().__init__(f"{text} {more}".strip(), param="model")


class Conflict(ClientError):
    status = 409


class TooLarge(ClientError):
    status = 413


class AdapterRefused(ClientError):
    """An adapter that cannot be served exactly as PEFT computes it; the message lists every reason."""

    status = 422
    code = "adapter_refused"

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons), param="model")
        self.reasons = reasons


class ServerError(LorafleetError):
    retryable = True


class Overloaded(ServerError):
    """The queue is full; `retry_after_s` comes from the measured drain rate."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(ServerError):
    """No worker can take the request now."""

    status = 503
    type = "service_unavailable_error"
    code = "no_worker"
    retry_after_s = 2.0


class WorkerLost(ServerError):
    """The workers that ran the request died, more often than a request is retried."""

    code = "worker_lost"


class DeadlineExceeded(ServerError):
    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class Internal(ServerError):
    """A fault of ours; the log has the traceback."""

    code = "internal_error"
    retryable = False


class ProtocolError(LorafleetError):
    """A message from Redis that cannot be decoded, or a reply that the protocol does not allow."""
