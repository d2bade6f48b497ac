"""Stored conversations: created, changed and listed by clients; responses add their turns.

A response's prompt consists of the conversation's items at the time of the request, and its own input. Its turn, the
input and the output, is added as a whole once it has ended with an answer: by the next reader of the conversation, or
by the sweep of any gateway.
"""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import orjson

from gateway.auth.callers import Caller
from gateway.bodies.json_slices import JsonText
from gateway.bodies.json_values import loads_kept
from gateway.jobs.jobs import KEPT_AFTER_EXPIRY_S, Jobs
from gateway.overload import large
from gateway.overload.cost import free_slowly, held, hold
from gateway.overload.large import Checks
from gateway.overload.memory import values_bytes
from gateway.overload.shares import shares
from gateway.responses.items import Item, item_page, items_of
from gateway.responses.response_bodies import ConversationRequest, Metadata
from gateway.responses.stored import GOES_ON, StoredResponses, end_of
from protocol.metrics.series import UNREADABLE
from protocol.queue.bus import Bus, RequestFacts, now_ms
from protocol.queue.kept.conversations import ConversationLimits, TurnOutcome
from protocol.runtime.backoff import Backoff
from protocol.runtime.guarded import FAILED, Items, is_queue_away
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.codec import as_kept
from protocol.wire.errors import BadRequest, LorafleetError, NewerRecord, NotFound, Overloaded, UnreadableRecord

ID_PREFIX = "conv_"

MAX_ADDED = 20
"""Maximum items added at once, as in OpenAI's API."""

SWEEP_S = 20.0
"""Seconds between searches for ended responses whose conversations were not read since."""

LOOK_AGAIN_MS = 60_000
"""Milliseconds between two checks of a response that has not ended."""

RETRY = Backoff(1.0, 600.0)

_ID = re.compile(r"conv_[0-9a-f]{32}")
_AT_ONCE, _OF_TENANT = 1000, 16  # turns read together, and added per tenant
_RETRY_S = 60.0  # Retry-After, in seconds, at a limit of stored data


WrittenItem = tuple[str, bytes]
"""The id and the JSON text of an item."""


class TurnFailed(Exception):
    """A response cannot be added to its conversation because of an internal error."""

    def __init__(self, response: str) -> None:
        super().__init__(f"{response} cannot be added to its conversation")
        self.response = response


