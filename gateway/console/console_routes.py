"""The console's files, as they are in the package: without data and without secrets, so anybody may read them.

What they show they ask of the routes of the API with the operator's key. They bring all that they need: the policy of
their headers lets the browser load, ask and run nothing else.
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
"""End of a file's name -> its media type. Files of other kinds are not served."""

POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:", "connect-src 'self'",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
    "trusted-types 'none'",
))  # fmt: skip
"""Content-Security-Policy: own files alone, no code in pages, no markup made of text, shown within no other page."""

DOCS_POLICY = POLICY.partition("; require-trusted-types-for")[0]
"""That of `/docs`: Swagger UI writes markup by itself, out of files of its own alone."""

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
    """Return the console's files by their paths. They have a few hundred kB together, and stay in memory."""
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
        """Send a browser to the path with a slash, below which its files are, whatever prefix stands before it."""
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
    """The pages of `/docs`, which show what `/openapi.json` says with Swagger UI: who may see one may see the other."""

    path, access, headers = DOCS, API_PAGE, {**HEADERS, "content-security-policy": DOCS_POLICY}
    folder = DOCS_FOLDER


def add_console(app: FastAPI, pages: ConsolePages) -> None:
    """Bind paths to handlers. They are no part of the API, so its description has none of them."""
    routes = Routes(app, JsonRoute)
    routes.get(pages.path, pages.access, include_in_schema=False)(pages.enter)
    routes.get(f"{pages.path}/{{name:path}}", pages.access, include_in_schema=False)(pages.file)
