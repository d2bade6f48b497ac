"""Untrusted programs, chat templates and grammars, run in the sandbox as in production."""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.scripted_fleet import make_model_folder
from hostile.fuzz import odd
from hostile.fuzz.engine import Check, Target
from hypothesis import strategies as st

from gateway.chat.messages import normalize_messages
from gateway.grammars.notation import grammar_text
from gateway.grammars.structured import constraint_of
from gateway.sandbox.child import Check as GrammarJob
from gateway.sandbox.child import Render
from gateway.sandbox.sandbox import SandboxPool
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest, Overloaded, Unavailable

LIMIT_S = 0.5
"""CPU seconds per job: enough for every valid one, and a limit on the cost of an endless one."""

REFUSALS = (BadRequest, Overloaded, Unavailable)
"""The job's own fault, a tenant's limit, and a machine too busy to run the job in time."""

TENANTS = itertools.count()
"""Each case uses a new tenant: the cost of earlier cases would get a tenant's next ones refused."""

# ---------------------------------------------------------------- templates

NAMES = ("messages", "message", "x", "tools", "eos_token", "add_generation_prompt", "loop", "self", "undefined", "ns")
EXPRESSIONS = (
    "messages[0].content", "messages[0]['role']", "messages|length", "'a' * 3", "'a' * 1000000000", "range(9)",
    "range(10 ** 12)", "10 ** 10 ** 6", "''.__class__", "().__class__.__bases__", "messages|tojson",
    "x|attr('__init__')",
    "namespace(a=1)", "cycler('a', 'b').next()", "lipsum(9999)", "raise_exception('no')", "strftime_now('%Y')",
    "[[]] * 9",
    "'%s' % messages", "'%9999999s' % 1", "'{0.__class__}'.format(x)", "messages|join", "messages|map('upper')|list",
    "'a'|center(99999999)", "x is defined", "messages|selectattr('role', 'eq', 'user')|list", "dict(a=1)|items",
    "messages|sort(attribute='x')", "'a'|indent(10 ** 8)", "messages|groupby('role')", "1 / 0", "[1, 2]|sum",
    "'\\ud800'",
    "joiner('|')()", "self.__init__.__globals__", "caller()", "messages|batch(0)|list", "messages|slice(10 ** 9)|list",
    "'a'|replace('a', 'b' * 9999)", "''|xmlattr", "'a'|wordwrap(0)", "[]|first.foo.bar", "x()()", "messages|random",
)  # fmt: skip
OPERATORS = ("~", "+", "*", "-", "in", "and", "==", "|", "**", "%", "//")
STATEMENTS = (
    "{{% for message in {e} %}}{b}{{% endfor %}}", "{{% if {e} %}}{b}{{% else %}}{b}{{% endif %}}",
    "{{% set x = {e} %}}",
    "{{% set ns.a = {e} %}}", "{{% macro m(x) %}}{b}{{% endmacro %}}{{{{ m({e}) }}}}",
    "{{% filter upper %}}{b}{{% endfilter %}}",
    "{{% call(x) m() %}}{b}{{% endcall %}}", "{{% include {e} %}}", "{{% extends 'x' %}}", "{{% import 'x' as y %}}",
    "{{% generation %}}{b}{{% endgeneration %}}", "{{% break %}}", "{{% raw %}}{{{{{{% endraw %}}", "{{{{ {e} }}}}",
    "{{% for x in messages recursive %}}{{{{ loop(messages) }}}}{{% endfor %}}", "{{% block a %}}{b}{{% endblock %}}",
    "{{% with x = {e} %}}{b}{{% endwith %}}", "{{% autoescape true %}}{b}{{% endautoescape %}}", "{{# {b} #}}",
    "text {b}",
)  # fmt: skip


@st.composite
def expressions(draw: st.DrawFn) -> str:
    """Draw an expression of a template."""
    text = draw(st.one_of(st.sampled_from(EXPRESSIONS), st.sampled_from(NAMES), odd.texts.map(json.dumps)))
    if draw(st.integers(0, 3)) == 0:
        text = f"{text} {draw(st.sampled_from(OPERATORS))} {draw(st.sampled_from(EXPRESSIONS))}"
    return text


