"""Structural tags in `response_format` of vLLM and SGLang: text with tags whose contents have given formats. Pure.

The formats are XGrammar's (https://xgrammar.mlc.ai/docs/tutorials/structural_tag.html), converted to llguidance's Lark.
Text before a trigger or a tag's end is a lazy lexeme, which ends at the first match. A tag's text is matched as text,
even if the model has a token for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from gateway.grammars.limits import check_num, check_regex, too_many
from gateway.grammars.notation import Constraint, lark_json, lark_string, regex_literal
from gateway.grammars.schemas import checked_schema
from protocol.runtime.settings import Settings
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest

MAX_FORMATS = 400
"""Maximum formats, triggers and ends in one structural tag, including nested ones."""

MAX_DEPTH = 32
"""Maximum nesting of formats."""

TAG_FIELDS = ("format", "structures", "triggers")
"""Fields of a structural tag besides its type."""

_ANY = "/(?s:.*)/"
_TAGS = ("tags", "at_least_one", "stop_after_first")
_FIELDS = {
    "any_text": (),
    "const_string": ("value",),
    "json_schema": ("json_schema",),
    "regex": ("pattern",),
    "sequence": ("elements",),
    "or": ("elements",),
    "tag": ("begin", "content", "end"),
    "triggered_tags": ("triggers", *_TAGS),
    "tags_with_separator": ("separator", *_TAGS),
}
"""Type of a format -> its fields. XGrammar has more of both, which are refused by name."""


def structural_tag(form: Any, place: str, settings: Settings) -> Constraint:
    """Return the grammar of a structural tag: {format}, or the form until 2025: {structures, triggers}.

    Limited to `max_grammar_bytes` in total. Raises BadRequest.
    """
    if not isinstance(form, dict) or form.get("type", "structural_tag") != "structural_tag":
        raise BadRequest(f"{place} must be an object of the type 'structural_tag'", param=place)
    for name in form.keys() - {"type", *TAG_FIELDS}:
        raise BadRequest(f"{place}.{brief(name)} is not supported", param=place)
    num_bytes = len(orjson.dumps(form))
    if num_bytes > settings.max_grammar_bytes:  # before anything in it is checked
        raise too_many(num_bytes, settings.max_grammar_bytes, "bytes", place)
    given = {name for name in TAG_FIELDS if form.get(name) is not None}
    rules = _Rules(settings)
    if given == {"format"}:
        start = rules.expression(form["format"], f"{place}.format")
    elif given == {"structures", "triggers"}:
        tags = [
            _tag_of(one, f"{place}.structures[{i}]")
            for i, one in enumerate(_list(form["structures"], f"{place}.structures"))
        ]
        triggered = {"type": "triggered_tags", "tags": tags, "triggers": form["triggers"]}
        start = rules.expression(triggered, place)
    else:
        raise BadRequest(f"{place} of type 'structural_tag' needs format, or structures and triggers", param=place)
    return {"lark_grammar": "\n".join([f"start: {start}", *rules.rules])}


def _tag_of(structure: Any, place: str) -> dict[str, Any]:
    """Convert a structure of the older form to a tag."""
    if not isinstance(structure, dict) or structure.keys() != {"begin", "schema", "end"}:
        raise BadRequest(f"{place} must be an object with begin, schema and end", param=place)
    content = {"type": "json_schema", "json_schema": structure["schema"]}
    return {"type": "tag", "begin": structure["begin"], "content": content, "end": structure["end"]}


class _Rules:
    """The rules of one structural tag, collected during the conversion."""

    def __init__(self, settings: Settings) -> None:
        self.rules: list[str] = []
        self._settings = settings
        self._num_formats = 0
        self._depth = 0

    def expression(self, form: Any, place: str, ends: list[str] | None = None) -> str:
        """Return a format as a Lark expression, including the end that follows it.

        ends: texts of which one ends the format; []: it ends with the answer; None: another format follows.
        """
        self._count(1, place)
        if not isinstance(form, dict) or not isinstance(kind := form.get("type"), str) or kind not in _FIELDS:
            named = brief(form.get("type")) if isinstance(form, dict) else brief(form)
            raise BadRequest(f"{place} must be of one of the types {', '.join(_FIELDS)}; it is {named}", param=place)
        for name in form.keys() - {"type", *_FIELDS[kind]}:
            raise BadRequest(f"{place}.{brief(name)} is not supported", param=place)
        if self._depth == MAX_DEPTH:
            raise BadRequest(f"{place} is within {MAX_DEPTH} other formats, which is the limit", param=place)
        self._depth += 1
        write: Callable[[Mapping[str, Any], str, list[str] | None], str] = getattr(self, f"_{kind}")
        written = write(form, place, [] if ends is None and self._depth == 1 else ends)
        self._depth -= 1
        return written

    # ------------------------------------------------------------ simple formats

    def _any_text(self, form: Mapping[str, Any], place: str, ends: list[str] | None) -> str:
        if ends is None:
            raise BadRequest(f"{place}: any_text must be the last in a tag or in the answer", param=place)
        return self._text_until(ends)

    def _const_string(self, form: Mapping[str, Any], place: str, ends: list[str] | None) -> str:
        return self._ended(lark_string(self._text(form, "value", place)), ends)

    def _json_schema(self, form: Mapping[str, Any], place: str, ends: list[str] | None) -> str:
        place = f"{place}.json_schema"
        schema = checked_schema(form.get("json_schema"), place, self._settings)
        return self._ended(self._rule(lark_json(schema)), ends)

    def _regex(self, form: Mapping[str, Any], place: str, ends: list[str] | None) -> str:
        pattern = self._text(form, "pattern", place)
        check_regex(pattern, f"{place}.pattern")
        return self._ended(regex_literal(pattern), ends)

    # ------------------------------------------------------------ composite formats

    def _sequence(self, form: Mapping[str, Any], place: str, ends: list[str] | None) -> str:
        *first, last = self._each(form, "elements", place)
        parts = [self.expression(one, where, None) for one, where in first]
        return self._rule(" ".join([*parts, self.expression(*last, ends)]))

    def _or(self, form: Mapping[str, Any], place: str, ends: list[str] | None) -> str:
        parts = [self.expression(one, where, ends) for one, where in self._each(form, "elements", place)]
        return self._rule(" | ".join(parts))

    def _tag(self, form: Mapping[str, Any], place: str, ends: list[str] | None, after: str = "") -> str:
        """Return a tag's expression. after: the part of its beginning that is written already, a trigger."""
        begin = lark_string(self._text(form, "begin", place, empty=True)[len(after) :])
        end = form.get("end")
        own = [end] if isinstance(end, str) else _list(end, f"{place}.end")
        self._count(len(own), f"{place}.end")
        if not all(isinstance(one, str) for one in own):
            raise BadRequest(f"{place}.end must be a text, or a list of texts", param=f"{place}.end")
        if own == [""]:  # the tag has no end of its own
            return self._rule(f"{begin} {self.expression(form.get('content'), f'{place}.content', ends)}")
        if "" in own:
            raise BadRequest(f"{place}.end must be a list of texts that are not empty", param=f"{place}.end")
        content = self.expression(form.get("content"), f"{place}.content", own)
        return self._ended(self._rule(f"{begin} {content}"), ends)

    def _triggered_tags(self, form: Mapping[str, Any], place: str, ends: list[str] | None) -> str:
        if ends is None:
            raise BadRequest(f"{place}: triggered_tags must be the last in a tag or in the answer", param=place)
        where = f"{place}.triggers"
        triggers = _list(form.get("triggers"), where)
        self._count(len(triggers), where)
        if not all(isinstance(one, str) and one for one in triggers):
            raise BadRequest(f"{where} must be a list of texts that are not empty", param=where)
        bodies: dict[str, list[str]] = {}
        for tag, at in self._tags(form, place):
            begin = self._text(tag, "begin", at)
            own = [trigger for trigger in triggers if begin.startswith(trigger)]
            if len(own) != 1:
                told = "none" if not own else " and ".join(brief(one) for one in own)
                raise BadRequest(f"{at}.begin must begin with exactly one trigger; it has {told}", param=f"{at}.begin")
            bodies.setdefault(own[0], []).append(self._tag(tag, at, None, own[0]))
        idle = [brief(one) for one in triggers if one not in bodies]
        if idle:
            raise BadRequest(f"{where}: no tag begins with {idle[0]}", param=where)
        begun = [
            f"{self._lazy(f'{_ANY} {lark_string(trigger)}')} ({' | '.join(own)})" for trigger, own in bodies.items()
        ]
        tag = self._rule(" | ".join(begun))
        must, stops = self._is(form, "at_least_one", place), self._is(form, "stop_after_first", place)
        if stops:
            once = self._ended(tag, ends)
            return once if must else self._rule(f"{once} | {self._text_until(ends)}")
        return self._rule(f"{tag}{'+' if must else '*'} {self._text_until(ends)}")

    def _tags_with_separator(self, form: Mapping[str, Any], place: str, ends: list[str] | None) -> str:
        tag = self._rule(" | ".join(self._tag(one, at, None) for one, at in self._tags(form, place)))
        separator = lark_string(self._text(form, "separator", place, empty=True))
        must, stops = self._is(form, "at_least_one", place), self._is(form, "stop_after_first", place)
        some = tag if stops else self._rule(f"{tag} ({separator} {tag})*")
        return self._ended(some if must else self._rule(f'{some} | ""'), ends)

    # ------------------------------------------------------------ parts

    def _count(self, num: int, place: str) -> None:
        self._num_formats += num
        check_num(self._num_formats, MAX_FORMATS, "formats, triggers and ends", place)

    def _rule(self, expression: str) -> str:
        name = f"rule_{len(self.rules)}"
        self.rules.append(f"{name}: {expression}")
        return name

    def _lazy(self, expression: str) -> str:
        name = f"text_{len(self.rules)}"
        self.rules.append(f"{name}[lazy]: {expression}")
        return name

    def _ended(self, expression: str, ends: list[str] | None) -> str:
        return f"{expression} ({' | '.join(map(lark_string, ends))})" if ends else expression

    def _text_until(self, ends: list[str]) -> str:
        return self._lazy(f"{_ANY} ({' | '.join(map(lark_string, ends))})") if ends else _ANY

    def _text(self, form: Mapping[str, Any], name: str, place: str, *, empty: bool = False) -> str:
        value, where = form.get(name), f"{place}.{name}"
        if not isinstance(value, str) or not (value or empty):
            raise BadRequest(f"{where} must be a text{'' if empty else ', and not empty'}", param=where)
        return value

    def _is(self, form: Mapping[str, Any], name: str, place: str) -> bool:
        value = form.get(name, False)
        if not isinstance(value, bool):
            raise BadRequest(f"{place}.{name} must be true or false", param=f"{place}.{name}")
        return value

    def _each(self, form: Mapping[str, Any], name: str, place: str) -> list[tuple[Any, str]]:
        where = f"{place}.{name}"
        return [(one, f"{where}[{i}]") for i, one in enumerate(_list(form.get(name), where))]

    def _tags(self, form: Mapping[str, Any], place: str) -> list[tuple[dict[str, Any], str]]:
        found = self._each(form, "tags", place)
        for tag, where in found:
            self._count(1, where)
            if not isinstance(tag, dict) or tag.get("type", "tag") != "tag" or tag.keys() - {"type", *_FIELDS["tag"]}:
                raise BadRequest(f"{where} must be a tag: begin, content and end", param=where)
        return found


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise BadRequest(f"{place} must be a list, and not empty", param=place)
    return value
