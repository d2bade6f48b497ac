"""JSON input and output: bodies are read within the limits of `json_values`, large answers written by `json_slices`."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping, MutableMapping
from functools import partial, wraps
from typing import Any, TypeVar

from fastapi import Request, routing
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, compile_path
from starlette.types import Receive, Scope, Send

from gateway.auth.callers import CALLER, caller_of
from gateway.bodies import json_values
from gateway.bodies.json_slices import dumps, has_rows, slices
from gateway.bodies.parameter_check import IGNORED_HEADER, JsonBody, check_parameters
from gateway.http.access import MATCH, RouteAccess
from gateway.http.errors import ERROR_SHAPE, OPENAI_ERRORS
from gateway.http.headers import header_of
from gateway.http.paths import OPENAI_FORMS
from gateway.overload.cost import hold_values
from gateway.overload.large import PLAIN_BYTES, Checks, Working, keep
from gateway.overload.loop_slice import LoopSlice
from gateway.overload.memory import bytes_of_values, values_bytes
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

T = TypeVar("T")

logger = logging.getLogger(__name__)

SLOWLY_FREED_BYTES = 1 << 19
"""Minimum bytes of a body that is freed in a thread: returning its pages to the system takes 0.4 ms per megabyte."""

SENT_BYTES = 1 << 13
"""Bytes of a large answer that are collected before they are sent."""

Handler = Callable[..., Coroutine[Any, Any, Response]]

_filling = threading.RLock()


async def body_value(raw: bytes, scope: MutableMapping[str, Any]) -> Any:
    """Return the parsed body of a request, and charge a call for it. Long or nested JSON is parsed in a thread.

    Raises JSONDecodeError; HTTPException, which FastAPI passes on, for too many values; and as `cost.hold`.
    """
    is_call = scope[MATCH].kind == "call"
    try:
        if len(raw) <= PLAIN_BYTES and json_values.is_shallow(raw):
            if is_call:
                hold_values(len(raw), values_bytes(raw))
            return json_values.loads(raw)
        marks = await in_thread(scope, partial(json_values.Marks, raw))
        if is_call:
            hold_values(len(raw), bytes_of_values(len(raw), marks.num_values, marks.num_containers))
        value = await in_thread(scope, marks.value)
        keep(value)
        return value
    except BadRequest as error:
        raise HTTPException(400, error.message) from error


async def in_thread(scope: MutableMapping[str, Any], make: Callable[[], T]) -> T:
    """Return the result of a function that processes a request's body, run in a thread in the tenant's turn."""
    checks: Checks = scope["app"].state.checks
    return await checks.in_thread(make, scope[CALLER].owner)


async def written(scope: MutableMapping[str, Any], make: Callable[[], T]) -> T:
    """Return the result of a function that makes an answer, as `in_thread`, but without delaying bodies."""
    writing: Checks = scope["app"].state.writing
    return await writing.in_thread(make, scope[CALLER].owner)


def note_form(scope: MutableMapping[str, Any], value: Any) -> None:
    """If the path accepts two forms of body and this is OpenAI's, set the request's error format accordingly."""
    fields = OPENAI_FORMS.get(scope["path"])
    if fields is not None and isinstance(value, dict) and value.keys() & fields:
        scope[ERROR_SHAPE] = OPENAI_ERRORS


class _JsonRequest(Request):
    """Parses bodies with `body_value`."""

    async def json(self) -> Any:
        value = await body_value(await self.body(), self.scope)
        note_form(self.scope, value)
        return value


class JsonRoute(APIRoute):
    """A route whose bodies are read within limits: a large one when it has its turn, once it has arrived completely.

    A `JsonBody` is refused if it has parameters that would have no effect; its handler also takes the request. The
    handler of a call takes nothing else, so calls skip FastAPI's dependency resolution.

    FastAPI's data about a handler and its body's model are created on first use, by a request or for /openapi.json.
    That takes 2 to 4 ms per route, 25 for the first, and a gateway has more than a hundred routes. For a request it is
    done in a thread, see `make`.
    """

    any_type = False
    """Whether a body is parsed as JSON whatever its content type is."""

    _is_made = False

    def __init__(self, path: str, endpoint: Handler, *, access: RouteAccess, **options: Any) -> None:
        """access: the route's access rules. The other arguments are FastAPI's.

        Raises TypeError for a call whose handler takes anything but its body and the request.
        """
        self.access = access
        taken = list(inspect.signature(endpoint).parameters)
        if access.kind == "call" and taken != ["body", "request"]:
            raise TypeError(f"the handler of {path} takes {', '.join(taken)}; calls have body and request")
        self._fill = functools.partial(super().__init__, path, _checked(endpoint), **options)
        # The router reads these four attributes before FastAPI's initialization.
        self.path, self.methods = path, set(options["methods"])
        self.path_regex, _, self.param_convertors = compile_path(path)
        self._making = asyncio.Lock()

    async def make(self) -> None:
        """Complete this route in a thread, once. Raises what FastAPI raises."""
        if self._is_made:
            return
        async with self._making:
            if not self._is_made:
                await asyncio.to_thread(self._make)

    def _make(self) -> None:
        """Complete this route unless that is done; wait if another thread is doing it.

        A failure is raised on every call.
        """
        with _filling:  # /openapi.json is generated in a thread, concurrently with requests
            fill = self.__dict__.pop("_fill", None)  # FastAPI reads attributes during the call
            if fill is None:
                return
            try:
                fill()
                # FastAPI would read a handler's source file at its first call, for error messages, and cache it.
                getattr(routing, "_extract_endpoint_context")(self.dependant.call)  # noqa: B009  private
            except BaseException:
                self._fill = fill
                raise
            self._is_made = True

    def __getattr__(self, name: str) -> Any:
        """Complete this route; return one of its attributes. Raises AttributeError, and what FastAPI raises."""
        with _filling:
            self._make()
            if name not in self.__dict__:
                raise AttributeError(f"{type(self).__name__} has no {name}")
            return self.__dict__[name]

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match the requests that `RouteTable` assigned to this route, whatever their path: only that was checked."""
        found = scope.get(MATCH)
        if found is None or found.route is not self:
            return Match.NONE, {}
        return Match.FULL, {"endpoint": self.endpoint, "path_params": dict(found.params), "route": self}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Raises client errors, and the handler's errors."""
        if self.access.kind != "call":
            await super().handle(scope, receive, send)
            return
        request = Request(scope, receive)
        await _whole(request)
        raw = [await request.body()]
        async with Working():
            body = await self._body_of(raw[0], request)
            response = await self.endpoint(body=body, request=request)
        del request, body  # so that the body can be freed before the answer is sent
        if len(raw[0]) > SLOWLY_FREED_BYTES:
            await asyncio.to_thread(raw.clear)
        else:
            raw.clear()
        await response(scope, receive, send)

    async def _body_of(self, raw: bytes, request: Request) -> Any:
        """Return the body as the route's model. Raises HTTPException and RequestValidationError as FastAPI does."""
        refused = partial(RequestValidationError, body=None)
        if not raw:
            raise refused([{"type": "missing", "loc": ("body",), "msg": "", "input": None}])
        if not self.any_type and not _is_json(header_of(request.scope["headers"], b"content-type") or ""):
            raise refused([{"type": "model_type", "loc": ("body",), "msg": "", "input": None}])
        try:
            value = await body_value(raw, request.scope)
        except json.JSONDecodeError as error:
            place = {"loc": ("body", error.pos), "ctx": {"error": error.msg}}
            raise refused([{"type": "json_invalid", "msg": "", "input": {}, **place}]) from error
        note_form(request.scope, value)
        assert self.body_field is not None
        validate = partial(self.body_field.validate, value, {}, loc=("body",))
        body, errors = validate() if len(raw) <= PLAIN_BYTES else await in_thread(request.scope, validate)
        if errors:
            raise refused(errors)
        return body

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler."""
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def handle(request: Request) -> Response:
            scope = request.scope
            if self.any_type:
                rest = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
                scope = {**scope, "headers": [*rest, (b"content-type", b"application/json")]}
            request = _JsonRequest(scope, request.receive)
            await _whole(request)
            async with Working():
                return await handler(request)

        return handle


class AnyTypeRoute(JsonRoute):
    """A route whose clients need not declare that their bodies are JSON, such as curl in Ollama's documentation."""

    any_type = True


