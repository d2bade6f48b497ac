"""The memory that calls may hold in a gateway: one account of bytes, charged before the work that takes them.

A call is charged the most that it can come to hold, as far as that is known: its body before it is read, its values
before they are made, its prompt and longest answer before it is submitted. What a client does not read is charged to
its address. What would be too much is refused before anything is done for it, and nothing that was charged is taken
away. So a gateway's memory is the account's limit and what `docs/threat-model.md` lists beside it, whatever is asked.
"""

from __future__ import annotations

from protocol.wire.errors import BadRequest, Overloaded, Unavailable

SHARE = 4
"""A holder, which is a tenant or an address, may have one part in so many of the account."""

RETRY_S = 5.0
"""Retry-After of what finds no room: when a call will end is not known."""

CALL_BYTES = 32 << 10
"""What a call holds whatever it asks for: its tasks, headers, options and the objects around them."""

VALUE_BYTES, CONTAINER_BYTES, CHARACTER_BYTES = 96, 288, 4
"""What a value of a body takes at most, beside its text; a list or an object; and a byte of a text."""

SMALL_FACTOR, LARGE_FACTOR = 32, 16
"""The same for each byte of a whole body, of one of up to 64 kB and a larger one, where its values are not counted."""


class MemoryAccount:
    """The bytes that are held, by whom, and how many they may be."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.max_share = max_bytes // SHARE
        self.num_bytes = 0
        self._of: dict[str, int] = {}  # bytes by holder

    def held_by(self, holder: str) -> int:
        """Return the bytes that a holder has."""
        return self._of.get(holder, 0)

    def open(self, holder: str) -> Charge:
        """Return an empty charge; the caller must close it."""
        return Charge(self, holder)

    def move(self, holder: str, num: int) -> None:
        """Charge a holder `num` bytes more, or less. Raises Overloaded for its share, Unavailable for the whole."""
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
    """What one call, or one connection, is charged."""

    __slots__ = ("_account", "_holder", "_is_closed", "num_bytes")

    def __init__(self, account: MemoryAccount, holder: str) -> None:
        self._account = account
        self._holder = holder
        self._is_closed = False
        self.num_bytes = 0

    def hold(self, num_bytes: int) -> None:
        """Be charged so many bytes instead of those before, which stay charged where that raises.

        Once it is closed it does nothing: work in a thread may outlive its call, and nobody would give its bytes back.
        Raises as `MemoryAccount.move`, and BadRequest for what could never be charged.
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
        """Return a charge of nothing to the same holder."""
        return self._account.open(self._holder)

    def close(self) -> None:
        """Be charged nothing any more. A second time does nothing."""
        self._is_closed = True
        self._account.move(self._holder, -self.num_bytes)
        self.num_bytes = 0


def values_bytes(raw: bytes) -> int:
    """Return the most bytes that the values of a short JSON text take, found by counting in it."""
    num_containers = raw.count(b"[") + raw.count(b"{")
    return bytes_of_values(len(raw), raw.count(b",") + raw.count(b":") + num_containers + 1, num_containers)


def bytes_of_values(num_bytes: int, num_values: int, num_containers: int) -> int:
    """Return the most bytes that the values of a JSON text take: keys count as values, as do lists and objects."""
    return CHARACTER_BYTES * num_bytes + VALUE_BYTES * num_values + CONTAINER_BYTES * num_containers


def tenant_holder(name: str) -> str:
    """Return the holder that a tenant is."""
    return f"tenant {name}"


def address_holder(address: str) -> str:
    """Return the holder that an address is, as connections are counted by; "" is this machine."""
    return f"address {address or 'localhost'}"
