"""Converts the constraints that clients may set on an output to llguidance grammars. Pure.

Supported: `response_format` of OpenAI, TGI and LoRAX, `structured_outputs` and `guided_…` of vLLM, `regex` and `ebnf`
of SGLang, `grammar` of TGI; `structural_tags` has structural tags. `check` finds out whether a grammar compiles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.bodies import json_values
from gateway.grammars.ebnf import is_ebnf, lark_of
from gateway.grammars.limits import (
    MAX_CHOICES,
    check_bytes,
    check_num,
    check_regex,
    check_whitespace,
)
from gateway.grammars.notation import Constraint, lark_string, regex_literal
from gateway.grammars.schemas import ANY_OBJECT, JSON_STYLE, check_schema, checked_schema, is_strict
from gateway.grammars.structural_tags import TAG_FIELDS, structural_tag
from protocol.runtime.settings import Settings
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest

_LARK_TOKEN = re.compile(
    r'"(?:[^"\\\n]|\\.)*+(?P<end>"?+)|/(?![/*])(?P<regex>(?:[^/\\\n]|\\.)++)(?P<slash>/?+)|//[^\n]*+'
    r"|(?P<json>%json\s*+(?=[{\[]))"
)
_NAME = re.compile(r"[A-Za-z_]\w*")
_JSON = json.JSONDecoder()


_KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")

OTHER_NAMES: Mapping[str, str] = {
    "guided_json": "json",
    "guided_json_object": "json_object",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_whitespace_pattern": "whitespace_pattern",
    "regex": "regex",
    "ebnf": "grammar",
    "json_schema": "json",
}
"""Parameter of vLLM until 2025 or of SGLang -> the equivalent field of `structured_outputs`."""


def constraint_of(
    response_format: Mapping[str, Any] | None,
    structured_outputs: Mapping[str, Any] | None,
    settings: Settings,
    others: Mapping[str, Any] = {},
) -> Constraint | None:
    """Return the constraint of a request to OpenAI's routes, None if unconstrained. Raises BadRequest.

    others: the given fields of `OTHER_NAMES`.
    """
    formatted = None if response_format is None else _response_format(response_format, settings)
    structured = None
    if structured_outputs is not None or others:
        structured = _structured_outputs(structured_outputs or {}, others, settings)
    if formatted is not None and structured is not None:
        place = "structured_outputs" if structured_outputs is not None else next(iter(others))
        raise BadRequest(f"response_format and {place} cannot be used together", param=place)
    return structured if formatted is None else formatted


def native_constraint(response_format: Mapping[str, Any] | None, settings: Settings) -> Constraint | None:
    """Return the constraint of a request to LoRAX's routes, None if unconstrained. Raises BadRequest.

    A missing `schema` means any object; a null one, which LoRAX's client sends for "any", no constraint.
    """
    param = "response_format"
    if response_format is None or response_format.get("schema", ...) is None:
        return None
    if response_format.get("value") is not None or response_format.get("json_schema") is not None:
        return _response_format(response_format, settings)  # form used by clients of other servers
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise BadRequest(f"`{param}` of type {brief(kind)} is not supported", param=param)
    return _json(response_format.get("schema", ANY_OBJECT), param, settings)


def tgi_constraint(grammar: Mapping[str, Any] | None, place: str, settings: Settings) -> Constraint | None:
    """Return the constraint of TGI's {type, value}, None if unconstrained. Raises BadRequest."""
    if grammar is None:
        return None
    kind, value, where = grammar.get("type"), grammar.get("value"), f"{place}.value"
    if kind == "regex":
        if not isinstance(value, str) or not value:
            raise BadRequest(f"{where} must be a string, and not empty", param=where)
        check_bytes(value, where, settings)
        check_regex(value, where)
        return {"lark_grammar": f"start: {regex_literal(value)}"}
    if kind == "json_schema" and isinstance(value, dict) and "schema" in value:
        return _json(value["schema"], f"{where}.schema", settings)
    if kind not in ("json", "json_object", "json_schema"):
        raise BadRequest(f"{place} of type {brief(kind)} is not supported", param=place)
    return _json(_parsed(value, where, settings), where, settings)


# ---------------------------------------------------------------- response_format


def _response_format(form: Mapping[str, Any], settings: Settings) -> Constraint | None:
    kind = form.get("type")
    given = [name for name in ("json_schema", "schema", "value", *TAG_FIELDS) if form.get(name) is not None]
    idle = [name for name in given if (name in TAG_FIELDS) != (kind == "structural_tag")]
    if not idle and kind == "structural_tag":
        return structural_tag(form, "response_format", settings)
    if idle or len(given) > 1 or (given and kind == "text") or (given == ["json_schema"] and kind == "json_object"):
        name = (idle or given)[-1]
        message = f"response_format.{name} has no effect with the type {brief(kind)}"
        raise BadRequest(message, param=f"response_format.{name}")
    if given == ["value"]:
        return tgi_constraint(form, "response_format", settings)
    if kind == "text":
        return None
    if kind == "json_object":
        return _json(form.get("schema", ANY_OBJECT), "response_format.schema", settings)
    if kind != "json_schema":
        raise BadRequest(f"response_format of type {brief(kind)} is not supported", param="response_format")
    if "json_schema" not in form and "schema" in form:  # LoRAX's form
        return _json(form["schema"], "response_format.schema", settings)
    inner = form.get("json_schema")
    if not isinstance(inner, dict):
        raise BadRequest("response_format.json_schema must be an object", param="response_format.json_schema")
    place = "response_format.json_schema.schema"
    if "schema" not in inner:
        raise BadRequest(f"{place} is missing", param=place)
    strict = is_strict(inner, "response_format.json_schema")
    return {"json_schema": checked_schema(inner["schema"], place, settings, strict=strict)}


