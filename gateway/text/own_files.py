"""Chat templates and added tokens of adapters, fetched from the stores and cached."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from dataclasses import replace
from typing import NamedTuple
from weakref import WeakValueDictionary

import httpx2

from gateway.grammars.check import GrammarCheck
from gateway.http.http_client import HttpClient
from gateway.sandbox.sandbox import SandboxedTemplate, SandboxPool
from gateway.text.tokenizer import Encoder, ModelFiles
from peft_adapters.texts.files import MAX_TEXTS_BYTES, TEXTS_FIELD, TEXTS_FILE, OwnTexts, parse_texts, special_tokens
from peft_adapters.texts.tokenizer_json import AddedToken
from protocol.queue.bus import Bus
from protocol.runtime.fair_slots import FairSlots
from protocol.wire import messages as m
from protocol.wire.errors import NotFound, Unavailable
from protocol.wire.tokens import TokenTable

logger = logging.getLogger(__name__)

MAX_KEPT = 32
"""Maximum cached sets of files; sets with equal added tokens share a tokenizer."""

MAX_KEPT_BYTES = 128 << 20
"""Maximum bytes of cached added tokens; the newest set is always kept."""

NUM_READ, NUM_WAITING = 2, 64
"""Adapters' texts read concurrently, at most one per tenant, and the maximum number of readings that wait."""

READ_BYTES = 4 * MAX_TEXTS_BYTES
"""Memory of one reading: the text as fetched, and as parsed."""

MAX_FACTS = 10_000

TIMEOUT = httpx2.Timeout(30.0, connect=2.0)


class OwnFacts(NamedTuple):
    """Immutable facts from an adapter's record about how it is served."""

    texts: str  # hash of its own text files, "" if it has none
    vocab_size: int  # 0: the base's
    num_labels: int  # labels of its own head; 0: it has none
    num_virtual: int  # virtual tokens before every prompt


class OwnFiles:
    """The text files, sandbox and grammar check of a base, and the text files of its adapters, cached by their hash."""

    def __init__(
        self,
        bus: Bus,
        base: ModelFiles,
        sandbox: SandboxPool,
        stores: HttpClient,
        grammars: GrammarCheck,
        max_kept_bytes: int = MAX_KEPT_BYTES,
    ) -> None:
        self._max_kept_bytes = max_kept_bytes
        self._reading = FairSlots(NUM_READ, 1, NUM_WAITING)
        self._bus = bus
        self.base = base
        self.sandbox, self.grammars = sandbox, grammars
        self._kept: OrderedDict[str, ModelFiles] = OrderedDict()
        self._facts: OrderedDict[str, OwnFacts] = OrderedDict()  # by digest
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._stores = stores

    async def facts(self, digest: str) -> OwnFacts:
        """Return an adapter's facts from its record. Raises NotFound."""
        facts = self._facts.get(digest)
        if facts is None:
            record = await self._bus.get(self._bus.keys.adapter(digest), m.AdapterRecord)
            if record is None:
                raise NotFound(f"the adapter {digest:.12} has just left the catalogue", param="model")
            texts = record.config.get(TEXTS_FIELD, "")
            facts = OwnFacts(texts, record.vocab_size, record.num_labels, record.num_virtual)
        self._facts[digest] = facts
        self._facts.move_to_end(digest)
        if len(self._facts) > MAX_FACTS:
            self._facts.popitem(last=False)
        return facts

    async def files(self, digest: str, texts: str, tenant: str) -> ModelFiles:
        """Return the files to serve an adapter with: the base's if it has none (`texts` is ""), or its own.

        tenant: on whose behalf they are read. Raises AdapterRefused if they are unusable, NotFound and Unavailable if
        they cannot be fetched, Overloaded if too many readings wait.
        """
        if not texts:
            return self.base
        async with self._locks.setdefault(texts, asyncio.Lock()):
            files = self._kept.get(texts)
            if files is None:
                files = await self._read(digest, texts, tenant)
            self._kept[texts] = files
            self._kept.move_to_end(texts)
            self._drop_oldest()
            return files

    def _drop_oldest(self) -> None:
        while len(self._kept) > MAX_KEPT or (self.num_bytes > self._max_kept_bytes and len(self._kept) > 1):
            self._kept.popitem(last=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of the added tokens in the cache."""
        own = {id(files.encoder): files for files in self._kept.values() if files.encoder is not self.base.encoder}
        return sum(files.encoder.num_bytes + files.tokens.num_bytes for files in own.values())

    async def _read(self, digest: str, texts: str, tenant: str) -> ModelFiles:
        """Fetch and parse an adapter's texts: a few at a time, round-robin by tenant."""
        async with self._reading.held(tenant):
            raw = await self._fetch(digest)
            return await asyncio.to_thread(lambda: self._made(parse_texts(raw, texts)))

    def _made(self, own: OwnTexts) -> ModelFiles:
        base = self.base
        encoder, tokens, eos_ids, template = base.encoder, base.tokens, base.eos_ids, base.template
        if own.tokenizer is not None:
            encoder, tokens = self._with_added(own.tokenizer.added)
            eos = encoder.id_of(own.special_tokens.get("eos_token", ""))
            eos_ids = eos_ids if eos is None else eos_ids | {eos}
        if own.template is not None:
            template = SandboxedTemplate(own.template, special_tokens(base.texts) | own.special_tokens, self.sandbox)
        return replace(
            base,
            encoder=encoder,
            tokens=tokens,
            template=template,
            eos_ids=eos_ids,
            base_tokens=None,
            own_ends=eos_ids - base.eos_ids,
        )

    def _with_added(self, added: list[AddedToken]) -> tuple[Encoder, TokenTable]:
        """Return the base's tokenizer with added tokens, shared with cached files that have the same.

        Raises AdapterRefused.
        """
        base = self.base
        assert base.base_tokens is not None
        tokens = base.base_tokens.with_added(added)
        for known in (base, *tuple(self._kept.values())):
            if known.tokens is tokens:
                return known.encoder, tokens
        return base.encoder.with_added(added), tokens

    async def _fetch(self, digest: str) -> bytes:
        urls, http = await self._bus.members.store_urls(), await self._stores.get()
        missing = 0
        for url in urls:
            try:
                response = await http.get(f"{url}/adapters/{digest}/{TEXTS_FILE}", timeout=TIMEOUT)
                if response.status_code == 404:
                    missing += 1
                    continue
                response.raise_for_status()
            except httpx2.HTTPError as error:
                logger.warning("store %s did not return the texts of adapter %.12s: %r", url, digest, error)
            else:
                return response.content
        if urls and missing == len(urls):
            raise NotFound(f"no adapter store has the texts of the adapter {digest:.12} any more", param="model")
        raise Unavailable(f"no adapter store returned the texts of the adapter {digest:.12}", code="no_store")
