"""Tool calls and reasoning: the formats of four families of templates, grammars of answers, and parsing them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers import examples
from helpers.openai_events import events_of
from helpers.scripted_fleet import Script, ScriptedFleet, make_model_folder, playing, running_gateway
from llguidance import LLMatcher, LLTokenizer
from openai import AsyncOpenAI
from tokenizers import AddedToken, Tokenizer

from gateway.grammars.notation import grammar_text
from gateway.text.answer_form import AnswerForm, answer_grammar
from gateway.text.answer_parts import THOUGHTS, AnswerParts, Thought
from gateway.tools.definitions import tools_of
from gateway.tools.prompt import knows_tools
from gateway.tools.styles import (
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMED,
    MISTRAL_SPACED,
    MISTRAL_WITH_IDS,
    QWEN_CODER,
    ToolStyle,
    style_of,
)
from gateway.tools.xml_calls import raw_parameters
from peft_adapters.texts.files import MAX_TEMPLATE_BYTES
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

TEMPLATES = Path(__file__).parents[1] / "templates"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"p": {"$ref": "#/$defs/n"}},
            "required": ["p"],
            "$defs": {"n": {"type": "integer"}},
        },
    },
}
TOOLS = [WEATHER, ADD]
STYLES = {
    "hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "mistral-spaced": MISTRAL_SPACED,
    "mistral-named": MISTRAL_NAMED, "mistral-ids": MISTRAL_WITH_IDS, "qwen-coder": QWEN_CODER,
}  # fmt: skip
QWEN_THOUGHT, MISTRAL_THOUGHT = THOUGHTS
OSLO, THREE = {"city": 'Oslo {"}]ü'}, {"p": 3}


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def written(style: ToolStyle, *calls: tuple[str, dict[str, Any]]) -> str:
    """Return calls as a model of this style writes them."""

    def body(name: str, arguments: dict[str, Any]) -> str:
        if style.body == "json":
            return f'{{"name": "{name}", "{style.arguments}": {as_json(arguments)}}}'
        if style.body == "named":
            return f"{name}{'[CALL_ID]a1b2c3d4e' if style.call_ids else ''}[ARGS]{as_json(arguments)}"
        values = {key: value if isinstance(value, str) else as_json(value) for key, value in arguments.items()}
        tags = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items()]
        return f"<function={name}>\n{''.join(tags)}</function>"

    bodies = [style.open + body(*call) + style.close for call in calls]
    return style.prefix + style.between.join(bodies) + style.suffix


# ---------------------------------------------------------------- the grammar


@pytest.fixture(
    scope="module",
    params=[None, False, pytest.param(True, marks=pytest.mark.thorough)],
    ids=["written", "added", "special"],
)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Markers are text, or separate tokens that llguidance treats as special, or special tokens."""
    folder = make_model_folder(tmp_path_factory.mktemp("markers"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    markers = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<think>", "</think>",
               "[THINK]", "[/THINK]", "<|python_tag|>")  # fmt: skip
    if request.param is not None:
        tokenizer.add_tokens([AddedToken(marker, special=request.param) for marker in markers])
    return tokenizer


@pytest.mark.parametrize("style", list(STYLES.values()), ids=list(STYLES))
def test_answers_are_text_or_calls_of_the_tools(tokenizer: Tokenizer, style: ToolStyle) -> None:
    added = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()}
    vocabulary = LLTokenizer(tokenizer.to_str(), eos_token=1)
    one, two = written(style, ("get_weather", OSLO)), written(style, ("get_weather", OSLO), ("add", THREE))
    other = written(style, ("add", THREE))
    own = MISTRAL_THOUGHT if style.body == "named" else QWEN_THOUGHT
    wrong: list[str] = []
    for choice in ("auto", "required", "add", {"type": "function", "function": {"name": "add"}}):
        for parallel in (None, False):
            for thought, opened in ((None, False), (own, False), (own, True)):
                auto, named = choice == "auto", choice not in ("auto", "required")
                tools = tools_of(TOOLS, choice, parallel, Settings())
                form = AnswerForm(thought, opened, style, {}, {})
                matcher = LLMatcher(vocabulary, grammar_text(*answer_grammar(None, tools, form, added.get)))
                assert not matcher.is_error(), matcher.get_error()
                before = "" if thought is None or opened else f"{thought[0]}\n"
                before += f"a {{x}} <tool\n{thought[1]}\n\n" if thought is not None else ""
                cases = {
                    before + one: not named,
                    before + two: not named and parallel is not False,
                    before + other: True,
                    before + "Hello, how < are {you}?": auto,
                    before + "Sure:\n" + one: auto,
                    before + one.replace("get_weather", "unknown"): False,
                    before + one.replace("city", "place"): False,
                    before + other.replace("3", '"3"'): False,
                    "<b>hi</b>": auto and not opened,
                    other: not opened,
                }
                for text, good in cases.items():
                    ids = tokenizer.encode(text, add_special_tokens=False).ids
                    copy = matcher.deep_copy()
                    taken = copy.try_consume_tokens(ids)
                    if (taken == len(ids) and copy.is_accepting()) != good:
                        wrong.append(f"{choice} {parallel} {thought} {opened}: {text!r}: {taken} of {len(ids)}")
    assert not wrong, "\n".join(wrong)


