"""How many tokens of a text are counted, for whoever asks nothing else of it. Pure."""

from __future__ import annotations

from collections.abc import Callable

from protocol.wire import messages as m
from protocol.wire.errors import BadRequest

MIN_TOKENIZED = 1 << 16
"""Tokens of a text that are answered with, however short the model's context is."""

MAX_CHARACTERS_PER_TOKEN = 16
"""Longer than this the tokens of a text are on average in no language: it is not worth finding out."""


def most_tokenized(base: m.ServedModel | None) -> int:
    """Return how many tokens are answered with at most."""
    return MIN_TOKENIZED if base is None else max(base.max_model_len, MIN_TOKENIZED)


def check_tokens(limit: int, param: str) -> Callable[[int], None]:
    """Return what raises BadRequest for more tokens than are answered with."""

    def check(num_tokens: int) -> None:
        if num_tokens > limit:
            raise BadRequest(f"`{param}` must have at most {limit} tokens. Given: {num_tokens}", param=param)

    return check
