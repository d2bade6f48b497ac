"""The components of a tokenizer.json that are known, and the bounds of their parameters.

A normalizer, a pre-tokenizer, a post-processor and a decoder is a component or a sequence of components. They are read
here from what is plain JSON, with all sequences made one, and written again with the known fields alone.

Components and fields: https://github.com/huggingface/tokenizers/tree/main/tokenizers/src.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_adapters.json_values import is_list, is_object
from peft_adapters.texts.regexes import regex_cost
from protocol.wire.errors import AdapterRefused

MAX_COMPONENTS = 16
MAX_NESTING = 4
MAX_AFFIX_CHARS = 16
"""Characters of what a component puts into a text."""

MAX_TOKEN_CHARS = 1_024
MAX_GROWTH = 128
"""How many times longer normalizer and pre-tokenizer may make a text, together."""

MAX_CHARSMAP_BYTES = 1 << 20
MAX_CHARSMAP_GROWTH = 64
"""Bytes that a charsmap makes of a character; NFKC makes 33 of U+FDFA, the most."""

MAX_TEMPLATE_PIECES = 16
MAX_ID = (1 << 20) - 1


@dataclass(frozen=True, slots=True)
class Component:
    """One component, with those of its fields that are known."""

    type: str
    fields: dict[str, Any]
    growth: float = 1.0  # how many times longer it may make a text


Check = Callable[[Any, str], Any]
"""Returns a field's value as it is written again; gets the place for the error. Raises AdapterRefused."""

Kinds = Mapping[str, Mapping[str, Check]]
"""The fields of each known component."""


def refusal(place: str, what: str) -> AdapterRefused:
    """Return the error that names a place in a tokenizer.json, "" for all of it, and what is wrong with it."""
    return AdapterRefused([f"tokenizer.json: {place} {what}" if place else f"tokenizer.json {what}"])


def component_list(value: Any, place: str, kinds: Kinds) -> list[Component]:
    """Return the components of a part of the file, in order; [] for null. Raises AdapterRefused."""
    found: list[Component] = []
    if value is not None:
        _collect(value, place, kinds, found, 0)
    if sum(component.type == "Precompiled" for component in found) > 1:
        raise refusal(place, "has more than one Precompiled")
    return found


def _collect(value: Any, place: str, kinds: Kinds, found: list[Component], depth: int) -> None:
    if not is_object(value) or not isinstance(value.get("type"), str):
        raise refusal(place, "is not an object with a type")
    kind = value["type"]
    if kind == "Sequence":
        name = next((name for name in _SEQUENCES if name in value), "")
        parts = value.get(name)
        if not is_list(parts):
            raise refusal(place, "is a Sequence without a list")
        if depth == MAX_NESTING:
            raise refusal(place, f"is nested deeper than {MAX_NESTING}")
        for i, part in enumerate(parts[: MAX_COMPONENTS + 1]):
            _collect(part, f"{place}[{i}]", kinds, found, depth + 1)
        return
    if kind not in kinds:
        raise refusal(place, f"is of the type {kind[:40]!r}, not one of {', '.join(kinds)}")
    place = f"{place} ({kind})"
    missing = kinds[kind].keys() - value.keys() - _OPTIONAL
    if missing:
        raise refusal(place, f"has no {', '.join(sorted(missing))}")
    fields = {name: check(value[name], f"{place}.{name}") for name, check in kinds[kind].items() if name in value}
    if kind == "TemplateProcessing":
        _check_template(fields, place)
    found.append(Component(kind, fields, _growth(kind, fields)))
    if len(found) > MAX_COMPONENTS:
        raise refusal(place, f"is one of more than {MAX_COMPONENTS} components")


_OPTIONAL = frozenset({
    "add_prefix_space", "behavior", "individual_digits", "invert", "prepend_scheme", "split", "strip_accents", "suffix",
    "trim_offsets", "use_regex",
})  # fmt: skip
"""Fields that older versions of `tokenizers` did not write, or that have a default."""

_SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")


def written(components: Sequence[Component], sequence: str) -> dict[str, Any] | None:
    """Return components as a part of a tokenizer.json. sequence: the field that holds a list of them."""
    parts = [{"type": component.type, **component.fields} for component in components]
    if len(parts) > 1:
        return {"type": "Sequence", sequence: parts}
    return parts[0] if parts else None


def check_growth(components: Sequence[Component]) -> None:
    """Raise AdapterRefused when components make a text longer than MAX_GROWTH times, one after another."""
    growth = 1.0
    for component in components:
        growth *= component.growth
        if growth > MAX_GROWTH:
            raise refusal(component.type, f"may make a text, with those before it, over {MAX_GROWTH} times longer")


