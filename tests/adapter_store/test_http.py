"""The store's HTTP server, byte by byte: ranges, conditions, keep-alive, and malformed requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import unquote

import httpx2
import pytest
import pytest_asyncio
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store.http import BlobServer, HttpRequest, _file_answer
from peft_adapters.format import CONFIG_FILE, FOLDER_HEADER, WEIGHTS_FILE
from protocol.wire.errors import Conflict, NotFound, Unavailable

DIGEST = "a" * 64
BEARER = "0123abcd"
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB: more than a socket accepts at once


@pytest_asyncio.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    (tmp_path / WEIGHTS_FILE).write_bytes(WEIGHTS)
    (tmp_path / CONFIG_FILE).write_bytes(b"{}")

    async def locate(digest: str) -> Path | None:
        if digest == "b" * 64:
            raise Unavailable("the disk is full")
        if digest == "c" * 64:
            raise NotFound("the repository is gone")
        return tmp_path if digest == DIGEST else None

    async def drop(digest: str) -> int:
        if digest == DIGEST:
            raise Conflict("the name x refers to it")
        return 17

    server = BlobServer(locate, drop, lambda: {"status": "ok"}, BEARER)
    port = await server.start("127.0.0.1", 0)
    headers = {"Authorization": f"Bearer {BEARER}"}
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as http:
        yield http
    await server.close()


PATH = f"/adapters/{DIGEST}/{WEIGHTS_FILE}"


async def test_whole_files(client: httpx2.AsyncClient) -> None:
    answer = await client.get(PATH)
    assert answer.status_code == 200
    assert answer.content == WEIGHTS
    assert answer.headers["etag"] == f'"{DIGEST}"'
    assert answer.headers["accept-ranges"] == "bytes"
    config = await client.get(f"/adapters/{DIGEST}/{CONFIG_FILE}")
    assert config.json() == {}
    assert config.headers["content-type"] == "application/json"
    assert (Path(unquote(config.headers[FOLDER_HEADER])) / WEIGHTS_FILE).read_bytes() == WEIGHTS
    head = await client.head(PATH)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(WEIGHTS)))
    assert (await client.get("/health")).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("wanted", "begin", "end"),
    [("bytes=0-0", 0, 1), ("bytes=5-9", 5, 10), ("bytes=1000000-", 1_000_000, None), ("bytes=-7", -7, None),
     ("bytes=10-99999999", 10, None), ("bytes=-99999999", 0, None)],
)  # fmt: skip
async def test_ranges(client: httpx2.AsyncClient, wanted: str, begin: int, end: int | None) -> None:
    answer = await client.get(PATH, headers={"Range": wanted})
    assert answer.status_code == 206
    assert answer.content == WEIGHTS[begin:end]
    first = begin % len(WEIGHTS)
    assert answer.headers["content-range"] == f"bytes {first}-{first + len(answer.content) - 1}/{len(WEIGHTS)}"


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 20))
@settings(max_examples=examples.of(200))
def test_a_range_is_never_more_than_asked_for(first: int, last: int, size: int) -> None:
    request = HttpRequest("GET", "", {"range": f"bytes={first}-{last}"})
    answer = _file_answer(request, Path("x.bin"), size, DIGEST)
    expected = range(size)[first : last + 1]
    assert answer.status == (206 if expected else 416)
    assert answer.count == len(expected)
    assert not expected or answer.begin == expected[0]


async def test_conditions(client: httpx2.AsyncClient) -> None:
    same = await client.get(PATH, headers={"If-None-Match": f'"{DIGEST}"'})
    assert (same.status_code, same.content) == (304, b"")
    assert (await client.get(PATH, headers={"If-None-Match": '"x"'})).status_code == 200
    newer = await client.get(PATH, headers={"Range": "bytes=0-1", "If-Range": '"x"'})
    assert (newer.status_code, len(newer.content)) == (200, len(WEIGHTS))
    beyond = await client.get(PATH, headers={"Range": f"bytes={len(WEIGHTS)}-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(WEIGHTS)}")
    nonsense = await client.get(PATH, headers={"Range": "bytes=1-2,5-6"})
    assert nonsense.status_code == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 404),
        (f"/adapters/{'d' * 64}/{WEIGHTS_FILE}", 404),
        (f"/adapters/{DIGEST}/adapter_model.bin", 404),
        (f"/adapters/{DIGEST}/../../etc/passwd", 404),
        (f"/adapters/{DIGEST[:-1]}/{CONFIG_FILE}", 404),
        (f"/adapters/{DIGEST.upper()}/{CONFIG_FILE}", 404),
        (f"/adapters/{'b' * 64}/{CONFIG_FILE}", 503),
        (f"/adapters/{'c' * 64}/{CONFIG_FILE}", 404),
    ],
)
async def test_what_is_not_there(client: httpx2.AsyncClient, path: str, status: int) -> None:
    answer = await client.get(path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


async def test_writing_is_not_possible(client: httpx2.AsyncClient) -> None:
    answer = await client.put(PATH)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, DELETE")


async def test_blobs_without_a_name_can_be_removed(client: httpx2.AsyncClient) -> None:
    answer = await client.delete(f"/adapters/{'e' * 64}")
    assert (answer.status_code, answer.json()) == (200, {"freed_bytes": 17})
    assert (await client.delete(f"/adapters/{DIGEST}")).status_code == 409
    for path in (PATH, "/adapters/x", "/health"):
        assert (await client.delete(path)).status_code == 404


@pytest.mark.parametrize("shown", ["", f"Bearer {BEARER}x", "Bearer", f"Basic {BEARER}", BEARER, "Bearer \xe9"])
async def test_only_the_fleet_is_served(client: httpx2.AsyncClient, shown: str) -> None:
    """Without the token, not even the existence of an adapter is visible; only the health endpoint is open."""
    headers = [(b"Authorization", shown.encode("latin-1"))]
    for method, path in (("GET", PATH), ("GET", "/adapters/nothing"), ("DELETE", f"/adapters/{DIGEST}")):
        answer = await client.request(method, path, headers=headers)
        assert answer.status_code == 401
        assert DIGEST not in answer.text
    assert (await client.get("/health", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "raw",
    [b"\r\n\r\n", b"GET /health\r\n\r\n", b"GET /health HTTP/1.0\r\n\r\n", b"GET /health HTTP/1.1\r\nnonsense\r\n\r\n",
     b"POST /health HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", b"\xff\xfe\x00 / HTTP/1.1\r\n\r\n"],
)  # fmt: skip
async def test_nonsense_gets_an_answer_and_an_end(client: httpx2.AsyncClient, raw: bytes) -> None:
    assert (await talk(client, raw)).startswith((b"HTTP/1.1 400", b"HTTP/1.1 405"))


async def test_an_endless_head_is_cut_off(client: httpx2.AsyncClient) -> None:
    assert await talk(client, b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 10_000) == b""


async def test_two_requests_on_one_connection(client: httpx2.AsyncClient) -> None:
    get = b"GET /health HTTP/1.1\r\n"
    raw = await talk(client, get + b"\r\n" + get + b"\r\n")
    assert raw.count(b"HTTP/1.1 200 OK") == 2


async def talk(client: httpx2.AsyncClient, raw: bytes) -> bytes:
    """Send raw bytes; return everything received until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    try:
        writer.write(raw)
        writer.write_eof()
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()
