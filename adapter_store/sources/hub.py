"""Adapters on the Hugging Face Hub: a revision is resolved to its commit, and the files are fetched by commit.

The client library's own download is not used. It does not resume across calls or retry 429 and 5xx, and it returns a
cached snapshot as if it were current when the Hub does not respond.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import httpx2

from adapter_store.sources import (
    FLEET,
    MORE_FILES,
    Changed,
    RemoteFile,
    SourceAccess,
    SourceVersion,
    choose_weights,
    needs_config,
)
from adapter_store.sources.retry import Attempts, Retries
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from protocol.runtime.adapter_refs import parse_reference
from protocol.runtime.free_space import Reserve
from protocol.runtime.imports import Late
from protocol.wire.errors import AdapterRefused, LorafleetError, NotFound, PermissionDenied, Unavailable

if TYPE_CHECKING:
    import huggingface_hub as hub
    from huggingface_hub import constants as hub_constants
    from huggingface_hub import errors as hub_errors
else:  # a fifth of a store's imports, and many stores have only local adapters
    hub, hub_constants = Late("huggingface_hub"), Late("huggingface_hub.constants")
    hub_errors = Late("huggingface_hub.errors")

NO_COOKIES = DefaultCookiePolicy(allowed_domains=())
"""Keeps none: a cookie could carry one caller's access to another tenant's request."""

CHUNK_BYTES = 1 << 20
TIMEOUT = httpx2.Timeout(30.0, connect=10.0)
MAX_REDIRECTS = 5
RETRIED = (429, 500, 502, 503, 504)  # temporary statuses
PICKLE = re.compile(r"adapter_model\.(bin|pt|pth)")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class HubSource:
    """One Hub: huggingface.co, or the server in HF_ENDPOINT."""

    def __init__(
        self,
        endpoint: str = "",
        *,
        token: str | None = None,
        retries: Retries | None = None,
        offline: bool | None = None,
        reserve: Reserve | None = None,
    ) -> None:
        """Prepare a client of `endpoint`, the configured Hub by default.

        token: the fleet's own; default: HF_TOKEN or that of the Hub's login. retries: how calls are repeated. offline:
        make no requests; default: as HF_HUB_OFFLINE says. reserve: see `Source`.
        """
        self._reserve = reserve or Reserve(0)
        self._given = endpoint, token, offline
        self._retries = retries or Retries()
        self._http = httpx2.AsyncClient(timeout=TIMEOUT, follow_redirects=True, headers={"Accept-Encoding": "identity"})
        self._http.cookies.jar.set_policy(NO_COOKIES)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    @cached_property
    def _endpoint(self) -> str:
        return self._given[0] or hub_constants.ENDPOINT

    @cached_property
    def _token(self) -> str | None:
        return self._given[1] or hub.get_token()

    @cached_property
    def _offline(self) -> bool:
        return hub_constants.is_offline_mode() if self._given[2] is None else self._given[2]

    @property
    def _api(self) -> hub.HfApi:
        hub.get_session().cookies.jar.set_policy(NO_COOKIES)  # the library may have made another session meanwhile
        return hub.HfApi(endpoint=self._endpoint)

    def _token_of(self, access: SourceAccess) -> str:
        return access.token or (self._token or "" if access.as_fleet else "")

    # ------------------------------------------------------------ resolve

    def fixed(self, target: str) -> SourceVersion | None:
        """Return the version of a target that names a commit; None for any other."""
        reference = parse_reference(f"hub:{target}")
        return self._version(target) if reference is not None and reference.is_fixed else None

    def _version(self, target: str, files: Mapping[str, RemoteFile] | None = None) -> SourceVersion:
        """Return the version of ORG/NAME@COMMIT."""
        return SourceVersion(f"hub:{self._endpoint}/{target}", source=f"hub:{target}", target=target, files=files or {})

    async def resolve(self, target: str, access: SourceAccess = FLEET) -> SourceVersion:
        """Ask the Hub for the commit and the files of ORG/NAME[@REVISION]; see `Source.resolve`."""
        reference = parse_reference(f"hub:{target}")
        if reference is None:
            raise NotFound(f"{target!r} is not an id on the Hub")
        if self._offline:
            raise Unavailable("the store is in offline mode (HF_HUB_OFFLINE)")
        repo = f"{reference.owner}/{reference.path}"

        def ask() -> Any:
            return self._api.repo_info(
                repo,
                revision=reference.revision or None,
                files_metadata=True,
                timeout=TIMEOUT.read,
                token=self._token_of(access) or False,
            )

        info = await self._retrying(lambda: asyncio.to_thread(ask), repo, reference.revision)
        files = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        weights = choose_weights(files) or WEIGHTS_FILE
        own = (CONFIG_FILE, weights) if needs_config(weights) else (weights,)
        for name in own:
            if name not in files:
                raise AdapterRefused([_why_missing(name, files)])
        found = {name: _remote_file(files[name]) for name in (*own, *MORE_FILES) if name in files}
        return self._version(f"{repo}@{info.sha}", found)

    async def _retrying(self, call: Callable[[], Any], repo: str, revision: str) -> Any:
        """Return the result of `call()`, repeated after temporary errors. Raises LorafleetError."""
        attempts = Attempts(self._retries)
        while True:
            try:
                return await call()
            except hub_errors.GatedRepoError as error:
                raise PermissionDenied(f"{repo} is gated: request access on the Hub, then give a token") from error
            except hub_errors.RevisionNotFoundError as error:
                raise NotFound(f"{repo} has no revision {revision!r}") from error
            except hub_errors.RepositoryNotFoundError as error:
                raise NotFound(
                    f"{repo} does not exist on the Hub, or is private and this token has no access"
                ) from error
            except hub_errors.OfflineModeIsEnabled as error:
                raise Unavailable("the store is in offline mode (HF_HUB_OFFLINE)") from error
            except hub_errors.HfHubHTTPError as error:
                refusal = _refusal(error.response, repo)
                if refusal is not None:
                    raise refusal from error
                await attempts.pause(f"the Hub answered {error.response.status_code}", error.response.headers)
            except httpx2.TransportError as error:
                await attempts.pause(f"the Hub cannot be reached: {type(error).__name__}")

    async def confirm(self, version: SourceVersion, access: SourceAccess) -> None:
        """Request the head of a file, as the Hub shows gated repositories to everyone; see `Source.confirm`."""
        repo, _, commit = version.target.partition("@")
        name = version.weights if version.files and CONFIG_FILE not in version.files else CONFIG_FILE
        url = hub.hf_hub_url(repo, name, revision=commit, endpoint=self._endpoint)
        attempts = Attempts(self._retries)
        num_redirects = 0
        while True:
            try:
                answer = await self._http.head(url, headers=_bearer(self._token_of(access)), follow_redirects=False)
            except httpx2.TransportError as error:
                await attempts.pause(f"the Hub cannot be reached: {type(error).__name__}")
                continue
            if answer.next_request is not None and answer.next_request.url.host == answer.url.host:
                url = str(answer.next_request.url)  # the repository has moved: its new location decides
                num_redirects += 1
                if num_redirects > MAX_REDIRECTS:
                    raise Unavailable(f"the Hub redirects {repo} more than {MAX_REDIRECTS} times")
                continue
            if answer.status_code < 400:
                return  # also for a redirect to the host of the file contents: the Hub has then granted access
            refusal = _refusal(answer, repo)
            if refusal is not None:
                raise refusal
            await attempts.pause(f"the Hub answered {answer.status_code}", answer.headers)

    # ------------------------------------------------------------ fetch

    async def fetch(
        self, version: SourceVersion, name: str, path: Path, end: int, access: SourceAccess = FLEET
    ) -> None:
        """Download a part of a file, with retries; see `Source.fetch`."""
        repo, _, commit = version.target.partition("@")
        url = hub.hf_hub_url(repo, name, revision=commit, endpoint=self._endpoint)
        attempts = Attempts(self._retries)
        with path.open("ab") as file:
            while (at := file.tell()) < end:
                try:
                    await self._read(url, file, end, version.files[name].num_bytes, self._token_of(access))
                except _Answer as answer:
                    refusal = _refusal(answer.response, repo)
                    if refusal is not None:
                        raise refusal from None
                    await attempts.pause(f"the Hub answered {answer.response.status_code}", answer.response.headers)
                except (httpx2.TransportError, _Cut) as error:
                    if file.tell() > at:
                        attempts = Attempts(self._retries)  # progress was made: reset the count
                    await attempts.pause(f"the download of {repo} was interrupted: {type(error).__name__}")

    async def _read(self, url: str, file: BinaryIO, end: int, num_bytes: int, token: str) -> None:
        """Append bytes `[file.tell(), end)` of a remote file of size `num_bytes`."""
        at = file.tell()
        headers = {"Range": f"bytes={at}-{end - 1}"} | _bearer(token)
        # The client drops the Authorization header when the Hub redirects to another host.
        async with self._http.stream("GET", url, headers=headers) as response:
            if response.status_code == 206:
                match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
                if match is None or int(match[1]) != at or int(match[3]) != num_bytes:
                    raise Changed(f"the Hub did not return bytes {at}- of {num_bytes}")
            elif response.status_code == 200:
                at = 0
                file.seek(0)
                file.truncate()
            elif response.status_code == 416:
                raise Changed(f"the Hub reports a file shorter than {num_bytes} bytes")
            else:
                raise _Answer(response)
            await _append(response, file, end - at, lambda num: self._reserve.check(Path(file.name), num))


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


async def _append(response: httpx2.Response, file: BinaryIO, num_bytes: int, check: Callable[[int], None]) -> None:
    """Append `num_bytes` of a body to a file. Raises _Cut if the body ends early; what was received is kept.

    check: raises NoRoom unless the disk has space for this number of bytes.
    """
    pending = bytearray()
    try:
        # Pieces as they arrive: with a fixed size, the client would drop the last incomplete piece of an interrupted
        # body.
        async for piece in response.aiter_raw():
            pending += piece[:num_bytes]
            num_bytes -= min(len(piece), num_bytes)
            if not num_bytes:
                break
            if len(pending) >= CHUNK_BYTES:
                check(len(pending))
                await asyncio.to_thread(file.write, pending)
                pending = bytearray()
    finally:
        file.write(pending)
        file.flush()
    if num_bytes:
        raise _Cut


class _Answer(Exception):
    """A response with a status other than 200 and 206."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response


