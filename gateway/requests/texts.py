"""The prompt and output of an ended request, if the operator keeps them with the history."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from gateway.calls.pipeline import Pipeline
from gateway.overload import reads
from gateway.text.tokenizer import ModelFiles
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError, NotFound, Overloaded
from protocol.wire.tokens import Detokenizer, TokenTable

if TYPE_CHECKING:  # its packages are optional
    from gateway.requests.database import Database

TOKENS_AT_ONCE = 1024
"""Tokens decoded before other tasks run: some tenths of a millisecond."""

MAX_CHARACTERS = 1 << 16
"""Maximum characters shown of a prompt or output: a token may be a hundred spaces."""


class KeptTexts:
    """Decodes kept texts. The caller must have checked that the client may see the request."""

    def __init__(self, pipeline: Pipeline, database: Database | None) -> None:
        """database: holds the history; None: the queue does, which keeps no texts."""
        self._pipeline = pipeline
        self._database = database
        self._max_tokens = pipeline.settings.history_text

    async def shown(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Return the prompt and output of a request, given as its API object; None if they are not kept.

        Raises Overloaded once the caller's reads are used up.
        """
        if self._database is None or not self._max_tokens or request["state"] not in m.TERMINAL:
            return None
        num = min(request["prompt_tokens"], self._max_tokens) + min(request["output_tokens"], self._max_tokens)
        reads.spend(num / reads.TOKENS_PER_READ)
        archive, tenant, rid = self._pipeline.bus.archive, request["tenant"], request["id"]
        found: dict[str, Any] = {"prompt": None, "output": None, "is_cut": False, "problem": None}
        try:
            if await archive.is_deleted(tenant, rid):  # the database may not have deleted it yet
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
        except LorafleetError as error:  # unreachable database, other key, or unknown tokens
            return found | {"problem": error.message}
        found |= {"prompt": prompt[-MAX_CHARACTERS:], "output": output[:MAX_CHARACTERS] if text.has_output else None}
        is_cut = len(text.prompt) < 4 * request["prompt_tokens"] or max(len(prompt), len(output)) > MAX_CHARACTERS
        return found | {"is_cut": is_cut or (text.has_output and len(text.output) < 4 * request["output_tokens"])}

    async def _files(self, text: m.KeptText, tenant: str) -> ModelFiles:
        """Return the tokenizer of a text's ids. Raises as `OwnFiles.files`, and NotFound if no base here has it.

        The tokenizer identifies the base, because the base may have been renamed.
        """
        own = self._pipeline.resolver.bases.of(text.base)
        if text.tokenizer != own.base.tokenizer:
            message = f"its tokens are those of the base `{text.base}`, whose tokenizer this gateway does not have"
            raise NotFound(message, code="base_not_served")
        return await own.files(text.digest, text.texts, tenant)


async def _decoded(tokens: TokenTable, ids: bytes) -> str:
    """Decode ids (int32) in slices, with special tokens. Raises BadRequest if they cannot be decoded."""
    detokenizer, parts = Detokenizer(tokens, special=True), list[str]()
    numbers = memoryview(ids).cast("i")
    for begin in range(0, len(numbers), TOKENS_AT_ONCE):
        parts.append(detokenizer.add(numbers[begin : begin + TOKENS_AT_ONCE]))
        await asyncio.sleep(0)
    return "".join([*parts, detokenizer.flush()])
