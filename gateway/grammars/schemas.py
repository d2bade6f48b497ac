"""Limits of JSON schemas, and closing of their objects: an object that names its properties gets no others. Pure.

Libraries that generate schemas from classes omit `additionalProperties`, which formally allows any key. Models then
keep writing, repeating a key, because the grammar sets no bound. An explicit `additionalProperties` is respected.
Objects with free keys, whose repetition a grammar cannot prevent, are limited in number of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import orjson

from gateway.grammars.limits import MAX_CHOICES, check_regex, check_whitespace, too_many
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

MAX_FREE_KEYS = 256
"""Maximum properties of an object besides the named ones, unless its schema has `maxProperties`."""

MIN_STEPS = 256
BYTES_PER_STEP = 2
"""The traversal of a schema takes a step per object and per name read or copied; at most one step per BYTES_PER_STEP
bytes is allowed."""

COPIED_BYTES = 16
"""Bytes that one step may add to a schema, so that long names or copies enlarge it to at most eight times its size."""

MAX_VALUES = 20_000
"""Maximum values in one schema, including objects and lists."""

ANY_OBJECT: dict[str, Any] = {"type": "object"}

JSON_STYLE: dict[str, Any] = {
    # Models write a space or a newline between JSON tokens; small ones never stop if any number is allowed.
    "whitespace_pattern": r"[ ]|\n[ \t]{0,32}",
    "whitespace_flexible": True,
    "lenient": False,  # refuse what cannot be enforced
}

STYLE = "x-guidance"
"""The schema key that sets llguidance's JSON style; only this project sets it."""

_LISTS = ("enum", "anyOf", "oneOf", "allOf", "prefixItems", "required")
_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_VALUES = frozenset({"const", "enum", "default", "example", "examples"})  # keywords whose values are not schemas
_SCHEMA, _NAMES, _VALUE = "schema", "names", "value"  # kinds of schema parts; _NAMES maps names to schemas

_ALL, _ANY = "allOf", ("anyOf", "oneOf")
_APPLIED = (_ALL, *_ANY, "$ref")  # schemas that apply to the same value
_OBJECT = ("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties")
_PARTS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_OF_PARTS = ("items", "prefixItems", "additionalItems", "additionalProperties")  # schemas of inner values

Schema = dict[str, Any]


