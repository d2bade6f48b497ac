"""Calls that were submitted before: found by Idempotency-Key, and read again from the queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from msgspec import structs

from gateway.adapters.resolver import CallTarget
from gateway.auth.callers import Caller
from gateway.calls.parsed_call import ChatPrompt, Pairs, ParsedCall, Sent, Texts
from gateway.calls.replies import Replies
from gateway.calls.size import call_bytes, longest, numbers_of
from gateway.calls.submit import SubmittedCall, call_of
from gateway.calls.tokenize import Offset, Prompt, echoed, encoded
from gateway.fleet.bases import GatewayBases
from gateway.overload.cost import held, hold
from gateway.text.answer_form import found_form
from protocol.queue.bus import Bus, RequestFacts
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.error_codec import error_from
from protocol.wire.errors import IdempotencyKeyReused, NotFound, Unavailable

ATTACHED_POLL_S = 0.1

UNKNOWN_MODEL_LEN = 1 << 17
"""Context length assumed while no worker has reported its model to this gateway."""


@dataclass(frozen=True, slots=True)
class EarlierCall:
    """The record of an Idempotency-Key's first use, and the facts of its requests when they were read."""

    record: m.Idempotent
    facts: Sequence[RequestFacts | None] = ()  # (): not read


class EarlierCalls:
    """Finds calls by Idempotency-Key or job record in the queue, whichever gateway submitted them."""

    def __init__(self, settings: Settings, bus: Bus, bases: GatewayBases, replies: Replies) -> None:
        self._timeout_ms = int(settings.request_timeout_s * 1000)
        self._bus = bus
        self._bases, self._fleet = bases, bases.fleet
        self._replies = replies

    async def find(self, sent: Sent, caller: Caller) -> EarlierCall | None:
        """Return the call that a caller first sent with this Idempotency-Key, None if the key is unused.

        A key whose call ended with a retryable error (503) counts as unused: otherwise every retry would get that error
        for a day. The failed job or response stays until it expires.
        """
        if not sent.key:
            return None
        key = self._bus.keys.idem(caller.owner, sent.key)
        record = await self._bus.get(key, m.Idempotent)
        if record is None or record.body_hash != sent.hash:
            return EarlierCall(record) if record is not None else None
        facts = await self._bus.requests(record.rids)
        if not _is_void(facts):
            return EarlierCall(record, facts)
        await self._bus.free_idem(key, record)
        record = await self._bus.get(key, m.Idempotent)  # another gateway may have used it in between
        return EarlierCall(record) if record is not None else None

    async def attach(self, call: ParsedCall, earlier: EarlierCall) -> SubmittedCall:
        """Return an earlier call, to be followed from its first token.

        Charges for the memory it holds besides its body. Raises as `check_same_body` and `cost.hold`, and NotFound.
        """
        assert call.sent is not None
        record = earlier.record
        check_same_body(record, call.sent)
        known = await self.known(call, record, earlier.facts or await self._bus.requests(record.rids))
        hold(held() + self.num_bytes(known))
        mail = self._replies.subscribe(record.rids, eager=call.options.stream)
        deadline_ms = call.caller.until_ms or record.created_ms + self._timeout_ms
        return structs.replace(
            known, parsed=known.parsed.without_prompts(), mail=mail, deadline_ms=deadline_ms, poll_s=ATTACHED_POLL_S
        )

    def num_bytes(self, call: SubmittedCall) -> int:
        """Return the maximum bytes of memory that an earlier call holds while it is read."""
        numbers = numbers_of(call.parsed.task, call.prompts, call.base)
        return call_bytes(call.parsed.options, call.prompts, numbers)

    async def known(
        self, call: ParsedCall, record: m.Idempotent | m.Job, facts: Sequence[RequestFacts | None]
    ) -> SubmittedCall:
        """Rebuild an earlier call without resolving or tokenizing it again. facts: of its requests, in order.

        Raises NotFound if the result has expired, the adapter's texts are gone, or this gateway does not serve its
        base; Unavailable while the base, whose sizes are needed to decode numbers, is unknown.
        """
        if self._fleet.base is None:
            await self._fleet.refresh()
        if self._fleet.is_foreign(record.base):
            raise NotFound(f"its base `{record.base}` is not served here", code="base_not_served")
        if isinstance(call.inputs, Pairs) and len(record.rids) != len(call.sources):
            call = structs.replace(call, task="embed", inputs=replace(call.inputs, apart=True))
        prompts: list[Prompt] = []
        base, own = self._fleet.named(record.base), self._bases.of(record.base)
        if base is None and call.task != "generate":
            raise Unavailable("no worker has reported the base model of these token ids yet")
        max_model_len = base.max_model_len if base is not None else UNKNOWN_MODEL_LEN
        of_prompts = iter(facts[:: call.options.n])
        for i, (digest, texts) in enumerate(zip(record.digests, record.texts, strict=True)):
            files = await own.files(digest, texts, call.caller.name or digest)
            target = CallTarget("", digest, files, texts)
            opened, continued = (i < len(told) and told[i] for told in (record.opened, record.without_thought))
            form = None
            if isinstance(call.inputs, ChatPrompt):
                form = await found_form(files, call.options.tools, opened=opened, continued=continued)
            offsets = await self._offsets(call, target, max_model_len)
            for source, of_tokens in zip(call.sources, offsets, strict=True):
                fact = next(of_prompts, None)
                if fact is None:
                    raise NotFound("the result has expired", code="result_expired")
                echo = echoed(call, source, files)
                most = longest(call.options, fact.num_prompt_tokens, max_model_len)
                prompts.append(
                    Prompt(target, b"", fact.num_prompt_tokens, most, echo=echo, form=form, offsets=of_tokens)
                )
        ended_ms = max((fact.ended_ms for fact in facts if fact is not None), default=0)
        return SubmittedCall(call_of(record.rids[0]), call, base, prompts, record.created_ms, 0, ended_ms=ended_ms)

    async def _offsets(self, call: ParsedCall, target: CallTarget, max_model_len: int) -> Sequence[Sequence[Offset]]:
        """Return the offsets of each prompt's tokens in its text, () if they were not requested."""
        inputs = call.inputs
        if not (isinstance(inputs, Texts) and inputs.with_offsets):
            return [()] * len(call.sources)
        texts = [source for source in inputs.sources if isinstance(source, str)]
        check = partial(call.rules.most_tokens, call.options, max_model_len=max_model_len)
        found = await encoded(target.files, texts, check, special=inputs.add_special_tokens)
        return [offsets for _, offsets in found]


def _is_void(facts: Sequence[RequestFacts | None]) -> bool:
    """Return whether all requests of a call have ended, and at least one because no worker could serve it then."""
    if not all(fact is not None and fact.is_terminal for fact in facts):
        return False
    errors = [error_from(fact.error) for fact in facts if fact is not None and fact.error]
    return any(isinstance(error, Unavailable) for error in errors)


def check_same_body(record: m.Idempotent, sent: Sent) -> None:
    """Refuse an Idempotency-Key that was first used with another body. Raises IdempotencyKeyReused (422)."""
    if record.body_hash != sent.hash:
        raise IdempotencyKeyReused("this Idempotency-Key was already used with a different body")