# ---------------------------------------------------------------- structured_outputs


def _structured_outputs(wish: Mapping[str, Any], others: Mapping[str, Any], settings: Settings) -> Constraint:
    given = {name: value for name, value in wish.items() if value is not None and value is not False}
    places = {name: f"structured_outputs.{name}" for name in given}
    for name, value in others.items():
        kind = OTHER_NAMES[name]
        if kind in given:
            raise BadRequest(f"{places[kind]} and {name} cannot be used together", param=name)
        given[kind], places[kind] = value, name
    kinds = [name for name in _KINDS if name in given]
    if len(kinds) != 1:
        asked = " and ".join(places[name] for name in kinds) or "none"
        param = next(iter(others), "structured_outputs")
        raise BadRequest(f"{param} needs exactly one of {', '.join(_KINDS)}; there is {asked}", param=param)
    kind, value, place = kinds[0], given[kinds[0]], places[kinds[0]]
    style = _style(given, places.get("whitespace_pattern", ""))
    if kind == "json_object":
        return _json(ANY_OBJECT, place, settings, style)
    if kind == "json":
        close = settings.close_objects or bool(given.get("disable_additional_properties"))
        schema = _parsed(value, place, settings)
        return {"json_schema": checked_schema(schema, place, settings, style, close=close)}
    if kind == "choice":
        return _choice(value, place, settings)
    if kind == "structural_tag":
        return structural_tag(_parsed(value, place, settings), place, settings)
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{place} must be a string, and not empty", param=place)
    check_bytes(value, place, settings)
    if kind == "grammar":
        if is_ebnf(value):
            value = lark_of(value, place)
        check_lark(value, place, settings)
        return {"lark_grammar": value}
    check_regex(value, place)
    return {"lark_grammar": f"start: {regex_literal(value)}"}


def _style(given: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the JSON style of `structured_outputs`, as llguidance's `x-guidance`."""
    pattern, compact = given.get("whitespace_pattern"), given.get("disable_any_whitespace", False)
    if pattern is not None:
        if not isinstance(pattern, str):
            raise BadRequest(f"{place} must be a string", param=place)
        check_whitespace(pattern, place)
    if compact:
        return {"whitespace_flexible": False, "lenient": False}
    return JSON_STYLE if pattern is None else {**JSON_STYLE, "whitespace_pattern": pattern}


def _parsed(value: Any, place: str, settings: Settings) -> Any:
    """Return a schema, which may be given as JSON text. Raises BadRequest."""
    if not isinstance(value, str):
        return value
    check_bytes(value, place, settings)
    try:
        return json_values.loads(value.encode(), place)
    except BadRequest as error:
        raise BadRequest(error.message, param=place) from error
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"{place} is not JSON: {error}", param=place) from error


def _choice(choices: Any, place: str, settings: Settings) -> Constraint:
    if isinstance(choices, list):
        check_num(len(choices), MAX_CHOICES, "choices", place)
    if not isinstance(choices, list) or not choices or not all(isinstance(text, str) and text for text in choices):
        raise BadRequest(f"{place} must be a list of strings that are not empty", param=place)
    check_bytes("".join(choices), place, settings)
    return {"lark_grammar": "start: " + " | ".join(lark_string(text) for text in choices)}


def _json(schema: Any, place: str, settings: Settings, style: Mapping[str, Any] = JSON_STYLE) -> Constraint:
    return {"json_schema": checked_schema(schema, place, settings, style)}


# ---------------------------------------------------------------- grammars


def check_lark(text: str, place: str, settings: Settings) -> None:
    """Raise BadRequest for a grammar whose regular expressions, JSON schemas or repetitions exceed the limits."""
    at, outside, is_json = 0, list[str](), True
    while (token := _LARK_TOKEN.search(text, at)) is not None:
        is_open = token["end"] == "" or token["slash"] == ""  # unterminated; the compiler reports it
        outside += (text[at : token.start()], token[0] if is_open else "_")  # counts as one part
        at = token.end()
        if token["slash"]:
            check_regex(token["regex"], place)
        elif token["json"] is not None and is_json:
            try:
                schema, at = _JSON.raw_decode(text, at)
            except (ValueError, RecursionError):
                is_json = False  # the compiler reports it; each further error here would count lines again
                continue
            if isinstance(schema, dict | list):
                check_schema(schema, place, settings)
    outside.append(text[at:])
    for rule in "".join(outside).splitlines():
        check_regex(_NAME.sub("_", rule), place)
