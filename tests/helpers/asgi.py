"""A stand-in for the connection of an ASGI application's client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class AsgiClient:
    """Stores the messages that it is sent, sends no body, and stays connected until `left` is set."""

    def __init__(self, on_message: Callable[[Any], object] = lambda message: None) -> None:
        """on_message: called with each message that the application sends."""
        self.sent: list[Any] = []
        self.left = asyncio.Event()
        self._on_message = on_message

    async def receive(self) -> dict[str, Any]:
        """Return the disconnect message once the client has left."""
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        """Store a message."""
        self.sent.append(message)
        self._on_message(message)

    @property
    def body(self) -> bytes:
        """The parts of the response body sent so far, joined."""
        return b"".join(message.get("body", b"") for message in self.sent)
