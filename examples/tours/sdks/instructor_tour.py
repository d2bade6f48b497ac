"""Instructor: an object by tools, by JSON schema and by JSON mode; lists, streams of partial objects, errors."""

from __future__ import annotations

import instructor
import openai
from checks import QUESTION, Tour, raises
from pydantic import BaseModel

WIDE = {"max_tokens": 300, "temperature": 0, "max_retries": 0}
MESSAGES = [{"role": "user", "content": QUESTION}]


class City(BaseModel):
    """A city of the world."""

    name: str
    is_capital: bool


def main() -> None:
    """Use every way to constrain an answer once."""
    tour = Tour()
    plain = openai.OpenAI(base_url=tour.v1, api_key=tour.key, max_retries=0)
    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(plain, mode=mode)
        with tour.check(f"{mode.name}: an object, of the base and of the adapter"):
            for model in (tour.base, tour.adapter):
                held = client.chat.completions.create(model=model, messages=MESSAGES, response_model=City, **WIDE)
                assert isinstance(held, City)
    schema = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)
    with tour.check("JSON_SCHEMA: a stream of partial objects"):
        parts = list(
            schema.chat.completions.create_partial(model=tour.base, messages=MESSAGES, response_model=City, **WIDE)
        )
        City.model_validate(parts[-1].model_dump())
    with tour.check("JSON_SCHEMA: a list, as it streams"):
        # `{}` also conforms to Instructor's schema, which does not require a list: the prompt must lead a small model
        # to one.
        few = {"role": "user", "content": "Extract the cities as tasks: Paris is a capital. Lyon is not."}
        cities = schema.chat.completions.create_iterable(model=tour.base, messages=[few], response_model=City, **WIDE)
        assert {type(city) for city in cities} == {City}
    with tour.check("errors"):
        with raises(Exception, "nobody-has-this"):
            schema.chat.completions.create(model="nobody-has-this", messages=MESSAGES, response_model=City, **WIDE)
        with raises(Exception, "max_tokens"):
            schema.chat.completions.create(
                model=tour.base, messages=MESSAGES, response_model=City, **{**WIDE, "max_tokens": 1 << 30}
            )
    tour.end()


if __name__ == "__main__":
    main()
