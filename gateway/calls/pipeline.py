"""The stages that every call passes in the gateway, whichever API it uses.

    stage                  takes            returns          module
    parse                  an HTTP body     ParsedCall       `parse` of openai, lorax, ollama, encoders
    resolve names          ParsedCall       ResolvedCall     calls.resolve
    render and tokenize    ResolvedCall     TokenizedCall    calls.tokenize
    constrain              TokenizedCall    TokenizedCall    calls.constrain
    admit                  TokenizedCall    AdmittedCall     calls.admit
    submit                 AdmittedCall     SubmittedCall    calls.submit
    follow                 SubmittedCall    Generation       calls.follow
    write                  Generation       HTTP response    `write` of openai, lorax, ollama, encoders

Each API has its own first and last stage; this module runs those between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel

from gateway.adapters.resolver import Resolver
from gateway.auth.callers import Caller
from gateway.bodies.parameter_check import ignore
from gateway.calls.admit import AdmittedCall, CallAdmission
from gateway.calls.constrain import constrain
from gateway.calls.earlier import EarlierCall, EarlierCalls
from gateway.calls.follow import Generation
from gateway.calls.parsed_call import ChatPrompt, ParsedCall
from gateway.calls.replies import Replies
from gateway.calls.resolve import CallResolver
from gateway.calls.submit import SubmittedCall, Submitter
from gateway.calls.tokenize import check_size, tokenize
from gateway.calls.trace import TRACE_OF, stage
from gateway.fleet.view import FleetView
from gateway.http.errors import OUTCOME_OF
from gateway.overload import cost, large
from gateway.overload.admission import Admission
from gateway.overload.large import Checks
from protocol.queue.bus import Bus
from protocol.queue.kept.jobs import NewJob
from protocol.runtime.settings import Settings
from protocol.wire import messages as m

T = TypeVar("T")


class Pipeline:
    """The stages between *parse* and *write*."""

    def __init__(
        self, settings: Settings, bus: Bus, fleet: FleetView, resolver: Resolver, replies: Replies,
        admission: Admission,
    ) -> None:  # fmt: skip
        self.settings = settings
        self.checks = Checks()
        self.bus = bus
        self.files = resolver.bases.default.base
        self.fleet = fleet
        self.resolver = resolver
        self.replies = replies
        self.call_resolver = CallResolver(fleet, resolver, settings.request_timeout_s)
        self.admission = CallAdmission(settings, fleet, admission)
        self.submitter = Submitter(settings, bus, replies, self.admission)
        self.earlier = EarlierCalls(settings, bus, resolver.bases, replies)

    async def parsed(self, body: BaseModel, caller: Caller, num_bytes: int, make: Callable[[], T]) -> T:
        """Return `make()`, which converts a body; it runs off the event loop if it may take long. Raises as `make`.

        num_bytes: size of the body.
        """
        return await self.checks.do(make, body.model_fields_set, num_bytes, caller.owner)

    async def run(self, call: ParsedCall, job: Callable[[SubmittedCall], NewJob] | None = None) -> Generation:
        """Take a call from *parse* to *follow*. Raises client errors, Overloaded and Unavailable.

        job: makes the job that stores the call, None if it is not a job.
        """
        admitted = await self.prepare(call)
        with stage("submit"):
            submitted = await self.submitter.submit(admitted, job)
        if isinstance(submitted, m.Idempotent):  # a concurrent call has used this key first
            return await self.attach(call, EarlierCall(submitted))
        large.release()
        cost.hold(admitted.num_bytes)
        return self.follow(submitted)

    async def run_once(self, call: ParsedCall) -> Generation:
        """Run a call, or attach to the earlier call with its Idempotency-Key. Raises as `run` and `attach`."""
        earlier = await self.earlier.find(call.sent, call.caller) if call.sent is not None else None
        return await self.run(call) if earlier is None else await self.attach(call, earlier)

    async def prepare(self, call: ParsedCall) -> AdmittedCall:
        """Take a call from *parse* to *admit*; the cheapest checks run first. Raises as `run`."""
        outcome = OUTCOME_OF.get(None)
        if outcome is not None:
            outcome.model = call.model_name
        if isinstance(call.inputs, ChatPrompt):
            large.keep(call.inputs.messages)
        call.rules.check_number(len(call.models.names), len(call.sources), call.options.n)
        await self.admission.check_room(call)
        ignore(call.caller.headers, call.served_without)
        trace = TRACE_OF.get()
        if trace is not None:
            trace.about(call)
            trace.stage("admission", trace.began_ns)
        with stage("resolve names"):
            resolved = await self.call_resolver.resolve(call)
        check_size(resolved, self.settings.max_call_tokens)
        with stage("render and tokenize"):
            tokenized = await large.work(lambda: tokenize(resolved))
            constrained = await constrain(tokenized, self.resolver.bases.of(resolved.base.name).grammars, self.checks)
        return self.admission.admit(constrained)

    async def attach(self, call: ParsedCall, earlier: EarlierCall) -> Generation:
        """Follow the earlier call of a call's Idempotency-Key. Raises ClientError if its body was another."""
        self.admission.left()
        of_body = cost.held()
        attached = await self.earlier.attach(call, earlier)
        large.release()
        cost.hold(cost.held() - of_body)
        return self.follow(attached)

    def follow(self, call: SubmittedCall) -> Generation:
        """Return a generation that follows a submitted call; the caller must close it."""
        return Generation(self.replies, call)