async def _whole(request: Request) -> None:
    """Wait until a body is complete. Raises HTTPException if its client leaves before.

    Starlette would join the parts on the event loop, which takes one or two milliseconds for megabytes.
    """
    parts: list[bytes] = []
    has_more = True
    while has_more:  # `request.stream()`, an async generator, would take more time than a small body itself
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise HTTPException(400, "the client left before its body was complete")
        if part := message.get("body", b""):
            parts.append(part)
        has_more = message.get("more_body", False)
    is_long = sum(map(len, parts)) > PLAIN_BYTES and len(parts) > 1
    setattr(request, "_body", await asyncio.to_thread(b"".join, parts) if is_long else b"".join(parts))  # noqa: B010


def _is_json(content_type: str) -> bool:
    """Return whether a media type is JSON: `application/json`, or one that ends in `+json`."""
    kind, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    return kind == "application" and (subtype == "json" or (subtype.endswith("+json") and "/" not in subtype))


def _checked(endpoint: Handler) -> Handler:
    """Return a handler that applies `check_parameters` to its body first."""

    @wraps(endpoint)
    async def checked(*, request: Request, body: JsonBody, **others: Any) -> Response:
        settings: Settings = request.app.state.settings
        check = partial(check_parameters, body, settings.unknown_parameters)
        is_long = len(await request.body()) > PLAIN_BYTES
        ignored = await in_thread(request.scope, check) if is_long else check()
        if ignored:
            logger.warning("%s is served without %s", request.scope["path"], ignored)
            caller_of(request).headers[IGNORED_HEADER] = ignored
        return await endpoint(request=request, body=body, **others)

    return checked if "body" in inspect.signature(endpoint).parameters else endpoint


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON response with a value, which may contain `RowSlices`."""
    return Response(dumps(value), status, headers, media_type="application/json")


def json_answer(value: Any, status: int = 200) -> Response:
    """Return a JSON response with a value, written in slices if it contains `RowSlices`."""
    return SlicedResponse(value, status) if has_rows(value) else json_response(value, status)


class SlicedResponse(Response):
    """A JSON response that is made and sent slice by slice, at its client's pace; other tasks run in between.

    So it is never completely in memory, and has no Content-Length.
    """

    media_type = "application/json"

    def __init__(
        self,
        value: Any,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        is_over: Callable[[], bool] | None = None,
        *,
        in_thread: bool = False,
    ) -> None:
        """is_over: returns whether the client has left; None: the response detects that itself.

        in_thread: make slices in a thread, round-robin by tenant, because a row takes milliseconds.
        """
        super().__init__(None, status, headers)
        self._value = value
        self._in_thread = in_thread
        self._is_over = is_over
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response until its client leaves."""
        if self._is_over is not None:
            await self._send(scope, send, self._is_over)
            return
        left = asyncio.create_task(disconnected(receive))
        try:
            await self._send(scope, send, left.done)
        finally:
            left.cancel()

    async def _send(self, scope: Scope, send: Send, is_over: Callable[[], bool]) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        gathered, next_part, turn = b"", partial(next, slices(self._value), b""), LoopSlice()
        while part := await written(scope, next_part) if self._in_thread else next_part():
            gathered += part
            if len(gathered) >= SENT_BYTES:
                if is_over():
                    return
                await send({"type": "http.response.body", "body": gathered, "more_body": True})
                gathered = b""
                await asyncio.sleep(0)
            await turn.pause()
        await send({"type": "http.response.body", "body": gathered, "more_body": False})


async def disconnected(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
