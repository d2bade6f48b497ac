"""A client of a fleet's HTTP API, for the commands of this package."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2

from lorafleet.launcher.records import URL_VARIABLE, LocalFleet, running, the_only
from lorafleet.shared.parser import Parser, suggestion
from lorafleet.shared.profiles import config_file, load_profile, read_key
from protocol.wire.errors import BadRequest, LorafleetError, NotFound, PermissionDenied, Unauthorized, Unavailable
from protocol.wire.lines import iter_lines

KEY_VARIABLE, PROFILE_VARIABLE = "OPENAI_API_KEY", "LORAFLEET_PROFILE"
DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 60.0

GIVE_KEY = f"; give a valid key with --api-key-file or ${KEY_VARIABLE}"
"""End of every error about a key."""

_KINDS: dict[int, type[LorafleetError]] = {401: Unauthorized, 403: PermissionDenied, 404: NotFound}


def add_flags(parser: Parser) -> None:
    """Declare the flags to choose a fleet: a flag overrides a variable, and a variable overrides the profile."""
    parser.add_argument(
        "--url",
        help=f"the gateway (default: ${URL_VARIABLE}, the profile's, the fleet on this machine, or {DEFAULT_URL})",
    )
    parser.add_argument(
        "--key", metavar="KEY", help="API key; other users of this machine can see it in the process list"
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"file with the API key (default: ${KEY_VARIABLE}, the profile's, or that of the fleet on this machine)",
    )
    parser.add_argument(
        "--profile",
        metavar="NAME",
        default=os.environ.get(PROFILE_VARIABLE, ""),
        help=f"a profile in {config_file()} (default: ${PROFILE_VARIABLE}, or the file's default)",
    )


def add_json_flag(parser: Parser) -> None:
    """Declare that a command can print JSON."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=2))


def in_path(text: str) -> str:
    """Quote a text as part of a URL path. A name keeps its slashes."""
    return quote(text, safe="/:@")


def given_url(args: argparse.Namespace) -> str:
    """Return the gateway's URL from flag, variable or profile, "" if none has one. Raises BadRequest."""
    return args.url or os.environ.get(URL_VARIABLE) or load_profile(args.profile).url


def reason_of(error: Exception) -> str:
    """Return why a server cannot be reached, without the system's error number."""
    return re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__


class Api:
    """A client of one gateway."""

    def __init__(self, args: argparse.Namespace, fleet: LocalFleet | None = None) -> None:
        """args: flags of `add_flags`. fleet: the local fleet to call; None: as the flags say.

        A given fleet only gets the key of a flag or its own, since variable and profile may be for another fleet. A
        local fleet given by the URL of its record gets its own key if nothing gives another. Another spelling of that
        URL does not, since another process may listen there.
        Raises BadRequest if the key or profile cannot be read, or if several local fleets could be meant.
        """
        is_given = fleet is not None
        profile = load_profile(args.profile)
        url = given_url(args)
        if fleet is None and not url:
            fleet = the_only()
        url = fleet.url if fleet is not None else url or DEFAULT_URL
        if args.api_key_file:
            key = read_key(args.api_key_file, "--api-key-file")
        else:
            key = args.key or ("" if is_given else os.environ.get(KEY_VARIABLE) or profile.key)
        self.url: str = url.rstrip("/")
        fleet = fleet or next((one for one in running() if one.url == self.url), None)
        if not key and fleet is not None and fleet.key_file:
            key = read_key(Path(fleet.key_file), "the fleet's key")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._is_default = self.url == DEFAULT_URL
        try:
            self._client = httpx2.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_S, trust_env=False)
        except (httpx2.InvalidURL, UnicodeEncodeError) as error:
            raise BadRequest(f"{self.url!r:.200} is not a usable URL: {error}") from error

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """Return a route's JSON response. Raises the error in the response, and Unavailable."""
        return self.request(method, path, **options).json()

    def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Return a route's response, of any type. Raises as `ask`."""
        try:
            answer = self._client.request(method, path, **options)
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error
        _check(answer)
        return answer

    def _unreachable(self, error: Exception) -> Unavailable:
        hint = "; start a fleet with `lorafleet up MODEL`, or give its --url" if self._is_default else ""
        return Unavailable(f"cannot reach the gateway at {self.url}: {reason_of(error)}{hint}")

    def health(self) -> dict[str, Any]:
        """Return the gateway's health, also if it is not ready. Raises Unavailable if it cannot be reached."""
        try:
            answer = self._client.get("/health")
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error
        if answer.status_code not in (200, 503):
            _check(answer)
        return answer.json()

    def pages(self, path: str, **params: Any) -> Iterator[dict[str, Any]]:
        """Yield the objects of a list, page by page. Raises as `ask`."""
        while True:
            page = self.ask("GET", path, params=params)
            yield from page["data"]
            if not page["has_more"]:
                return
            params["after"] = page["last_id"]

    def download(self, path: str, target: Path) -> None:
        """Write a route's response to a file. Raises as `ask`."""
        try:
            with self._client.stream("GET", path) as answer, target.open("wb") as file:
                if answer.status_code >= 400:
                    answer.read()
                _check(answer)
                for chunk in answer.iter_bytes():
                    file.write(chunk)
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error

    def events(self, path: str, method: str = "GET", **options: Any) -> Iterator[dict[str, Any]]:
        """Yield the events of a stream until it ends. Raises as `ask`."""
        try:
            with self._client.stream(method, path, **options) as answer:
                if answer.status_code >= 400:
                    answer.read()
                _check(answer)
                for line in iter_lines(answer.iter_bytes()):
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield json.loads(line.removeprefix("data: "))
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error


def _check(answer: httpx2.Response) -> None:
    """Raise the error in a route's response."""
    if answer.status_code < 400:
        return
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"the server answered {answer.status_code}: {answer.text[:200]!r}"
    if answer.status_code == 401:  # what the gateway says is for HTTP clients
        message = f"{message.partition(': send')[0]}{GIVE_KEY}"
    default = BadRequest if answer.status_code < 500 else Unavailable
    raise _KINDS.get(answer.status_code, default)(message)


def suggested(api: Api, error: NotFound, name: str) -> NotFound:
    """Return the error for an unknown model or adapter, with the most similar name if there is one."""
    try:
        names = [model["id"] for model in api.ask("GET", "/v1/models")["data"]]
    except LorafleetError:
        return error
    return NotFound(error.message.rstrip(".") + suggestion(name, names))


def run_action(args: argparse.Namespace, code_of: Callable[[Any], int] | None = None) -> int:
    """Run `args.do` with the fleet's API; return the exit code. With `--json` its result is printed here.

    The error for an unknown adapter, `args.adapter`, gets a suggestion.

    code_of: returns the exit code for the result; None: 0. Raises the fleet's error response, and Unavailable.
    """
    with Api(args) as api:
        try:
            answer = args.do(api, args)
        except NotFound as error:
            raise suggested(api, error, args.adapter) if getattr(args, "adapter", "") else error from None
    if args.json:
        print_json(answer)
    return code_of(answer) if code_of is not None else 0
