"""Random JSON schemas with the keywords that llguidance enforces, small enough that every answer can be completed."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

Schema = dict[str, Any]

WORDS = ("name", "age", "city", "tags", "price", "kind", "when", "size", "owner", "notes", "id", "score")
FORMATS = ("date", "ipv4", "ipv6", "uuid", "email", "date-time", "time", "duration", "hostname", "uri")
PATTERNS = (r"^[A-Z]{2}-[0-9]{3}$", r"^(red|green|blue)$", r"^[a-z]{3,8}( [a-z]{3,8})?$", r"^\+?[0-9]{5,9}$")


def random_schema(random: Random) -> Schema:
    """Return a schema of an object with two to five properties, nested at most three deep."""
    schema = _object(random, 3)
    if random.random() < 0.3:
        name = random.choice(list(schema["properties"]))
        schema["$defs"] = {"part": schema["properties"][name]}
        schema["properties"][name] = {"$ref": "#/$defs/part"}
        schema["properties"]["more"] = {"type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 2}
    return schema


def _any(random: Random, depth: int) -> Schema:
    kinds: list[Callable[[Random, int], Schema]] = [_string, _integer, _number, _choice, _boolean]
    if depth:
        kinds += [_object, _array, _tuple, _union, _both, _map]
    return random.choice(kinds)(random, depth - 1)


def _object(random: Random, depth: int) -> Schema:
    names = random.sample(WORDS, random.randint(2, 5))
    properties = {name: _any(random, depth) for name in names}
    required = random.sample(names, random.randint(1, len(names)))
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _map(random: Random, _: int) -> Schema:
    """Return the schema of an object whose property names are not listed."""
    values = random.choice([_integer, _boolean])(random, 0)
    if random.random() < 0.5:
        return {"type": "object", "patternProperties": {"^k[0-9]$": values}, "additionalProperties": False,
                "maxProperties": 2}  # fmt: skip
    return {"type": "object", "additionalProperties": values, "maxProperties": 2}


def _array(random: Random, depth: int) -> Schema:
    least = random.randint(0, 2)
    return {"type": "array", "items": _any(random, depth), "minItems": least, "maxItems": least + random.randint(0, 2)}


def _tuple(random: Random, _: int) -> Schema:
    parts = [_any(random, 0) for _ in range(random.randint(1, 3))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def _union(random: Random, depth: int) -> Schema:
    if random.random() < 0.5:
        return {"anyOf": [_any(random, depth), {"type": "null"}]}
    return {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "string", "maxLength": 5}]}


def _both(random: Random, _: int) -> Schema:
    return {
        "allOf": [{"type": "integer", "minimum": random.randint(0, 9)}, {"maximum": random.randint(20, 99)}],
        "exclusiveMaximum": 200,
    }


def _string(random: Random, _: int) -> Schema:
    kind = random.random()
    if kind < 0.25:
        return {"type": "string", "format": random.choice(FORMATS), "maxLength": 40}
    if kind < 0.5:
        return {"type": "string", "pattern": random.choice(PATTERNS)}
    return {"type": ["string", "null"] if kind < 0.6 else "string", "minLength": 1, "maxLength": random.randint(5, 30)}


def _integer(random: Random, _: int) -> Schema:
    low = random.randint(-50, 50)
    if random.random() < 0.3:
        return {
            "type": "integer",
            "exclusiveMinimum": low,
            "maximum": low + 100,
            "multipleOf": random.choice([2, 5, 10]),
        }
    return {"type": "integer", "minimum": low, "maximum": low + random.randint(1, 5000)}


def _number(random: Random, _: int) -> Schema:
    low = random.randint(0, 20)
    bounds = {"exclusiveMinimum": low, "exclusiveMaximum": low + 10}
    # Without `multipleOf`, a number may have any number of digits, and small models generate very long ones.
    return {"type": "number", **bounds, "multipleOf": random.choice([0.25, 0.5])}


def _choice(random: Random, _: int) -> Schema:
    if random.random() < 0.2:
        return {"const": random.choice(["fixed", 7, None, True])}
    return {"enum": random.sample(["small", "large", 1, 2.5, None, "ünï", 'a "quoted" one', [1, 2], {"a": 1}], 3)}


def _boolean(_: Random, __: int) -> Schema:
    return {"type": "boolean"}