def checked_schema(
    schema: Any, place: str, settings: Settings, style: Mapping[str, Any] = JSON_STYLE, *,
    close: bool | None = None, strict: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Return a JSON schema with closed objects and llguidance's style. Raises BadRequest.

    close: whether objects that name their properties get no others; None: the setting. strict: OpenAI's `strict`.
    """
    if not isinstance(schema, dict):
        raise BadRequest(f"{place} must be an object", param=place)
    if STYLE in schema:
        other = "structured_outputs has whitespace_pattern and disable_any_whitespace"
        raise BadRequest(f"{place}.{STYLE} is not supported: {other}", param=f"{place}.{STYLE}")
    num_bytes = len(orjson.dumps(schema))
    if num_bytes > settings.max_grammar_bytes:  # before its patterns are checked
        raise too_many(num_bytes, settings.max_grammar_bytes, "bytes", place)
    check_schema(schema, place, settings)
    close = strict or (settings.close_objects if close is None else close)
    return {**closed(schema, place, num_bytes=num_bytes, close=close, strict=strict), STYLE: dict(style)}


def is_strict(definition: Mapping[str, Any], place: str) -> bool:
    """Return whether the definition of a schema or function is `strict`. Raises BadRequest."""
    strict = definition.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise BadRequest(f"{place}.strict must be a boolean", param=f"{place}.strict")
    return bool(strict)


def check_schema(schema: Any, place: str, settings: Settings) -> None:
    """Raise BadRequest for a schema that is too deep, has too many values, or a pattern beyond the limits."""
    num, depth, limit = 0, 0, settings.max_grammar_depth
    groups: list[tuple[str, Any]] = [(_SCHEMA, schema)]
    while groups:
        depth += 1
        if depth > limit:
            raise BadRequest(f"{place} is nested deeper than {limit} levels, which is the limit", param=place)
        inner: list[tuple[str, Any]] = []
        for kind, group in groups:
            num += len(group)
            if num > MAX_VALUES:
                raise too_many(num, MAX_VALUES, "values", place)
            inner += _parts(kind, group, place)
        groups = inner


def _parts(kind: str, group: Any, place: str) -> list[tuple[str, Any]]:
    """Return the objects and lists in an object or list, each with its kind. Raises BadRequest beyond the limits."""
    if isinstance(group, list):
        return [(kind, part) for part in group if isinstance(part, dict | list)]
    if kind == _SCHEMA:
        _check_keywords(group, place)
    parts: list[tuple[str, Any]] = []
    for key, part in group.items():
        if isinstance(part, dict | list):
            inner = kind if kind == _VALUE else _SCHEMA
            if kind == _SCHEMA:
                inner = _NAMES if key in _BY_NAME else _VALUE if key in _VALUES else _SCHEMA
            parts.append((inner, part))
    return parts


def _check_keywords(schema: dict[str, Any], place: str) -> None:
    for key in _LISTS:
        if isinstance(values := schema.get(key), list) and len(values) > MAX_CHOICES:
            raise too_many(len(values), MAX_CHOICES, f"values in {key}", place)
    if isinstance(pattern := schema.get("pattern"), str):
        check_regex(pattern, place)
    if isinstance(patterns := schema.get("patternProperties"), dict):
        for pattern in patterns:
            check_regex(pattern, place)
    style = schema.get("x-guidance")
    if isinstance(style, dict) and isinstance(white := style.get("whitespace_pattern"), str):
        check_whitespace(white, place)


def closed(schema: Schema, place: str, *, num_bytes: int, close: bool = True, strict: bool = False) -> Schema:
    """Return a schema whose objects have only the properties that they name.

    num_bytes: size of the schema. close: False: only limit the number of free keys. strict: refuse explicitly open
    objects. Raises BadRequest, also if too many references make the traversal too long.
    """
    walk = _Walk(schema, place, MIN_STEPS + num_bytes // BYTES_PER_STEP, close=close, strict=strict)
    if not isinstance(schema.get("$defs", {}), dict):
        raise BadRequest(f"{place}.$defs must be an object", param=place)
    result = walk.alone(schema)
    copies = walk.copies()
    return {**result, "$defs": {**result.get("$defs", {}), **copies}} if copies else result


@dataclass(slots=True)
class _Names:
    """What all schemas that apply to one value say about its properties."""

    names: dict[str, None] = field(default_factory=dict)  # names in the schema's order
    has_properties: bool = False
    as_written: bool = False  # True: additional properties are explicit or unknown


class _Walk:
    """The traversal that closes one schema."""

    def __init__(self, root: Schema, place: str, max_steps: int, *, close: bool, strict: bool) -> None:
        self._root = root
        self._place = place
        self._steps = self._max_steps = max_steps
        self._close = close
        self._strict = strict
        self._copy_of: dict[str, str] = {}  # reference -> name of its open copy
        self._to_copy: list[tuple[str, Schema]] = []
        self._targets: dict[str, Schema | None] = {}
        self._num = 0  # number of the latest copy's name

    def copies(self) -> Schema:
        """Return additions to the root's `$defs` by name: open copies of schemas that are referenced beside others."""
        copies: Schema = {}
        while self._to_copy:
            name, target = self._to_copy.pop()
            copies[name] = self._beside({k: v for k, v in target.items() if k not in ("$defs", "definitions")})
        return copies

    def alone(self, schema: Any) -> Any:
        """Return a closed schema that is the only one for its value."""
        if not isinstance(schema, dict):
            return schema
        applied = [key for key in _APPLIED if key in schema]
        if _passes_on(schema, applied):
            return self._with_parts(schema, self.alone)
        result = self._with_parts(schema, self._beside)
        found, own = self._names(schema), result.get("properties", {})
        if self._close and found.has_properties and not found.as_written and isinstance(own, dict):
            self._spend(len(found.names) + sum(map(len, found.names)) // COPIED_BYTES)
            result["properties"] = own | {name: {} for name in found.names if name not in own}
            result["additionalProperties"] = False
        elif not applied and _has_free_keys(schema):
            least = schema.get("minProperties", 0)
            result["maxProperties"] = max(len(own) + MAX_FREE_KEYS, least if isinstance(least, int) else 0)
        return result

    def _beside(self, schema: Any) -> Any:
        """Return a schema that is combined with others. It stays open: closed, it would forbid their properties."""
        if not isinstance(schema, dict):
            return schema
        return self._with_parts(schema, self._beside)

    def _with_parts(self, schema: Schema, applied: Callable[[Any], Any]) -> Schema:
        """Return a schema with its subschemas closed. applied: transforms those that apply to the same value."""
        self._spend(1)
        if self._strict and schema.get("additionalProperties", False) is not False:
            text = f"{self._place}: where strict is true, additionalProperties must be false or left out"
            raise BadRequest(text, param=self._place)
        result = dict(schema)
        for key, part in schema.items():
            if key in _PARTS_BY_NAME and isinstance(part, dict):
                result[key] = {name: self.alone(value) for name, value in part.items()}
            elif key in _OF_PARTS:
                result[key] = [self.alone(value) for value in part] if isinstance(part, list) else self.alone(part)
            elif key in (_ALL, *_ANY) and isinstance(part, list):
                result[key] = [applied(value) for value in part]
        if "$ref" in schema and applied == self._beside:
            result["$ref"] = self._open(schema["$ref"])
        return result

    def _open(self, ref: Any) -> Any:
        """Return a reference to an open copy of the schema that `ref` refers to."""
        target = self._target(ref)
        if target is None:
            return ref
        if ref not in self._copy_of:
            self._spend(len(orjson.dumps(target)) // COPIED_BYTES)
            while f"open{self._num}" in self._root.get("$defs", {}):
                self._num += 1
            self._copy_of[ref] = f"open{self._num}"
            self._to_copy.append((self._copy_of[ref], target))
            self._num += 1
        return f"#/$defs/{self._copy_of[ref]}"

    def _names(self, outer: Schema) -> _Names:
        """Collect the properties of a schema and of the schemas that apply to the same value."""
        found, seen, waiting = _Names(), set[int](), [outer]
        while waiting:
            schema = waiting.pop()
            if id(schema) in seen:
                continue
            seen.add(id(schema))
            self._spend(1)
            if schema.keys() & {"additionalProperties", "unevaluatedProperties", "enum", "const"}:
                found.as_written = True
            if isinstance(properties := schema.get("properties"), dict):
                self._spend(len(properties))
                found.has_properties = True
                found.names |= dict.fromkeys(properties)
            if "patternProperties" in schema:
                found.has_properties = True
                found.as_written = found.as_written or schema is not outer  # `outer`, closed, forbids these
            if isinstance(required := schema.get("required"), list):
                self._spend(len(required))
                found.names |= {name: None for name in required if isinstance(name, str)}
            inner = [part for key in (_ALL, *_ANY) if isinstance(schema.get(key), list) for part in schema[key]]
            if "$ref" in schema:
                target = self._target(schema["$ref"])
                found.as_written = found.as_written or target is None
                inner.append(target)
            waiting += [part for part in reversed(inner) if isinstance(part, dict)]
        return found

    def _target(self, ref: Any) -> Schema | None:
        """Return the schema that a pointer within this one refers to; None for other references."""
        if not isinstance(ref, str):
            return None
        if ref not in self._targets:
            self._targets[ref] = _pointed_to(self._root, ref)
        return self._targets[ref]

    def _spend(self, steps: int) -> None:
        self._steps -= steps
        if self._steps < 0:
            text = f"{self._place}: its schemas have so many references that closing its objects takes more than"
            text = f"{text} {self._max_steps} steps, the limit for its size; give them additionalProperties"
            raise BadRequest(text, param=self._place)


def _pointed_to(root: Schema, ref: str) -> Schema | None:
    if ref != "#" and not ref.startswith("#/"):
        return None
    at: Any = root
    for part in unquote(ref).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(at, list):
            at = at[int(name)] if name.isdecimal() and len(name) < 9 and int(name) < len(at) else None
        else:
            at = at.get(name) if isinstance(at, dict) else None
    return at if isinstance(at, dict) else None


def _passes_on(schema: Schema, applied: list[str]) -> bool:
    """Return whether a schema constrains objects only through one applied schema."""
    if len(applied) != 1 or schema.keys() & {*_OBJECT, "enum", "const"}:
        return False
    parts = schema[applied[0]]
    return applied[0] != _ALL or (isinstance(parts, list) and len(parts) == 1)


def _has_free_keys(schema: Schema) -> bool:
    """Return whether an object may have properties of any name, in a number that a grammar can bound."""
    kinds, more = schema.get("type"), schema.get("additionalProperties", True)
    if "maxProperties" in schema or (more is False and "patternProperties" not in schema):
        return False
    is_object = kinds == "object" or (isinstance(kinds, list) and "object" in kinds) or "additionalProperties" in schema
    names, required = schema.get("properties", {}), schema.get("required", [])
    if not is_object or not isinstance(names, dict) or not isinstance(required, list):
        return False
    return names.keys() <= {name for name in required if isinstance(name, str)}
