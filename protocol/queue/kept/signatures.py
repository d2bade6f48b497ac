"""The signatures of the scripts that write what outlives a connection, see `protocol.queue.signatures`."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.queue.script_call import Call, Group, Key


class KeepFile(Call, kw_only=True):
    """Note a file, whose bytes are in the gateways' storage, or hold room for one."""

    file: Key
    files: Key
    sizes: Key
    expiry: Key
    id: str
    tenant: str
    record: bytes
    num_bytes: int
    created_ms: int
    expires_ms: int
    max_bytes: int
    max_files: int


class DropFile(Call, kw_only=True):
    """Forget a file."""

    file: Key
    files: Key
    sizes: Key
    expiry: Key
    id: str
    tenant: str


class OpenBatch(Call, kw_only=True):
    """Take a batch, for any gateway to run."""

    batch: Key
    batches: Key
    open_batches: Key
    tenant_open: Key
    id: str
    tenant: str
    record: bytes
    created_ms: int
    ttl_ms: int
    max_open: int


class ClaimBatch(Call, kw_only=True):
    """Let a gateway run a batch that nobody runs, or go on with one that it runs."""

    batch: Key
    open_batches: Key
    id: str
    tenant: str
    gid: str
    lease_ms: int


class SaveBatch(Call, kw_only=True):
    """Write how far a batch is, by the gateway that runs it."""

    batch: Key
    open_batches: Key
    tenant_open: Key
    id: str
    tenant: str
    epoch: int
    record: bytes
    outcome: str
    status: str
    wait_ms: int
    tries: int | str


class ItemRow(Group, kw_only=True):
    """An item that a conversation gets."""

    item_id: str
    item: bytes


class ChangeConversation(Call, kw_only=True):
    """Make or change a conversation: its record, and what is added to its items."""

    conversation: Key
    items: Key
    order: Key
    turns: Key
    conversations: Key
    all_turns: Key
    id: str
    tenant: str
    record: bytes
    is_new: int
    ttl_ms: int
    max_conversations: int
    max_items: int
    max_bytes: int
    max_kept: int
    response: str
    new_items: Sequence[ItemRow]


class DropConversation(Call, kw_only=True):
    """Delete a conversation, or one of its items, and give its tenant the bytes back."""

    conversation: Key
    items: Key
    order: Key
    turns: Key
    conversations: Key
    id: str
    tenant: str
    item_id: str


class KeepHook(Call, kw_only=True):
    """Write an endpoint of webhooks: a new one, unless its tenant has too many, or one that is still there."""

    hooks: Key
    id: str
    record: bytes
    most: int


class DropEnds(Call, kw_only=True):
    """Forget ends of a tenant that deliveries were made of, and put it behind all others that wait for their turn."""

    tenant_ends: Key
    ends: Key
    tenant: str
    entries: Sequence[str]


class DeliveryRow(Group, kw_only=True):
    """A delivery that is noted."""

    id: str
    record: bytes


class AddDeliveries(Call, kw_only=True):
    """Note deliveries of one tenant, due now, as long as few of its wait; they are no longer given up."""

    outbox: Key
    times: Key
    undelivered: Key
    outboxes: Key
    tenant: str
    max_waiting: int
    deliveries: Sequence[DeliveryRow]


class TakeDeliveries(Call, kw_only=True):
    """Give a tenant its turn."""

    outbox: Key
    times: Key
    outboxes: Key
    tenant: str
    num: int
    claim_ms: int


class TakeOver(Call, kw_only=True):
    """Give each tenant what the version before kept of all together: endpoints, ends and deliveries."""

    num: int


SIGNATURES: tuple[type[Call], ...] = tuple(call for call in Call.__subclasses__() if call.__module__ == __name__)
