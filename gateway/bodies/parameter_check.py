"""Parameters that nobody knows, or that are not served: found in a body that is already read, and refused by name.

An honest body costs a look at a dict per object. What names are near to an unknown one is found out only to refuse it.
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
"""Names what a call was served without: parameters of which the settings only warn, tools that run elsewhere, and
keywords of tools' schemas that no grammar holds."""

MAX_NAMED = 8
"""Parameters that are named in an error, a header or a log line. The search for more ends with them."""

MAX_ENTRIES = 1 << 13
"""Entries of a list that are looked into, such as messages and tools; no list of objects may have more."""

MAX_NAME_CHARACTERS = 64
"""Characters of a name that are shown, and that are compared with known ones."""


def _describe(schema: dict[str, Any], body: type[JsonBody]) -> None:
    """Add a body's further parameters to `/openapi.json`."""
    schema["additionalProperties"] = False
    for name, parameter in PARAMETERS_OF[body.OBJECT].items():
        if parameter.fate == "accepted":
            schema["properties"][name] = {"description": f"Accepted without effect: it {parameter.why}."}


class JsonBody(BaseModel):
    """A JSON object of typed fields. Unknown fields are stored separately for `check_parameters`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False, json_schema_extra=_describe)

    OBJECT: ClassVar[str]
    """Which of `parameters.OBJECTS` this is."""

    _WITH_DEFAULTS: ClassVar[tuple[str, ...]] = ()
    """The fields, as they are sent, whose default is something else than null."""

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
        """Leave out fields that have another default, which null stands for."""
        if not isinstance(value, dict):
            return value
        nulls = [name for name in cls._WITH_DEFAULTS if value.get(name, cls) is None]
        if nulls:
            value = value.copy()  # not entry by entry: a body may have 300 000, which nobody knows
            for name in nulls:
                del value[name]
        return value


@dataclass(frozen=True, slots=True)
class Ignored:
    """A parameter that would have no effect though its sender expects one."""

    path: str  # stream_options.include_usge
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

    Afterwards nothing of it is left in the body, nor of what is accepted without effect. Raises BadRequest.
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
    """Name in an answer's headers what its call is served without, besides what they name already.

    names: printable ASCII; at most `MAX_NAMED` are named.
    """
    before = headers[IGNORED_HEADER].split(", ") if IGNORED_HEADER in headers else []
    named = list(dict.fromkeys([*before, *names]))[:MAX_NAMED]
    if named:
        headers[IGNORED_HEADER] = ", ".join(named)


def _ignored(value: JsonBody | dict[str, Any], kind: str, path: str) -> Iterator[Ignored]:
    """Yield what would have no effect in an object of a kind, and in those that it holds."""
    known = PARAMETERS_OF[kind]
    beside = value if isinstance(value, dict) else value.__pydantic_extra__  # `isinstance` of a model is slow
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
    """Yield what would have no effect in a value that is an object of a kind, or a list of such."""
    if isinstance(value, list):
        for i, entry in enumerate(islice(value, MAX_ENTRIES)):
            if isinstance(entry, dict) and (known := _kind_of(entry, kind)) is not None:
                yield from _ignored(entry, known, f"{path}[{i}].")
    elif kind not in BY_TYPE and (isinstance(value, dict) or hasattr(value, "OBJECT")):  # these occur in lists
        yield from _ignored(value, kind, path + ".")


def _kind_of(entry: dict[str, Any], kind: str) -> str | None:
    """Return which of `OBJECTS` an entry is; None if it has a type that *parse* refuses."""
    if kind not in BY_TYPE:
        return kind
    given = entry.get("type")
    return BY_TYPE[kind].get(given) if given is None or isinstance(given, str) else None


def _forget(body: JsonBody) -> None:
    """Drop what a body and those in it have beside their fields."""
    if body.__pydantic_extra__:
        body.__pydantic_extra__.clear()
    for name in _HOLDERS[body.OBJECT]:
        if hasattr(inner := getattr(body, name), "OBJECT"):
            _forget(inner)


def _shown(name: str) -> str:
    """Return a client's name as it may stand in a header and a line of the log: printable ASCII, and not long."""
    return ascii(name[:MAX_NAME_CHARACTERS])[1:-1][:MAX_NAME_CHARACTERS]


_HOLDERS: Mapping[str, list[str]] = {
    kind: [name for name, parameter in known.items() if parameter.holds] for kind, known in PARAMETERS_OF.items()
}
"""Object -> its parameters that hold objects."""
