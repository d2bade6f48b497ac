"""How often third-party programs get complete structured answers: `make forms URL=http://127.0.0.1:8000`.

It asks N questions each with Instructor in each of its modes, and with the program `llm` and a schema, without retries.
It prints a table of how many answers were valid objects, and why the others were not. It needs `instructor` and `llm`,
in a separate environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, Field, TypeAdapter

NUM = 20
MAX_TOKENS = 256
SENTENCES = [
    f"{name} is {age} years old, lives in {city} and {likes}."
    for name, age, city, likes in zip(
        ["Ada", "Ben", "Chi", "Dora", "Emil"] * 4,
        range(21, 61, 2),
        ["Paris", "Oslo", "Lima", "Cairo"] * 5,
        ["likes chess", "plays the flute", "swims", "bakes bread and reads", "does not like tea"] * 4,
        strict=True,
    )
]


class Address(BaseModel):
    """Where somebody lives."""

    city: str
    country: str | None = None


class Person(BaseModel):
    """A person that a text tells of."""

    name: str
    age: int = Field(ge=0, le=150)
    address: Address
    hobbies: list[str] = Field(max_length=5)
    mood: Literal["happy", "sad", "unknown"] = "unknown"


def with_instructor(url: str, model: str) -> None:
    """Print the rows for Instructor's modes."""
    plain = openai.OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "any"), max_retries=0)
    options = {"model": model, "temperature": 0, "max_tokens": MAX_TOKENS, "max_retries": 0}
    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
        create = instructor.from_openai(plain, mode=mode).chat.completions

        def whole(asked: list[dict[str, str]], create: object = create) -> None:
            assert isinstance(create.create(messages=asked, response_model=Person, **options), Person)  # type: ignore

        def partial(asked: list[dict[str, str]], create: object = create) -> None:
            *_, last = create.create_partial(messages=asked, response_model=Person, **options)  # type: ignore
            Person.model_validate(last.model_dump())

        def listed(asked: list[dict[str, str]], create: object = create) -> None:
            found = list(create.create_iterable(messages=asked, response_model=Person, **options))  # type: ignore
            assert found, "an empty list"
            TypeAdapter(list[Person]).validate_python([one.model_dump() for one in found])

        for way, ask in (("object", whole), ("partial", partial), ("iterable", listed)):
            row(f"instructor {instructor.__version__}", f"{mode.name}, {way}", ask)


def with_llm(url: str, model: str) -> None:
    """Print the row for the program `llm`, which sends a response_format and streams."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"model_id": "fleet", "model_name": model, "api_base": f"{url}/v1", "supports_schema": True}
        Path(folder, "extra-openai-models.yaml").write_text(json.dumps([options]))
        schema = Path(folder, "person.json")
        schema.write_text(json.dumps(Person.model_json_schema()))
        environment = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": os.environ.get("OPENAI_API_KEY", "any")}

        def ask(asked: list[dict[str, str]]) -> None:
            command = [sys.executable, "-m", "llm", "-m", "fleet", "-o", "temperature", "0", "-o", "max_tokens",
                       str(MAX_TOKENS), "--schema", str(schema), asked[0]["content"]]  # fmt: skip
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            Person.model_validate_json(done.stdout)

        row("llm", "--schema", ask)


def row(program: str, mode: str, ask: Callable[[list[dict[str, str]]], None]) -> None:
    """Ask every question and print the table row."""
    reasons: Counter[str] = Counter()
    for sentence in SENTENCES[:NUM]:
        try:
            ask([{"role": "user", "content": f"Tell who this is about, as data: {sentence}"}])
        except Exception as error:  # noqa: BLE001  whatever a program raises is the reason
            words = f"{type(error).__name__}: {error}".splitlines()
            reasons[" ".join(words)[:160]] += 1
    failed = sum(reasons.values())
    why = "; ".join(f"{num} × {text}" for text, num in reasons.most_common(3)) or "–"
    print(f"| {program} | {mode} | {NUM - failed} of {NUM} | {why} |", flush=True)


if __name__ == "__main__":
    url, model = [*sys.argv[1:], *("http://127.0.0.1:8000", "base")[len(sys.argv) - 1 :]][:2]
    print("| program | mode | whole | why not |\n| --- | --- | --- | --- |")
    with_instructor(url, model)
    with_llm(url, model)
