"""Serves the console's static files. They contain no data and no secrets, so no key is needed.

The pages fetch data from the API with the operator's key. They are self-contained: the headers' policy lets the browser
load, fetch and run nothing else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import Response

from gateway.bodies.json_bodies import JsonRoute
from gateway.http.access import API_PAGE, OPEN, Routes
from gateway.http.paths import CONSOLE, DOCS
from protocol.wire.errors import NotFound

FOLDER = Path(__file__).parent / "static"
DOCS_FOLDER = Path(__file__).parent / "docs"
INDEX = "index.html"

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
"""File suffix -> media type. Other files are not served."""

POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:", "connect-src 'self'",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
    "trusted-types 'none'",
))  # fmt: skip
"""Content-Security-Policy: only own files, no inline code, no markup from strings, no framing."""

DOCS_POLICY = POLICY.partition("; require-trusted-types-for")[0]
"""The policy of `/docs`, whose Swagger UI creates markup from strings, but only from its own files."""

HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class ConsolePage:
    """A file of the console."""

    body: bytes
    kind: str
    tag: str  # ETag


@cache
def load(folder: Path = FOLDER) -> dict[str, ConsolePage]:
    """Return the console's files by path. They stay in memory: a few hundred kB in total."""
    pages: dict[str, ConsolePage] = {}
    for path in sorted(folder.rglob("*")):
        kind = KINDS.get(path.suffix)
        if kind is not None and path.is_file():
            body = path.read_bytes()
            tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            pages[path.relative_to(folder).as_posix()] = ConsolePage(body, kind, tag)
    return pages


class ConsolePages:
    """The handlers of the console's paths, or of another folder of pages."""

    path, access, headers = CONSOLE, OPEN, HEADERS
    folder = FOLDER

    def __init__(self) -> None:
        self._pages = load(self.folder)

    async def enter(self) -> Response:
        """Redirect to the path with a slash, which is the base of the files' URLs.

        The location is relative, for any prefix.
        """
        name = self.path.rpartition("/")[2]
        return Response(None, 307, {**self.headers, "location": f"{name}/"})

    async def file(self, name: str, request: Request) -> Response:
        """Answer with a file, or with 304 if the browser has it. Raises NotFound."""
        page = self._pages.get(name or INDEX)
        if page is None:
            raise NotFound(f"{self.path} has no file {name:.100}", code="not_found")
        headers = {**self.headers, "etag": page.tag}
        if request.headers.get("if-none-match") == page.tag:
            return Response(None, 304, headers)
        return Response(page.body, 200, {**headers, "content-type": page.kind})


class DocsPages(ConsolePages):
    """The pages of `/docs`, which show `/openapi.json` in Swagger UI, with the same access rules."""

    path, access, headers = DOCS, API_PAGE, {**HEADERS, "content-security-policy": DOCS_POLICY}
    folder = DOCS_FOLDER


def add_console(app: FastAPI, pages: ConsolePages) -> None:
    """Bind paths to handlers. `/openapi.json` leaves them out: they are not part of the API."""
    routes = Routes(app, JsonRoute)
    routes.get(pages.path, pages.access, include_in_schema=False)(pages.enter)
    routes.get(f"{pages.path}/{{name:path}}", pages.access, include_in_schema=False)(pages.file)