class Conversations:
    """The conversations of the fleet."""

    def __init__(
        self,
        bus: Bus,
        settings: Settings,
        jobs: Jobs,
        stored: StoredResponses,
        checks: Checks,
        sweep_s: float = SWEEP_S,
        retry: Backoff = RETRY,
    ) -> None:
        """jobs: a job is added to its conversation before it is deleted. checks: runs the reading of items.

        retry: backoff of a turn that fails.
        """
        self._bus = bus
        self._queue = bus.conversations
        self._jobs = jobs
        self._stored = stored
        self._checks = checks
        self.sweep_s = sweep_s
        self._turns = Items("conversations", backoff=retry)
        ttl_s = max(settings.conversation_ttl_s, settings.job_ttl_s + KEPT_AFTER_EXPIRY_S)  # outlives its turns
        self._limits = ConversationLimits(
            int(ttl_s * 1000),
            settings.tenant_conversations,
            settings.max_messages,
            settings.max_body_bytes,
            settings.tenant_bytes,
        )
        jobs.before_forget = self._add_turn_of

    # ------------------------------------------------------------ operations of clients

    async def create(self, request: ConversationRequest, caller: Caller) -> dict[str, Any]:
        """Create a conversation. Raises BadRequest, Overloaded."""
        items = await self._given(request.items or [], caller.owner)
        made = m.Conversation(ID_PREFIX + secrets.token_hex(16), caller.owner, now_ms(), dict(request.metadata or {}))
        await self._change(made.id, caller, record=made, is_new=True, items=items)
        return view(made)

    async def get(self, conversation_id: str, caller: Caller) -> dict[str, Any]:
        """Return a conversation. Raises NotFound."""
        return view(await self._known(conversation_id, caller))

    async def update(self, conversation_id: str, metadata: Metadata | None, caller: Caller) -> dict[str, Any]:
        """Replace a conversation's metadata. Raises NotFound, Overloaded."""
        known = await self._known(conversation_id, caller)
        changed = m.Conversation(known.id, known.tenant, known.created_ms, dict(metadata or {}))
        await self._change(known.id, caller, record=changed)
        return view(changed)

    async def delete(self, conversation_id: str, caller: Caller) -> dict[str, Any]:
        """Delete a conversation with its items, also an unreadable one. Its responses remain. Raises NotFound."""
        if not _ID.fullmatch(conversation_id) or not await self._queue.drop(conversation_id, caller.owner):
            raise _not_found(conversation_id, "conversation_id")
        return {"id": conversation_id, "object": "conversation.deleted", "deleted": True}

    async def add(self, conversation_id: str, given: Sequence[Item], caller: Caller) -> dict[str, Any]:
        """Append items to a conversation; return them. Raises BadRequest, NotFound, Overloaded."""
        items = await self._given(given, caller.owner)
        if not items:
            raise BadRequest("items is an empty list", param="items")
        await self._known(conversation_id, caller)
        await self._add_turns(conversation_id, caller.owner)
        await self._change(conversation_id, caller, items=items)
        return item_page(*zip(*items, strict=True), has_more=False)

    async def page(
        self, conversation_id: str, caller: Caller, limit: int, after: str | None, *, newest_first: bool
    ) -> dict[str, Any]:
        """Return a page of a conversation's items. Raises NotFound, also for an unknown `after`."""
        await self._known(conversation_id, caller)
        await self._add_turns(conversation_id, caller.owner)
        start = 0
        if after is not None:
            rank = await self._queue.rank(conversation_id, after, newest_first=newest_first)
            if rank is None:
                raise NotFound(f"there is no item {brief(after)}", param="after")
            start = rank + 1
        raws = await self._queue.items(conversation_id, start, limit + 1, newest_first=newest_first)
        has_more = len(raws) > limit
        del raws[limit:]
        return item_page(await self._ids(raws, caller.owner), raws, has_more=has_more)

    async def item(self, conversation_id: str, item_id: str, caller: Caller) -> JsonText:
        """Return an item. Raises NotFound."""
        await self._known(conversation_id, caller)
        await self._add_turns(conversation_id, caller.owner)
        raw = await self._queue.item(conversation_id, item_id)
        if raw is None:
            raise _no_item(item_id)
        await self._ids([raw], caller.owner)
        return JsonText(raw)

    async def delete_item(self, conversation_id: str, item_id: str, caller: Caller) -> dict[str, Any]:
        """Delete an item; return the conversation. Raises NotFound."""
        known = await self._known(conversation_id, caller)
        await self._add_turns(conversation_id, caller.owner)
        if not await self._queue.drop(conversation_id, caller.owner, item_id):
            raise _no_item(item_id)
        return view(known)

    # ------------------------------------------------------------ turns of responses

    async def all_items(self, conversation_id: str, caller: Caller) -> list[Item]:
        """Return the items that a response continues, and extend the conversation's TTL. Raises NotFound."""
        known = await self._known(conversation_id, caller, "conversation")
        await self._add_turns(known.id, caller.owner)
        await self._change(known.id, caller)
        return await self._values(await self._queue.items(known.id), caller.owner)

    async def _add_turn_of(self, job: m.Job) -> None:
        """Add the turn of a response that is about to be deleted, if it has ended with an answer."""
        if job.conversation:
            await self._add_turns(job.conversation, job.tenant)

    async def _add_turns(self, conversation_id: str, tenant: str) -> None:
        """Add the ended responses of a conversation in the order of their ends, each at most once.

        Failed and cancelled responses add nothing. Raises temporary errors of reading a response, so that no later
        response continues without it.
        """
        ids = await self._queue.turns(conversation_id)
        if not ids:
            return
        jobs = {job.jid: job for job in await self._bus.jobs.get_many(ids, leave_newer=True)}
        known = await self._bus.requests([job.rids[0] for job in jobs.values()])
        facts = dict(zip(jobs, known, strict=True))
        ended = [(fact.ended_ms if (fact := facts.get(id_)) is not None else 0, id_) for id_ in ids]
        for _, id_ in sorted(ended):
            fact, items = facts.get(id_), []
            if fact is not None:  # otherwise it was deleted
                status = end_of(jobs[id_], [fact]).status
                if status in ("queued", "in_progress"):
                    continue
                if status in GOES_ON:
                    try:
                        items = await self._turn(jobs[id_], fact)
                    except NotFound as error:  # for example the adapter's texts, which may return
                        FAILED.note("conversations", error, id_)
                        continue
            await self._queue.change(conversation_id, tenant, self._limits, items=items, response=id_)

    async def _turn(self, job: m.Job, fact: RequestFacts) -> list[WrittenItem]:
        """Return the items that a response adds, written; none if its stored record is unreadable.

        Raises temporary errors, and TurnFailed.
        """
        before = held()
        try:
            items = await self._stored.turn(job, [fact])
            written = await self._checks.in_thread(partial(_written, items), job.tenant)
            await large.freed(items)
            return written
        except NewerRecord:
            raise
        except UnreadableRecord as error:  # permanent; a client that reads the response gets this error
            UNREADABLE.labels("Response").inc()
            FAILED.note("conversations", error, job.jid)
            return []
        except Exception as error:
            if isinstance(error, LorafleetError) or is_queue_away(error):
                raise
            raise TurnFailed(job.jid) from error
        finally:
            hold(before)

    async def add_due_turns(self) -> None:
        """Check all due responses, round-robin by tenant, and add those that have ended to their conversations.

        A response whose turn fails repeatedly adds nothing.
        """
        while due := await self._queue.due(now_ms(), _AT_ONCE):
            turns, later = shares(due, attrgetter("tenant"), _OF_TENANT)
            await self._queue.put_off(later, now_ms())  # to the end of the list
            for conversation_id, tenant in dict.fromkeys((turn.conversation, turn.tenant) for turn in turns):

                async def leave_out(error: BaseException, of: str = conversation_id, tenant: str = tenant) -> None:
                    if isinstance(error, TurnFailed):
                        await self._queue.change(of, tenant, self._limits, response=error.response)

                await self._turns.run(conversation_id, partial(self._add_turns, conversation_id, tenant), leave_out)
            for turn in turns:
                await self._queue.look_again(turn, now_ms() + LOOK_AGAIN_MS)

    # ------------------------------------------------------------ storage

    async def _given(self, items: Sequence[Item], tenant: str) -> list[WrittenItem]:
        """Return a body's items with new ids, written. Raises BadRequest."""
        return await self._checks.in_thread(partial(_given, items), tenant) if items else []

    async def _values(self, raws: Sequence[bytes], tenant: str) -> list[Item]:
        """Return items stored as JSON, and charge for them: a conversation may have some of each of many bodies.

        Raises UnreadableRecord, and as `cost.hold`.
        """
        num_bytes = sum(map(len, raws))
        apart = partial(self._checks.do, fields=(), num_bytes=num_bytes, tenant=tenant)
        hold(held() + await apart(lambda: sum(len(raw) + values_bytes(raw) for raw in raws)))
        with as_kept("an item of the conversation"):
            items = await apart(lambda: [{"id": item["id"], **item} for item in map(loads_kept, raws)])
        large.keep(items, num_bytes)
        return items

    async def _ids(self, raws: Sequence[bytes], tenant: str) -> list[str]:
        """Return the ids of items stored as JSON, and charge for their texts. Raises as `_values`."""
        num_bytes = sum(map(len, raws))
        apart = partial(self._checks.do, fields=(), num_bytes=num_bytes, tenant=tenant)
        hold(held() + num_bytes + await apart(lambda: max(map(values_bytes, raws), default=0)))
        with as_kept("an item of the conversation"):
            return await apart(lambda: list(map(_id_of, raws)))

    async def _known(self, conversation_id: str, caller: Caller, param: str = "conversation_id") -> m.Conversation:
        found = None
        if _ID.fullmatch(conversation_id):
            found = await self._queue.get(conversation_id, caller.owner)
        if found is None:
            raise _not_found(conversation_id, param)
        return found

    async def _change(
        self,
        conversation_id: str,
        caller: Caller,
        *,
        record: m.Conversation | None = None,
        is_new: bool = False,
        items: Sequence[WrittenItem] = (),
    ) -> None:
        limits = self._limits
        if caller.tenant is not None and caller.tenant.kept_bytes:
            limits = replace(limits, max_kept=caller.tenant.kept_bytes)
        made = await self._queue.change(
            conversation_id, caller.owner, limits, record=record, is_new=is_new, items=items
        )
        if made.code == "gone":
            raise _not_found(conversation_id, "conversation_id")
        if made.code != "ok":
            raise _refusal(made, limits, len(items), caller.owner)


