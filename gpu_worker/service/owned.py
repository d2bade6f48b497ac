"""The requests that a worker owns, and each one's output that is not durable yet. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError


@dataclass(slots=True)
class OwnedRequest:
    """A request that this worker owns: assigned to it and not ended."""

    rid: str
    epoch: int
    entry: bytes  # id of the work entry that assigned it
    gateway: str
    tenant: str
    num_prompt_tokens: int
    record_bytes: int  # size of one logprob record; 0 without logprobs
    log: bytearray = field(default_factory=bytearray)  # int32 ids that are durable; repairs a log that lost its end
    logprobs: bytearray = field(default_factory=bytearray)  # their logprob records
    task: m.Task = "generate"
    queued_ms: int = 0  # ms from submission to this assignment
    trace: str = ""  # see `messages.Assigned`
    timing: m.Timing | None = None  # the latest that is durable
    scored_prompt: bytes = b""  # its prompt (int32), if its logprobs are requested

    @property
    def num_logged(self) -> int:
        """The number of durable tokens."""
        return len(self.log) // 4

    def num_output(self, new: PendingOutput) -> int:
        """Return the number of output tokens including `new`; 0 for tasks that generate no text."""
        return self.num_logged + len(new.ids) // 4 if self.task == "generate" else 0


class PendingOutput(msgspec.Struct):  # three times as fast to create as a dataclass; each row of each step has one
    """Output of one request that is not durable yet, from one or several steps."""

    seq0: int = -1  # index of ids[0] in the log; -1: append at its end, wherever that is
    ids: bytes = b""  # int32 token ids
    logprobs: bytes = b""  # one record per id, if requested
    prompt_logprobs: bytes = b""
    finish: str = ""  # messages.FinishReason; "" while the request runs
    error: LorafleetError | None = None
    num_cached_tokens: int = 0
    timing: m.Timing | None = None  # the latest

    def cut(self, request: OwnedRequest) -> bool:
        """Drop the ids that the log holds already. Return whether anything that continues the log is left."""
        num_known = len(request.log) // 4 - self.seq0 if self.seq0 >= 0 else 0
        if num_known == 0:
            return True
        if not 0 < num_known <= len(self.ids) // 4:
            return False
        self.ids, self.logprobs = self.ids[4 * num_known :], self.logprobs[num_known * request.record_bytes :]
        self.seq0 = request.num_logged
        return bool(self.ids or self.finish)
