"""A collector of spans that forgets them, for measuring what it costs to tell them."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Take a request whole, and answer it with nothing."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/x-protobuf")]}
    )
    await send({"type": "http.response.body", "body": b""})


def serve(port: int) -> None:
    """Serve at a port of this machine until a signal."""
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off")
    asyncio.run(uvicorn.Server(config).serve())