def view(conversation: m.Conversation) -> dict[str, Any]:
    """Return a conversation as OpenAI's object."""
    return {
        "id": conversation.id,
        "object": "conversation",
        "created_at": conversation.created_ms // 1000,
        "metadata": conversation.metadata,
    }


def _given(items: Sequence[Item]) -> list[WrittenItem]:
    """Return a body's items with new ids, written. Raises BadRequest."""
    if len(items) > MAX_ADDED:
        raise BadRequest(
            f"items has {len(items)} entries; the limit is {MAX_ADDED} at a time", param="items", code="limit_exceeded"
        )
    for i, item in enumerate(items):
        if item.get("type") == "item_reference":
            text = f"items[{i}]: an item_reference is not supported here: send the item itself"
            raise BadRequest(text, param=f"items[{i}].type")
    return _written(items_of(items, uuid.uuid4().hex, {}, renamed=True, param="items"))


def _id_of(raw: bytes) -> str:
    """Return the id of an item stored as JSON. Raises JSONDecodeError, KeyError, TypeError."""
    items = [loads_kept(raw)]
    found = items[0]["id"]
    free_slowly(items)
    return found


def _written(items: Sequence[Item]) -> list[WrittenItem]:
    return [(item["id"], orjson.dumps(item)) for item in items]


def _not_found(conversation_id: str, param: str) -> NotFound:
    text = f"Conversation with id {brief(conversation_id)} not found."
    return NotFound(text, param=param, code="conversation_not_found")


def _no_item(item_id: str) -> NotFound:
    return NotFound(f"Item with id {brief(item_id)} not found.", param="item_id", code="item_not_found")


def _refusal(made: TurnOutcome, limits: ConversationLimits, num: int, tenant: str) -> LorafleetError:
    """Return the error for a change refused by a limit. num: of items that it would have added."""
    if made.code == "conversations":
        text = f"you have {made.there} conversations; the limit is {limits.max_conversations}: delete some"
        return Overloaded(text, _RETRY_S)
    if made.code == "kept":
        text = (
            f"tenant {tenant} keeps {made.there} bytes in the queue, and this would add {made.added}; its limit is"
            f" {limits.max_kept}: delete conversations, responses or jobs"
        )
        return Overloaded(text, _RETRY_S)
    if made.code == "items":
        text = f"the conversation has {made.there} items and this would add {num}; the limit is {limits.max_items}"
    else:
        text = f"the conversation has {made.there} bytes; with these items it would exceed {limits.max_bytes}"
    return BadRequest(f"{text}: delete some", param="items", code="limit_exceeded")
