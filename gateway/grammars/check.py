"""Checks in the sandbox whether grammars compile, and caches the results."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from gateway.sandbox.child import Check
from gateway.sandbox.sandbox import SandboxPool
from protocol.wire.errors import BadRequest, ServerError

MAX_REMEMBERED = 4096

LIMIT_REMEMBERED_S = 60.0
"""Seconds for which a tenant's grammar that exceeded a limit is refused without a new try, which might succeed."""

Key = tuple[str, bytes]
"""A tenant, and the digest of one of its grammars."""


@dataclass
class _Trial:
    """A grammar that is being compiled; concurrent callers wait for the same result."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    error: ServerError | None = None  # why it could not be tried, for concurrent callers


class GrammarCheck:
    """Checks whether grammars compile for the base model's tokenizer.

    The compiler's verdict is a fact about the grammar, and cached for all tenants. A time or memory limit is cached for
    one tenant and a minute only. A failure to try, for want of a slot, a process or CPU time, says nothing about the
    grammar and is not cached.
    """

    def __init__(self, sandbox: SandboxPool, limit_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        """limit_s: maximum CPU seconds per grammar."""
        self._now_s = now_s
        self._sandbox = sandbox
        self._limit_s = limit_s
        self._facts: OrderedDict[bytes, str] = OrderedDict()  # digest -> why it is refused, "" if it compiles
        self._limits: OrderedDict[Key, tuple[str, float]] = OrderedDict()  # refusal, and monotonic time of its expiry
        self._trials: WeakValueDictionary[Key, _Trial] = WeakValueDictionary()

    async def check(self, grammar: str, param: str, tenant: str) -> None:
        """Raise BadRequest if a grammar, as in `messages.Body`, does not compile, or not within the limits.

        Raises Overloaded and Unavailable if it cannot be tried now. tenant: whose turn in the sandbox it takes.
        """
        key = tenant, hashlib.blake2b(grammar.encode(), digest_size=16).digest()
        refusal = self._known(key)
        if refusal is None:
            trial = self._trials.setdefault(key, _Trial())
            if trial.lock.locked():
                self._sandbox.on_wait()
            async with trial.lock:
                if trial.error is not None:
                    raise trial.error
                refusal = self._known(key)
                if refusal is None:
                    refusal = await self._try(grammar, key, trial)
        if refusal:
            raise BadRequest(f"{param} cannot be served: {refusal}", param=param)

    def _known(self, key: Key) -> str | None:
        """Return why a grammar is refused, "" if it compiles, None if unknown."""
        refusal = self._facts.get(key[1])
        if refusal is not None:
            self._facts.move_to_end(key[1])
            return refusal
        limit, until_s = self._limits.get(key, ("", 0.0))
        return limit if self._now_s() < until_s else None

    async def _try(self, grammar: str, key: Key, trial: _Trial) -> str:
        """Compile a grammar and cache the result: why it is refused, or "". Raises Overloaded and Unavailable."""
        tenant, digest = key
        try:
            refusal = (await self._sandbox.do(Check(grammar), tenant=tenant, limit_s=self._limit_s)).refusal
        except BadRequest as limit:
            self._limits[key] = limit.message, self._now_s() + LIMIT_REMEMBERED_S
            if len(self._limits) > MAX_REMEMBERED:
                self._limits.popitem(last=False)
            return limit.message
        except ServerError as error:
            trial.error = error
            del self._trials[key]  # later callers start a new try
            raise
        self._facts[digest] = refusal
        if len(self._facts) > MAX_REMEMBERED:
            self._facts.popitem(last=False)
        return refusal
