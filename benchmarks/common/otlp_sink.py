"""A collector that discards all spans, for measuring the cost of exporting them."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Read a whole request, and answer it with an empty body."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/x-protobuf")]}
    )
    await send({"type": "http.response.body", "body": b""})


def serve(port: int) -> None:
    """Serve on a port of this machine until a signal arrives."""
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off")
    asyncio.run(uvicorn.Server(config).serve())
