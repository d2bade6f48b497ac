"""Fetches adapters from the stores by digest and verifies them. Blocking: for loader threads only."""

from __future__ import annotations

import logging
import mmap
import os
import stat
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPSConnection
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import msgspec

from gpu_worker.host_memory import MemoryBudget
from peft_adapters.format import CONFIG_FILE, FOLDER_HEADER, WEIGHTS_FILE, adapter_digest
from peft_adapters.safetensors_header import read_header
from peft_adapters.texts.files import TEXTS_FIELD, TEXTS_FILE, parse_texts
from peft_adapters.texts.tokenizer_json import AddedToken
from protocol.wire.errors import AdapterRefused, Internal, NotFound, Unavailable

logger = logging.getLogger(__name__)

FETCH_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 2.0
SILENCE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class FetchedAdapter:
    """An adapter as stored by the store."""

    config: dict[str, Any]
    weights: bytes | bytearray | memoryview | mmap.mmap  # a safetensors file
    added: list[AddedToken] | None = None  # tokens added to the base's tokenizer, if it has its own


Allocate = Callable[[int], Any]
"""Returns writable memory of the given number of bytes, as a buffer, for an adapter's weights."""


Turn = Callable[[int], AbstractContextManager[object]]
"""Returns the lock for checking an adapter, which is CPU-bound; called with the bytes of its weights."""


class StoreClient:
    """Fetches adapters from any of the stores that are alive."""

    def __init__(self, bearer: str = "") -> None:
        """bearer: the token for the stores, `FleetSecret.bearer`."""
        self.urls: tuple[str, ...] = ()
        self._elsewhere: set[str] = set()  # stores that returned wrong content: their folders may be another machine's
        self._known = threading.Event()
        self._memory = MemoryBudget(FETCH_TIMEOUT_S)
        self._headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}

    def set_urls(self, urls: tuple[str, ...]) -> None:
        """Set the URLs of the stores that are alive. Fetches in progress try these next."""
        self.urls = urls
        if urls:
            self._known.set()

    def fetch(
        self, digest: str, allocate: Allocate = bytearray, turn: Turn = lambda _: nullcontext()
    ) -> FetchedAdapter:
        """Return an adapter's files, from the first store that has them. Blocks for up to about FETCH_TIMEOUT_S.

        allocate: returns the memory into which the weights are read, so that large ones are in memory once. turn: the
        lock held while they are checked. Raises Unavailable when no store answers, NotFound when none has the adapter,
        AdapterRefused, Internal.
        """
        deadline = time.monotonic() + FETCH_TIMEOUT_S
        pause_s = 0.1
        while True:
            self._known.wait(max(0.0, deadline - time.monotonic()))
            missing = 0
            urls = self.urls
            for url in urls:
                try:
                    files = self._fetch_from(url, digest, allocate)
                except NotFound:
                    missing += 1
                except (OSError, HTTPException) as error:
                    logger.warning("store %s did not return adapter %.12s: %r", url, digest, error)
                else:
                    with turn(len(files.weights)):
                        is_right = self._is_right(files, url, digest)
                    if is_right:
                        return files
                    self._elsewhere.add(url)
                    logger.error("store %s returned different content for adapter %.12s; retrying", url, digest)
            if urls and missing == len(urls):
                raise NotFound(f"no adapter store has the adapter {digest:.12}", param="model")
            if time.monotonic() > deadline:
                raise Unavailable(f"no adapter store returned the adapter {digest:.12} within {FETCH_TIMEOUT_S:.0f} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 2.0)

    def _is_right(self, files: FetchedAdapter, url: str, digest: str) -> bool:
        """Return whether a store's files match a digest. Raises AdapterRefused if they are not an adapter at all."""
        try:
            return digest_of(files) == digest
        except AdapterRefused:
            if url in self._elsewhere:
                raise
            return False  # perhaps from another machine's folder: the store is asked over HTTP next

    def _fetch_from(self, url: str, digest: str, allocate: Allocate) -> FetchedAdapter:
        """Return an adapter's files from one store, unverified. Raises NotFound, Internal, OSError, HTTPException."""
        with closing(_connect(url)) as connection:
            folder = f"{urlsplit(url).path.rstrip('/')}/adapters/{digest}"
            content, headers = self._get(connection, f"{folder}/{CONFIG_FILE}")
            config, own_folder = _parse(content), headers.get(FOLDER_HEADER)
            weights = None
            if own_folder and url not in self._elsewhere:
                weights = self._read(os.path.join(os.fsdecode(unquote_to_bytes(own_folder)), WEIGHTS_FILE), allocate)
            if weights is None:
                weights, _ = self._get(connection, f"{folder}/{WEIGHTS_FILE}", allocate)
            texts = config.get(TEXTS_FIELD)
            own = parse_texts(self._get(connection, f"{folder}/{TEXTS_FILE}")[0], texts).tokenizer if texts else None
            return FetchedAdapter(config, weights, own.added if own is not None else None)

    def _read(self, path: str, allocate: Allocate) -> Any:
        """Return a file of a store on the same machine, None if it cannot be read here. Raises Unavailable.

        This takes a third of the CPU time of a connection. Only regular files are read, and content is not trusted
        until its digest is checked: the path may mean something else on this machine.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb", buffering=0) as file:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode) or not status.st_size:
                    return None
                with self._memory.hold(status.st_size):
                    memory = allocate(status.st_size)
                    return memory if _fill(memory, file.readinto, status.st_size) == status.st_size else None
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            logger.debug("%r cannot be read here: %r", path, error)
            return None

    def _get(self, connection: HTTPConnection, path: str, allocate: Allocate = bytearray) -> tuple[Any, HTTPMessage]:
        """Return the content of a path of a store, and the headers.

        Raises NotFound, Internal, OSError, HTTPException.
        """
        connection.request("GET", path, headers=self._headers)
        response = connection.getresponse()
        if response.status == 404:
            raise NotFound(f"{path} is not there")
        if response.status == 401:
            raise Internal("the adapter store does not know this worker: their secrets differ")
        if response.status != 200:
            raise HTTPException(f"{response.status} {response.read(200)!r}")
        num_bytes = int(response.getheader("Content-Length", "0"))
        with self._memory.hold(num_bytes):
            memory = allocate(num_bytes) if num_bytes else bytearray()
            num_read = _fill(memory, response.readinto, num_bytes)
        if num_read < num_bytes:
            raise HTTPException(f"{path} ends after {num_read} of {num_bytes} bytes")
        return memory, response.headers


def _fill(memory: Any, read_into: Callable[[memoryview], int | None], num_bytes: int) -> int:
    """Read up to `num_bytes` into the beginning of memory. Return the number of bytes read, fewer only at the end."""
    num_read = 0
    with memoryview(memory) as view:
        while num_read < num_bytes and (num := read_into(view[num_read:num_bytes])):
            num_read += num
    return num_read


def _connect(url: str) -> HTTPConnection:
    # The standard library's client takes a third of the CPU time of richer clients; steps need the CPU.
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=CONNECT_TIMEOUT_S)
    connection.connect()
    connection.sock.settimeout(SILENCE_TIMEOUT_S)
    return connection


def digest_of(files: FetchedAdapter) -> str:
    """Return the digest of an adapter's files. Raises AdapterRefused if the weights are not a safetensors file."""
    return adapter_digest(files.config, read_header(files.weights), files.weights)


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(raw, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise AdapterRefused([f"adapter_config.json is not a JSON object: {error}"]) from error
