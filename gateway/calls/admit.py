"""*Admit*, the fifth stage: check that a call fits the context, its tenant's limits and the queue.

Calls use the gateway's admission only through this module.
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
from gateway.overload.admission import Admission
from gateway.overload.call_load import CallLoad
from gateway.overload.cost import held, hold
from gateway.overload.memory import CHARACTER_BYTES
from protocol.queue.books.quota import Quota, Standing
from protocol.queue.bus import now_ms
from protocol.queue.kept.conversations import MAX_TURNS
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError, NotFound, Overloaded, Unavailable

TURN_RETRY_S = 1.0
"""Retry-After, in seconds, of a response refused for its conversation's `MAX_TURNS`: a guess at when one will end."""


class AdmittedCall(msgspec.Struct, frozen=True):
    """A call that may be submitted, with the load that it adds to the queue."""

    parsed: ParsedCall
    base: m.ServedModel
    prompts: list[Prompt]  # each with the maximum number of output tokens
    load: CallLoad
    quota: Quota | None  # limits that the call counts against; None without keys, if nothing is stored
    num_bytes: int = 0  # gateway memory, in bytes, that it may hold once queued


class CallAdmission:
    """Decides whether calls are accepted."""

    def __init__(self, settings: Settings, fleet: FleetView, admission: Admission) -> None:
        self._settings = settings
        self._fleet = fleet
        self._admission = admission

    async def check_room(self, call: ParsedCall) -> None:
        """Refuse a call early if the queue has no room for it. Raises Overloaded, Unavailable."""
        await self._fleet.require_any(worker=not call.options.background)
        self._admission.check(CallLoad(call.cls, tenant=call.caller.name))

    def admit(self, call: TokenizedCall) -> AdmittedCall:
        """Accept a call, and charge for the memory it may hold.

        Raises Overloaded, Unavailable, and BadRequest if the call is too large to be accepted at any load.
        """
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
        if options.output != "text":  # the answer uses the prompts' texts
            num_bytes += CHARACTER_BYTES * sum(map(len, parsed.sources))
        hold(held() + num_bytes)  # charged besides the body, until the call is submitted
        admitted, quota = parsed.without_prompts(), self.quota_of(parsed.caller, is_kept=parsed.is_kept)
        if options.is_empty:
            return AdmittedCall(admitted, base, prompts, CallLoad(parsed.cls, 0, 0, 0.0), quota, num_bytes)
        num_tokens = options.n * sum(
            prompt.target.num_virtual + prompt.num_tokens + prompt.max_new_tokens for prompt in prompts
        )
        num, payer = len(prompts) * options.n, prompts[0].target.payer(parsed.caller)
        load = CallLoad(parsed.cls, num, num_tokens, self.lifetime_s(parsed), payer)
        try:
            if quota is not None:
                check_quota(quota, load.num, load.num_tokens)
            self._admission.check(load)
        except LorafleetError:
            self.reached_queue()
            raise
        return AdmittedCall(admitted, base, prompts, load, quota, num_bytes)

    def quota_of(self, caller: Caller, *, is_kept: bool = False) -> Quota | None:
        """Return the limits that a caller's calls count against, None if there are none.

        is_kept: the result is stored.
        """
        quota = caller.quota
        if quota is None and is_kept:
            quota = Quota(PUBLIC)  # without keys, all callers share one tenant's storage quota
        if quota is not None and not quota.max_bytes:
            quota = replace(quota, max_bytes=self._settings.tenant_bytes)
        return quota

    def check_again(self, load: CallLoad, quota: Quota | None) -> None:
        """Refuse to rerun a request if its caller's limits or the queue have no room for it. Raises as `admit`."""
        if quota is not None:
            check_quota(quota, load.num, load.num_tokens)
        self._admission.check(CallLoad(load.cls, tenant=load.tenant))
        self._admission.check(load)

    def settle_again(self, load: CallLoad, quota: Quota | None, outcome: str, result: Any) -> None:
        """Handle the queue's result for a rerun request: count it as submitted, or raise as `settle`."""
        if outcome == "full":
            raise self._admission.full(load, int(result))
        if quota is not None and isinstance(result, Standing) and result.over:
            raise refusal(quota, result, load.num, load.num_tokens)
        self._admission.submitted(load)

    def check_known(self, needs: Sequence[str]) -> None:
        """Refuse a request that needs a protocol feature which no worker supports: workers ignore unknown fields.

        Raises Unavailable. needs: names of the fields in use.
        """
        status = self._fleet.status
        if status is None or not status.workers:
            return  # no worker has registered yet; the scheduler will not assign the call to a worker that is too old
        unknown = set(needs) - set(status.knows)
        if unknown:
            text = f"no worker supports {', '.join(sorted(unknown))}: all run an older version than this gateway"
            raise Unavailable(f"{text}; retry when a worker of its version has joined", code="workers_too_old")

    def lifetime_s(self, call: ParsedCall) -> float:
        """Return the seconds until the call's deadline."""
        if call.caller.is_batch:
            return max(1.0, (call.caller.until_ms - now_ms()) / 1000)
        return self._settings.job_ttl_s if call.options.background else self._settings.request_timeout_s

    def settle(self, call: AdmittedCall, outcome: str, result: Any) -> None:
        """Handle the queue's result for a submitted call, as returned by `Bus.submit`.

        Raises Overloaded if the queue refused it for now, BadRequest if it exceeds a limit at any load, and NotFound if
        its conversation was deleted.
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
        """Count the current task's call as no longer inbound, because it is in the queue."""
        self._admission.leave_inbound(reached_queue=True)

    def left(self) -> None:
        """Count the current task's call as no longer inbound, though it did not reach the queue."""
        self._admission.leave_inbound()
