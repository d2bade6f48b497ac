"""The prompt and the output of a request that has ended, where an operator has them kept with the history."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from gateway.calls.pipeline import Pipeline
from gateway.overload import reads
from gateway.text.tokenizer import ModelFiles
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError, NotFound, Overloaded
from protocol.wire.tokens import Detokenizer, TokenTable

if TYPE_CHECKING:  # it needs packages that most fleets do not have
    from gateway.requests.database import Database

TOKENS_AT_ONCE = 1024
"""Tokens that are decoded before others have their turn: some tenths of a millisecond."""

MAX_CHARACTERS = 1 << 16
"""Most characters of a prompt or an output that are shown: some tokens are a hundred spaces."""


class KeptTexts:
    """Shows what is kept. Whoever calls it has checked that the caller may see the request."""

    def __init__(self, pipeline: Pipeline, database: Database | None) -> None:
        """database: where the history is, None: in the queue, which keeps no texts."""
        self._pipeline = pipeline
        self._database = database
        self._max_tokens = pipeline.settings.history_text

    async def shown(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Return the prompt and output of a request, an object of the API, as it shows them.

        None where none are kept. Raises Overloaded once the caller's reads are used up.
        """
        if self._database is None or not self._max_tokens or request["state"] not in m.TERMINAL:
            return None
        num = min(request["prompt_tokens"], self._max_tokens) + min(request["output_tokens"], self._max_tokens)
        reads.spend(num / reads.TOKENS_PER_READ)
        archive, tenant, rid = self._pipeline.bus.archive, request["tenant"], request["id"]
        found: dict[str, Any] = {"prompt": None, "output": None, "is_cut": False, "problem": None}
        try:
            if await archive.is_deleted(tenant, rid):  # before the database is asked, which may just have deleted it
                return None
            raw = await self._database.text(tenant, rid)
            if raw is None:
                return None
            text = archive.opened(tenant, rid, raw)
            files = await self._files(text, tenant)
            prompt = await _decoded(files.tokens, text.prompt)
            output = await _decoded(files.tokens, text.output)
        except Overloaded:
            raise
        except LorafleetError as error:  # the database is away, it was sealed otherwise, or its tokens are unknown now
            return found | {"problem": error.message}
        found |= {"prompt": prompt[-MAX_CHARACTERS:], "output": output[:MAX_CHARACTERS] if text.has_output else None}
        is_cut = len(text.prompt) < 4 * request["prompt_tokens"] or max(len(prompt), len(output)) > MAX_CHARACTERS
        return found | {"is_cut": is_cut or (text.has_output and len(text.output) < 4 * request["output_tokens"])}

    async def _files(self, text: m.KeptText, tenant: str) -> ModelFiles:
        """Return what a text's ids are tokens of. Raises as `OwnFiles.files`, and NotFound for those of no base here.

        A gateway's only base may have had another name, so the tokenizer decides.
        """
        own = self._pipeline.resolver.bases.of(text.base)
        if text.tokenizer != own.base.tokenizer:
            message = f"its tokens are those of the base `{text.base}`, whose tokenizer this gateway does not have"
            raise NotFound(message, code="base_not_served")
        return await own.files(text.digest, text.texts, tenant)


async def _decoded(tokens: TokenTable, ids: bytes) -> str:
    """Return ids (int32) as text, with special tokens, some at a time. Raises BadRequest if they cannot be decoded."""
    detokenizer, parts = Detokenizer(tokens, special=True), list[str]()
    numbers = memoryview(ids).cast("i")
    for begin in range(0, len(numbers), TOKENS_AT_ONCE):
        parts.append(detokenizer.add(numbers[begin : begin + TOKENS_AT_ONCE]))
        await asyncio.sleep(0)
    return "".join([*parts, detokenizer.flush()])
