"""Conversations that clients keep: their items, and the responses to be added to them.

The script that submits a response of a conversation records its *turn*. Any gateway may add the turn once the response
has ended. The script that adds the items deletes the record, so the turn is added once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from protocol.queue.connection.redis_client import Client
from protocol.queue.dead_letters import set_aside
from protocol.queue.kept import signatures as lua
from protocol.queue.scripts import Scripts
from protocol.runtime.sealing import Seal
from protocol.wire import messages as m
from protocol.wire.codec import decode_record
from protocol.wire.keys import Keys

MAX_TURNS = 16
"""Maximum number of responses waiting to be added to one conversation."""


@dataclass(frozen=True, slots=True)
class ConversationLimits:
    """Limits of a tenant's conversations, and their retention."""

    ttl_ms: int  # retention in ms after the last change
    max_conversations: int  # limit per tenant; 0: no limit
    max_items: int  # limit per conversation
    max_bytes: int  # limit per conversation
    max_kept: int  # limit on all bytes of the tenant in the queue; 0: no limit


class TurnOutcome(NamedTuple):
    """The outcome of a change."""

    code: str  # "ok"; "gone"; or the limit that has refused it: conversations, items, bytes, kept
    there: int = 0  # current value of the quantity that this limit applies to
    added: int = 0  # bytes that the change would have added, if `kept` has refused it


class Turn(NamedTuple):
    """A response to be added to a conversation."""

    tenant: str
    conversation: str
    response: str


class StoredConversations:
    """The conversations of a fleet, by id. An id sent by a client must be checked before it is used in a key."""

    def __init__(self, client: Client, keys: Keys, scripts: Scripts, seal: Seal | None = None) -> None:
        self._redis = client
        self._keys = keys
        self._scripts = scripts
        self._seal = seal

    # ------------------------------------------------------------ changing

    async def change(
        self, conversation_id: str, tenant: str, limits: ConversationLimits, *, record: m.Conversation | None = None,
        is_new: bool = False, items: Sequence[tuple[str, bytes]] = (), response: str = "",
    ) -> TurnOutcome:  # fmt: skip
        """Create a conversation, or change it and extend its TTL; see `change_conversation.lua`.

        record: None: unchanged. items: pairs of an id and the item as JSON. response: the response whose turn the items
        are; "": none.
        """
        keys, seal, place = self._keys, self._seal, self._keys.conversation_items(conversation_id)
        call = lua.ChangeConversation(
            conversation=keys.conversation(conversation_id), items=place,
            order=keys.conversation_order(conversation_id), turns=keys.conversation_turns(conversation_id),
            conversations=keys.conversations(tenant), all_turns=keys.turns, id=conversation_id, tenant=tenant,
            record=b"" if record is None else m.encode(record), is_new=int(is_new), ttl_ms=limits.ttl_ms,
            max_conversations=limits.max_conversations, max_items=limits.max_items, max_bytes=limits.max_bytes,
            max_kept=limits.max_kept, response=response,
            new_items=[
                lua.ItemRow(item_id=item_id, item=item if seal is None else seal.seal(item, f"{place}/{item_id}"))
                for item_id, item in items
            ],
        )  # fmt: skip
        reply = await self._scripts.run(call)
        return TurnOutcome(reply[0].decode(), *map(int, reply[1:]))

    async def drop(self, conversation_id: str, tenant: str, item_id: str = "") -> bool:
        """Delete a conversation, or one of its items. Returns whether the tenant had it."""
        keys = self._keys
        call = lua.DropConversation(
            conversation=keys.conversation(conversation_id),
            items=keys.conversation_items(conversation_id),
            order=keys.conversation_order(conversation_id),
            turns=keys.conversation_turns(conversation_id),
            conversations=keys.conversations(tenant),
            id=conversation_id,
            tenant=tenant,
            item_id=item_id,
        )
        return bool(await self._scripts.run(call))

    # ------------------------------------------------------------ reading

    async def get(self, conversation_id: str, tenant: str) -> m.Conversation | None:
        """Return a tenant's conversation; None if unknown, expired or of another tenant. Raises UnreadableRecord."""
        owner, raw = await self._redis.hmget(self._keys.conversation(conversation_id), ("tenant", "b"))
        return decode_record(raw, m.Conversation) if raw is not None and owner == tenant.encode() else None

    async def rank(self, conversation_id: str, item_id: str, *, newest_first: bool) -> int | None:
        """Return the number of items before this one in a list; None if it is unknown."""
        name = self._keys.conversation_order(conversation_id)
        return await (self._redis.zrevrank(name, item_id) if newest_first else self._redis.zrank(name, item_id))

    async def items(
        self, conversation_id: str, start: int = 0, num: int = 0, *, newest_first: bool = False
    ) -> list[bytes]:
        """Return items `[start, start + num)` as JSON; num 0: all from `start` on. Raises ProtocolError."""
        name, last = self._keys.conversation_order(conversation_id), start + num - 1 if num else -1
        found = await (self._redis.zrevrange if newest_first else self._redis.zrange)(name, start, last)
        return [item for item in await self._read(conversation_id, [raw.decode() for raw in found]) if item is not None]

    async def item(self, conversation_id: str, item_id: str) -> bytes | None:
        """Return one item as JSON; None if it is unknown. Raises ProtocolError."""
        return (await self._read(conversation_id, [item_id]))[0]

    async def _read(self, conversation_id: str, item_ids: Sequence[str]) -> list[bytes | None]:
        place = self._keys.conversation_items(conversation_id)
        found: list[bytes | None] = await self._redis.hmget(place, item_ids) if item_ids else []
        if self._seal is None:
            return found
        seal = self._seal
        return [
            item if item is None else seal.open(item, f"{place}/{item_id}")
            for item_id, item in zip(item_ids, found, strict=True)
        ]

    # ------------------------------------------------------------ turns

    async def turns(self, conversation_id: str) -> list[str]:
        """Return the ids of the responses to be added to a conversation, in the order of their submission."""
        found = await self._redis.zrange(self._keys.conversation_turns(conversation_id), 0, -1)
        return [response.decode() for response in found]

    async def due(self, now_ms: int, num: int) -> list[Turn]:
        """Return at most `num` turns due for a check. Invalid entries are set aside."""
        found = await self._redis.zrangebyscore(self._keys.turns, "-inf", now_ms, start=0, num=num)
        turns: list[Turn] = []
        for member in found:
            parts = member.decode(errors="replace").split(":")
            if len(parts) == 3:
                turns.append(Turn(*parts))
            else:
                reason = "it is no turn's name, which looks like TENANT:CONVERSATION:RESPONSE"
                taken = ("ZREM", self._keys.turns, member)
                await set_aside(self._scripts, self._keys, "turn", member, reason, taken)
        return turns

    async def put_off(self, turns: Sequence[Turn], at_ms: int) -> None:
        """Make turns due at `at_ms`."""
        if turns:
            await self._redis.zadd(self._keys.turns, {":".join(turn): at_ms for turn in turns}, xx=True)

    async def look_again(self, turn: Turn, at_ms: int) -> None:
        """Postpone the check of a turn to `at_ms`; delete it if the conversation is gone or already has the turn."""
        member, name = ":".join(turn), self._keys.conversation_turns(turn.conversation)
        if await self._redis.zscore(name, turn.response) is None:
            await self._redis.zrem(self._keys.turns, member)
        else:
            await self._redis.zadd(self._keys.turns, {member: at_ms}, xx=True)
