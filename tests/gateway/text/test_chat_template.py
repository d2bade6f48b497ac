"""Chat templates render the same as in transformers, and can only produce text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from gateway.chat.message_text import text_in, text_of
from gateway.chat.messages import normalize_messages
from gateway.chat.template import ChatTemplate
from gateway.chat.template_forms import Form, in_forms, shows_lists
from protocol.wire.errors import BadRequest

CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "What is 2 + 2?\n"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": "zwei é"}'}}
        ],
    },
    {"role": "tool", "content": "4", "tool_call_id": "c1"},
    {"role": "assistant", "content": "Four.", "reasoning": "it is easy"},
    {"role": "user", "content": "Thanks"},
]

TEMPLATES = [
    # ChatML with defaults, whitespace control and a nested loop
    """{%- if messages[0].role != 'system' %}
    {{- bos_token + 'default system' }}
{%- endif %}
{% for message in messages %}
    {%- if loop.index0 == 1 and false %}{% continue %}{% endif %}
{{ '<|im_start|>' + message['role'] }}
{% if message.content is defined and message.content is not none %}{{ message.content | trim }}{% endif %}
{%- for call in message.tool_calls %}
{{ call.function.name }}({{ call.function.arguments | tojson }}){{ call.function.arguments | tojson(indent=2) }}
{%- endfor %}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}""",
    # namespaces, break, generation blocks, defined and None variables, reasoning, extra variables
    """{%- set ns = namespace(found=false, n=0) %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{%- set ns.found = true %}{%- break %}{%- endif %}
{%- set ns.n = ns.n + 1 %}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}{%- endif %}
{%- endfor %}
{{- ns.found }}|{{ ns.n }}|{{ tools is none }}|{{ tools is defined }}|{{ documents is none }}|{{ nothing is defined }}
{{- '|' ~ (messages[4].reasoning_content | default('none')) ~ '|' ~ (messages[4].thinking | default('none')) }}
{{- '|' ~ (enable_thinking | default('unset')) ~ '|' ~ strftime_now('%Y') | length }}
{{- dict(a=1).a }}""",
    # string methods, slices, filters
    "{% for m in messages[1:] %}{% if m.content %}{{ m.content.strip().upper()[:4] }}{{ m.content.split('\\n')[0] }}"
    "{{ m | tojson(sort_keys=true) }}{{ raise_exception('no') if m.role == 'never' }}{% endif %}{% endfor %}",
]


def reference(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """Return the text that transformers renders."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>", chat_template=template
    )
    text = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("variables", [{"add_generation_prompt": True}, {"enable_thinking": False}])
def test_rendering_equals_transformers(template: str, variables: dict[str, Any]) -> None:
    normal = normalize_messages(CONVERSATION)
    wanted = reference(template, normal, **variables)
    own = dict(variables)
    prompt = own.pop("add_generation_prompt", False)
    got = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"}).render(
        normal, add_generation_prompt=prompt, variables=own
    )
    assert got == wanted
    assert len(wanted) > 40


MIXED: list[dict[str, Any]] = [
    {"role": "developer", "content": "a", "name": None},
    {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "function": {"name": "f", "arguments": ""}}, {"function": {"name": "g", "arguments": {"k": "é"}}}]},
    {"role": "tool", "tool_call_id": "1", "content": "d"},
    {"role": "assistant", "content": None, "tool_calls": [], "refusal": "e"},
    {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
    {"role": "function", "name": "f", "content": "g"},
]  # fmt: skip