def test_text_beside_calls_may_have_a_form_too(tokenizer: Tokenizer) -> None:
    tools = tools_of([ADD], None, None, Settings())
    constraint = {"json_schema": {"type": "array", "items": {"type": "integer"}}}
    form = AnswerForm(QWEN_THOUGHT, False, HERMES, {}, {})
    added = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()}
    vocabulary = LLTokenizer(tokenizer.to_str(), eos_token=1)
    matcher = LLMatcher(vocabulary, grammar_text(*answer_grammar(constraint, tools, form, added.get)))
    assert not matcher.is_error(), matcher.get_error()
    call = written(HERMES, ("add", THREE))
    for text, good in (("[1, 2]", True), (call, True), ("<think>so</think>[3]", True), ("Hello", False)):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        copy = matcher.deep_copy()
        assert (copy.try_consume_tokens(ids) == len(ids) and copy.is_accepting()) == good, text


# ---------------------------------------------------------------- parsing

RAW = {tool["function"]["name"]: raw_parameters(tool["function"]["parameters"]) for tool in TOOLS}


def read(
    text: str, size: int, *, style: ToolStyle | None, thought: Thought | None = None, opened: bool = False,
    raw: dict[str, frozenset[str]] | None = None,
) -> list[Any]:  # fmt: skip
    """Return the parts of an answer that arrives in pieces of `size` characters, merging adjacent parts of a kind."""
    splitter = AnswerParts(thought=thought, opened=opened, style=style, raw=raw or RAW)
    parts = [part for at in range(0, len(text), size) for part in splitter.add(text[at : at + size])]
    whole: list[list[Any]] = []
    for part in [*parts, *splitter.finish()]:
        if whole and part.kind != "call" and whole[-1][0] == part.kind:
            whole[-1][1] += part.text
        else:
            whole.append([part.kind, part.text, part.index])
    return [tuple(part) for part in whole]


CALLS = [("get_weather", OSLO), ("add", THREE)]
CALL_PARTS = [
    ("call", "get_weather", 0), ("arguments", as_json(OSLO), 0), ("call", "add", 1), ("arguments", '{"p": 3}', 1)
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_pieces_of_any_size_are_read_alike(size: int) -> None:
    for style in STYLES.values():
        assert read(written(style, *CALLS), size, style=style) == CALL_PARTS
        assert read("Hello, {you} < [TOOL] <tool ", size, style=style) == [("text", "Hello, {you} < [TOOL] <tool ", 0)]
        if style.marker:
            text = f"Let me see.\n\n{written(style, *CALLS)}"
            assert read(text, size, style=style) == [("text", "Let me see.", 0), *CALL_PARTS]
    cut = written(HERMES, *CALLS)
    assert read(cut[:18], size, style=HERMES) == [("text", cut[:18], 0)]  # the call has no name yet
    assert read(cut[:59], size, style=HERMES) == [("call", "get_weather", 0), ("arguments", '{"city": "', 0)]
    for thought in THOUGHTS:
        begin, end = thought
        both = f"{begin}\nWhat < is?{end}\n\n{cut}"
        parts = [("reasoning", "\nWhat < is?", 0), *CALL_PARTS]
        assert read(both, size, style=HERMES, thought=thought) == parts
        assert read(both.removeprefix(begin), size, style=HERMES, thought=thought, opened=True) == parts
    assert read("<b>bold</b>", size, style=None, thought=QWEN_THOUGHT) == [("text", "<b>bold</b>", 0)]
    assert read("<think>no end </thi", size, style=None, thought=QWEN_THOUGHT) == [("reasoning", "no end </thi", 0)]


EDIT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "description": "of the file"},
        "mode": {"enum": ["add", "replace"]},
        "line": {"$ref": "#/$defs/line"},
        "dry": {"type": "boolean"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "code": {"type": "string", "pattern": "^[a-z]+$"},
        "more": {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"}}}},
    },
    "required": ["path", "line", "owner"],
    "$defs": {"line": {"type": "integer", "minimum": 1}},
}  # fmt: skip
EDITS: list[tuple[str, Any]] = [  # text between the tags, and its value
    ("path", 'a "b"\\n\n{"c": 1}\n<parameter=x>\n'), ("path", ""), ("mode", "replace"), ("line", 12), ("dry", False),
    ("note", None), ("note", "so"), ("code", "abc"), ("more", {"tags": ["\n</parameter>", "ü"]}), ("owner", [{}]),
]  # fmt: skip
NO_EDITS = [("mode", "remove"), ("line", 0), ("line", "12"), ("dry", "no"), ("code", "A"), ("more", 1), ("what", 1)]


