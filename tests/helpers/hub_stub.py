"""A small Hub for the real client: repositories with commits, private and gated ones, and faults on demand."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from helpers.waiting import wait_until

LFS_BYTES = 2000  # larger files are stored like the Hub's large files


@dataclass(slots=True)
class Repo:
    """One repository: branches and tags refer to commits, and a commit is a set of files."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit to a branch; return its id."""
        seed = repr((branch, len(self.commits), sorted(files.items()))).encode()
        sha = hashlib.sha1(seed, usedforsecurity=False).hexdigest()
        self.commits[sha] = files
        self.refs[branch] = sha
        return sha


@dataclass(slots=True)
class Seen:
    path: str
    range: str
    token: str
    cookie: str


class HubStub:
    """A Hub with repositories, faults and recorded requests, which tests read and change."""

    def __init__(self) -> None:
        self.url = ""
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, set[str]] = {}  # token -> private and gated repositories that it may read
        self.failures: list[tuple[int, dict[str, str]]] = []  # answers to the next requests
        self.cut_at = 0  # number of bytes after which a body breaks off
        self.num_cuts = 0
        self.ignore_ranges = False
        self.gate: asyncio.Event | None = None  # large bodies wait for it after their first bytes
        self.drop_gated = False  # break the gated bodies off when `gate` is set
        self.down = False
        self.moved: dict[str, str] = {}  # old repository name -> new one, to which file requests are redirected
        self.elsewhere = ""  # another host to which file requests are redirected
        self.seen: list[Seen] = []

    def requests(self, part: str) -> list[Seen]:
        return [seen for seen in self.seen if part in seen.path]

    def app(self) -> Starlette:
        info = "/api/models/{org}/{name}"
        return Starlette(
            routes=[
                Route(info, self._info),
                Route(info + "/revision/{rev:path}", self._info),
                Route(info + "/tree/{rev}", self._tree),
                Route("/{org}/{name}/resolve/{rev}/{file:path}", self._file),
            ]
        )

    def _refuse(self, request: Request, *, content: bool) -> Response | None:
        """Record a request; return the response that refuses it, None if it is allowed."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        headers = request.headers
        self.seen.append(Seen(request.url.path, headers.get("range", ""), token, headers.get("cookie", "")))
        if self.down:
            return Response(status_code=503)
        if self.failures:
            status, headers = self.failures.pop(0)
            return Response(status_code=status, headers=headers)
        if token and token not in self.tokens:
            message = "Invalid credentials in Authorization header"
            return Response(status_code=401, headers={"X-Error-Message": message})
        name = "{org}/{name}".format(**request.path_params)
        repo = self.repos.get(name)
        may = name in self.tokens.get(token, set())
        if repo is None or (repo.private and not may):
            return Response(status_code=404 if token else 401, headers={"X-Error-Code": "RepoNotFound"})
        if content and repo.gated and not may:
            return Response(status_code=403 if token else 401, headers={"X-Error-Code": "GatedRepo"})
        return None

    def _find(self, request: Request) -> tuple[str, dict[str, bytes]] | None:
        repo = self.repos["{org}/{name}".format(**request.path_params)]
        revision = request.path_params.get("rev", "main")
        sha = repo.refs.get(revision, revision)
        return (sha, repo.commits[sha]) if sha in repo.commits else None

    async def _info(self, request: Request) -> Response:
        refusal = self._refuse(request, content=False)
        if refusal is not None:
            return refusal
        found = self._find(request)
        if found is None:
            return Response(status_code=404, headers={"X-Error-Code": "RevisionNotFound"})
        sha, files = found
        name = "{org}/{name}".format(**request.path_params)
        siblings = [_sibling(file, content) for file, content in files.items()]
        return JSONResponse({"id": name, "modelId": name, "sha": sha, "tags": [], "siblings": siblings})

    async def _tree(self, request: Request) -> Response:
        refusal = self._refuse(request, content=False)
        if refusal is not None:
            return refusal
        found = self._find(request)
        if found is None:
            return Response(status_code=404, headers={"X-Error-Code": "RevisionNotFound"})
        tree = [
            {"type": "file", "path": file, "size": len(content), "oid": _sibling(file, content)["blobId"]}
            for file, content in found[1].items()
        ]
        return JSONResponse(tree)

    async def _file(self, request: Request) -> Response:
        name = "{org}/{name}".format(**request.path_params)
        if name in self.moved:
            return Response(status_code=307, headers={"Location": request.url.path.replace(name, self.moved[name])})
        refusal = self._refuse(request, content=True)
        if refusal is not None:
            return refusal
        found = self._find(request)
        content = found[1].get(request.path_params["file"]) if found else None
        if found is None or content is None:
            return Response(status_code=404, headers={"X-Error-Code": "EntryNotFound"})
        if self.elsewhere:
            return Response(status_code=302, headers={"Location": self.elsewhere + request.url.path})
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        etag = _sibling("", content)["blobId"]
        headers = {"X-Repo-Commit": found[0], "Accept-Ranges": "bytes", "ETag": f'"{etag}"'}
        body, status = content, 200
        if match and not self.ignore_ranges:
            first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            body, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        headers["Content-Length"] = str(len(body))
        return StreamingResponse(self._send(body), status, headers=headers, media_type="application/octet-stream")

    async def _send(self, body: bytes) -> AsyncIterator[bytes]:
        if self.gate is not None and len(body) > LFS_BYTES:
            yield body[:LFS_BYTES]
            await self.gate.wait()
            if self.drop_gated:
                raise ConnectionError("the body is cut here on purpose")
            body = body[LFS_BYTES:]
        if self.num_cuts and len(body) > self.cut_at:
            self.num_cuts -= 1
            yield body[: self.cut_at]
            raise ConnectionError("the body is cut here on purpose")
        for piece in _pieces(body):
            yield piece


def _pieces(body: bytes, size: int = 1 << 16) -> Iterator[bytes]:
    return (body[at : at + size] for at in range(0, len(body), size))


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob_id}
    if len(content) > LFS_BYTES:
        sibling["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return sibling


@asynccontextmanager
async def run_hub() -> AsyncIterator[HubStub]:
    """Serve a Hub on a free port during the block."""
    hub = HubStub()
    cookie = [("Set-Cookie", "session=of-the-first-caller")]  # a proxy before a Hub may set one with every response
    config = uvicorn.Config(
        hub.app(), host="127.0.0.1", port=0, log_level="critical", lifespan="off", headers=cookie
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.config.setup_event_loop = lambda: None  # type: ignore[method-assign]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server._serve())  # not serve(), which installs signal handlers
        await wait_until(lambda: server.started, "the Hub listens")
        port = server.servers[0].sockets[0].getsockname()[1]
        hub.url = f"http://127.0.0.1:{port}"
        try:
            yield hub
        finally:
            if hub.gate is not None:
                hub.gate.set()
            server.should_exit = True
            server.force_exit = True
