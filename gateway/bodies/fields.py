"""Types of fields that the bodies of several APIs share. Whatever is in a field, checking it ends with its first error.

Without that, pydantic makes an error of every wrong element, and tries every member of a union on all elements.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

MAX_NAME_CHARACTERS = 1100
"""Longest name of a model: an s3:// URL."""

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""A client's id of its request, which stands in headers too."""

Name = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)]

BASE = "base"
"""The name by which every fleet serves its base model, besides the model's own. It answers who names no model."""

Strings = Annotated[list[str], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]

_Ids = Annotated[list[int], Field(fail_fast=True)]


def _kind_of_prompts(value: Any) -> str | None:
    """Return which member of `Prompts` a value can only be, by its first element."""
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
    """Yield single prompts."""
    several: Any = prompts
    return [several] if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)) else several


def entries_within(limit: int) -> BeforeValidator:
    """Return a validator that refuses an object with more entries, before any is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            values = {"num": len(value), "limit": limit}
            raise PydanticCustomError("too_many_entries", "it has {num} entries; the limit is {limit}", values)
        return value

    return BeforeValidator(check)
