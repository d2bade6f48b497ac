"""*Admit*, the fifth stage: whether a call fits the context, its tenant's limits and the queue.

Everything that calls ask of the gateway's admission is asked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
from msgspec import structs

from gateway.auth.callers import PUBLIC, Caller
from gateway.auth.limits import check_quota, refusal
from gateway.calls.parsed_call import ParsedCall
from gateway.calls.size import call_bytes, check_logprobs, numbers_of
from gateway.calls.tokenize import Prompt, TokenizedCall
from gateway.fleet.view import FleetView
from gateway.overload.admission import Admission, CallLoad
from gateway.overload.cost import held, hold
from gateway.overload.memory import CHARACTER_BYTES
from protocol.queue.books.quota import Quota, Standing
from protocol.queue.bus import now_ms
from protocol.queue.kept.conversations import MAX_TURNS
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError, NotFound, Overloaded, Unavailable

TURN_RETRY_S = 1.0
"""Retry-After of one more response of a conversation with too many: when one of them will end is not known."""


class AdmittedCall(msgspec.Struct, frozen=True):
    """A call that may go into the queue, and what it adds there."""

    parsed: ParsedCall
    base: m.ServedModel
    prompts: list[Prompt]  # with the most tokens that each answer may have
    load: CallLoad
    quota: Quota | None  # limits that it counts against; None without keys, if nothing is stored
    num_bytes: int = 0  # memory (bytes) that it may hold while queued


class CallAdmission:
    """Lets calls in, or refuses them."""

    def __init__(self, settings: Settings, fleet: FleetView, admission: Admission) -> None:
        self._settings = settings
        self._fleet = fleet
        self._admission = admission

    async def check_room(self, call: ParsedCall) -> None:
        """Refuse a call that the queue has no room for, before it costs any work. Raises Overloaded, Unavailable."""
        await self._fleet.require_any(worker=not call.options.background)
        self._admission.check(CallLoad(call.cls))

    def admit(self, call: TokenizedCall) -> AdmittedCall:
        """Let a call in. Raises Overloaded, Unavailable, and BadRequest for more than can ever be let in."""
        parsed, base, options = call.parsed, call.resolved.base, call.options
        most = parsed.rules.most_tokens
        prompts = [
            structs.replace(
                prompt, max_new_tokens=most(options, prompt.num_tokens, prompt.target.within(base).max_model_len)
            )
            for prompt in call.prompts
        ]
        parsed.rules.check_total(
            options.n * sum(prompt.num_tokens for prompt in prompts), self._settings.max_call_tokens
        )
        check_logprobs(options, prompts)
        num_bytes = call_bytes(options, prompts, numbers_of(parsed.task, prompts, base))
        if options.output != "text":  # the answer needs its prompts' texts again
            num_bytes += CHARACTER_BYTES * sum(map(len, parsed.sources))
        hold(held() + num_bytes)  # beside the body, until it is submitted
        admitted, quota = parsed.without_prompts(), self.quota_of(parsed.caller, is_kept=parsed.is_kept)
        if options.is_empty:
            return AdmittedCall(admitted, base, prompts, CallLoad(parsed.cls, 0, 0, 0.0), quota, num_bytes)
        num_tokens = options.n * sum(
            prompt.target.num_virtual + prompt.num_tokens + prompt.max_new_tokens for prompt in prompts
        )
        load = CallLoad(parsed.cls, len(prompts) * options.n, num_tokens, self.lifetime_s(parsed))
        try:
            if quota is not None:
                check_quota(quota, load.num, load.num_tokens)
            self._admission.check(load)
        except LorafleetError:
            self.reached_queue()
            raise
        return AdmittedCall(admitted, base, prompts, load, quota, num_bytes)

    def quota_of(self, caller: Caller, *, is_kept: bool = False) -> Quota | None:
        """Return the limits that a caller's calls count against, None for none. is_kept: the result is stored."""
        quota = caller.quota
        if quota is None and is_kept:
            quota = Quota(PUBLIC)  # without keys all callers together may keep what a tenant may
        if quota is not None and not quota.max_bytes:
            quota = replace(quota, max_bytes=self._settings.tenant_bytes)
        return quota

    def check_again(self, load: CallLoad, quota: Quota | None) -> None:
        """Refuse to run a request once more that its caller, or the queue, has no room for. Raises as `admit`."""
        if quota is not None:
            check_quota(quota, load.num, load.num_tokens)
        self._admission.check(CallLoad(load.cls))
        self._admission.check(load)

    def settle_again(self, load: CallLoad, quota: Quota | None, outcome: str, result: Any) -> None:
        """Take note of what the queue made of a request that is run once more. Raises as `settle`."""
        if outcome == "full":
            raise self._admission.full(load, int(result))
        if quota is not None and isinstance(result, Standing) and result.over:
            raise refusal(quota, result, load.num, load.num_tokens)
        self._admission.submitted(load)

    def check_known(self, needs: Sequence[str]) -> None:
        """Refuse what needs a worker that knows more than any does, which would ignore the rest. Raises Unavailable."""
        status = self._fleet.status
        if status is None or not status.workers:
            return  # the scheduler has not met the workers yet; it gives the call to none that is too old
        unknown = set(needs) - set(status.knows)
        if unknown:
            text = f"no worker supports {', '.join(sorted(unknown))}: all run an older version than this gateway"
            raise Unavailable(f"{text}; retry when a worker of its version has joined", code="workers_too_old")

    def lifetime_s(self, call: ParsedCall) -> float:
        """Return after how many seconds a call is ended, done or not."""
        if call.caller.is_batch:
            return max(1.0, (call.caller.until_ms - now_ms()) / 1000)
        return self._settings.job_ttl_s if call.options.background else self._settings.request_timeout_s

    def settle(self, call: AdmittedCall, outcome: str, result: Any) -> None:
        """Take note of what the queue made of a call, see `Bus.submit`.

        Raises Overloaded if it was refused there, and BadRequest if it always will be.
        """
        caller, load = call.parsed.caller, call.load
        if outcome == "full":
            raise self._admission.full(load, int(result))
        if outcome == "conversation":
            if result < 0:
                raise NotFound("the conversation was deleted", param="conversation", code="conversation_not_found")
            text = (
                f"{result} responses of this conversation have not ended, or not been added; the limit is {MAX_TURNS}"
            )
            raise Overloaded(text, TURN_RETRY_S)
        if isinstance(result, Standing):
            caller.headers.update(call.parsed.rules.limit_headers(result))
            if result.over:
                assert call.quota is not None
                raise refusal(call.quota, result, load.num, load.num_tokens)
        self._admission.submitted(load)

    def reached_queue(self) -> None:
        """Note that the current task's call has come as far as the queue."""
        self._admission.leave_inbound(reached_queue=True)

    def left(self) -> None:
        """Note that the current task's call is no longer on its way to the queue."""
        self._admission.leave_inbound()