def _growth(kind: str, fields: Mapping[str, Any]) -> float:
    if kind == "Replace" and {"pattern", "content"} <= fields.keys():
        return _replace_growth(fields["pattern"], fields["content"])
    # A byte becomes a character of two bytes, a space one of up to four; a mark may come before each piece.
    return {"ByteLevel": 2.0, "Metaspace": 4.0}.get(kind, 1.0)


def _replace_growth(pattern: Mapping[str, str], content: str) -> float:
    """Return how many times longer a replacement may make a text, in bytes of UTF-8."""
    size = len(content.encode())
    if "String" in pattern:
        return max(1.0, size / len(pattern["String"].encode()))
    shortest = regex_cost(pattern["Regex"]).shortest
    return max(1.0, size / shortest) if shortest else 1.0 + size


# ---------------------------------------------------------------- fields


def _flag(value: Any, place: str) -> bool:
    if not isinstance(value, bool):
        raise refusal(place, "is not true or false")
    return value


def _flag_or_null(value: Any, place: str) -> bool | None:
    return None if value is None else _flag(value, place)


def _count(most: int, least: int = 0) -> Check:
    def check(value: Any, place: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise refusal(place, f"is not a number from {least} to {most}")
        return value

    return check


def _text(most: int, least: int = 0) -> Check:
    def check(value: Any, place: str) -> str:
        if not isinstance(value, str):
            raise refusal(place, "is not a text")
        if not least <= len(value) <= most:
            raise refusal(place, f"has {len(value)} characters, not {least} to {most}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise refusal(place, f"is not valid Unicode: {error}") from error
        return value

    return check


def _one_of(*choices: str) -> Check:
    def check(value: Any, place: str) -> str:
        if value not in choices:
            raise refusal(place, f"is not one of {', '.join(choices)}")
        return value

    return check


def _pattern(value: Any, place: str) -> dict[str, str]:
    if not is_object(value) or len(value) != 1:
        raise refusal(place, "is not one of String and Regex")
    if "String" in value:
        return {"String": _text(MAX_TOKEN_CHARS, 1)(value["String"], place)}
    if not isinstance(value.get("Regex"), str):
        raise refusal(place, "is not one of String and Regex")
    try:
        regex_cost(value["Regex"])
    except AdapterRefused as error:
        raise refusal(place, f": {error.message}") from error
    return {"Regex": value["Regex"]}


def _literal(value: Any, place: str) -> dict[str, str]:
    pattern = _pattern(value, place)
    if "Regex" in pattern:
        raise refusal(place, "is a Regex, which no decoder needs")
    return pattern


def _charsmap(value: Any, place: str) -> str:
    """Check SentencePiece's table: four bytes of a trie's size, the trie, and what characters become, ended by NULs."""
    if not isinstance(value, str):
        raise refusal(place, "is not a text")
    try:
        raw = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise refusal(place, f"is not base64: {error}") from error
    if len(raw) > MAX_CHARSMAP_BYTES:
        raise refusal(place, f"has {len(raw)} bytes; the limit is {MAX_CHARSMAP_BYTES}")
    size = int.from_bytes(raw[:4], "little")
    made = raw[4 + size :]
    if len(raw) < 4 or not size or size % 4 or 4 + size > len(raw) or not made.endswith(b"\0"):
        raise refusal(place, "is not a charsmap of SentencePiece")
    if max(map(len, made.split(b"\0"))) > MAX_CHARSMAP_GROWTH:
        raise refusal(place, f"makes more than {MAX_CHARSMAP_GROWTH} bytes of a character")
    return value


def _template(*texts: str) -> Check:
    """Return the check of what is put around texts, each of which stands there once at most."""

    def check(value: Any, place: str) -> list[dict[str, Any]]:
        if not is_list(value) or len(value) > MAX_TEMPLATE_PIECES:
            raise refusal(place, f"is not a list of at most {MAX_TEMPLATE_PIECES} pieces")
        pieces: list[dict[str, Any]] = []
        seen: list[str] = []
        for piece in value:
            [(kind, inner)] = piece.items() if is_object(piece) and len(piece) == 1 else [("", None)]
            if kind not in ("Sequence", "SpecialToken") or not is_object(inner):
                raise refusal(place, "has a piece that is no Sequence and no SpecialToken")
            id_ = _text(MAX_TOKEN_CHARS, 1)(inner.get("id"), f"{place}.id")
            pieces.append({kind: {"id": id_, "type_id": _count(MAX_ID)(inner.get("type_id", 0), f"{place}.type_id")}})
            if kind == "Sequence":
                seen.append(_one_of(*texts)(id_, f"{place}.id"))
        if len(set(seen)) < len(seen):
            raise refusal(place, "repeats a text")
        return pieces

    return check


def _check_template(fields: Mapping[str, Any], place: str) -> None:
    for piece in (*fields["single"], *fields["pair"]):
        if "SpecialToken" in piece and piece["SpecialToken"]["id"] not in fields["special_tokens"]:
            raise refusal(place, f"has no special token {piece['SpecialToken']['id']!r}")


def _template_tokens(value: Any, place: str) -> dict[str, dict[str, Any]]:
    if not is_object(value) or len(value) > MAX_TEMPLATE_PIECES:
        raise refusal(place, f"is not an object of at most {MAX_TEMPLATE_PIECES} tokens")
    tokens: dict[str, dict[str, Any]] = {}
    for name, token in value.items():
        if not is_object(token):
            raise refusal(place, "has a token that is no object")
        ids, texts = token.get("ids"), token.get("tokens")
        if not is_list(ids) or not is_list(texts) or not len(ids) == len(texts) <= MAX_TEMPLATE_PIECES:
            raise refusal(place, f"has a token without as many ids as tokens, at most {MAX_TEMPLATE_PIECES}")
        tokens[_text(MAX_TOKEN_CHARS)(name, place)] = {
            "id": _text(MAX_TOKEN_CHARS)(token.get("id"), f"{place}.id"),
            "ids": [_count(MAX_ID)(id_, f"{place}.ids") for id_ in ids],
            "tokens": [_text(MAX_TOKEN_CHARS)(text, f"{place}.tokens") for text in texts],
        }
    return tokens


def _token_and_id(value: Any, place: str) -> list[Any]:
    if not is_list(value) or len(value) != 2:
        raise refusal(place, "is not a token and its id")
    return [_text(MAX_TOKEN_CHARS)(value[0], place), _count(MAX_ID)(value[1], place)]


# ---------------------------------------------------------------- components

_AFFIX = _text(MAX_AFFIX_CHARS)
_CHARACTER = _text(1, 1)
_BEHAVIOR = _one_of("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_BYTE_LEVEL: Mapping[str, Check] = {"add_prefix_space": _flag, "trim_offsets": _flag, "use_regex": _flag}
_METASPACE: Mapping[str, Check] = {
    "replacement": _CHARACTER,
    "prepend_scheme": _one_of("always", "first", "never"),
    "split": _flag,
    "add_prefix_space": _flag,  # older files have it instead of `prepend_scheme`
}

NORMALIZERS: Kinds = {
    "BertNormalizer": {
        "clean_text": _flag, "handle_chinese_chars": _flag, "strip_accents": _flag_or_null, "lowercase": _flag,
    },
    "ByteLevel": {},
    "Lowercase": {},
    "NFC": {},
    "NFD": {},
    "NFKC": {},
    "NFKD": {},
    "Nmt": {},
    "Precompiled": {"precompiled_charsmap": _charsmap},
    "Prepend": {"prepend": _AFFIX},
    "Replace": {"pattern": _pattern, "content": _AFFIX},
    "Strip": {"strip_left": _flag, "strip_right": _flag},
    "StripAccents": {},
}  # fmt: skip

PRE_TOKENIZERS: Kinds = {
    "BertPreTokenizer": {},
    "ByteLevel": _BYTE_LEVEL,
    "CharDelimiterSplit": {"delimiter": _CHARACTER},
    "Digits": {"individual_digits": _flag},
    "Metaspace": _METASPACE,
    "Punctuation": {"behavior": _BEHAVIOR},
    "Split": {"pattern": _pattern, "behavior": _BEHAVIOR, "invert": _flag},
    "UnicodeScripts": {},
    "Whitespace": {},
    "WhitespaceSplit": {},
}

POST_PROCESSORS: Kinds = {
    "BertProcessing": {"sep": _token_and_id, "cls": _token_and_id},
    "ByteLevel": _BYTE_LEVEL,
    "RobertaProcessing": {
        "sep": _token_and_id, "cls": _token_and_id, "trim_offsets": _flag, "add_prefix_space": _flag,
    },
    "TemplateProcessing": {"single": _template("A"), "pair": _template("A", "B"), "special_tokens": _template_tokens},
}  # fmt: skip

DECODERS: Kinds = {
    "BPEDecoder": {"suffix": _text(MAX_AFFIX_CHARS, 1)},
    "ByteFallback": {},
    "ByteLevel": _BYTE_LEVEL,
    "Fuse": {},
    "Metaspace": _METASPACE,
    "Replace": {"pattern": _literal, "content": _AFFIX},
    "Strip": {"content": _CHARACTER, "start": _count(MAX_AFFIX_CHARS), "stop": _count(0)},
    "WordPiece": {"prefix": _AFFIX, "cleanup": _flag},
}
