"""Parameters and bodies of vLLM and SGLang that OpenAI's routes accept in addition to OpenAI's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
from helpers.openai_events import events_of
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client, make_model_folder

from gateway.chat.messages import MAX_OTHER_ROLES
from gateway.openai.timed import FIELDS, metrics_of
from protocol.queue.bus import Bus
from protocol.wire.records import RequestFacts

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USER: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]


async def test_reasoning_is_left_out_where_it_is_not_wanted(qwen: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script("<think>\nHm.\n</think>\n\nSo.")
    for wanted in (None, True, False):
        body = {"model": "base", "messages": USER, "include_reasoning": wanted}
        message = (await qwen.post(CHAT, json=body)).json()["choices"][0]["message"]
        assert message["content"] == "So."
        assert (message["reasoning_content"] is None) == (wanted is False)
        deltas = [
            chunk["choices"][0]["delta"] for chunk in events_of(await qwen.post(CHAT, json={**body, "stream": True}))
        ]
        assert any("reasoning_content" in delta for delta in deltas) == (wanted is not False)
        assert "".join(delta.get("content") or "" for delta in deltas) == "So."


async def test_lora_path_names_the_adapter_of_a_base(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    await fleet.add_adapter("fox", "ab" * 32)
    for name in ("base", "tiny/base", ""):
        answer = await http.post(COMPLETIONS, json={"model": name, "prompt": "hi", "lora_path": "fox"})
        assert answer.status_code == 200, answer.text
        assert fleet.seen[-1][0].digest == "ab" * 32
    for name in ("fox", "base:fox"):  # both mean the same adapter
        answer = await http.post(COMPLETIONS, json={"model": name, "prompt": "hi", "lora_path": "fox"})
        assert answer.status_code == 200, answer.text
        assert fleet.seen[-1][0].digest == "ab" * 32
    await fleet.add_adapter("owl", "cd" * 32)
    for fields, status in (({"model": "owl"}, 400), ({"model": ["base", "fox"]}, 400), ({"lora_path": "nobody"}, 404)):
        asked = {"model": "base", "prompt": "hi", "lora_path": "fox", **fields}
        assert (await http.post(COMPLETIONS, json=asked)).status_code == status


async def test_the_base_answers_who_names_no_model(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    for path, body in ((CHAT, {"messages": USER}), (COMPLETIONS, {"prompt": "hi"}), (RESPONSES, {"input": "hi"})):
        for fields in ({}, {"model": None}):
            answer = await http.post(path, json={**body, **fields})
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == "base"
    counted = await http.post(f"{RESPONSES}/input_tokens", json={"input": "hi"})
    assert counted.json()["input_tokens"] > 0
    assert len(fleet.seen) == 6
    assert {submit.digest for submit, _ in fleet.seen} == {""}


async def test_responses_have_penalties_and_stop_strings(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fields = {"min_p": 0.1, "frequency_penalty": 0.5, "presence_penalty": -0.5, "repetition_penalty": 1.5}
    body = {"model": "base", "input": "hi", **fields, "stop": ["how"]}
    answer = (await http.post(RESPONSES, json=body)).json()
    sampling = fleet.seen[-1][1].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    text = answer["output"][0]["content"][0]["text"]
    assert text == Script().text.partition("how")[0]
    kept = (await http.get(f"{RESPONSES}/{answer['id']}")).json()
    assert kept["output"][0]["content"][0]["text"] == text
    late = (await http.post(RESPONSES, json={**body, "background": True})).json()
    streamed = await http.get(f"{RESPONSES}/{late['id']}", params={"stream": "true"})
    assert '"delta":"how"' not in streamed.text
    wrong = await http.post(RESPONSES, json={**body, "stop": ["x"] * 65})
    assert wrong.json()["error"]["param"] == "stop"


async def test_invocations_take_bodies_of_openai_s_routes(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    chat = await http.post("/invocations", json={"model": "base", "messages": USER})
    assert chat.json()["object"] == "chat.completion"
    text = await http.post("/invocations", json={"model": "base", "prompt": "hi", "stream": True})
    assert events_of(text)[0]["object"] == "text_completion"
    native = await http.post("/invocations", json={"inputs": "hi"})
    assert "generated_text" in native.json()[0]
    wrong = await http.post("/invocations", json={"model": "base", "messages": USER, "temprature": 1})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "unknown_parameter")
    assert "error_type" in (await http.post("/invocations", json={"model": "base"})).json()
    for body, param in (({"messages": 5}, "messages"), ({"prompt": "a", "n": "b"}, "n")):  # the field only
        error = (await http.post("/invocations", json={"model": "base", **body})).json()["error"]
        assert error["param"] == param
        assert error["message"].startswith(f"{param}: ")


async def test_repetitions_are_penalised_as_far_back_as_is_asked(
    http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:  # fmt: skip
    """The names of Open WebUI, llama.cpp and Ollama for it, on OpenAI's routes and Ollama's."""
    for fields, penalty, window in (
        ({"repeat_penalty": 1.3}, 1.3, 0),
        ({"repeat_penalty": 1.3, "repeat_last_n": 64}, 1.3, 64),
        ({"repeat_penalty": 1.3, "repeat_last_n": -1}, 1.3, 0),
        ({"repeat_penalty": 1.3, "repeat_last_n": 0}, 1.0, 0),
    ):
        for path, body in (
            (CHAT, {"messages": USER, **fields}),
            (COMPLETIONS, {"prompt": "hi", **fields}),
            ("/api/chat", {"messages": USER, "options": fields}),
        ):
            answer = await http.post(path, json={"model": "base", **body})
            assert answer.status_code == 200, answer.text
            sampling = fleet.seen[-1][1].sampling
            assert (sampling.repetition_penalty, sampling.repetition_window) == (penalty, window)
    for fields in ({"repeat_last_n": 4097}, {"repeat_last_n": -2}, {"repeat_penalty": 1.3, "repetition_penalty": 1.2}):
        assert (await http.post(CHAT, json={"model": "base", "messages": USER, **fields})).status_code == 400


async def test_settings_do_what_vllm_s_flags_do(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    async with gateway_client(bus, model_folder, force_include_usage=True, return_tokens_as_token_ids=True) as http:
        body = {"model": "base", "prompt": "hi", "logprobs": 1}
        for path, asked in ((COMPLETIONS, body), (CHAT, {"messages": USER})):
            for wish in (None, {"include_usage": False}):
                sent = events_of(await http.post(path, json={**asked, "stream": True, "stream_options": wish}))
                assert all(chunk["usage"]["prompt_tokens"] > 0 for chunk in sent)  # in each chunk, as in vLLM
                assert sent[-1]["usage"]["total_tokens"] > sent[0]["usage"]["total_tokens"]
        plain = (await http.post(COMPLETIONS, json=body)).json()["choices"][0]["logprobs"]["tokens"]
        assert all(token.startswith("token_id:") for token in plain)
        named = (await http.post(COMPLETIONS, json={**body, "return_tokens_as_token_ids": False})).json()
        assert not any(token.startswith("token_id:") for token in named["choices"][0]["logprobs"]["tokens"])
        assert (await http.post(COMPLETIONS, json={"model": "base", "prompt": "hi"})).status_code == 200


async def test_an_answer_tells_its_times_where_they_are_wanted(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    """Like vLLM's `metrics`, in whole answers and in the chunk with the usage, if the call or the operator asks."""
    for always in (False, True):
        async with gateway_client(bus, model_folder, per_request_metrics=always) as http:
            for path, asked in ((CHAT, {"messages": USER}), (COMPLETIONS, {"prompt": "hi"})):
                for wish in (None, True, False):
                    body = {"model": "base", "max_tokens": 8, **asked, "include_metrics": wish}
                    whole = (await http.post(path, json=body)).json()
                    usage = {**body, "stream": True, "stream_options": {"include_usage": True}}
                    *others, last = events_of(await http.post(path, json=usage))
                    is_wanted = always if wish is None else wish
                    assert ("metrics" in whole, "metrics" in last) == (is_wanted, is_wanted)
                    assert not any("metrics" in chunk for chunk in others)
                    if is_wanted:
                        assert set(whole["metrics"]) == set(FIELDS)
                        assert all(found["metrics"][name] >= 0 for name in FIELDS[:3] for found in (whole, last))
                        one = events_of(await http.post(path, json={**usage, "max_tokens": 1}))[-1]["metrics"]
                        assert set(FIELDS[:3]) <= set(one) <= {*FIELDS} - {"mean_itl_ms"}
                    without = {**body, "stream": True, "stream_options": None}
                    assert not any("metrics" in chunk for chunk in events_of(await http.post(path, json=without)))
                    several = (await http.post(path, json={**body, "n": 2})).json()
                    assert several.get("metrics", "none") == (None if is_wanted else "none")
            late = {"model": "base", "prompt": "hi", "background": True}
            assert (await http.post(COMPLETIONS, json=late)).status_code == 202
            refused = await http.post(COMPLETIONS, json={**late, "include_metrics": True})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "include_metrics")


