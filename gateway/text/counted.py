"""Limits on the number of tokens for requests that only tokenize. Pure."""

from __future__ import annotations

from collections.abc import Callable

from protocol.wire import messages as m
from protocol.wire.errors import BadRequest

MIN_TOKENIZED = 1 << 16
"""Number of tokens always allowed in an answer, even if the model's context is shorter."""

MAX_CHARACTERS_PER_TOKEN = 16
"""Upper bound of characters per token, on average, in any language: longer texts are refused without tokenizing."""


def most_tokenized(base: m.ServedModel | None) -> int:
    """Return the maximum number of tokens in an answer."""
    return MIN_TOKENIZED if base is None else max(base.max_model_len, MIN_TOKENIZED)


def check_tokens(limit: int, param: str) -> Callable[[int], None]:
    """Return a function that raises BadRequest for more than `limit` tokens."""

    def check(num_tokens: int) -> None:
        if num_tokens > limit:
            raise BadRequest(f"`{param}` must have at most {limit} tokens. Given: {num_tokens}", param=param)

    return check
