"""Tool calls with arguments in tags, as Qwen3-Coder writes them: their grammar, and conversion to JSON. Pure.

    <function=get_weather>
    <parameter=city>
    Oslo
    </parameter>
    </function>

A string is raw text, and may not contain its end tag; every other value is JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from gateway.grammars.limits import check_num
from gateway.grammars.notation import lark_json, lark_string
from gateway.grammars.schemas import MAX_FREE_KEYS
from protocol.wire.errors import BadRequest
from protocol.wire.text import overlap

END_FUNCTION = "</function>"

_END_VALUE = "\n</parameter>"
RAW_VALUE_RULES = [f"raw_value[lazy]: RAW_TEXT {lark_string(_END_VALUE + chr(10))}", "RAW_TEXT: /(?s:.*)/"]
_TAG = re.compile(r"<parameter=([^>\n]++)>\n|</function>")
MAX_TAG = 1024
"""Maximum characters of a parameter's tag. Longer text is not a tag, and what follows is ignored."""

MAX_SHARED_BYTES = 1 << 20
MAX_NAMED = 8
"""Maximum keywords named in an error."""

_PLAIN = frozenset({"type", "enum", "const", "title", "description", "default", "examples", "x-guidance"})
_OF_OBJECTS = frozenset(
    {"properties", "required", "additionalProperties", "maxProperties", "$defs", "definitions", "$schema"}
)


def raw_parameters(schema: dict[str, Any]) -> frozenset[str]:
    """Return the parameters in a schema of arguments whose values are written as raw text, not as JSON."""
    properties = schema.get("properties")
    named = properties if isinstance(properties, dict) else {}  # an invalid schema is refused with its grammar
    return frozenset(name for name, value in named.items() if _choices(value) is not None)


def _choices(schema: Any) -> list[str] | None:
    """Return the strings that a schema allows, [] for any string; None if other values are allowed."""
    if not isinstance(schema, dict) or not schema.keys() <= _PLAIN:
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    if not isinstance(values, list) or not all(isinstance(value, str) and _END_VALUE not in value for value in values):
        return None
    return values if values or schema.get("type") == "string" else None


def arguments_rules(name: str, schema: dict[str, Any], rule: str) -> list[str]:
    """Return the rules of a function's arguments and closing tag; the first is named `rule`.

    They refer to RAW_VALUE_RULES. Raises BadRequest for schemas that tags cannot express.
    """
    unknown = [key for key in schema if key not in _PLAIN | _OF_OBJECTS]
    if unknown:
        named = ", ".join(unknown[:MAX_NAMED])
        text = f"tools: the arguments of {name} have {named}, which cannot be enforced in the tags that this model"
        raise BadRequest(f"{text} writes calls in", param="tools")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict):
        raise BadRequest(f"tools: the arguments of {name}: properties must be an object", param="tools")
    if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
        raise BadRequest(f"tools: the arguments of {name}: required must be a list of names", param="tools")
    properties = properties | {key: {} for key in required if key not in properties}
    shared = {key: schema[key] for key in ("$defs", "definitions", "x-guidance") if key in schema}
    # Every value's schema includes a copy of `shared`.
    check_num(len(json.dumps(shared)) * len(properties), MAX_SHARED_BYTES, "bytes of $defs and their copies", "tools")
    parts, rules, needed = [], [], frozenset(required)
    for i, (key, value) in enumerate(properties.items()):
        if ">" in key or "\n" in key:
            raise BadRequest(f"tools: {name} has a parameter {key!r}, which no tag can be named", param="tools")
        own = f"{rule}_{i}"
        parts.append(own if key in needed else f"{own}?")
        rules += [f"{own}: {lark_string(f'<parameter={key}>' + chr(10))} {own}_value"]
        rules += _value_rules(f"{own}_value", value, shared)
    more = schema.get("additionalProperties", True)
    most = schema.get("maxProperties", MAX_FREE_KEYS)
    if not isinstance(most, int) or most < len(properties):
        text = f"tools: the arguments of {name}: maxProperties must be at least the number of properties"
        raise BadRequest(text, param="tools")
    if not properties and more is not False:  # free keys only if no parameters are named
        parts.append(f"{rule}_any{{0,{min(most, MAX_FREE_KEYS)}}}")
        rules += [f'{rule}_any: "<parameter=" /[^>\\n]+/ ">\\n" {rule}_any_value']
        rules += _value_rules(f"{rule}_any_value", {} if more is True else more, shared, raw=False)
    return [f"{rule}: {' '.join([*parts, lark_string(END_FUNCTION)])}", *rules]


def _value_rules(rule: str, schema: Any, shared: dict[str, Any], *, raw: bool = True) -> list[str]:
    choices = _choices(schema) if raw else None
    end = lark_string(_END_VALUE + "\n")
    if choices == []:
        return [f"{rule}: raw_value"]
    if choices:
        return [f"{rule}: ({' | '.join(map(lark_string, choices))}) {end}"]
    whole = {**schema, **shared} if isinstance(schema, dict) else schema
    return [f"{rule}: {rule}_json {end}", f"{rule}_json: {lark_json(whole)}"]


class XmlArguments:
    """Converts the tags of one call's arguments, up to the function's closing tag, to the text of a JSON object."""

    def __init__(self, raw: Collection[str]) -> None:
        """raw: the parameters whose values are raw text."""
        self._raw = raw
        self._name: str | None = None  # parameter whose value is being read
        self._num = 0
        self._is_lost = False  # True: the text was not a tag
        self.ended = False

    def take(self, text: str) -> tuple[str, str]:
        """Return the JSON completed by a text, and the text's unread end, which must precede the next text."""
        out = ""
        while not self.ended:
            if self._name is not None:
                value, found, rest = text.partition(_END_VALUE)
                keep = 0 if found else overlap(value, _END_VALUE)
                shown = value[: len(value) - keep]
                is_raw = self._name in self._raw
                out += json.dumps(shown, ensure_ascii=False)[1:-1] if is_raw else shown
                if not found:
                    return out, text[len(shown) :]
                out += '"' if is_raw else ""
                self._name, text = None, rest
            text = "" if self._is_lost else text.lstrip()
            tag = _TAG.match(text)
            if tag is None:
                self._is_lost = self._is_lost or len(text) > MAX_TAG
                return out, text
            text, self._name = text[tag.end() :], tag[1]
            if self._name is None:
                out += "}" if self._num else "{}"
                self.ended = True
                break
            out += (", " if self._num else "{") + json.dumps(self._name, ensure_ascii=False) + ": "
            out += '"' if self._name in self._raw else ""
            self._num += 1
        return out, text
