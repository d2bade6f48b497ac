"""Memory of a model's own caches: estimated from measured ones, to limit the number of sequences. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from protocol.wire.errors import BadRequest

Continues = Literal["chunks", "tokens", "nothing"]
"""How a model continues from its own cache: with any number of tokens, one at a time, or not at all.

A model that cannot continue recomputes the whole text for each new token.
"""


@dataclass(frozen=True, slots=True)
class Account:
    """Size of a sequence's cache, in bytes."""

    token_bytes: int  # per token
    sequence_bytes: int  # fixed part

    @classmethod
    def through(cls, short: tuple[int, int], long: tuple[int, int], *others: tuple[int, int]) -> Account:
        """Return an account that no measured cache, (tokens, bytes), exceeds.

        short, long: of texts computed in one pass, which determine the bytes per token.
        """
        token_bytes = max(0, math.ceil((long[1] - short[1]) / (long[0] - short[0])))
        return cls(token_bytes, max(0, *(size - token_bytes * num for num, size in (short, long, *others))))

    def num_places(self, num_bytes: int, max_num_seqs: int) -> int:
        """Return how many sequences may run, at most `max_num_seqs`: their fixed parts may fill half of the memory.

        num_bytes: for all caches. Raises BadRequest if no sequence fits.
        """
        if not self.sequence_bytes:
            return max_num_seqs
        room = num_bytes // 2 // self.sequence_bytes
        if room < 1:
            raise BadRequest(
                f"kv_cache_bytes is {num_bytes}, of which half is less than a sequence's {self.sequence_bytes} bytes"
            )
        return min(room, max_num_seqs)


def passes_of(continues: Continues, start: int, end: int, *, is_wanted: bool) -> list[tuple[int, int]]:
    """Return the forward passes [first, last) that compute a text's tokens from `start` to `end`.

    is_wanted: whether their logits are needed.
    """
    if continues == "nothing":
        return [(0, end)] if is_wanted else []
    if continues == "tokens" and start:
        return [(position, position + 1) for position in range(start, end)]
    return [(start, end)]
