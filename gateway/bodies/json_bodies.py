"""JSON in and out: bodies are read within the limits of `json_values`, large answers written by `json_slices`."""

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
"""Bytes of a body that are freed in a thread: returning their pages to the system takes 0.4 ms a megabyte."""

SENT_BYTES = 1 << 13
"""Bytes of a large answer that are gathered before they are sent."""

Handler = Callable[..., Coroutine[Any, Any, Response]]

_filling = threading.RLock()


async def body_value(raw: bytes, scope: MutableMapping[str, Any]) -> Any:
    """Return the value of a request's body, and charge a call for it. What is long or nested is read in a thread.

    Raises JSONDecodeError; HTTPException, as FastAPI lets it pass, for too many values; and as `cost.hold`.
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
    """Return what a function makes of a request's body, in a thread, at a turn of its tenant's."""
    checks: Checks = scope["app"].state.checks
    return await checks.in_thread(make, scope[CALLER].owner)


async def written(scope: MutableMapping[str, Any], make: Callable[[], T]) -> T:
    """Return what a function makes for an answer as `in_thread` does, in turns that no body waits for."""
    writing: Checks = scope["app"].state.writing
    return await writing.in_thread(make, scope[CALLER].owner)


def note_form(scope: MutableMapping[str, Any], value: Any) -> None:
    """Note that a body has errors in OpenAI's form, where its path has two forms of body and this is not LoRAX's."""
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
    """A route whose bodies are read within limits: a large one in its turn, once all of it is there.

    A body that is a `JsonBody` may have no parameter that would have no effect; a handler takes it with its request.
    The handler of a call takes nothing else, so calls need none of what FastAPI does to solve dependencies.

    What FastAPI needs to know of a handler and of its body's model is made when it is first asked for, by a request or
    for /openapi.json: 2 to 4 milliseconds a route and 25 for the first, with a hundred routes and more in a gateway. A
    request has it made in a thread, see `make`.
    """

    any_type = False
    """Whether a body is taken for JSON whatever its content type says."""

    _is_made = False

    def __init__(self, path: str, endpoint: Handler, *, access: RouteAccess, **options: Any) -> None:
        """`access`: what it asks of its callers. The rest is FastAPI's.

        Raises TypeError for a call whose handler takes more than its body and the request.
        """
        self.access = access
        taken = list(inspect.signature(endpoint).parameters)
        if access.kind == "call" and taken != ["body", "request"]:
            raise TypeError(f"the handler of {path} takes {', '.join(taken)}; calls have body and request")
        self._fill = functools.partial(super().__init__, path, _checked(endpoint), **options)
        # The router reads these four before a first request makes FastAPI fill in the others.
        self.path, self.methods = path, set(options["methods"])
        self.path_regex, _, self.param_convertors = compile_path(path)
        self._making = asyncio.Lock()

    async def make(self) -> None:
        """Make the rest of this route in a thread, once. Raises what FastAPI raises."""
        if self._is_made:
            return
        async with self._making:
            if not self._is_made:
                await asyncio.to_thread(self._make)

    def _make(self) -> None:
        """Make the rest of this route, unless somebody has; wait for another thread that does. As often as it fails."""
        with _filling:  # the page of the API is made in a thread, beside requests
            fill = self.__dict__.pop("_fill", None)  # FastAPI asks for attributes meanwhile
            if fill is None:
                return
            try:
                fill()
                # FastAPI reads the source of a handler at its first call, to name it in errors, and keeps that.
                getattr(routing, "_extract_endpoint_context")(self.dependant.call)  # noqa: B009  private
            except BaseException:
                self._fill = fill
                raise
            self._is_made = True

    def __getattr__(self, name: str) -> Any:
        """Make the rest of this route; return an attribute of it. Raises AttributeError, and what FastAPI raises."""
        with _filling:
            self._make()
            if name not in self.__dict__:
                raise AttributeError(f"{type(self).__name__} has no {name}")
            return self.__dict__[name]

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match the requests that were found to be this route's, whatever their path: nothing else was checked."""
        found = scope.get(MATCH)
        if found is None or found.route is not self:
            return Match.NONE, {}
        return Match.FULL, {"endpoint": self.endpoint, "path_params": dict(found.params), "route": self}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Raises what the client did wrong, and what its handler raises."""
        if self.access.kind != "call":
            await super().handle(scope, receive, send)
            return
        request = Request(scope, receive)
        await _whole(request)
        raw = [await request.body()]
        async with Working():
            body = await self._body_of(raw[0], request)
            response = await self.endpoint(body=body, request=request)
        del request  # and its body with it, which is not held until the answer's end
        if len(raw[0]) > SLOWLY_FREED_BYTES:
            await asyncio.to_thread(raw.clear)
        else:
            raw.clear()
        await response(scope, receive, send)

    async def _body_of(self, raw: bytes, request: Request) -> Any:
        """Return a body as the route's type. Raises HTTPException and RequestValidationError as FastAPI does."""
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
    """A route whose clients need not say that their bodies are JSON, such as curl in Ollama's documentation."""

    any_type = True


async def _whole(request: Request) -> None:
    """Wait until all of a body is there. Raises HTTPException if its client leaves before.

    Starlette would join its parts on the event loop, which takes a millisecond or two for megabytes.
    """
    parts: list[bytes] = []
    has_more = True
    while has_more:  # not `request.stream()`: an asynchronous generator costs a small call more than its body does
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
    """Return a handler that is called with bodies whose parameters `check_parameters` has judged."""

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
    """Return a value, which may hold `RowSlices`, as a JSON answer."""
    return Response(dumps(value), status, headers, media_type="application/json")


def json_answer(value: Any, status: int = 200) -> Response:
    """Return a value as a JSON answer, in slices if it holds `RowSlices`."""
    return SlicedResponse(value, status) if has_rows(value) else json_response(value, status)


class SlicedResponse(Response):
    """A JSON answer that is written a slice at a time, as its client reads it; between two of them others have a turn.

    So it is never in memory as a whole, and its length is not announced.
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
        """is_over: whether nobody reads it any more; None: the answer finds that out itself.

        in_thread: its slices are made in a thread by turns of tenants, since a row takes milliseconds.
        """
        super().__init__(None, status, headers)
        self._value = value
        self._in_thread = in_thread
        self._is_over = is_over
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, as far as its client is there."""
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
