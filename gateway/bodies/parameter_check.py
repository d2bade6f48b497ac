"""Finds parameters that are unknown or not supported in a parsed body, and refuses them by name.

A valid body costs one dict lookup per object. Similar names are searched only for the error message.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from gateway.bodies.parameters import BY_TYPE, OBJECTS, PARAMETERS_OF, Parameter
from protocol.wire.errors import BadRequest

IGNORED_HEADER = "x-ignored-parameters"
"""Response header with ignored parameters: those that the settings only warn of, tools that run elsewhere, and keywords
of tools' schemas that no grammar enforces."""

MAX_NAMED = 8
"""Maximum parameters named in an error, header or log line; the search stops there."""

MAX_ENTRIES = 1 << 13
"""Maximum entries checked of a list, such as messages or tools; no list of objects may have more."""

MAX_NAME_CHARACTERS = 64
"""Maximum characters of a name that are shown, and compared with known names."""


def _describe(schema: dict[str, Any], body: type[JsonBody]) -> None:
    """Add a body's accepted parameters without effect to `/openapi.json`."""
    schema["additionalProperties"] = False
    for name, parameter in PARAMETERS_OF[body.OBJECT].items():
        if parameter.fate == "accepted":
            schema["properties"][name] = {"description": f"Accepted without effect: it {parameter.why}."}


class JsonBody(BaseModel):
    """A JSON object of typed fields. Unknown fields are stored separately for `check_parameters`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False, json_schema_extra=_describe)

    OBJECT: ClassVar[str]
    """Name of this object in `parameters.OBJECTS`."""

    _WITH_DEFAULTS: ClassVar[tuple[str, ...]] = ()
    """Names, as sent, of the fields whose default is not null."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        cls._WITH_DEFAULTS = tuple(
            field.alias or name
            for name, field in cls.model_fields.items()
            if not field.is_required() and field.get_default(call_default_factory=True, validated_data={}) is not None
        )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        """Drop null fields that have another default: null means the default."""
        if not isinstance(value, dict):
            return value
        nulls = [name for name in cls._WITH_DEFAULTS if value.get(name, cls) is None]
        if nulls:
            value = value.copy()  # one copy, as a body may have 300,000 unknown entries
            for name in nulls:
                del value[name]
        return value


@dataclass(frozen=True, slots=True)
class Ignored:
    """A parameter that would have no effect, although its sender expects one."""

    path: str  # such as stream_options.include_usge
    name: str
    object: str
    known: Parameter | None  # None: no object of this kind has such a parameter

    def message(self) -> str:
        """Return the error message."""
        if self.known is not None:
            return f"`{self.path}` {self.known.why}."
        unknown = f"Unknown parameter: `{self.path}`."
        for kind, where in OBJECTS.items():
            if self.name in PARAMETERS_OF[kind]:
                return f"{unknown} It is one of {where}."
        near = difflib.get_close_matches(self.name, PARAMETERS_OF[self.object], n=1)
        return f"{unknown} Did you mean `{near[0]}`?" if near else unknown


def check_parameters(body: JsonBody, policy: Literal["refuse", "warn"]) -> str:
    """Refuse a body with parameters that would have no effect, or return their names under the policy `warn`.

    Then remove them, and the accepted parameters without effect, from the body. Raises BadRequest.
    """
    if not body.__pydantic_extra__ and all(getattr(body, name) is None for name in _HOLDERS[body.OBJECT]):
        return ""  # most bodies
    found = list(islice(_ignored(body, body.OBJECT, ""), MAX_NAMED))
    _forget(body)
    if not found:
        return ""
    if policy == "refuse":
        first = found[0]
        rest = f" Also unsupported: {', '.join(one.path for one in found[1:])}." if len(found) > 1 else ""
        code = "unknown_parameter" if first.known is None else "unsupported_parameter"
        raise BadRequest(f"{first.message()}{rest}", param=first.path, code=code)
    return ", ".join(one.path for one in found)


def ignore(headers: MutableMapping[str, str], names: Sequence[str]) -> None:
    """Add names of ignored parameters to an answer's headers.

    names: printable ASCII; at most `MAX_NAMED` are listed in total.
    """
    before = headers[IGNORED_HEADER].split(", ") if IGNORED_HEADER in headers else []
    named = list(dict.fromkeys([*before, *names]))[:MAX_NAMED]
    if named:
        headers[IGNORED_HEADER] = ", ".join(named)


def _ignored(value: JsonBody | dict[str, Any], kind: str, path: str) -> Iterator[Ignored]:
    """Yield the parameters without effect in an object of a kind, and in the objects that it contains."""
    known = PARAMETERS_OF[kind]
    beside = value if isinstance(value, dict) else value.__pydantic_extra__  # `isinstance` with a model is slow
    for name, given in beside.items() if beside else ():
        yield from _judged(name, given, kind, path)
    for name in _HOLDERS[kind]:
        held = value.get(name) if isinstance(value, dict) else getattr(value, name)
        if held is not None:
            yield from _within(held, known[name].holds, path + name)


def _judged(name: str, value: Any, kind: str, path: str) -> Iterator[Ignored]:
    parameter = PARAMETERS_OF[kind].get(name)
    if value is not None and (parameter is None or parameter.has_effect(value)):
        shown = _shown(name)
        yield Ignored(path + shown, shown, kind, parameter)


def _within(value: Any, kind: str, path: str) -> Iterator[Ignored]:
    """Yield the parameters without effect in a value that is an object of a kind, or a list of such objects."""
    if isinstance(value, list):
        for i, entry in enumerate(islice(value, MAX_ENTRIES)):
            if isinstance(entry, dict) and (known := _kind_of(entry, kind)) is not None:
                yield from _ignored(entry, known, f"{path}[{i}].")
    elif kind not in BY_TYPE and (isinstance(value, dict) or hasattr(value, "OBJECT")):  # BY_TYPE: in lists only
        yield from _ignored(value, kind, path + ".")


def _kind_of(entry: dict[str, Any], kind: str) -> str | None:
    """Return the name of an entry in `OBJECTS`; None if *parse* refuses its type."""
    if kind not in BY_TYPE:
        return kind
    given = entry.get("type")
    return BY_TYPE[kind].get(given) if given is None or isinstance(given, str) else None


def _forget(body: JsonBody) -> None:
    """Drop the undeclared fields of a body and of the bodies in it."""
    if body.__pydantic_extra__:
        body.__pydantic_extra__.clear()
    for name in _HOLDERS[body.OBJECT]:
        if hasattr(inner := getattr(body, name), "OBJECT"):
            _forget(inner)


def _shown(name: str) -> str:
    """Return a client's name shortened, in printable ASCII, for headers and log lines."""
    return ascii(name[:MAX_NAME_CHARACTERS])[1:-1][:MAX_NAME_CHARACTERS]


_HOLDERS: Mapping[str, list[str]] = {
    kind: [name for name, parameter in known.items() if parameter.holds] for kind, known in PARAMETERS_OF.items()
}
"""Object -> its parameters that contain objects."""
