"""For unknown URLs and methods, errors suggest what exists."""

from __future__ import annotations

import httpx2
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.http.errors import MAX_TEXT_CHARACTERS
from gateway.http.unknown import MAX_COMPARED, unknown_url


async def test_an_unknown_url_is_told_what_exists(subtests: pytest.Subtests, http: httpx2.AsyncClient) -> None:
    for method, path, words in [
        ("POST", "/chat/completions", "Did you mean POST /v1/chat/completions"),
        ("POST", "/v1/chat/completion", "Did you mean POST /v1/chat/completions"),
        ("POST", "/v1/v1/completions", "POST /v1/completions"),
        ("GET", "/v1/model", "GET /v1/models"),
        ("POST", "/v3/rerank", "POST /v2/rerank"),
        ("POST", "/pooling", "not served: per-token outputs"),
        ("POST", "/v1/responses/compact", "not served: conversations are not compacted"),
        ("GET", "/is_sleeping", "not served: workers have no sleep mode"),
        ("POST", "/flush_cache/", "not served: prefix caches"),
        ("GET", "/get_server_info", "/info and /v1/models"),
        ("POST", "/update_named_param", "POST /load_lora_adapter, which loads it in place"),
        ("POST", "/load_lora_adapter_from_tensors", "adapters cannot be sent as tensors"),
        ("GET", "/get_world_size", "/v1/adapters/upload"),
        ("GET", "/qqq", "GET /qqq. /openapi.json lists"),
        ("GET", "/v1", "the base URL of their clients: POST /v1/chat/completions"),
        ("GET", "/v1/", "the base URL of their clients: POST /v1/chat/completions"),
    ]:
        with subtests.test(method=method, path=path, words=words):
            answer = await http.request(method, path)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (404, "unknown_url")
            assert error["message"].startswith(f"Unknown request URL: {method} {path}.")
            assert words in error["message"]


async def test_a_name_that_lacks_is_told(http: httpx2.AsyncClient) -> None:
    lacking = await http.get("/v1/models/")
    assert (lacking.status_code, lacking.json()["error"]["code"]) == (404, "unknown_url")
    assert "GET /v1/models lists them" in lacking.json()["error"]["message"]
    for name in ("base:", "tiny/base:"):
        shown = await http.get(f"/v1/models/{name}")
        asked = await http.post("/v1/completions", json={"model": name, "prompt": "hi"})
        for answer in (shown, asked):
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (404, "model_not_found")
            assert error["message"].startswith(f"The model `{name}` does not exist")
            assert "No adapter is named after the colon." in error["message"]


async def test_long_unknown_urls_are_not_compared(http: httpx2.AsyncClient) -> None:
    """The time of a comparison grows with the square of the path's length."""

    async def answer(_: Request) -> Response:
        return Response()

    routes = [Route("/v1/chat/completions", answer)]
    assert "Did you mean" in unknown_url("GET", "/v1/chat/completion", routes)
    near = "/v1/chat/completions" * (MAX_COMPARED // 20 + 1)
    assert "Did you mean" not in unknown_url("GET", near, [Route(near, answer)])
    asked = await http.get("/" + "v1/chat/completions" * 400)
    assert len(asked.json()["error"]["message"]) <= MAX_TEXT_CHARACTERS


async def test_a_405_names_all_methods_of_a_path(http: httpx2.AsyncClient) -> None:
    for path, allowed in (("/v1/jobs/job_none", "DELETE, GET"), ("/v1/chat/completions", "POST")):
        answer = await http.put(path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        assert answer.json()["error"]["message"] == f"PUT is not allowed on {path}: only {allowed}"
    assert (await http.put("/generate")).headers["allow"] == "POST"


async def test_a_browser_at_the_root_is_sent_to_the_console(http: httpx2.AsyncClient) -> None:
    for accept in ("text/html", "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"):
        sent = await http.get("/", headers={"accept": accept})
        assert (sent.status_code, sent.headers["location"]) == (307, "console/")
    followed = await http.get("/", headers={"accept": "text/html"}, follow_redirects=True)
    assert "<html" in followed.text
    for accept in ("*/*", "application/json", ""):  # programs get the health
        assert (await http.get("/", headers={"accept": accept})).json()["status"] == "ready"