def test_times_are_those_of_a_request() -> None:
    facts = RequestFacts(
        state="done", epoch=1, finish="stop", error="", gateway="g", num_prompt_tokens=3, num_output_tokens=5,
        attempts=1, submitted_ms=1000, first_ms=1300, ended_ms=1700, assigned_ms=1200,
    )  # fmt: skip
    values = metrics_of(facts)
    assert values == {"queue_time_ms": 200, "time_to_first_token_ms": 100, "generation_time_ms": 400,
                      "mean_itl_ms": 100, "tokens_per_second": 10}  # fmt: skip
    assert metrics_of(replace(facts, num_output_tokens=1))["mean_itl_ms"] is None
    assert metrics_of(replace(facts, ended_ms=1200, first_ms=1200))["tokens_per_second"] is None
    for lost in (None, replace(facts, first_ms=0), replace(facts, ended_ms=0), replace(facts, assigned_ms=0)):
        assert metrics_of(lost) == dict.fromkeys(FIELDS)


async def test_roles_that_a_template_has(bus: Bus, fleet: ScriptedFleet, tmp_path: Path) -> None:
    """A message is in the prompt with its role, or refused; none is dropped, and the check is linear."""
    any_role = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
    some = any_role.replace("<{{", "{% if m.role in ['user', 'critic'] %}<{{").replace(
        "{% endfor", "{% endif %}{% endfor"
    )
    fleet.max_model_len = 1 << 18
    await fleet.register()
    for number, (template, roles) in enumerate(((any_role, ("critic", "Judge_2")), (some, ("critic",)))):
        folder = make_model_folder(tmp_path / str(number), template)
        async with gateway_client(bus, folder) as http:
            for role in ("critic", "Judge_2"):
                messages = [*USER, {"role": role, "content": " it is bad "}]
                answer = await http.post(CHAT, json={"model": "base", "messages": messages})
                assert answer.status_code == (200 if role in roles else 400), answer.text
                if role not in roles:
                    assert f"the template of this model has no role '{role}'" in answer.text
            for role in ("a b", "<x>", "", "x" * 65, 3):
                messages = [{"role": role, "content": "x"}]
                wrong = await http.post(CHAT, json={"model": "base", "messages": messages})
                assert wrong.json()["error"]["param"] == "messages[0].role"
            many = [{"role": f"r{i}", "content": "x"} for i in range(MAX_OTHER_ROLES + 1)]
            assert "the limit is" in (await http.post(CHAT, json={"model": "base", "messages": many})).text
