"""A fleet's HTTP API, as the commands of this package use it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from protocol.wire.errors import BadRequest, LorafleetError, NotFound, Unauthorized, Unavailable

URL_VARIABLE, KEY_VARIABLE = "LORAFLEET_URL", "OPENAI_API_KEY"
DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 60.0

_KINDS: dict[int, type[LorafleetError]] = {401: Unauthorized, 404: NotFound}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare how the fleet is reached."""
    parser.add_argument(
        "--url", default=os.environ.get(URL_VARIABLE, DEFAULT_URL),
        help=f"the fleet's gateway (default: ${URL_VARIABLE}, or {DEFAULT_URL})",
    )  # fmt: skip
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help=f"file that holds the API key (default: ${KEY_VARIABLE})"
    )


class Api:
    """A client of one gateway."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Take the flags of `add_flags`. Raises BadRequest when the key cannot be read."""
        try:
            key = args.api_key_file.read_text().strip() if args.api_key_file else os.environ.get(KEY_VARIABLE, "")
        except OSError as error:
            raise BadRequest(f"--api-key-file: cannot read {args.api_key_file}: {error.strerror}") from error
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.url: str = args.url.rstrip("/")
        self._client = httpx2.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_S, trust_env=False)

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """Return the answer of a route. Raises the error that it is answered with, and Unavailable."""
        try:
            answer = self._client.request(method, path, **options)
        except httpx2.HTTPError as error:
            raise _unreachable(self.url, error) from error
        _check(answer)
        return answer.json()

    def download(self, path: str, target: Path) -> None:
        """Write what a route answers to a file. Raises as `ask`."""
        try:
            with self._client.stream("GET", path) as answer, target.open("wb") as file:
                if answer.status_code >= 400:
                    answer.read()
                _check(answer)
                for chunk in answer.iter_bytes():
                    file.write(chunk)
        except httpx2.HTTPError as error:
            raise _unreachable(self.url, error) from error

    def events(self, path: str) -> Iterator[dict[str, Any]]:
        """Yield the events of a stream, until its end. Raises as `ask`."""
        try:
            with self._client.stream("GET", path) as answer:
                if answer.status_code >= 400:
                    answer.read()
                _check(answer)
                for line in answer.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield json.loads(line.removeprefix("data: "))
        except httpx2.HTTPError as error:
            raise _unreachable(self.url, error) from error


def _check(answer: httpx2.Response) -> None:
    """Raise the error that a route has answered with."""
    if answer.status_code < 400:
        return
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"the server answers {answer.status_code}: {answer.text[:200]!r}"
    default = BadRequest if answer.status_code < 500 else Unavailable
    raise _KINDS.get(answer.status_code, default)(message)


def _unreachable(url: str, error: Exception) -> Unavailable:
    return Unavailable(f"no gateway answers at {url}: {error or type(error).__name__}")
