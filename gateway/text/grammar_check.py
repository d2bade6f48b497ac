"""Checks whether grammars compile, in a process that can be killed, and remembers the results."""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict

from gateway.text.sandbox import Sandbox
from gateway.text.sandbox_child import Check
from protocol.wire.errors import BadRequest

MAX_REMEMBERED = 4096

LIMIT_REMEMBERED_S = 60.0
"""How long a grammar that took too long is refused without another try, which may pass on a quieter machine."""


class GrammarCheck:
    """Checks grammars for the base model's tokenizer."""

    def __init__(self, tokenizer: str, limit_s: float) -> None:
        """tokenizer: path of the base model's tokenizer.json."""
        self._tokenizer = tokenizer
        self._sandbox = Sandbox(limit_s, "compiling the output's grammar")
        self._refusals: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        """By the grammar's digest: why it is refused, "" if it compiles, and until when that holds (monotonic)."""

    async def close(self) -> None:
        """End the process."""
        await self._sandbox.close()

    async def check(self, grammar: str, param: str) -> None:
        """Raise BadRequest if a grammar, as in `messages.Body`, cannot be compiled, or not within the limits."""
        digest = hashlib.blake2b(grammar.encode(), digest_size=16).digest()
        now_s = time.monotonic()
        refusal, until_s = self._refusals.get(digest, ("", 0.0))
        if until_s <= now_s:
            until_s = math.inf
            try:
                refusal = (await self._sandbox.do(Check(grammar, self._tokenizer))).refusal
            except BadRequest as limit:
                refusal, until_s = limit.message, time.monotonic() + LIMIT_REMEMBERED_S
            self._refusals[digest] = refusal, until_s
            if len(self._refusals) > MAX_REMEMBERED:
                self._refusals.popitem(last=False)
        else:
            self._refusals.move_to_end(digest)
        if refusal:
            raise BadRequest(f"{param} cannot be served: {refusal}", param=param)