class _Cut(Exception):
    """A body ended early."""


def _refusal(response: httpx2.Response, repo: str) -> LorafleetError | None:
    """Return the error for a permanent status; None for a status that should be retried."""
    status, code = response.status_code, response.headers.get("x-error-code", "")
    if status in RETRIED:
        return None
    if code == "GatedRepo":
        return PermissionDenied(f"{repo} is gated: request access on the Hub, then give a token")
    if status == 401 and code != "RepoNotFound":
        return PermissionDenied(f"the Hub does not accept the token given for {repo}")
    if status == 403:
        return PermissionDenied(f"the token has no access to {repo}")
    if status in (401, 404):
        return NotFound(f"{repo} does not exist on the Hub, or is private and this token has no access")
    return Unavailable(f"the Hub answered {status} for {repo}")


def _remote_file(sibling: Any) -> RemoteFile:
    if sibling.lfs is not None:
        return RemoteFile(sibling.lfs.size, checksum=("sha256", sibling.lfs.sha256))
    if sibling.size is None:
        raise Unavailable(f"the Hub did not report the size of {sibling.rfilename}")
    return RemoteFile(sibling.size, checksum=("git", sibling.blob_id) if sibling.blob_id else None)


def _why_missing(name: str, files: dict[str, Any]) -> str:
    if name == CONFIG_FILE:
        return f"the repository has no {CONFIG_FILE}: it is not a PEFT adapter"
    pickle = next((file for file in files if PICKLE.fullmatch(file)), None)
    if pickle:
        return f"{pickle} is a pickle, which can run code: convert it to {WEIGHTS_FILE}"
    return f"the repository has no {WEIGHTS_FILE}"
