"""The history of requests: scripts add an entry when a request ends, gateways add one for each refused call."""

from __future__ import annotations

import msgspec

from protocol.wire.messages.base import Packed


class HistoryEntry(Packed, frozen=True):
    """A request that has ended, or a refused call. Times are unix ms, 0 for what did not happen."""

    rid: str  # of a refused call: the id of its HTTP request
    call: str
    row: str  # JSON: model, digest, base model, 1 for a batch line; see `usage.usage_of`
    cls: str
    state: str  # completed, failed, cancelled or refused
    finish: str
    error: str  # JSON of `ErrorInfo`, "" without an error
    worker: str  # name of the last worker, "" if it reached none
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: float
    attempts: int
    submitted_ms: int
    first_ms: int
    ended_ms: int
    endpoint: str = ""  # path of a refused call
    status: int = 0  # HTTP status of a refused call

    @property
    def model(self) -> str:
        """The requested model, as the API shows it; "" if the call was refused before the model was known."""
        return msgspec.json.decode(self.row)[0] if self.row else ""

    @property
    def digest(self) -> str:
        """Digest of its adapter, "" for the base model."""
        return msgspec.json.decode(self.row)[1] if self.row else ""

    @property
    def base(self) -> str:
        """Name of its base; "" if the call was refused before the base was known."""
        return msgspec.json.decode(self.row)[2] if self.row else ""


class KeptText(Packed, frozen=True):
    """The last tokens of a request's prompt and the first tokens of its output, kept with the history."""

    prompt: bytes  # int32 ids
    output: bytes  # int32 ids
    digest: str  # digest of the adapter, which may bring its own tokens; "": the base model
    texts: str  # hash of the tokens and template that the adapter brings; "": none
    has_output: bool = True  # whether the request generates text
    base: str = ""  # name of the base whose tokens these are
    tokenizer: str = ""  # hash of the base's tokenizer
