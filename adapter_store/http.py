"""The store's HTTP server for its fleet: files of adapters by digest, with ranges, sent by `sendfile`.

    GET|HEAD /adapters/{digest}/{adapter_config.json|adapter_model.safetensors|texts.json}
                                    Range, If-None-Match; ETag = digest; the config has X-Lorafleet-Folder, URL-quoted:
                                    the folder in which a process on the same machine finds these files
    DELETE   /adapters/{digest}     200 with the bytes freed, 409 while a name refers to it
    POST     /uploads               200 with the source of the zip's adapter, see `uploads`; needs Content-Length
    DELETE   /uploads/{name}        200, 404 if there is none
    GET      /health

Every path except `/health` requires the fleet's bearer token. The server is written directly on asyncio because ASGI
servers copy every byte through Python.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from adapter_store.sources import FILES
from adapter_store.uploads import Uploads
from peft_adapters.format import CONFIG_FILE, FOLDER_HEADER
from peft_adapters.texts.files import TEXTS_FILE
from protocol.wire.errors import Conflict, LorafleetError

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 << 10
IDLE_S = 75.0  # maximum wait for a connection's next request
SEND_S = 600.0  # maximum duration of sending one response
MAX_CONNECTIONS = 1024

Locate = Callable[[str], Awaitable[Path | None]]
"""Returns the verified folder of a digest, fetched again if necessary; None for an unknown digest."""

Drop = Callable[[str], Awaitable[int]]
"""Deletes a digest from the disk and returns the bytes freed. Raises Conflict while a name refers to it."""

UPLOADS = "/uploads"
READ_S = 60.0  # maximum wait for the next part of an upload
READ_BYTES = 1 << 18

_PATH = re.compile(r"/adapters/([0-9a-f]{64})(?:/([a-z_.]+))?")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_REASONS = {200: "OK", 206: "Partial Content", 304: "Not Modified", 400: "Bad Request", 401: "Unauthorized",
            404: "Not Found", 405: "Method Not Allowed", 409: "Conflict", 411: "Length Required",
            413: "Content Too Large", 416: "Range Not Satisfiable", 429: "Too Many Requests",
            500: "Internal Server Error", 503: "Service Unavailable", 507: "Insufficient Storage"}  # fmt: skip


@dataclass(slots=True)
class HttpRequest:
    """The head of a request."""

    method: str
    path: str
    headers: dict[str, str]  # by lower-case name
    length: int = 0  # size of the body in bytes; only uploads have one

    @property
    def keep_alive(self) -> bool:
        """Whether the connection stays open for another request; it does not after a body."""
        return not self.length and self.headers.get("connection", "").lower() != "close"


@dataclass(slots=True)
class HttpResponse:
    """A response with a body or a range of a file."""

    status: int
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""
    file: Path | None = None  # sent instead of `body`
    begin: int = 0
    count: int = 0


class BlobServer:
    """Serves blobs over HTTP until it is closed."""

    def __init__(
        self,
        locate: Locate,
        drop: Drop,
        health: Callable[[], dict[str, object]],
        bearer: str = "",
        uploads: Uploads | None = None,
    ) -> None:
        """Prepare without listening. bearer: the token that clients must present; "": none is needed."""
        self._uploads = uploads
        self._locate = locate
        self._drop = drop
        self._health = health
        self._bearer = f"Bearer {bearer}".encode() if bearer else b""
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen on `host`; return the port, a free one for 0. Raises OSError."""
        self._server = await asyncio.start_server(self._connection, host, port, limit=MAX_HEAD_BYTES)
        return self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening and abort every open connection."""
        if self._server is None:
            return
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await self._server.wait_closed()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            async with self._slots:
                while await self._serve_one(reader, writer):
                    pass
        except (ConnectionError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            logger.debug("a connection ended early")
        except Exception:
            logger.exception("cannot answer a request")
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; return whether another may follow on this connection."""
        async with asyncio.timeout(IDLE_S):
            head = await reader.readuntil(b"\r\n\r\n")
        request = _parse(head)
        answer = HttpResponse(400) if request is None else await self._answer(request, reader)
        keep = request is not None and request.keep_alive
        length = answer.count if answer.file else len(answer.body)
        lines = [f"HTTP/1.1 {answer.status} {_REASONS[answer.status]}"]
        headers = {"Content-Length": str(length), **answer.headers, "Connection": "keep-alive" if keep else "close"}
        if answer.status == 304:
            del headers["Content-Length"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        async with asyncio.timeout(SEND_S):
            if answer.file is not None and request is not None and request.method == "GET":
                with answer.file.open("rb") as file:
                    writer.write("\r\n".join([*lines, "", ""]).encode())
                    await writer.drain()
                    await _send(writer, file, answer.begin, answer.count)
            else:
                head_only = request is not None and request.method == "HEAD"
                writer.write("\r\n".join([*lines, "", ""]).encode() + (b"" if head_only else answer.body))
                await writer.drain()
        return keep

    async def _answer(self, request: HttpRequest, reader: asyncio.StreamReader) -> HttpResponse:
        is_upload = request.method == "POST" and request.path == UPLOADS
        if request.method not in ("GET", "HEAD", "DELETE") and not is_upload:
            return HttpResponse(405, {"Allow": "GET, HEAD, DELETE"})
        if request.path == "/health" and request.method != "DELETE":
            return _json(200, self._health())
        shown = request.headers.get("authorization", "").encode("latin-1")
        if self._bearer and not hmac.compare_digest(shown, self._bearer):
            return _error(
                401,
                "the bearer token is missing or wrong",
                {"WWW-Authenticate": "Bearer"},
            )
        if request.path.startswith(UPLOADS) and self._uploads is not None:
            return await self._upload(request, reader, self._uploads)
        match = _PATH.fullmatch(request.path)
        if match is None or (match[2] not in (*FILES, TEXTS_FILE) if request.method != "DELETE" else match[2]):
            return _error(404, f"no such path: {request.path}")
        try:
            if request.method == "DELETE":
                return _json(200, {"freed_bytes": await self._drop(match[1])})
            folder = await self._locate(match[1])
        except Conflict as error:
            return _error(409, error.message)
        except LorafleetError as error:
            return _error(503 if error.retryable else 404, error.message)
        if folder is None:
            return _error(404, f"no such adapter: {match[1]}")
        try:
            size = os.stat(folder / match[2]).st_size
        except FileNotFoundError:  # evicted just now
            if match[2] == TEXTS_FILE and folder.exists():
                return _error(404, f"the adapter has no texts: {match[1]}")
            return _error(503, "the adapter was evicted from disk: retry")
        answer = _file_answer(request, folder / match[2], size, match[1])
        if match[2] == CONFIG_FILE:
            answer.headers[FOLDER_HEADER] = quote(os.fsencode(folder.absolute()))
        return answer

    async def _upload(self, request: HttpRequest, reader: asyncio.StreamReader, uploads: Uploads) -> HttpResponse:
        """Store or delete an uploaded adapter."""
        name = request.path.removeprefix(f"{UPLOADS}/")
        if request.method == "DELETE":
            dropped = await asyncio.to_thread(uploads.drop, name)
            return _json(200, {"deleted": name}) if dropped else _error(404, f"no such upload: {name}")
        if request.method != "POST":
            return _error(404, f"no such path: {request.path}")
        if not request.length:
            return _error(411, "an upload needs a Content-Length")
        body = _body(reader, request.length)
        try:
            return _json(200, {"source": await uploads.take(body, request.length)})
        except LorafleetError as error:
            async for _ in body:  # a client that is still sending would not read the response
                pass
            answer = _json(error.status, {"error": {"message": error.message, "code": error.code}})
            return answer if error.status in _REASONS else _error(409, error.message)


async def _body(reader: asyncio.StreamReader, length: int) -> AsyncIterator[bytes]:
    """Yield a body's chunks. Raises IncompleteReadError if the client disconnects, TimeoutError if it stalls."""
    while length:
        async with asyncio.timeout(READ_S):
            chunk = await reader.read(min(length, READ_BYTES))
        if not chunk:
            raise asyncio.IncompleteReadError(b"", length)
        length -= len(chunk)
        yield chunk


def _file_answer(request: HttpRequest, path: Path, size: int, digest: str) -> HttpResponse:
    """Return the whole file, a range of it, or 304, according to `If-None-Match`, `Range` and `If-Range`."""
    etag = f'"{digest}"'
    headers = {
        "Content-Type": "application/json" if path.suffix == ".json" else "application/octet-stream",
        "ETag": etag,
        "Accept-Ranges": "bytes",
    }
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if etag in known or "*" in known:
        return HttpResponse(304, headers)
    wanted = request.headers.get("range")
    match = _RANGE.fullmatch(wanted) if wanted and request.headers.get("if-range", etag) == etag else None
    if match is None or match[1] == match[2] == "":
        return HttpResponse(200, headers, file=path, count=size)
    first = int(match[1]) if match[1] else max(0, size - int(match[2]))
    last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
    if first > last:
        return HttpResponse(416, headers | {"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    return HttpResponse(206, headers, file=path, begin=first, count=last - first + 1)


async def _send(writer: asyncio.StreamWriter, file: BinaryIO, begin: int, count: int) -> None:
    if count:
        sent = await asyncio.get_running_loop().sendfile(writer.transport, file, begin, count)
        if sent != count:
            raise ConnectionError(f"the file ended after {sent} of {count} bytes")


def _json(status: int, value: object) -> HttpResponse:
    return HttpResponse(status, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> HttpResponse:
    answer = _json(status, {"error": {"message": message}})
    answer.headers |= headers or {}
    return answer


def _parse(head: bytes) -> HttpRequest | None:
    """Parse a request's head; None unless it is HTTP/1.1 without a body, which only an upload may have."""
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    parts = first.split(" ")
    if len(parts) != 3 or parts[2] != "HTTP/1.1":
        return None
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            return None
        headers[name.strip().lower()] = value.strip()
    length, path = headers.get("content-length", "0"), parts[1].partition("?")[0]
    if not re.fullmatch(r"[0-9]{1,15}", length) or "transfer-encoding" in headers:
        return None
    if int(length) and (parts[0] != "POST" or path != UPLOADS):
        return None
    return HttpRequest(parts[0], path, headers, int(length))
