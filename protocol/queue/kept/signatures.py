"""The signatures of the scripts that write records which outlive a connection, see `protocol.queue.signatures`."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.queue.script_call import Call, Group, Key


class KeepFile(Call, kw_only=True):
    """Record a file, whose bytes are in the gateways' storage, or reserve space for one."""

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
    """Delete the record of a file."""

    file: Key
    files: Key
    sizes: Key
    expiry: Key
    id: str
    tenant: str


class OpenBatch(Call, kw_only=True):
    """Accept a batch, for any gateway to run."""

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
    max_kept: int


class ClaimBatch(Call, kw_only=True):
    """Let a gateway run a batch that no gateway runs, or renew the lease of the one that runs it."""

    batch: Key
    open_batches: Key
    id: str
    tenant: str
    gid: str
    lease_ms: int


class SaveBatch(Call, kw_only=True):
    """Write the progress of a batch, by the gateway that runs it."""

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
    """An item to add to a conversation."""

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
    """Write a webhook endpoint: a new one, unless its tenant has too many, or an existing one."""

    hooks: Key
    id: str
    record: bytes
    most: int


class DropEnds(Call, kw_only=True):
    """Delete ends of a tenant for which deliveries were made, and move the tenant behind all others that wait."""

    tenant_ends: Key
    ends: Key
    tenant: str
    entries: Sequence[str]


class DeliveryRow(Group, kw_only=True):
    """A delivery to record."""

    id: str
    record: bytes


class AddDeliveries(Call, kw_only=True):
    """Record deliveries of one tenant, due now, while few of its deliveries wait; they no longer count as given up."""

    hooks: Key
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
    """Move what the previous version kept for all tenants together to each tenant: endpoints, ends and deliveries."""

    num: int


SIGNATURES: tuple[type[Call], ...] = tuple(call for call in Call.__subclasses__() if call.__module__ == __name__)
