"""Field types shared by the bodies of several APIs. Validation of a field stops at its first error.

Otherwise pydantic creates an error for every invalid element, and tries every member of a union on all elements.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

MAX_NAME_CHARACTERS = 1100
"""Maximum characters of a model's name, which may be an s3:// URL."""

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""Pattern of a client's request id, which is also put into headers."""

Name = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)]

BASE = "base"
"""The name under which every fleet serves its base model, besides the model's own. Calls without a model use it."""

Strings = Annotated[list[str], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]

_Ids = Annotated[list[int], Field(fail_fast=True)]


def _kind_of_prompts(value: Any) -> str | None:
    """Return the tag of the only member of `Prompts` that a value can be, judged by its first element."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return "ids" if isinstance(first, int) else "lists" if isinstance(first, list) else "texts"


Prompts = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Strings, Tag("texts")]
    | Annotated[_Ids, Tag("ids")]
    | Annotated[list[_Ids], Field(fail_fast=True), Tag("lists")],
    Discriminator(
        _kind_of_prompts,
        custom_error_type="prompts_type",
        custom_error_message="it must be a string, a list of strings or a list of token ids",
    ),
]
"""One prompt or several, as texts or token ids."""


def sources_of(prompts: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    """Return the prompts as a list."""
    several: Any = prompts
    return [several] if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)) else several


def entries_within(limit: int) -> BeforeValidator:
    """Return a validator that refuses an object with more entries, before any is validated."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            values = {"num": len(value), "limit": limit}
            raise PydanticCustomError("too_many_entries", "it has {num} entries; the limit is {limit}", values)
        return value

    return BeforeValidator(check)