def test_messages_become_one_form() -> None:
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    f, g = {"name": "f", "arguments": {}}, {"name": "g", "arguments": {"k": "é"}}
    before = json.dumps(MIXED)
    assert normalize_messages(MIXED) == [
        {"role": "developer", "content": "a"},
        {"role": "user", "content": parts},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": f}, {"function": g}]},
        {"role": "tool", "tool_call_id": "1", "content": "d"},
        {"role": "assistant", "content": "e"},
        {"role": "assistant", "tool_calls": [{"id": "000000005", "type": "function", "function": f}]},
        {"role": "tool", "name": "f", "tool_call_id": "000000005", "content": "g"},
    ]
    assert json.dumps(MIXED) == before


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{{ messages[0].role }}{{ messages[1].content }}", "systemb\nc"),
        ("{{ messages[0].role }}{{ 'developer' }}", "developerdeveloper"),
        ("{% for p in messages[1].content %}{{ p.text }}{% endfor %}{{ messages[0].content[0].text }}", "bca"),
        ("{% for p in messages[1].content %}{{ p.text }}{% endfor %}{{ messages[0].content is string }}", "bcTrue"),
        ("{% set c = messages[1]['content'] %}{% for p in c %}{{ p.text }}{% endfor %}", "bc"),
        ("{{ messages[1].content | trim }}{% for p in messages[0].content if p is mapping %}{% endfor %}", "b\nc"),
        ("{{ messages[1].content + '' }}{% for p in messages[0].content if p is mapping %}{% endfor %}", "b\nc"),
        ("[{{ messages[2]['content'] }}]", "[]"),
        ("{{ messages[2].content is none }}", "True"),
        ("{{ messages[2].tool_calls[1].function | tojson }}", '{"name": "g", "arguments": {"k": "é"}}'),
        ("{{ messages[2].tool_calls[1].function.arguments }}", '{"k": "é"}'),
        ("{% set f = messages[2].tool_calls[1].function %}{{ 'a' + f.arguments }}", 'a{"k": "é"}'),
        ("{{ messages[2].tool_calls[1].function['arguments']['k'] }}", "é"),
        (
            "{% set a = messages[2].tool_calls[1].function.arguments %}{{ a | tojson }}{{ 'b' if a else a }}",
            '{"k": "é"}b',
        ),
        ("{{ 'name' in messages[3] }}", "False"),
        ("{{ messages[3].name.upper() }}", "F"),
        ("{{ messages[6].name }}{{ messages[6].tool_call_id == messages[5].tool_calls[0].id }}", "fTrue"),
    ],
)
def test_a_template_gets_the_form_that_it_expects(source: str, wanted: str) -> None:
    assert ChatTemplate(source, {}).render(normalize_messages(MIXED), variables={}) == wanted


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "tool_calls": 3}, "messages[0].tool_calls"),
        ({"role": "user", "content": "a", "tool_calls": "x"}, "messages[0].tool_calls"),
        ({"role": "system", "content": "a", "tool_calls": [3]}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [3]}, "messages[0].tool_calls[0].function"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]},
            "messages[0].tool_calls[0].function.name",
        ),
        ({"role": "assistant", "tool_calls": [{"id": 3, "function": {"name": "f"}}]}, "messages[0].tool_calls[0].id"),
        ({"role": "assistant", "function_call": "f"}, "messages[0].function_call.name"),
        (
            {"role": "assistant", "function_call": {"name": "f"}, "tool_calls": [{"function": {"name": "f"}}]},
            "messages[0].function_call",
        ),
        ({"role": "assistant", "refusal": 4}, "messages[0].refusal"),
        ({"role": "assistant", "audio": {"id": "a"}}, "messages[0].audio"),
        ({"role": "user", "content": "a", "name": 4}, "messages[0].name"),
        ({"role": "tool", "content": None, "tool_call_id": "a"}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}, "messages[0].content[0]"),
        ({"role": "user", "content": ["a"]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0]"),
    ],
)
def test_wrong_messages_are_named(message: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        normalize_messages([message])
    assert caught.value.param == param


def test_an_empty_list_of_calls_is_dropped_from_any_message() -> None:
    messages = [{"role": role, "content": "a", "tool_calls": []} for role in ("system", "user", "assistant", "tool")]
    assert normalize_messages(messages) == [{"role": one["role"], "content": "a"} for one in messages]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ nothing.at.all }}",
        "{{ 1 + 'a' }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10000000000) %}{% endfor %}",
        "{{ messages[9].role.upper() }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_a_client_error(template: str) -> None:
    with pytest.raises(BadRequest) as caught:
        ChatTemplate(template, {}).render([{"role": "user", "content": "x"}], variables={})
    assert caught.value.param == "messages"
    assert "undefined" not in caught.value.message


