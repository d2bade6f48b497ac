"""The tokenizers and chat templates that adapters bring, fetched from the stores and kept for the next request."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from weakref import WeakValueDictionary

import httpx2
from tokenizers import Tokenizer

from gateway.text.sandbox import SandboxedTemplate, SandboxPool
from gateway.text.tokenizer import ModelFiles, TokenText, read_tokenizer
from peft_adapters.texts import (
    TEXTS_FIELD,
    TEXTS_FILE,
    TOKENIZER,
    special_tokens,
    split_texts,
    template_of,
)
from protocol.queue.bus import Bus
from protocol.wire import messages as m
from protocol.wire.errors import AdapterRefused, BadRequest, NotFound, Unavailable

logger = logging.getLogger(__name__)

MAX_KEPT = 32
"""Sets of files that are kept; those with equal tokenizers share one."""

MAX_FACTS = 10_000

TIMEOUT = httpx2.Timeout(30.0, connect=2.0)


class OwnFiles:
    """The tokenizers and chat templates of adapters, kept by their hash."""

    def __init__(self, bus: Bus, base: ModelFiles, sandbox: SandboxPool, bearer: str = "") -> None:
        """bearer: authorizes at the stores, see `FleetSecret.bearer`; "" for a fleet without a secret."""
        self._bus = bus
        self.base = base
        self._sandbox = sandbox
        self._kept: OrderedDict[str, ModelFiles] = OrderedDict()
        self._facts: OrderedDict[str, tuple[str, int]] = OrderedDict()  # as `facts` returns, by digest; never change
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        self._http = httpx2.AsyncClient(timeout=TIMEOUT, headers=headers, trust_env=False)

    async def close(self) -> None:
        """Close the connections to the stores."""
        await self._http.aclose()

    async def facts(self, digest: str) -> tuple[str, int]:
        """Return the hash of an adapter's own texts, "" if it brings none, and its vocabulary's size, 0 for the base's.

        Raises NotFound.
        """
        facts = self._facts.get(digest)
        if facts is None:
            record = await self._bus.get(self._bus.keys.adapter(digest), m.AdapterRecord)
            if record is None:
                raise NotFound(f"the adapter {digest:.12} has just left the catalogue", param="model")
            facts = record.config.get(TEXTS_FIELD, ""), record.vocab_size
        self._facts[digest] = facts
        self._facts.move_to_end(digest)
        if len(self._facts) > MAX_FACTS:
            self._facts.popitem(last=False)
        return facts

    async def files(self, digest: str, texts: str) -> ModelFiles:
        """Return the files to serve an adapter with: the base's, where it brings none (`texts` is ""), or its own.

        Raises AdapterRefused when they cannot be used, NotFound and Unavailable when they cannot be had.
        """
        if not texts:
            return self.base
        async with self._locks.setdefault(texts, asyncio.Lock()):
            files = self._kept.get(texts)
            if files is None:
                raw = await self._fetch(digest)
                files = await asyncio.to_thread(self._read, split_texts(raw, texts))
            self._kept[texts] = files
            self._kept.move_to_end(texts)
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            return files

    async def _fetch(self, digest: str) -> bytes:
        urls = await self._bus.members.store_urls()
        missing = 0
        for url in urls:
            try:
                response = await self._http.get(f"{url}/adapters/{digest}/{TEXTS_FILE}")
                if response.status_code == 404:
                    missing += 1
                    continue
                response.raise_for_status()
            except httpx2.HTTPError as error:
                logger.warning("store %s did not give the texts of adapter %.12s: %r", url, digest, error)
            else:
                return response.content
        if urls and missing == len(urls):
            raise NotFound(f"no adapter store has the tokenizer of the adapter {digest:.12} any more", param="model")
        raise Unavailable(f"no adapter store gave the tokenizer of the adapter {digest:.12}", code="no_store")

    def _read(self, texts: dict[str, str]) -> ModelFiles:
        base = self.base
        tokenizer, token_text, eos_ids = base.tokenizer, base.token_text, base.eos_ids
        if TOKENIZER in texts:
            tokenizer, token_text = self._tokenizer(texts[TOKENIZER])
            eos = tokenizer.token_to_id(special_tokens(texts).get("eos_token", ""))
            eos_ids = base.eos_ids if eos is None else base.eos_ids | {eos}
        template, source = base.template, template_of(texts)
        if source is not None:
            template = SandboxedTemplate(source, special_tokens(base.texts) | special_tokens(texts), self._sandbox)
        return ModelFiles(base.name, tokenizer, token_text, template, eos_ids, texts)

    def _tokenizer(self, text: str) -> tuple[Tokenizer, TokenText]:
        """Return the tokenizer of a tokenizer.json, shared by all with equal texts. Raises AdapterRefused."""
        for known in (self.base, *self._kept.values()):
            if known.texts.get(TOKENIZER) == text:
                return known.tokenizer, known.token_text
        try:
            return read_tokenizer(text)
        except BadRequest as error:
            raise AdapterRefused([f"its {error.message}"]) from error
