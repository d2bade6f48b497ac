"""OpenAI's routes for files."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal
from urllib.parse import quote

from fastapi import FastAPI, Query, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.auth.callers import caller_of
from gateway.bodies.json_bodies import JsonRoute, disconnected, json_answer, json_response
from gateway.bodies.json_slices import ROWS, RowSlices
from gateway.files.files import FileService, view
from gateway.files.storage import close
from gateway.files.upload import UploadedForm
from gateway.http import openapi
from gateway.http.access import FILE, INFER, Routes
from gateway.http.paths import FILES
from protocol.wire import messages as m


class FileEndpoints:
    """The routes' handlers."""

    def __init__(self, files: FileService, max_file_bytes: int) -> None:
        self._files = files
        self._max_file_bytes = max_file_bytes

    async def upload(self, request: Request) -> Response:
        """Answer `POST /v1/files`."""
        form = UploadedForm(request.headers.get("content-type", ""), self._max_file_bytes)
        length = int(request.headers.get("content-length", "0"))  # 0 for a chunked body
        return json_response(view(await self._files.upload(form, request.stream(), caller_of(request), length)))

    async def list(
        self,
        request: Request,
        purpose: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """Answer `GET /v1/files`."""
        page = await self._files.list(caller_of(request), purpose, limit, after, oldest_first=order == "asc")
        rows = page["data"]
        return json_answer({**page, "data": RowSlices(lambda: rows)} if len(rows) > ROWS else page)

    async def file(self, file_id: str, request: Request) -> Response:
        """Answer `GET /v1/files/{id}`."""
        return json_response(view(await self._files.get(file_id, caller_of(request))))

    async def content(self, file_id: str, request: Request) -> Response:
        """Answer `GET /v1/files/{id}/content`."""
        return FileContent(self._files, await self._files.get(file_id, caller_of(request)))

    async def delete(self, file_id: str, request: Request) -> Response:
        """Answer `DELETE /v1/files/{id}`."""
        await self._files.delete(file_id, caller_of(request))
        return json_response({"id": file_id, "object": "file", "deleted": True})


class FileContent(Response):
    """The content of a file, sent at its client's pace."""

    media_type = "application/octet-stream"

    def __init__(self, files: FileService, file: m.File) -> None:
        headers = {
            "content-length": str(file.num_bytes),
            "content-disposition": f"attachment; filename*=utf-8''{quote(file.filename)}",
        }
        super().__init__(None, 200, headers)
        self._chunks = files.read(file)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the content. Raises NotFound, before anything is sent, if it is missing."""
        chunk: bytes | None = await anext(self._chunks, None)
        left = asyncio.create_task(disconnected(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while chunk is not None and not left.done():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                chunk = await anext(self._chunks, None)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            left.cancel()
            await close(self._chunks)


def add_file_routes(app: FastAPI, files: FileEndpoints) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, JsonRoute)
    routes.post(FILES, FILE, responses=openapi.FILE, openapi_extra=openapi.UPLOAD)(files.upload)
    routes.get(FILES, INFER, responses=openapi.PAGE)(files.list)
    routes.get(f"{FILES}/{{file_id}}", INFER, responses=openapi.FILE)(files.file)
    routes.get(f"{FILES}/{{file_id}}/content", INFER, responses=openapi.CONTENT)(files.content)
    routes.delete(f"{FILES}/{{file_id}}", INFER, responses=openapi.DELETED)(files.delete)