def test_arguments_in_tags_are_strings_as_they_are_and_json(tokenizer: Tokenizer) -> None:
    """For each value of each kind, allowed or not: an allowed one is read as the JSON it means, however it is cut."""
    tool = {"type": "function", "function": {"name": "edit", "parameters": EDIT}}
    tools = tools_of([tool], "required", None, Settings())
    assert tools is not None
    raw = {"edit": raw_parameters(tools.schemas["edit"])}
    assert raw["edit"] == {"path", "mode"}
    added = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()}
    vocabulary = LLTokenizer(tokenizer.to_str(), eos_token=1)
    form = AnswerForm(None, False, QWEN_CODER, {}, raw)
    matcher = LLMatcher(vocabulary, grammar_text(*answer_grammar(None, tools, form, added.get)))
    assert not matcher.is_error(), matcher.get_error()
    for key, value, good in (*((*edit, True) for edit in EDITS), *((*edit, False) for edit in NO_EDITS)):
        meant = {"path": "a", "line": 3, "owner": "me", key: value}
        order = [*EDIT["properties"], "owner", "what"]
        meant = dict(sorted(meant.items(), key=lambda pair: order.index(pair[0])))
        tags = "".join(
            f"<parameter={k}>\n{v if k in raw['edit'] else as_json(v)}\n</parameter>\n" for k, v in meant.items()
        )
        text = f"<tool_call>\n<function=edit>\n{tags}</function>\n</tool_call>"
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        copy = matcher.deep_copy()
        assert (copy.try_consume_tokens(ids) == len(ids) and copy.is_accepting()) == good, text
        for size in (1, 5, 1000):
            [(_, name, _), (_, arguments, _)] = read(text, size, style=QWEN_CODER, raw=raw)
            assert (name, json.loads(arguments)) == ("edit", meant)


def test_arguments_without_names_and_what_tags_cannot_say() -> None:
    def tools(parameters: dict[str, Any]) -> Any:
        return tools_of(
            [{"type": "function", "function": {"name": "f", "parameters": parameters}}], None, None, Settings()
        )

    form = AnswerForm(None, False, QWEN_CODER, {}, {})
    free = answer_grammar(None, tools({"type": "object", "additionalProperties": {"type": "integer"}}), form, {}.get)
    assert LLMatcher.validate_grammar(grammar_text(*free)) == ""
    text = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>"
    assert read(text, 3, style=QWEN_CODER) == [("call", "f", 0), ("arguments", '{"a": 1, "b": 2}', 0)]
    for parameters, said in (
        ({"oneOf": [{"required": ["a"]}]}, "the arguments of f have oneOf, which cannot be enforced"),
        ({"properties": {"a>b": {}}}, "a parameter 'a>b'"),
        ({"properties": []}, "properties must be an object"),
        ({"required": "a"}, "required must be a list"),
    ):
        with pytest.raises(BadRequest, match=said):
            answer_grammar(None, tools(parameters), form, {}.get)


