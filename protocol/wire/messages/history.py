"""The history of requests: scripts write an entry when a request ends, gateways one for each call that they refuse."""

from __future__ import annotations

import msgspec

from protocol.wire.messages.base import Packed


class HistoryEntry(Packed, frozen=True):
    """A request that has ended, or a call that was refused. Times are unix ms, 0 for what did not happen."""

    rid: str  # of a refused call the id of its HTTP request
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
        """The requested model, as shown by the API; "" of a call that was refused before it was known."""
        return msgspec.json.decode(self.row)[0] if self.row else ""

    @property
    def digest(self) -> str:
        """Digest of its adapter, "" for the base model."""
        return msgspec.json.decode(self.row)[1] if self.row else ""

    @property
    def base(self) -> str:
        """Name of its base; "" of a call that was refused before that was known."""
        return msgspec.json.decode(self.row)[2] if self.row else ""


class KeptText(Packed, frozen=True):
    """The prompt and the output of a request in a history, as tokens: the end of one, the beginning of the other."""

    prompt: bytes  # int32 ids
    output: bytes  # int32 ids
    digest: str  # of the adapter, whose tokens they may be; "" for the base model's
    texts: str  # hash of the texts that the adapter brings, "" for none
    has_output: bool = True  # whether it generates text
    base: str = ""  # name of the base, whose tokens they are
    tokenizer: str = ""  # hash of the base's tokenizer
