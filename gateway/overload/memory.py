"""The memory that calls may hold in a gateway: one account of bytes, charged before the memory is used.

A call is charged the maximum that it may hold, as far as known: its body before it is read, its values before they are
parsed, its prompt and longest answer before it is submitted. Unread output is charged to the client's address. A call
that does not fit is refused before any work; granted memory is never revoked. So a gateway's memory is bounded by the
account's limit plus the items in `docs/threat-model.md`, whatever clients send.
"""

from __future__ import annotations

from protocol.wire.errors import BadRequest, Overloaded, Unavailable

SHARE = 4
"""A holder (tenant or address) may have 1/SHARE of the account."""

RETRY_S = 5.0
"""Retry-After, in seconds, if there is no room: a guess at when a call will end."""

CALL_BYTES = 32 << 10
"""Bytes that every call holds: its tasks, headers, options and the objects around them."""

VALUE_BYTES, CONTAINER_BYTES, CHARACTER_BYTES = 96, 288, 4
"""Maximum bytes of a parsed value besides its text; of a list or object; and of a character."""

SMALL_FACTOR, LARGE_FACTOR = 32, 16
"""Maximum bytes per byte of a body of up to 64 kB, and of a larger one, if its values are not counted."""


class MemoryAccount:
    """The bytes held in total and by each holder, with their limits."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.max_share = max_bytes // SHARE
        self.num_bytes = 0
        self._of: dict[str, int] = {}  # bytes by holder

    def held_by(self, holder: str) -> int:
        """Return the bytes of a holder."""
        return self._of.get(holder, 0)

    def open(self, holder: str) -> Charge:
        """Return an empty charge; the caller must close it."""
        return Charge(self, holder)

    def move(self, holder: str, num: int) -> None:
        """Change a holder's bytes by `num`. Raises Overloaded beyond its share, Unavailable beyond the total."""
        own = self._of.get(holder, 0) + num
        if num > 0:
            if own > self.max_share:
                held = f"{holder} holds {own - num} bytes of this gateway's memory, and this call may take {num} more"
                raise Overloaded(f"{held}; the limit is {self.max_share}", RETRY_S, "memory")
            if self.num_bytes + num > self.max_bytes:
                held = f"calls hold {self.num_bytes} bytes of this gateway's memory, and this one may take {num} more"
                raise Unavailable(f"{held}; the limit is {self.max_bytes}", code="gateway_full")
        self.num_bytes += num
        if own:
            self._of[holder] = own
        else:
            self._of.pop(holder, None)


class Charge:
    """The bytes charged to one call or connection."""

    __slots__ = ("_account", "_holder", "_is_closed", "num_bytes")

    def __init__(self, account: MemoryAccount, holder: str) -> None:
        self._account = account
        self._holder = holder
        self._is_closed = False
        self.num_bytes = 0

    def hold(self, num_bytes: int) -> None:
        """Set the charge to `num_bytes`; if that raises, the old charge remains.

        Does nothing once closed: work in a thread may outlive its call, and its bytes would never be released. Raises
        as `MemoryAccount.move`, and BadRequest if `num_bytes` exceeds a holder's share.
        """
        if num_bytes > self._account.max_share:
            raise BadRequest(
                f"this call may take {num_bytes} bytes of the gateway's memory; the limit per caller is"
                f" {self._account.max_share}: ask for fewer tokens, choices or logprobs",
                code="limit_exceeded",
            )
        if not self._is_closed:
            self._account.move(self._holder, num_bytes - self.num_bytes)
            self.num_bytes = num_bytes

    def beside(self) -> Charge:
        """Return an empty charge on the same holder."""
        return self._account.open(self._holder)

    def close(self) -> None:
        """Release all bytes. Idempotent."""
        self._is_closed = True
        self._account.move(self._holder, -self.num_bytes)
        self.num_bytes = 0


def values_bytes(raw: bytes) -> int:
    """Return the maximum bytes of a short JSON text's parsed values, by counting its punctuation."""
    num_containers = raw.count(b"[") + raw.count(b"{")
    return bytes_of_values(len(raw), raw.count(b",") + raw.count(b":") + num_containers + 1, num_containers)


def bytes_of_values(num_bytes: int, num_values: int, num_containers: int) -> int:
    """Return the maximum bytes of a JSON text's parsed values. num_values: includes keys, lists and objects."""
    return CHARACTER_BYTES * num_bytes + VALUE_BYTES * num_values + CONTAINER_BYTES * num_containers


def tenant_holder(name: str) -> str:
    """Return a tenant's name as a holder."""
    return f"tenant {name}"


def address_holder(address: str) -> str:
    """Return an address as a holder, by which connections are counted; "" is this machine."""
    return f"address {address or 'localhost'}"
