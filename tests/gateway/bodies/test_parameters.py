"""Every parameter on every route is served, accepted according to the list, or refused by name; none is ignored."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.good_bodies import CHAT, COMPLETION, GOOD
from helpers.scripted_fleet import ScriptedFleet, gateway_client
from pydantic import ValidationError

from gateway.bodies.compat import PAGE, with_table
from gateway.bodies.parameter_check import IGNORED_HEADER, MAX_ENTRIES, MAX_NAMED, JsonBody, check_parameters
from gateway.bodies.parameters import BY_TYPE, OBJECTS, PARAMETERS, PARAMETERS_OF, SERVERS
from gateway.http.paths import LORAX_PATHS, OLLAMA_PREFIX
from gateway.openai.openai_bodies import MAX_TOOLS, ChatRequest
from protocol.queue.bus import Bus
from protocol.wire.errors import BadRequest

TOOL = {"type": "function", "function": {"name": "look"}}
OPENAI = ("/v1/chat/completions", "/v1/completions")


def subclasses(kind: type[JsonBody]) -> Iterator[type[JsonBody]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from subclasses(sub)


BODIES = [body for body in subclasses(JsonBody) if hasattr(body, "OBJECT")]


# ---------------------------------------------------------------- the list


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_the_list_and_the_bodies_agree(body: type[JsonBody]) -> None:
    fields = {field.alias or name for name, field in body.model_fields.items()}
    served = {name for name, parameter in PARAMETERS_OF[body.OBJECT].items() if parameter.fate == "served"}
    assert fields == served
    for name, parameter in PARAMETERS_OF[body.OBJECT].items():
        inner = [kind for kind in BODIES if kind.__name__ in str(body.model_fields.get(name, ""))]
        assert not inner or parameter.holds == inner[0].OBJECT  # fields with objects are checked inside too


def test_every_entry_of_the_list_says_what_it_must() -> None:
    seen: set[tuple[str, str]] = set()
    for parameter in PARAMETERS:
        assert parameter.objects
        assert parameter.servers <= set(SERVERS)
        assert bool(parameter.why) == (parameter.fate != "served"), parameter.name
        assert not parameter.why.endswith("."), parameter.name
        assert not parameter.neutral or parameter.fate == "refused", parameter.name
        assert not parameter.holds or parameter.holds in {*OBJECTS, *BY_TYPE}, parameter.name
        for kind in parameter.objects:
            assert (parameter.name, kind) not in seen, f"{parameter.name} is defined twice"
            seen.add((parameter.name, kind))
    assert all(PARAMETERS_OF[kind] for kind in OBJECTS)
    assert all(kind in OBJECTS for kinds in BY_TYPE.values() for kind in kinds.values())
    assert len(PARAMETERS) > 200


def test_places_of_the_list_are_routes() -> None:
    routes = {re.sub(r"\{\w+\}", "ID", path) for path in GOOD}
    places = {re.sub("NAME", "ID", word) for where in OBJECTS.values() for word in where.split() if word[0] == "/"}
    assert places <= routes
    assert len(places) > 30


def test_the_page_has_the_table_of_the_list() -> None:
    page = PAGE.read_text()
    assert page == with_table(page), "run `python -m gateway.bodies.compat`"


def test_no_list_is_longer_than_is_looked_into() -> None:
    assert MAX_TOOLS <= MAX_ENTRIES


# ---------------------------------------------------------------- every route


async def test_every_route_with_a_body_is_tried_here(http: httpx2.AsyncClient) -> None:
    paths = (await http.get("/openapi.json")).json()["paths"]
    bodies = {path: way["requestBody"] for path, ways in paths.items() for way in ways.values() if "requestBody" in way}
    assert {path for path, body in bodies.items() if "application/json" in body["content"]} == set(GOOD)


def told(answer: httpx2.Response) -> str:
    error = answer.json()["error"]
    return error if isinstance(error, str) else error["message"]


async def test_a_typo_is_refused_with_the_nearest_name(subtests: pytest.Subtests, http: httpx2.AsyncClient) -> None:
    for path in GOOD:
        with subtests.test(path=path):
            first = next(iter(GOOD[path]))
            answer = await http.post(path, json={**GOOD[path], f"{first}x": 1, "another": 2})
            assert answer.status_code == (422 if path in LORAX_PATHS else 400), answer.text
            assert f"Unknown parameter: `{first}x`. Did you mean `{first}`? Also unsupported: another." in told(answer)
            if path in LORAX_PATHS:
                assert answer.json()["error_type"] == "validation"
            elif not path.startswith(OLLAMA_PREFIX):
                error = answer.json()["error"]
                details = error.get("details") or {"error_code": error["code"], "param": error["param"]}
                assert details == {"error_code": "unknown_parameter", "param": f"{first}x"}


async def test_null_never_counts_as_given(subtests: pytest.Subtests, http: httpx2.AsyncClient) -> None:
    for path in GOOD:
        with subtests.test(path=path):
            answer = await http.post(path, json={**GOOD[path], "unheard_of": None})
            assert "unheard_of" not in answer.text


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_null_is_the_default_of_every_field_that_has_one(body: type[JsonBody]) -> None:
    wrong: list[tuple[str, str]] = []
    for name, field in body.model_fields.items():
        sent = field.alias or name
        if field.is_required():
            continue
        try:
            body.model_validate({sent: None})
        except ValidationError as error:  # reports the required fields and nothing else
            wrong += [(sent, entry["type"]) for entry in error.errors() if entry["type"] != "missing"]
    assert wrong == []


NESTED: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"stream": True, "stream_options": {"include_usge": True}}, "stream_options.include_usge"),
    ("completions", {"stream": True, "stream_options": {"include_usge": True}}, "stream_options.include_usge"),
    ("chat", {"response_format": {"type": "text", "schem": {}}}, "response_format.schem"),
    (
        "completions",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strikt": True}}},
        "response_format.json_schema.strikt",
    ),
    ("completions", {"structured_outputs": {"regx": "a"}}, "structured_outputs.regx"),
    ("chat", {"merged_adapters": {"ids": ["a"], "weights": [1], "denzity": 1}}, "merged_adapters.denzity"),
    ("chat", {"tools": [TOOL, {**TOOL, "typ": "function"}]}, "tools[1].typ"),
    ("chat", {"tools": [{"type": "function", "function": {"name": "f", "parameter": {}}}]},
     "tools[0].function.parameter"),
    ("chat", {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look", "nam": 1}}},
     "tool_choice.function.nam"),
    ("chat", {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mod": 1}}},
     "tool_choice.allowed_tools.mod"),
]  # fmt: skip


async def test_objects_within_a_body_are_looked_into(
    subtests: pytest.Subtests, http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    for route, fields, param in NESTED:
        with subtests.test(route=route, fields=fields, param=param):
            path, good = (OPENAI[0], CHAT) if route == "chat" else (OPENAI[1], COMPLETION)
            error = (await http.post(path, json={**good, **fields})).json()["error"]
            assert (error["param"], error["code"]) == (param, "unknown_parameter")
            assert fleet.seen == []


async def test_lorax_s_parameters_are_looked_into(subtests: pytest.Subtests, http: httpx2.AsyncClient) -> None:
    for path in ["/", "/generate", "/generate_stream", "/invocations"]:
        with subtests.test(path=path):
            for parameters, place, near in (
                ({"max_new_token": 1}, "parameters.max_new_token", "max_new_tokens"),
                ({"merged_adapters": {"ids": [], "weigths": []}}, "parameters.merged_adapters.weigths", "weights"),
            ):
                answer = await http.post(path, json={"inputs": "hi", "parameters": parameters})
                assert answer.status_code == 422
                assert f"Unknown parameter: `{place}`. Did you mean `{near}`?" in told(answer)


@pytest.mark.parametrize("path", OPENAI)
async def test_what_is_refused_says_why_unless_it_has_no_effect(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str
) -> None:
    kind = "chat" if "chat" in path else "completions"
    refused = [parameter for parameter in PARAMETERS_OF[kind].values() if parameter.fate == "refused"]
    assert len(refused) > 20
    for parameter in refused:
        error = (await http.post(path, json={**GOOD[path], parameter.name: "certainly not neutral"})).json()["error"]
        assert (error["param"], error["code"]) == (parameter.name, "unsupported_parameter")
        assert error["message"] == f"`{parameter.name}` {parameter.why}."
    assert fleet.seen == []
    for parameter in refused:
        for value in (None, *parameter.neutral):
            answer = await http.post(path, json={**GOOD[path], parameter.name: value})
            assert answer.status_code == 200, (parameter.name, value, answer.text)


@pytest.mark.parametrize("path", OPENAI)
async def test_what_changes_no_answer_is_accepted(http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str) -> None:
    kind = "chat" if "chat" in path else "completions"
    names = [name for name, parameter in PARAMETERS_OF[kind].items() if parameter.fate == "accepted"]
    assert {"user", "store", "safety_identifier", "prompt_cache_key"} <= set(names)
    answer = await http.post(path, json={**GOOD[path], **dict.fromkeys(names, "x")})
    assert answer.status_code == 200, answer.text
    assert IGNORED_HEADER not in answer.headers


async def test_a_parameter_of_another_route_is_told_as_such(http: httpx2.AsyncClient) -> None:
    answer = await http.post("/v1/completions", json={**COMPLETION, "guideline": "x"})
    assert told(answer) == "Unknown parameter: `guideline`. It is one of /v1/chat/completions."


async def test_a_message_may_have_fields_for_its_template(http: httpx2.AsyncClient) -> None:
    message = {"role": "user", "content": "hi", "own": {"x": 1}}
    assert (await http.post("/v1/chat/completions", json={**CHAT, "messages": [message]})).status_code == 200


# ---------------------------------------------------------------- limits


def test_a_hundred_thousand_names_are_refused_by_a_few() -> None:
    body = ChatRequest.model_validate({**CHAT, **{f"temperature{i}": i for i in range(100_000)}})
    with pytest.raises(BadRequest) as caught:
        check_parameters(body, "refuse")
    assert caught.value.message.count("Did you mean") == 1
    assert caught.value.message.count("temperature") == MAX_NAMED + 1
    assert body.__pydantic_extra__ == {}


def test_a_name_is_shown_short_and_in_ascii() -> None:
    for name, shown in (("a\r\nset-cookie: x", r"a\r\nset-cookie: x"), ("ü" * 500, (r"\xfc" * 64)[:64])):
        body = ChatRequest.model_validate({**CHAT, name: 1})
        assert check_parameters(body, "warn") == shown


# ---------------------------------------------------------------- warn


async def test_warn_serves_and_tells(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with gateway_client(bus, model_folder, unknown_parameters="warn") as http:
        for path in ("/v1/chat/completions", "/v1/completions", "/generate"):
            for stream in (False, True):
                caplog.clear()
                body = {**GOOD[path], "use_beam_search": True, "tempratur": 0, "nothing": None}
                body |= {"stream": True} if stream and path != "/generate" else {}
                with caplog.at_level(logging.WARNING):
                    answer = await http.post(path, json=body)
                assert answer.status_code == 200
                assert answer.headers[IGNORED_HEADER] == "use_beam_search, tempratur"
                assert f"{path} is served without use_beam_search, tempratur" in caplog.text
        assert IGNORED_HEADER not in (await http.post("/v1/completions", json=COMPLETION)).headers


def test_the_schema_of_the_routes_has_no_room_for_others() -> None:
    schema = ChatRequest.model_json_schema()
    assert schema["additionalProperties"] is False
    assert schema["properties"]["user"]["description"].startswith("Accepted without effect: it names an end user")
