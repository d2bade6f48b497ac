"""Open WebUI: its own server, called as by its page: chats with a panel's parameters, and a tool that edits a file.

The fleets are its connections to OpenAI's API, then one is a connection to Ollama. Its own requests after an answer,
for the chat's title, tags and follow-up questions, go to the fleet too.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from checks import MAX_TOKENS, QUESTION, Tour, differ, same

READY_S = 300.0
ANSWER_S = 60.0
DONE = "The note is corrected."
PANEL = {
    "temperature": 0, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "seed": 1, "max_tokens": 200, "repeat_penalty": 1.1,
    "frequency_penalty": 0.1, "presence_penalty": 0.1, "stop": ["###"],
}  # fmt: skip
"""Parameters that users set next to a chat; the page sends them in place of OpenAI's request fields."""
TOOL = """
from pathlib import Path

class Tools:
    def correct(self, old: str, new: str) -> str:
        '''
        Replace a text in the note.
        :param old: The text that stands there
        :param new: The text that shall stand there
        '''
        notes = Path({notes!r})
        notes.write_text(notes.read_text().replace(old, new))
        return "It says now: " + notes.read_text()
"""


@contextmanager
def webui(tour: Tour, actor: str, data: Path) -> Iterator[httpx.Client]:
    """Run Open WebUI with the fleets as its connections; yield a client of its single user."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    urls = [f"{url}/v1" for url in dict.fromkeys((tour.url, actor))]
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(data), "DATA_DIR": str(data), "WEBUI_AUTH": "False",
        "WEBUI_SECRET_KEY": uuid.uuid4().hex, "OFFLINE_MODE": "true", "ENABLE_VERSION_UPDATE_CHECK": "false",
        "ANONYMIZED_TELEMETRY": "false", "DO_NOT_TRACK": "true", "SCARF_NO_ANALYTICS": "true",
        "RAG_EMBEDDING_ENGINE": "openai", "ENABLE_OLLAMA_API": "false", "OPENAI_API_BASE_URLS": ";".join(urls),
        "OPENAI_API_KEYS": ";".join([tour.key] * len(urls)),
    }  # fmt: skip
    program = Path(sys.executable).with_name("open-webui")
    words = [str(program), "serve", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(words, env=environment, stdout=sys.stderr, stderr=sys.stderr)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_S, trust_env=False) as client:
            wait_until(lambda: server.poll() is not None or is_up(client), READY_S)
            assert server.poll() is None, "the server ended"
            user = client.post("/api/v1/auths/signin", json={"email": "", "password": ""}).raise_for_status().json()
            client.headers["authorization"] = f"Bearer {user['token']}"
            yield client
    finally:
        server.terminate()
        server.wait()


def is_up(client: httpx.Client) -> bool:
    """Return whether the server answers."""
    try:
        return client.get("/health").status_code == 200
    except httpx.HTTPError:
        return False


def wait_until(happened: Any, limit_s: float) -> None:
    """Wait until `happened` returns true. Raises AssertionError after `limit_s`."""
    end = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < end, f"it took longer than {limit_s:.0f} s"
        time.sleep(0.2)


def said(client: httpx.Client, model: str, *, stream: bool, **params: Any) -> str:
    """Return a model's answer to the question."""
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "stream": stream, "params": params}
    answer = client.post("/api/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    if not stream:
        return answer.json()["choices"][0]["message"]["content"]
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def chat(client: httpx.Client, model: str, text: str) -> dict[str, Any]:
    """Begin a chat as the page does; return it once it has its answer and a title."""
    asked, answer = str(uuid.uuid4()), str(uuid.uuid4())
    messages = {
        asked: {"id": asked, "parentId": None, "childrenIds": [answer], "role": "user", "content": text},
        answer: {
            "id": answer,
            "parentId": asked,
            "childrenIds": [],
            "role": "assistant",
            "content": "",
            "model": model,
        },
    }
    new = {"title": "New Chat", "models": [model], "history": {"currentId": answer, "messages": messages}}
    made = client.post("/api/v1/chats/new", json={"chat": new}).raise_for_status().json()
    body = {
        "model": model, "messages": [{"role": "user", "content": text}], "stream": True, "params": PANEL,
        "stream_options": {"include_usage": True}, "tool_ids": ["notes"], "chat_id": made["id"], "id": answer,
        "parent_id": asked, "session_id": str(uuid.uuid4()),
        "background_tasks": {"title_generation": True, "tags_generation": True, "follow_up_generation": True},
    }  # fmt: skip
    client.post("/api/chat/completions", json=body).raise_for_status()
    found: dict[str, Any] = {}

    def is_whole() -> bool:
        found.update(client.get(f"/api/v1/chats/{made['id']}").raise_for_status().json())
        message = found["chat"]["history"]["messages"][answer]
        assert not message.get("error"), message["error"]
        return bool(message.get("done")) and found["title"] != "New Chat"

    wait_until(is_whole, ANSWER_S)
    return found["chat"]["history"]["messages"][answer]


def main() -> None:
    """Use each kind of connection."""
    tour = Tour()
    actor = os.environ.get("ACTOR_URL", "").rstrip("/") or tour.url
    call = {"name": "correct", "arguments": {"old": "helo", "new": "hello"}}
    steps = base64.b64encode(json.dumps([call, DONE]).encode()).decode()
    task = f'Correct the word "helo" in the note to "hello", and say: {DONE}\n<steps>{steps}</steps>'
    with tempfile.TemporaryDirectory() as name, webui(tour, actor, Path(name)) as client:
        notes = Path(name, "notes.txt")
        with tour.check("models of both fleets"):
            listed = {model["id"]: model for model in client.get("/api/models").raise_for_status().json()["data"]}
            assert tour.adapter in listed
        bases = [name for name, model in listed.items() if not model.get("openai", {}).get("parent")]
        acting = "actor" if "actor" in bases else bases[0]
        base = next((name for name in bases if name != acting), acting)
        with tour.check("base and adapter answer differently, and a stream equals the whole answer"):
            brief = {"temperature": 0, "max_tokens": MAX_TOKENS}
            whole = said(client, tour.adapter, stream=False, **brief)
            differ(said(client, base, stream=False, **brief), whole)
            same(said(client, tour.adapter, stream=True, **brief), whole)
        with tour.check("the parameters of its panel"):
            assert said(client, tour.adapter, stream=True, **PANEL)
        source = TOOL.format(notes=str(notes))
        tool = {"id": "notes", "name": "notes", "content": source, "meta": {"description": "notes", "manifest": {}}}
        client.post("/api/v1/tools/create", json=tool).raise_for_status()
        with tour.check("a chat with a tool that edits a file, with its title, tags and further questions"):
            notes.write_text("helo world\n")
            message = chat(client, acting, task)
            same((notes.read_text(), message["content"]), ("hello world\n", DONE))
        with tour.check("the same by a connection to Ollama"):
            config = {
                "ENABLE_OLLAMA_API": True, "OLLAMA_BASE_URLS": [actor],
                "OLLAMA_API_CONFIGS": {"0": {"enable": True, "prefix_id": "ollama", "key": tour.key}},
            }  # fmt: skip
            client.post("/ollama/config/update", json=config).raise_for_status()
            names = [model["id"] for model in client.get("/api/models?refresh=true").raise_for_status().json()["data"]]
            asked = next(name for name in names if name.startswith(f"ollama.{acting}"))
            notes.write_text("helo world\n")
            message = chat(client, asked, task)
            same((notes.read_text(), message["content"]), ("hello world\n", DONE))
        with tour.check("errors"):
            body = {"messages": [{"role": "user", "content": QUESTION}], "params": {"max_tokens": 1 << 30}}
            answer = client.post("/api/chat/completions", json={"model": tour.adapter, **body})
            same(answer.status_code, 400)
            assert "max_tokens" in answer.text, answer.text
    tour.end()


if __name__ == "__main__":
    main()
