"""An ASGI application's client, in place of a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class AsgiClient:
    """Keeps what it is sent, asks for nothing more, and stays until `left` is set."""

    def __init__(self, on_message: Callable[[Any], object] = lambda message: None) -> None:
        """on_message: called with each message that it is sent."""
        self.sent: list[Any] = []
        self.left = asyncio.Event()
        self._on_message = on_message

    async def receive(self) -> dict[str, Any]:
        """Return that the client has left, once it has."""
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        """Keep a message."""
        self.sent.append(message)
        self._on_message(message)

    @property
    def body(self) -> bytes:
        """All that was sent of a body."""
        return b"".join(message.get("body", b"") for message in self.sent)
