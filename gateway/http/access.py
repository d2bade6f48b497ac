"""The access rules of routes: which scopes a route needs and what bodies it accepts, declared where its path is bound.

`Envelope` first finds a request's route by one normalized path, and stores it in the request's scope. Admission, body
limits, scopes and the router use that route and never parse the path again, so no second reading of the path can differ
from the first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from protocol.queue.books.api_keys import Scope
from protocol.wire.errors import BadRequest

MATCH = "lorafleet.match"
"""ASGI scope key of a request's `RouteMatch`."""

Kind = Literal["plain", "call", "text", "file"]
"""How a route uses a body: `call` queues it, `text` tokenizes it, `file` stores it; `plain` accepts small bodies
only."""

TOKENS_OF_ITS_OWN = ("/v1/", "/api/")
"""Below these paths, a bearer token is passed to an adapter's source only if it is the Hub's; on LoRAX's routes, any
is."""


@dataclass(frozen=True, slots=True)
class RouteAccess:
    """What a route requires of its callers, and what bodies it accepts."""

    scopes: tuple[Scope, ...] | None  # at least one is required; (): any key; None: no key
    kind: Kind = "plain"
    is_page: bool = False  # needs no key if the setting `open_pages` is on


OPEN = RouteAccess(None)
INFER = RouteAccess(("infer",))
CALL = RouteAccess(("infer",), "call")
TEXT = RouteAccess(("infer",), "text")
FILE = RouteAccess(("infer",), "file")
READ_ADAPTERS = RouteAccess(("infer", "adapters"))
ADAPTERS = RouteAccess(("adapters",))
ADMIN = RouteAccess(("admin",))
ADMIN_FILE = RouteAccess(("admin",), "file")
API_PAGE = RouteAccess((), is_page=True)
ADMIN_PAGE = RouteAccess(("admin",), is_page=True)


@dataclass(frozen=True, slots=True)
class RouteMatch:
    """The route of a request, with its access rules."""

    path: str  # normalized path of the request
    route: APIRoute | None = None  # None: no route has the path, or none has it with this method
    params: Mapping[str, str] = field(default_factory=dict)
    scopes: (
        tuple[Scope, ...] | None
    ) = ()  # as in `RouteAccess`; unknown paths need a key, so that strangers cannot probe for routes
    kind: Kind = "plain"
    any_token: bool = False  # whether any bearer may be an adapter source's token
    allowed: tuple[str, ...] = ()  # the path's other methods, if this one is not among them

    @property
    def is_large(self) -> bool:
        """Whether a JSON body of more than `SMALL_BODY_BYTES` is accepted."""
        return self.kind in ("call", "text")


class Routes:
    """Binds paths to handlers, each with its access rules."""

    def __init__(self, app: FastAPI, route_class: Callable[..., APIRoute]) -> None:
        """route_class: accepts `access` in addition to FastAPI's arguments, as `JsonRoute` does."""
        self._app = app
        self._class = route_class

    def get(self, path: str, access: RouteAccess, **options: Any) -> Callable[[Any], None]:
        """Return a decorator that binds GET to a handler. options: FastAPI's."""
        return partial(self._add, "GET", path, access, options)

    def head(self, path: str, access: RouteAccess, **options: Any) -> Callable[[Any], None]:
        """Return a decorator that binds HEAD to a handler."""
        return partial(self._add, "HEAD", path, access, options)

    def post(self, path: str, access: RouteAccess, **options: Any) -> Callable[[Any], None]:
        """Return a decorator that binds POST to a handler."""
        return partial(self._add, "POST", path, access, options)

    def delete(self, path: str, access: RouteAccess, **options: Any) -> Callable[[Any], None]:
        """Return a decorator that binds DELETE to a handler."""
        return partial(self._add, "DELETE", path, access, options)

    def _add(self, method: str, path: str, access: RouteAccess, options: dict[str, Any], handler: Any) -> None:
        kind: Any = partial(self._class, access=access)
        self._app.router.add_api_route(path, handler, methods=[method], route_class_override=kind, **options)