@st.composite
def templates(draw: st.DrawFn) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """Draw a template, messages, and further variables."""
    body = ""
    for _ in range(draw(st.integers(1, 4))):
        statement = draw(st.sampled_from(STATEMENTS))
        body += statement.format(e=draw(expressions()), b=body[:300] if draw(st.booleans()) else draw(odd.texts)[:40])
    raw = body.encode("utf-8", "replace")
    source = draw(odd.damaged(st.just(raw))) if draw(st.integers(0, 4)) == 0 else raw
    contents = st.one_of(odd.texts, st.just([{"type": "text", "text": "x"}]), odd.values)
    messages = draw(st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": contents}), max_size=3))
    variables: dict[str, Any] = draw(st.dictionaries(odd.texts | st.sampled_from(NAMES), odd.values, max_size=2))
    return source.decode("utf-8", "replace"), messages, variables


@contextmanager
def _templates() -> Iterator[Check]:
    with _pool("") as (runner, pool):

        def check(case: tuple[str, list[dict[str, Any]], dict[str, Any]]) -> str:
            source, messages, variables = case
            try:
                job = Render(source, {"eos_token": "<end>"}, normalize_messages(messages), True, variables)
                text = runner.run(pool.do(job, tenant=f"t{next(TENANTS)}", limit_s=LIMIT_S))
            except REFUSALS as refusal:
                return odd.kind_of(refusal)
            return f"refused: {' '.join(text.refusal.split()[:6])}" if text.refusal else "rendered"

        yield check


# ---------------------------------------------------------------- grammars

SCHEMAS = (
    {"type": "object"}, {"type": "string", "pattern": "^a+$"}, {"type": "string", "pattern": "(a|aa)+$"}, {"$ref": "#"},
    {"type": "array", "items": {"$ref": "#"}}, {"enum": [1, "a", None]}, {"const": {"a": 1}}, {"type": "integer"},
    {"type": "number", "minimum": 1e300, "maximum": -1}, {"anyOf": []}, {"allOf": [{"type": "string"},
    {"type": "null"}]},
    {"type": "string", "minLength": 1000, "maxLength": 100_000}, {"type": "array",
    "minItems": 500, "maxItems": 100_000},
    {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, {"type": "string", "format": "date-time"},
    {"oneOf": [{"type": "string"}] * 50}, {"not": {}}, {"patternProperties": {"(": {}}}, {"type": ["string", "x"]},
    {"type": "number", "multipleOf": 1e-9}, {"properties": {"a": False}, "required": ["a"]}, {"if": {}, "then": False},
)  # fmt: skip
REGEXES = (
    "(a|b)?", "[^x]", "a{1,500}", "(a*)*", ".", "\\d+", "(?i)x", "\\p{L}", "a|", "[", "(?=a)", "\\1", "(?P<n>a)",
    "x{99999}",
    "(.{0,100}a){0,50}", "\\x00", "é+", "[a-\\x{10ffff}]", "&", "~a", "(?s:.)", "^a$", "\\b",
)  # fmt: skip
LARKS = (
    'start: "a"', "start: start", "start: a a\na: b b\nb: c c\nc: /x*/", "start: /(/", 'start: "a" start | ""',
    "start[lazy]: /a/",
    "start: %json {}", 'start: %json {"type": "x"}', "start: @g", "%ignore /./\nstart: /a/", "start: /a/ & /b/",
    "start: ~/a/",
    'start[max_tokens=5]: /.*/\n', "start: <[1]>", "start: <|im_end|>", "start: /a{1,99999}/",
    "%llguidance {}\nstart: /a/",
)  # fmt: skip

nested_schemas = st.recursive(
    st.sampled_from(SCHEMAS),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"type": st.just("array"), "items": inner}),
        st.fixed_dictionaries({"type": st.just("object"), "properties": st.dictionaries(odd.texts, inner, max_size=3)}),
        st.dictionaries(st.sampled_from(["anyOf", "allOf", "oneOf"]), st.lists(inner, max_size=3), max_size=2),
        st.tuples(inner, inner).map(lambda pair: {**pair[0], **pair[1]}),
    ),
    max_leaves=5,
)


@st.composite
def grammars(draw: st.DrawFn) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Draw a `response_format` and a `structured_outputs`, one of which is None."""
    how = draw(st.sampled_from(["schema", "schema", "regex", "grammar", "choice", "odd", "whitespace"]))
    if how == "schema":
        schema = draw(st.one_of(nested_schemas, nested_schemas, odd.values))
        return {"type": "json_schema", "json_schema": {"schema": schema}}, None
    if how == "regex":
        return None, {"regex": "".join(draw(st.lists(st.sampled_from(REGEXES) | odd.texts, max_size=6)))}
    if how == "grammar":
        text = "\n".join(draw(st.lists(st.sampled_from(LARKS), min_size=1, max_size=3)))
        return None, {"grammar": draw(odd.damaged(st.just(text.encode()))).decode("utf-8", "replace")}
    if how == "choice":
        return None, {"choice": draw(st.lists(odd.texts, max_size=5))}
    if how == "whitespace":
        pattern = "".join(draw(st.lists(st.sampled_from(REGEXES), max_size=4)))
        return None, {"json": draw(nested_schemas), "whitespace_pattern": pattern}
    if draw(st.booleans()):
        return draw(st.dictionaries(st.sampled_from(["type", "schema", "json_schema"]), odd.values, max_size=3)), None
    kinds = ["json", "json_object", "regex", "choice", "grammar", "whitespace_pattern", "disable_any_whitespace", "x"]
    return None, draw(st.dictionaries(st.sampled_from(kinds), odd.values, max_size=2))


@contextmanager
def _grammars() -> Iterator[Check]:
    settings = Settings()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_model_folder(Path(folder)) / "tokenizer.json"
        with _pool(str(tokenizer)) as (runner, pool):

            def check(case: tuple[dict[str, Any] | None, dict[str, Any] | None]) -> str:
                try:
                    constraint = constraint_of(*case, settings)
                    if constraint is None:
                        return "none"
                    answer = runner.run(
                        pool.do(GrammarJob(grammar_text(constraint)), tenant=f"t{next(TENANTS)}", limit_s=LIMIT_S)
                    )
                except REFUSALS as refusal:
                    return odd.kind_of(refusal)
                return f"refused: {' '.join(answer.refusal.split()[:5])}" if answer.refusal else "compiled"

            yield check


@contextmanager
def _pool(tokenizer: str) -> Iterator[tuple[asyncio.Runner, SandboxPool]]:
    with asyncio.Runner() as runner:

        async def make() -> SandboxPool:
            return SandboxPool(2, tokenizer)

        pool = runner.run(make())
        try:
            yield runner, pool
        finally:
            runner.run(pool.close())


TARGETS = (
    Target("chat templates", templates(), _templates, cost=20.0),
    Target("grammars, schemas and regular expressions", grammars(), _grammars, cost=20.0),
)
