"""The tokenizers and chat templates that adapters bring, fetched from the stores and kept for the next request."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections import OrderedDict
from functools import cached_property
from weakref import WeakValueDictionary

import httpx2
import msgspec

from gateway.overload.large import Places
from gateway.sandbox.child import ReadTokenizer
from gateway.sandbox.sandbox import SandboxedTemplate, SandboxPool
from gateway.text.tokenizer import TOKENIZER_S, BaseEncoder, Encoder, ModelFiles, OwnEncoder
from peft_adapters.texts.files import (
    MAX_TOKENIZER_BYTES,
    TEXTS_FIELD,
    TEXTS_FILE,
    TOKENIZER,
    special_tokens,
    split_texts,
    template_of,
)
from protocol.queue.bus import Bus
from protocol.wire import messages as m
from protocol.wire.errors import AdapterRefused, NotFound, Unavailable
from protocol.wire.tokens import TokenTable

logger = logging.getLogger(__name__)

MAX_KEPT = 32
"""Sets of files that are kept; those with equal tokenizers share one."""

MAX_KEPT_BYTES = 128 << 20
"""Bytes of packed tokenizers that are kept, the newest one always."""

NUM_READ, NUM_WAITING = 2, 64
"""Adapters' texts that are read and packed at once, one of a tenant, and that wait for that."""

READ_BYTES = 7 * MAX_TOKENIZER_BYTES
"""What one takes meanwhile: as it was fetched, twice with escapes; as a text, four bytes a character; and as UTF-8."""

MAX_FACTS = 10_000

TIMEOUT = httpx2.Timeout(30.0, connect=2.0)


class OwnFiles:
    """The tokenizers and chat templates of adapters, kept by their hash."""

    def __init__(
        self, bus: Bus, base: ModelFiles, sandbox: SandboxPool, bearer: str = "", max_kept_bytes: int = MAX_KEPT_BYTES
    ) -> None:  # fmt: skip
        """bearer: authorizes at the stores, see `FleetSecret.bearer`; "" for a fleet without a secret."""
        self._max_kept_bytes = max_kept_bytes
        self._reading = Places(NUM_READ, 1, NUM_WAITING)
        self._bus = bus
        self.base = base
        self._sandbox = sandbox
        self._kept: OrderedDict[str, ModelFiles] = OrderedDict()
        self._facts: OrderedDict[str, tuple[str, int, int]] = OrderedDict()  # as `facts` returns, by digest: for ever
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}

    @cached_property
    def _http(self) -> httpx2.AsyncClient:
        """Made by the first adapter with texts of its own: most have none, and it reads all certificates."""
        return httpx2.AsyncClient(timeout=TIMEOUT, headers=self._headers, trust_env=False)

    async def close(self) -> None:
        """Close the connections to the stores."""
        if "_http" in self.__dict__:
            await self._http.aclose()

    async def facts(self, digest: str) -> tuple[str, int, int]:
        """Return the hash of an adapter's own texts, its vocabulary's size, and the number of its own labels.

        "" if it brings no texts, 0 for the base's vocabulary and for no head of its own. Raises NotFound.
        """
        facts = self._facts.get(digest)
        if facts is None:
            record = await self._bus.get(self._bus.keys.adapter(digest), m.AdapterRecord)
            if record is None:
                raise NotFound(f"the adapter {digest:.12} has just left the catalogue", param="model")
            facts = record.config.get(TEXTS_FIELD, ""), record.vocab_size, record.num_labels
        self._facts[digest] = facts
        self._facts.move_to_end(digest)
        if len(self._facts) > MAX_FACTS:
            self._facts.popitem(last=False)
        return facts

    async def files(self, digest: str, texts: str, tenant: str) -> ModelFiles:
        """Return the files to serve an adapter with: the base's, where it brings none (`texts` is ""), or its own.

        tenant: for whom the sandbox reads a tokenizer. Raises AdapterRefused when they cannot be used, NotFound and
        Unavailable when they cannot be had, Overloaded when the sandbox has no place.
        """
        if not texts:
            return self.base
        async with self._locks.setdefault(texts, asyncio.Lock()):
            files = self._kept.get(texts)
            if files is None:
                files = await self._read(await self._prepared(digest, texts, tenant), tenant)
            self._kept[texts] = files
            self._kept.move_to_end(texts)
            self._drop_oldest()
            return files

    def _drop_oldest(self) -> None:
        while len(self._kept) > MAX_KEPT or (self.num_bytes > self._max_kept_bytes and len(self._kept) > 1):
            self._kept.popitem(last=False)

    @property
    def num_bytes(self) -> int:
        """The bytes of the packed tokenizers that are kept."""
        encoders = {id(files.encoder): files.encoder for files in self._kept.values()}
        return sum(encoder.num_bytes for encoder in encoders.values() if isinstance(encoder, OwnEncoder))

    async def _prepared(self, digest: str, texts: str, tenant: str) -> tuple[dict[str, str], bytes | None]:
        """Fetch an adapter's texts. Returns them without the tokenizer, and that packed: b"" the base's, None none.

        Whole they may take READ_BYTES, so a few are read at a time, by turns of tenants.
        """
        await self._reading.take(tenant)
        try:
            return await asyncio.to_thread(self._packed, await self._fetch(digest), texts)
        finally:
            self._reading.give(tenant)

    def _packed(self, raw: bytes, digest: str) -> tuple[dict[str, str], bytes | None]:
        texts = split_texts(raw, digest)
        text = texts.pop(TOKENIZER, None)
        if text is None:
            return texts, None
        return texts, b"" if text == self.base.texts[TOKENIZER] else zlib.compress(text.encode(), 1)

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

    async def _read(self, prepared: tuple[dict[str, str], bytes | None], tenant: str) -> ModelFiles:
        base, (texts, tokenizer) = self.base, prepared
        encoder, tokens, eos_ids = base.encoder, base.tokens, base.eos_ids
        if tokenizer is not None:
            name = special_tokens(texts).get("eos_token", "")
            if not tokenizer:
                assert isinstance(encoder, BaseEncoder)
                eos = encoder.id_of(name)
            else:
                encoder, tokens, eos = await self._own_tokenizer(tokenizer, name, tenant)
            eos_ids = base.eos_ids if eos is None else base.eos_ids | {eos}
        template, source = base.template, template_of(texts)
        if source is not None:
            template = SandboxedTemplate(source, special_tokens(base.texts) | special_tokens(texts), self._sandbox)
        return ModelFiles(base.name, encoder, tokens, template, eos_ids, base.texts, base.pair_template)

    async def _own_tokenizer(self, file: bytes, name: str, tenant: str) -> tuple[Encoder, TokenTable, int | None]:
        """Return what encodes as a packed tokenizer.json does, its tokens, and a token's id. Raises AdapterRefused.

        All adapters with equal files share the first two.
        """
        answer = await self._sandbox.do(ReadTokenizer(file, name), tenant=tenant, limit_s=TOKENIZER_S)
        if answer.refusal:
            raise AdapterRefused([answer.refusal])
        try:
            tokens = msgspec.msgpack.decode(answer.tokens, type=TokenTable)
        except msgspec.MsgspecError as error:
            raise AdapterRefused([f"its {TOKENIZER} cannot be read: {error}"]) from error
        for known in self._kept.values():
            if known.tokens.key == tokens.key:
                return known.encoder, known.tokens, answer.id
        return OwnEncoder(tokens.key, file, self._sandbox), tokens, answer.id
