"""inspect-ai: evaluations with every provider that can be pointed at a fleet: texts, tools, schemas, log-probabilities.

Texts come from the fleet with the example adapters. Agents use the fleet whose model follows scripts (`actor.py`):
their prompts tell it in base64 which tools to call and what to say.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from checks import MAX_TOKENS, QUESTION, Tour, differ, raises, same
from inspect_ai import Task, eval
from inspect_ai.agent import react
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalSample
from inspect_ai.model import Model, ResponseSchema, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate
from inspect_ai.tool import Tool, tool
from inspect_ai.util import json_schema
from pydantic import BaseModel

DONE = "The note is corrected."
Provider = tuple[str, str, dict[str, Any]]
"""The prefix of a model's name, the path of its API, and the provider's arguments."""
CHATS: dict[str, Provider] = {
    "openai-api": ("openai-api/fleet", "/v1", {}),
    "openai-api, streamed": ("openai-api/fleet", "/v1", {"stream": True}),
    "openai": ("openai", "/v1", {"responses_api": False}),
    "openai, Responses": ("openai", "/v1", {"responses_api": True}),
    "vllm": ("vllm", "/v1", {}),
    "sglang": ("sglang", "/v1", {}),
    "ollama": ("ollama", "/v1", {}),
    "anthropic": ("anthropic", "", {}),
    "anthropic, streamed": ("anthropic", "", {"streaming": True}),
}
SAMPLED = {"openai", "anthropic", "anthropic, streamed"}
"""Providers that send no temperature, since they treat any unknown name as one of their newest models."""
EMULATED: Provider = ("openai-api/fleet", "/v1", {"emulate_tools": True})


class City(BaseModel):
    """What a constrained answer must be."""

    name: Literal["Paris", "Rome", "Oslo"]  # free text may be cut off by max_tokens
    is_capital: bool


def replaced(notes: Path, old: str, new: str) -> str:
    """Replace a text in a file; return a message with the new content."""
    notes.write_text(notes.read_text().replace(old, new))
    return f"It says now: {notes.read_text()}"


@tool
def correct(notes: Path) -> Tool:
    """Give an agent a tool that edits a file."""

    async def execute(old: str, new: str) -> str:
        """Replace a text in the note.

        Args:
            old: The text that stands there
            new: The text that shall stand there
        """
        return replaced(notes, old, new)

    return execute


def model(tour: Tour, provider: Provider, name: str, url: str = "") -> Model:
    """Return a fleet's model for a provider."""
    prefix, path, arguments = provider
    return get_model(
        f"{prefix}/{name}", base_url=f"{url or tour.url}{path}", api_key=tour.key, memoize=False, **arguments
    )


def evaluated(task: Task, asked: Model, folder: Path, **config: Any) -> EvalSample:
    """Return the single sample of an evaluation, which must succeed."""
    [log] = eval(
        task,
        model=asked,
        display="none",
        log_dir=str(folder),
        temperature=0,
        max_retries=0,
        score_display=False,
        **config,
    )
    assert log.status == "success", log.error and log.error.message
    assert log.samples
    [sample] = log.samples
    assert sample.error is None
    return sample


def texts(tour: Tour, folder: Path) -> None:
    """Ask base and adapter with every provider."""
    task = Task([Sample(input=QUESTION, target="e")], solver=generate(), scorer=includes())
    wanted = ""
    for name, provider in CHATS.items():
        with tour.check(f"{name}: base and adapter answer differently"):
            models = [model(tour, provider, asked) for asked in (tour.adapter, tour.base)]
            said = [evaluated(task, asked, folder, max_tokens=MAX_TOKENS) for asked in models]
            differ(said[0].output.completion, said[1].output.completion)
            wanted = wanted or said[0].output.completion
            if name not in SAMPLED:
                same(said[0].output.completion, wanted)
            usage = said[0].output.usage
            assert usage is not None
            assert 0 < usage.output_tokens <= MAX_TOKENS


def agents(tour: Tour, folder: Path) -> None:
    """Run an agent that edits a file, with the tools of every provider and with emulated ones."""
    call = {"name": "correct", "arguments": {"old": "helo", "new": "hello"}}
    done = {"name": "submit", "arguments": {"answer": DONE}}
    steps = base64.b64encode(json.dumps([call, done]).encode()).decode()
    url = os.environ.get("ACTOR_URL", "") or tour.url
    asked = "actor" if os.environ.get("ACTOR_URL") else tour.base  # the vllm provider expects the server's model
    notes = folder / "notes.txt"
    for name, provider in {**CHATS, "openai-api, tools emulated": EMULATED}.items():
        with tour.check(f"{name}: an agent edits a file by a tool, and submits its answer"):
            notes.write_text("helo world\n")
            task = Task(
                [Sample(input=f"Correct the note.\n<steps>{steps}</steps>", target=DONE)],
                solver=react(tools=[correct(notes)]), scorer=includes(), message_limit=12,
            )  # fmt: skip
            sample = evaluated(task, model(tour, provider, asked, url), folder, max_tokens=200)
            same(notes.read_text(), "hello world\n")
            assert sample.scores
            same([score.value for score in sample.scores.values()], ["C"])


def forms(tour: Tour, folder: Path) -> None:
    """Constrain answers to a schema."""
    task = Task([Sample(input=f"{QUESTION} Answer in JSON.", target="e")], solver=generate(), scorer=includes())
    schema = ResponseSchema(name="city", json_schema=json_schema(City), strict=True)
    for name, provider in CHATS.items():
        with tour.check(f"{name}: an answer is held to a schema"):
            sample = evaluated(task, model(tour, provider, tour.base), folder, max_tokens=160, response_schema=schema)
            City.model_validate_json(sample.output.completion)


def probabilities(tour: Tour, folder: Path) -> None:
    """Request log-probabilities."""
    task = Task([Sample(input=QUESTION, target="e")], solver=generate(), scorer=includes())
    config = {"max_tokens": 4, "logprobs": True, "top_logprobs": 3}
    for name, provider in CHATS.items():
        if name.startswith("anthropic"):
            continue  # its API has none
        with tour.check(f"{name}: log-probabilities"):
            sample = evaluated(task, model(tour, provider, tour.adapter), folder, **config)
            logprobs = sample.output.choices[0].logprobs
            assert logprobs is not None
            for token in logprobs.content:
                assert token.top_logprobs is not None
                same(len(token.top_logprobs), 3)
                if name not in SAMPLED:
                    same(token.top_logprobs[0].token, token.token)


def main() -> None:
    """Use every provider once."""
    tour = Tour()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts(tour, folder)
        agents(tour, folder)
        forms(tour, folder)
        probabilities(tour, folder)
        with tour.check("errors"), raises(AssertionError, "nobody-has-this"):
            task = Task([Sample(input=QUESTION)], solver=generate())
            evaluated(task, model(tour, CHATS["openai-api"], "nobody-has-this"), folder)
    tour.end()


if __name__ == "__main__":
    main()
