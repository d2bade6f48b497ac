"""What a worker holds and what of it is durable: turns engine outputs into step scripts. Pure; `service.py` awaits.

A token counts once its step script has been accepted; a refused row says what became of its request meanwhile.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gpu_worker.engine.request import TokenOutput
from protocol.queue.bus import Refused, Step, StepRow
from protocol.wire import messages as m
from protocol.wire.error_codec import error_json
from protocol.wire.errors import LorafleetError

MAX_ROWS = 128
"""Rows in one script: 256 hold Redis for 1.3 ms (measured, 2 vCPU EPYC), others wait that long."""


@dataclass(slots=True)
class Held:
    """A request this worker owns."""

    rid: str
    epoch: int
    entry: bytes  # id of the work entry it came in
    gateway: str
    tenant: str
    num_prompt_tokens: int
    record_bytes: int  # of a logprob record, 0 without logprobs
    log: bytearray = field(default_factory=bytearray)  # int32 ids that are durable, to mend a log that lost its end
    logprobs: bytearray = field(default_factory=bytearray)
    task: m.Task = "generate"

    @property
    def num_logged(self) -> int:
        return len(self.log) // 4

    def num_output(self, new: Pending) -> int:
        """Return how many tokens have come out of it with `new`; what encoders make is none."""
        return self.num_logged + len(new.ids) // 4 if self.task == "generate" else 0


@dataclass(slots=True)
class Pending:
    """Outputs of one request that are not durable yet; later steps are merged into earlier ones."""

    seq0: int = -1  # index of ids[0] in the log; -1: wherever the log ends
    ids: bytes = b""
    logprobs: bytes = b""
    prompt_logprobs: bytes = b""
    finish: str = ""  # messages.FinishReason
    stop: str = ""
    error: LorafleetError | None = None
    num_cached_tokens: int = 0

    def cut(self, request: Held) -> bool:
        """Drop what the log holds already. Returns False when nothing is left, or what is left does not follow it."""
        num_known = request.num_logged - self.seq0 if self.seq0 >= 0 else 0
        if num_known == 0:
            return True
        if not 0 < num_known <= len(self.ids) // 4:
            return False
        self.ids, self.logprobs = self.ids[4 * num_known :], self.logprobs[num_known * request.record_bytes :]
        self.seq0 = request.num_logged
        return bool(self.ids or self.finish)


class Ledger:
    """The requests of this worker, by id, and how many of each work entry are left."""

    def __init__(self, wid: str) -> None:
        self.wid = wid
        self.held: dict[str, Held] = {}
        self._left: dict[bytes, int] = {}  # work entry -> requests not ended
        self.released: list[bytes] = []  # entries emptied outside a step, deleted with the next one

    def knows(self, entry: bytes) -> bool:
        """Tell whether a work entry was taken and is not done."""
        return entry in self._left

    def take(self, entry: bytes, requests: Sequence[Held]) -> list[str]:
        """Own the requests of a work entry.

        Returns those it owned already: a queue that lost its last second has given them away once more. What the
        engine still makes of them does not continue the log as it is now.
        """
        again = [request.rid for request in requests if request.rid in self.held]
        for rid in again:
            self.drop(rid)
        self._left[entry] = len(requests)
        for request in requests:
            self.held[request.rid] = request
        return again

    def drop(self, rid: str) -> None:
        """Stop owning a request that ended elsewhere."""
        if request := self.held.pop(rid, None):
            self._release(request.entry)

    def _release(self, entry: bytes) -> None:
        self._left[entry] -= 1
        if self._left[entry] == 0:
            del self._left[entry]
            self.released.append(entry)

    def build(self, pending: dict[str, Pending]) -> Step:
        """Return the step that makes `pending` durable. Left out: requests not held any more, or since held anew."""
        step = Step(done_entries=list(self.released))
        ending: dict[bytes, int] = {}
        for rid, new in pending.items():
            request = self.held.get(rid)
            if request is None or not new.cut(request):
                continue
            step.rows.append(self._row(request, new))
            if request.gateway:
                step.outs.setdefault(request.gateway, []).append(self._delta(request, new))
            if new.finish:
                ending[request.entry] = ending.get(request.entry, 0) + 1
                step.ended.append(self._ended(request, new))
        step.done_entries += [entry for entry, num in ending.items() if self._left[entry] == num]
        return step

    def commit(self, step: Step, pending: dict[str, Pending]) -> None:
        """Note that `step` is durable."""
        for row in step.rows:
            request = self.held[row.rid]
            request.log += row.ids
            request.logprobs += row.logprobs
            if pending[row.rid].finish:
                del self.held[row.rid]
                self._left[request.entry] -= 1
                if self._left[request.entry] == 0:
                    del self._left[request.entry]
        self.released = [entry for entry in self.released if entry not in step.done_entries]

    def _row(self, request: Held, new: Pending) -> StepRow:
        state, error = "", ""
        if new.finish:
            state = {"error": "failed", "cancelled": "cancelled"}.get(new.finish, "completed")
            error = error_json(new.error)
        return StepRow(
            request.rid, request.epoch, request.num_logged, new.ids, new.logprobs, state, new.finish, error,
            new.prompt_logprobs,
        )  # fmt: skip

    def _delta(self, request: Held, new: Pending) -> m.Delta:
        usage = None
        if new.finish:
            usage = m.Usage(request.num_prompt_tokens, request.num_output(new), new.num_cached_tokens)
        return m.Delta(
            request.rid, request.epoch, request.num_logged, new.ids, new.logprobs, new.finish,
            error_json(new.error), usage,
        )  # fmt: skip

    def _ended(self, request: Held, new: Pending) -> m.Ended:
        return m.Ended(request.rid, self.wid, request.epoch, request.num_output(new))


def merge(pending: dict[str, Pending], outputs: Iterable[TokenOutput]) -> None:
    """Add a step's outputs to what waits to be published."""
    for output in outputs:
        new = pending.get(output.rid)
        if new is None or (new.seq0 >= 0 and output.seq0 != new.seq0 + len(new.ids) // 4):
            new = pending[output.rid] = Pending(output.seq0)
        new.ids += array("i", output.ids).tobytes()
        new.logprobs += output.logprobs
        new.prompt_logprobs += output.prompt_logprobs
        new.num_cached_tokens = output.num_cached_tokens
        if output.finish:
            new.finish, new.stop, new.error = output.finish, output.stop, output.error


@dataclass(slots=True)
class Verdict:
    """What to do after a refusal."""

    dropped: list[str] = field(default_factory=list)  # the engine should forget these
    returned: list[str] = field(default_factory=list)  # also dropped; to be queued again, from what the log holds
    repairs: list[Held] = field(default_factory=list)  # logs in Redis that are shorter than what was shown


def settle(ledger: Ledger, pending: dict[str, Pending], refused: Sequence[Refused]) -> Verdict:
    """Change ledger and pending outputs by what a refused step tells, so that the rest can be written.

    A row that an earlier try already wrote (its reply was lost) is found by its log's length.
    """
    verdict = Verdict()
    for row in refused:
        request, new = ledger.held.get(row.rid), pending.get(row.rid)
        if request is None or new is None:
            continue
        if row.code in ("cancelled", "length"):
            _adopt(request, new, row.length)
        if row.code == "cancelled":
            pending[row.rid] = Pending(finish="cancelled", num_cached_tokens=new.num_cached_tokens)
            verdict.dropped.append(row.rid)
        elif row.code == "length" and row.length < request.num_logged:
            verdict.repairs.append(request)
        elif row.code == "length" and row.length == request.num_logged:
            if not new.ids and not new.finish:
                del pending[row.rid]
        else:  # ended, fenced or expired: somebody else's now
            if row.code == "length":  # or a gateway mended the log after this worker took it: begin again from there
                verdict.returned.append(row.rid)
            del pending[row.rid]
            ledger.drop(row.rid)
            verdict.dropped.append(row.rid)
    return verdict


def _adopt(request: Held, new: Pending, length: int) -> None:
    """Count as durable what an earlier try of the same step has written although its reply was lost."""
    written = min(length - request.num_logged, len(new.ids) // 4)
    if written > 0:
        new.seq0 = request.num_logged
        request.log += new.ids[: 4 * written]
        request.logprobs += new.logprobs[: written * request.record_bytes]
        new.cut(request)