# ---------------------------------------------------------------- end to end


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models: its template, and the markers in its tokenizer."""

    template: str
    style: ToolStyle
    tokens: tuple[str, ...] = ()
    special: bool = True
    thought: str = ""  # precedes its answers


FAMILIES = [
    Family("llama3", LLAMA, ("<|python_tag|>",)),
    Family(
        "qwen",
        HERMES,
        ("<tool_call>", "</tool_call>", "<think>", "</think>"),
        special=False,
        thought="<think>\nHm.\n</think>\n\n",
    ),
    Family("mistral", MISTRAL, ("[TOOL_CALLS]",)),
    Family(
        "mistral_named", MISTRAL_NAMED, ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"), thought="[THINK]Hm.[/THINK]"
    ),
    Family("mistral_ids", MISTRAL_WITH_IDS, ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")),
    Family("qwen_coder", QWEN_CODER, ("<tool_call>", "</tool_call>"), special=False),
    Family("hermes", HERMES),
]


@dataclass(slots=True)
class Served:
    """A gateway in front of a fleet with a scripted answer."""

    http: httpx2.AsyncClient
    openai: AsyncOpenAI
    fleet: ScriptedFleet

    def prompt(self) -> str:
        """Return the prompt of the last request."""
        ids = memoryview(self.fleet.seen[-1][1].prompt).cast("i").tolist()
        return self.fleet.tokenizer.decode(ids, skip_special_tokens=False)


@asynccontextmanager
async def served(bus: Bus, folder: Path, family: Family) -> AsyncIterator[Served]:
    make_model_folder(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(token, special=family.special) for token in family.tokens])
    tokenizer.save(str(folder / "tokenizer.json"))
    if family.template != "plain":  # which supports no tools, and refuses their results
        (folder / "chat_template.jinja").write_text((TEMPLATES / f"{family.template}.jinja").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "", "eos_token": "<|im_end|>"}))
    async with (
        playing(bus.url, tokenizer, max_model_len=4096) as fleet,
        running_gateway(bus, folder) as gateway,
        gateway.client() as http,
        AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as openai,
    ):
        yield Served(http, openai, fleet)


@pytest.mark.parametrize("family", examples.some(FAMILIES, *FAMILIES[::3]), ids=lambda family: family.template)
async def test_a_conversation_with_tools(bus: Bus, tmp_path: Path, family: Family) -> None:
    source = (TEMPLATES / f"{family.template}.jinja").read_text()
    assert (style_of(source), knows_tools(source)) == (family.style, True)
    async with served(bus, tmp_path / "model", family) as it:
        messages: list[Any] = [{"role": "user", "content": "Weather in Oslo?"}]
        ask: dict[str, Any] = {"model": "base", "messages": messages, "tools": TOOLS}
        it.fleet.script = lambda submit, body: Script(family.thought + written(family.style, *CALLS))
        whole = (await it.openai.chat.completions.create(**ask)).choices[0]
        assert "get_weather" in it.prompt()
        assert "The weather at a place." in it.prompt()
        assert it.fleet.seen[-1][1].grammar
        assert whole.finish_reason == "tool_calls"
        assert whole.message.content is None
        assert ("Hm." in (getattr(whole.message, "reasoning_content", "") or "")) == bool(family.thought)
        calls = whole.message.tool_calls or []
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == CALLS  # type: ignore[union-attr]

        streamed: list[dict[str, Any]] = []
        finish = ""
        async for chunk in await it.openai.chat.completions.create(**ask, stream=True):
            delta, finish = chunk.choices[0].delta, chunk.choices[0].finish_reason or finish
            assert not delta.content
            for call in delta.tool_calls or []:
                function = call.function
                assert function is not None
                if call.index == len(streamed):
                    assert (call.type, function.arguments) == ("function", "")
                    streamed.append({"id": call.id, "name": function.name, "arguments": ""})
                else:
                    assert (call.index, call.id, function.name) == (len(streamed) - 1, None, None)
                streamed[-1]["arguments"] += function.arguments or ""
        assert finish == "tool_calls"
        assert [(call["name"], json.loads(call["arguments"])) for call in streamed] == CALLS
        ids = [call["id"] for call in streamed]
        assert len({*ids, *(call.id for call in calls)}) == 4

        # The result of a call is sent back.
        [first, *_] = calls
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [first.model_dump()]},
            {"role": "tool", "tool_call_id": first.id, "content": '"rain"'},
        ]
        it.fleet.script = lambda submit, body: Script("Take an umbrella.")
        answer = (await it.openai.chat.completions.create(**ask)).choices[0]
        assert (answer.finish_reason, answer.message.content) == ("stop", "Take an umbrella.")
        assert answer.message.tool_calls is None
        assert "rain" in it.prompt()
        assert OSLO["city"] in it.prompt().replace("\\", "")


async def test_a_template_that_knows_no_tools_has_them_explained(bus: Bus, tmp_path: Path) -> None:
    async with served(bus, tmp_path / "model", Family("plain", HERMES)) as it:
        it.fleet.script = lambda submit, body: Script("Well. " + written(HERMES, ("add", THREE)))
        messages: list[Any] = [
            {"role": "user", "content": "One?"},
            {"role": "assistant", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"p": 1}'}}]},
            {"role": "tool", "tool_call_id": "c", "content": "2"},
        ]  # fmt: skip
        body = {"model": "base", "messages": messages, "tools": [ADD]}
        answer = (await it.http.post("/v1/chat/completions", json=body)).json()["choices"][0]
        assert answer["message"]["content"] == "Well."
        assert answer["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"p": 3}'}
        prompt = it.prompt()
        assert prompt.startswith("<|im_start|>system\n# Tools")
        assert '<tool_call>\n{"name": "add", "arguments": {"p": 1}}\n</tool_call>' in prompt
        assert "<|im_start|>user\n<tool_response>\n2\n</tool_response>" in prompt


async def test_reasoning_is_told_apart(bus: Bus, tmp_path: Path) -> None:
    async with served(bus, tmp_path / "model", FAMILIES[1]) as it:
        body: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "Why?"}]}
        for opened, text in ((False, "<think>\nHm.\n</think>\n\nSo."), (True, "Hm.\n</think>\n\nSo.")):
            it.fleet.script = lambda submit, body, text=text: Script(text)
            asked = {**body, "chat_template_kwargs": {"begin_thinking": opened}}
            message = (await it.http.post("/v1/chat/completions", json=asked)).json()["choices"][0]["message"]
            assert (message["reasoning_content"].strip(), message["content"]) == ("Hm.", "So.")
            assert message["reasoning"] == message["reasoning_content"]
            deltas: dict[str, str] = {}
            headers = {"Idempotency-Key": f"why-{opened}"}
            for _ in range(2):  # the second gets the first's stored answer
                answer = await it.http.post("/v1/chat/completions", json={**asked, "stream": True}, headers=headers)
                deltas.clear()
                for event in events_of(answer):
                    for name, value in event["choices"][0]["delta"].items():
                        deltas[name] = deltas.get(name, "") + (value or "")
                assert (deltas["reasoning_content"].strip(), deltas["content"]) == ("Hm.", "So.")
                assert deltas["reasoning"] == deltas["reasoning_content"]
            job = await it.http.post("/v1/chat/completions", json={**asked, "background": True})
            url = f"/v1/jobs/{job.json()['id']}"
            result = (await it.http.get(url, headers={"prefer": "wait=20"})).json()["result"]
            assert result["choices"][0]["message"] == message
        it.fleet.script = lambda submit, body: Script("[1]")
        asked = {**body, "chat_template_kwargs": {"enable_thinking": False}}
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}
        answer = await it.http.post("/v1/chat/completions", json={**asked, "response_format": form})
        message = answer.json()["choices"][0]["message"]
        assert (message["reasoning"], message["reasoning_content"], message["content"]) == (None, None, "[1]")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "web"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [ADD, ADD]}, "tools[1].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
        "tools[0].function.parameters",
    ),
    ({"tools": [ADD], "tool_choice": "sub"}, "tool_choice"),
    ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
    ({"tools": [ADD], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
        "tools",
    ),
]


async def test_wrong_tools_are_400_with_the_place(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    good = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
    for fields, param in WRONG:
        answer = await http.post("/v1/chat/completions", json={**good, **fields})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    answer = await http.post("/v1/chat/completions", json={**good, "tools": [ADD], "tool_choice": "none"})
    assert answer.status_code == 200
    assert fleet.seen[-1][1].grammar == ""


@pytest.mark.parametrize("piece", ["{%", "{{ '\\", "{% 'tools' %}"], ids=["tags", "quotes", "quoted"])
def test_a_template_of_unfinished_pieces_is_read_at_once(piece: str) -> None:
    """Backtracking took minutes on the gateway's event loop."""
    assert not knows_tools(piece * (MAX_TEMPLATE_BYTES // len(piece)))