class RouteTable:
    """Finds a request's route: one lookup for a path without parameters, else a pass over the routes that have some."""

    def __init__(self, routes: Iterable[BaseRoute], *, open_pages: bool = False) -> None:
        """Index the routes. open_pages: whether pages need no key.

        Raises TypeError for a route without access rules, so that no gateway starts with one.
        """
        self._fixed: dict[str, dict[str, RouteMatch]] = {}  # path -> method -> match
        self._with_params: list[tuple[str, re.Pattern[str], RouteMatch]] = []  # method, path's pattern, match
        self.matches: list[tuple[str, RouteMatch]] = []  # one per method and route
        for route in routes:
            access = getattr(route, "access", None)
            if not isinstance(route, APIRoute) or not isinstance(access, RouteAccess):
                raise TypeError(f"{getattr(route, 'path', route)} does not say which scope it needs: see access.py")
            found = RouteMatch(
                route.path,
                route,
                {},
                None if open_pages and access.is_page else access.scopes,
                access.kind,
                any_token=not route.path.startswith(TOKENS_OF_ITS_OWN),
            )
            for method in sorted(route.methods or ()):
                self.matches.append((method, found))
                if route.param_convertors:
                    self._with_params.append((method, route.path_regex, found))
                elif method in self._fixed.setdefault(route.path, {}):
                    raise TypeError(f"{method} {route.path} has two routes")
                else:
                    self._fixed[route.path][method] = found

    def match(self, method: str, path: str) -> RouteMatch:
        """Return the match of a method and a path. A trailing slash is ignored if no route has it."""
        found = self._match(method, path)
        if found.route is None and path.endswith("/") and path != "/":
            shorter = self._match(method, path[:-1])
            return found if shorter.route is None and (found.allowed or not shorter.allowed) else shorter
        return found

    def _match(self, method: str, path: str) -> RouteMatch:
        fixed = self._fixed.get(path, {})
        if method in fixed:
            return fixed[method]
        allowed = set(fixed)
        for known, expression, found in self._with_params:
            if (parts := expression.fullmatch(path)) is None:
                continue
            if known == method:
                return RouteMatch(
                    path, found.route, parts.groupdict(), found.scopes, found.kind, any_token=found.any_token
                )
            allowed.add(known)
        return RouteMatch(path, allowed=tuple(sorted(allowed)))


_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufffd]")
"""Characters refused in paths: control characters, line separators, and the decoder's replacement for invalid UTF-8."""


MAX_PATH_CHARACTERS = 4096
"""Maximum length of a path: several times that of the longest adapter name, escaped; matching takes at most 0.2 ms."""


MAX_QUERY_BYTES, MAX_QUERY_FIELDS = 1 << 13, 256
"""Maximum bytes and fields of a query string, which take at most 1 ms to parse. The 64 kB of a request head have room
for 19,000 fields, which take 13 ms, or for 18,000 escaped bytes, which take 8 ms."""


def check_query(query: bytes) -> None:
    """Raise BadRequest for a query string over its limits: every route parses one, also those that need no key."""
    for num, unit, limit in (
        (len(query), "bytes", MAX_QUERY_BYTES), (query.count(b"&") + 1, "fields", MAX_QUERY_FIELDS)
    ):  # fmt: skip
        if num > limit:
            raise BadRequest(f"the query has {num} {unit}; the limit is {limit}", code="invalid_query")


def normal_path(path: str, prefix: str) -> str:
    """Return the path by which a request is routed, without the prefix that clients may add.

    path: percent-decoded once, as in ASGI. Raises BadRequest for a path that is too long, has control characters, or is
    not UTF-8.
    """
    if len(path) > MAX_PATH_CHARACTERS:
        text = f"the path has {len(path)} characters; the limit is {MAX_PATH_CHARACTERS}"
        raise BadRequest(text, code="invalid_path")
    if not (path.isascii() and path.isprintable()) and (found := _CONTROLS.search(path)) is not None:
        what = "bytes that are not UTF-8" if found[0] == "\ufffd" else f"the control character {ord(found[0]):#04x}"
        raise BadRequest(f"the path has {what} after {found.start()} characters", code="invalid_path")
    if prefix and f"{path}/".startswith(f"{prefix}/"):
        return path.removeprefix(prefix) or "/"
    return path