def test_a_template_is_tried_five_times_at_most() -> None:
    calls = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "b"},
    ]
    forms = list(in_forms(normalize_messages(messages), Form(parts=True, only_parts=True)))
    assert len(forms) == 5
    assert all(one not in forms[:i] for i, one in enumerate(forms))


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"role": "assistant", "content": "a", "refusal": "no"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "refusal": ""},
        {"role": "assistant", "refusal": "no"},
        {"role": "assistant", "content": ""},
    ],
)
def test_the_text_of_a_message_is_that_of_its_normal_form(message: dict[str, Any]) -> None:
    assert text_in(message) == text_of(normalize_messages([message])[0].get("content"))


def test_calls_are_not_read_for_the_text_beside_them() -> None:
    calls = [{"function": {"name": "f", "arguments": "no JSON"}}] * 3
    assert text_in({"role": "assistant", "content": "a", "tool_calls": calls}) == "a"


@pytest.mark.parametrize("index", [0, 1, 4, 5])
def test_a_list_that_a_template_writes_as_python_does_is_found(index: int) -> None:
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    messages = [{"role": role, "content": [{"type": "text", "text": f"{i}'"}]} for i, role in enumerate(roles)]
    assert not shows_lists("".join(f"{i}'" for i in range(6)), messages)
    assert shows_lists(f"0'{messages[index]['content']}5'", messages)


def test_a_template_that_fails_is_told_with_the_line() -> None:
    with pytest.raises(BadRequest, match=r"fails on these messages in line 3 \(UndefinedError\)$"):
        ChatTemplate("\n\n{{ nothing.at.all }}", {}).render([{"role": "user", "content": "x"}], variables={})


def test_a_broken_template_is_refused_at_the_start() -> None:
    with pytest.raises(BadRequest, match="chat template"):
        ChatTemplate("{% if %}", {})


def test_a_client_s_variables_cannot_replace_the_messages() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ bos_token }}{{ add_generation_prompt }}", {"bos_token": "B"})
    variables = {"messages": [{"content": "forged"}], "add_generation_prompt": False}
    assert template.render([{"role": "user", "content": "true"}], variables=variables) == "trueBTrue"


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"chat_template.jinja": "A{{ eos_token }}", "tokenizer_config.json": {"eos_token": "E"}}, "AE"),
        ({"tokenizer_config.json": {"chat_template": "B{{ bos_token }}", "bos_token": {"content": "<s>"}}}, "B<s>"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "T"},
                        {"name": "default", "template": "D{{ sep_token }}"},
                    ]
                },
                "special_tokens_map.json": {"sep_token": "S"},
            },
            "DS",
        ),
        ({"tokenizer_config.json": {}}, None),
        ({}, None),
    ],
)
def test_templates_are_found_where_models_keep_them(tmp_path: Path, files: dict[str, Any], wanted: str | None) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    template = ChatTemplate.load(tmp_path)
    assert (template and template.render([], variables={})) == wanted


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": ["user"], "content": "a"}, "role must be one of"),
        ({"role": {"a": 1}, "content": "a"}, "role must be one of"),
        ({"role": "r" * 10_000, "content": "a"}, "not 'rrr"),
        ({"role": "user", "content": [{"type": ["text"]}]}, "are not supported"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" + "[]," * 200_000}}]},
            "lists and objects",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 101 + "]" * 101}}]},
            "is 100 levels",
        ),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '"\\ud800"'}}]}, "is not JSON"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "1" * 5000}}]}, "is not JSON"),
    ],
)
def test_hostile_messages_are_refused_in_few_words(message: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest, match=said) as refused:
        normalize_messages([message])
    assert len(refused.value.message) < 300
