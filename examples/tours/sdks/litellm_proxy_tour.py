"""LiteLLM's proxy in front of the fleet, called with OpenAI's SDK: base and adapter as its models, streams, errors."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
from checks import MAX_TOKENS, MESSAGES, WEATHER, Tour, differ, raises, same

READY_S = 120.0


@contextmanager
def proxy(tour: Tour) -> Iterator[openai.OpenAI]:
    """Run the proxy during the block; yield a client for it. Raises RuntimeError if it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    models = [
        {
            "model_name": f"my-{name}",
            "litellm_params": {"model": f"openai/{name}", "api_base": tour.v1, "api_key": "os.environ/KEY"},
        }
        for name in (tour.base, tour.adapter, "nobody-has-this")
    ]
    master = f"sk-{secrets.token_hex(8)}"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.yaml")
        config.write_text(json.dumps({"model_list": models, "router_settings": {"num_retries": 0}}))  # also YAML
        environment = {
            **os.environ, "KEY": tour.key, "LITELLM_MASTER_KEY": master, "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }  # fmt: skip
        program = str(Path(sys.executable).with_name("litellm"))
        words = [program, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        with Path(folder, "log").open("w+") as log:
            child = subprocess.Popen(words, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
            try:
                end = time.monotonic() + READY_S
                while not _answers(f"http://127.0.0.1:{port}/health/liveliness"):
                    if child.poll() is not None or time.monotonic() > end:
                        log.seek(0)
                        raise RuntimeError(f"the proxy does not start: {log.read()[-2000:]}")
                    time.sleep(0.5)
                yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=master, max_retries=0)
            finally:
                child.terminate()
                child.wait(30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def main() -> None:
    """Use every kind of call once."""
    tour = Tour()
    models = [f"my-{tour.base}", f"my-{tour.adapter}"]
    greedy = {"temperature": 0.0, "max_tokens": MAX_TOKENS}
    with proxy(tour) as client:
        chat = client.chat.completions
        said: dict[str, str] = {}
        with tour.check("base and adapter answer differently, as the fleet itself does"):
            direct = openai.OpenAI(base_url=tour.v1, api_key=tour.key)
            for model in models:
                whole = chat.create(model=model, messages=MESSAGES, **greedy)
                said[model] = whole.choices[0].message.content
                same(whole.usage.prompt_tokens + whole.usage.completion_tokens, whole.usage.total_tokens)
                own = direct.chat.completions.create(model=model.removeprefix("my-"), messages=MESSAGES, **greedy)
                same(own.choices[0].message.content, said[model])
            differ(*said.values())
        with tour.check("a stream equals the whole answer"):
            for model in models:
                chunks = chat.create(model=model, messages=MESSAGES, stream=True, **greedy)
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
                same(text, said[model])
        with tour.check("responses, whole and streamed, a conversation"):
            brief = {"input": MESSAGES[0]["content"], "temperature": 0.0, "max_output_tokens": 16}  # the minimum
            for model in models:
                whole = client.responses.create(model=model, **brief)
                assert whole.output_text.startswith(said[model]), whole.output_text
                events = client.responses.create(model=model, stream=True, **brief)
                same(
                    "".join(one.delta for one in events if one.type == "response.output_text.delta"), whole.output_text
                )
            assert client.responses.create(model=models[0], previous_response_id=whole.id, **brief).output_text
        with tour.check("a tool call"):
            forced = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 100, "temperature": 0}
            call = chat.create(model=models[0], messages=MESSAGES, **forced).choices[0].message.tool_calls[0]
            assert set(json.loads(call.function.arguments)) == {"city", "unit"}
        with tour.check("errors"):
            with raises(openai.NotFoundError, "nobody-has-this"):
                chat.create(model="my-nobody-has-this", messages=MESSAGES)
            with raises(openai.BadRequestError, "max_tokens"):
                chat.create(model=models[0], messages=MESSAGES, max_tokens=1 << 30)
    tour.end()


if __name__ == "__main__":
    main()
