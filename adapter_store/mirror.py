"""Copies versions of adapters from their sources into the blobs: each once, checked, with bounded parallelism."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from weakref import WeakValueDictionary

from adapter_store.approximate import Approximation, Taken, ToConvert, as_lora
from adapter_store.blobs import AdapterFolder, Blobs, named_in
from adapter_store.formats import HEAD_BYTES, convert, depends_on_base, plan_conversion
from adapter_store.sources import FLEET, MORE_FILES, Changed, Source, SourceAccess, SourceVersion
from peft_adapters.format import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    canonical_config,
    parse_config,
    parse_header,
    read_adapter,
)
from peft_adapters.formats.conversion import Conversion
from peft_adapters.kinds.converted import read_converted
from peft_adapters.texts.files import max_bytes
from protocol.metrics.series import STORE_FETCH_SECONDS, STORE_FETCHES
from protocol.queue.bus import now_ms
from protocol.runtime.free_space import size_of
from protocol.wire.errors import AdapterRefused, NoRoom, Unavailable
from protocol.wire.messages import AdapterRecord, ServedModel

if TYPE_CHECKING:
    from adapter_store.shared_bucket import SharedBucket

logger = logging.getLogger(__name__)

MAX_REASON = 200
"""Maximum characters of the reason why an adapter does not fit one of several bases."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Mirrored:
    """A version whose content is in the blobs."""

    digest: str
    version: SourceVersion


class NeedsBase(Exception):
    """Raised if the weights can only be read for one base, and it is not known which of several that is.

    Its argument is the base that its config names; None if the weights themselves show which bases they fit.
    """


class Mirror:
    """Fetches adapters into one store's blobs, from their sources or from the shared bucket."""

    def __init__(
        self,
        blobs: Blobs,
        *,
        max_bytes: int,
        max_parallel: int = 4,
        shared_bucket: SharedBucket | None = None,
        effect_test: Literal["off", "folders", "all"] = "folders",
        approximation: Approximation | None = None,
    ) -> None:
        """Set the limits.

        max_bytes: maximum size of a fetched file. max_parallel: maximum concurrent fetches per source, so that a slow
        source does not delay others; one tenant gets at most three quarters of them. effect_test: which adapters are
        checked for having no effect. approximation: converts full-rank kinds, which are otherwise refused.
        """
        self._approximation = approximation
        self._effect_test = effect_test
        self._tenant_parallel = max(1, max_parallel * 3 // 4)
        self._tenant_slots: WeakValueDictionary[tuple[Source, str], asyncio.Semaphore] = WeakValueDictionary()
        self.blobs = blobs
        self._max_bytes = max_bytes
        self._bucket = shared_bucket
        self._slots: defaultdict[Source, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(max_parallel))
        # Separate from fetches, so that slow ones do not delay lookups and confirmations.
        self._looks: defaultdict[Source, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(max_parallel))
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def take(
        self,
        source: Source,
        target: str,
        base: ServedModel | None,
        access: SourceAccess = FLEET,
        tenant: str = "",
        any_of: Sequence[ServedModel] = (),
    ) -> Mirrored:
        """Ensure that the blobs have the current content of `target`; return its digest and version.

        A version that is here already is not fetched. But its source must confirm that `access` may read it, unless
        anyone may, or the same rights, other than a token's, have read it before.

        base: the model that the adapter must fit, None while unknown; then it must fit one of `any_of`, if not empty.
        tenant: owner of the name; "": shared by all tenants.

        Raises:
        - AdapterRefused, if possible before the fetch of a file that is too large, or of weights with a wrong header.
        - NeedsBase for weights that are read for one of several bases.
        - ToConvert for an adapter that `converted` must convert first.
        - the errors of the source; Changed; NoRoom if the disk is full.
        """
        fixed = source.fixed(target)
        for version in [] if fixed is None else self._forms(fixed, base):
            digest = await asyncio.to_thread(self._open_to, version.key, access)
            if digest is not None:
                return Mirrored(digest, version)
        async with self._looks[source]:
            version = _for_base(await source.resolve(target, access), base, any_of)
            self._check_sizes(version)
            mirrored = await self._known(source, version, base, access)
        if mirrored is None:
            async with self._slot(source, tenant), self._locks.setdefault(version.key, asyncio.Lock()):
                mirrored = await self._known(source, version, base, access)
                if mirrored is None:
                    bases = [base] if base else any_of
                    mirrored = await self._fetch_measured(source, version, bases, access, tenant)
                    await self._note_reader(mirrored.version, access)
        return mirrored

    def _forms(self, version: SourceVersion, base: ServedModel | None) -> list[SourceVersion]:
        """Return a version as in its source, and also as converted for a base if conversions are on."""
        if self._approximation is None or base is None:
            return [version]
        return [version, as_lora(version, base)]

    async def _known(
        self, source: Source, version: SourceVersion, base: ServedModel | None, access: SourceAccess
    ) -> Mirrored | None:
        """Return a version that is here and that `access` may read, asking the source if necessary; None otherwise."""
        for form in self._forms(version, base):
            digest = await asyncio.to_thread(self._open_to, form.key, access)
            if digest is None:
                digest = await asyncio.to_thread(self.blobs.digest_of, form.key)
                if digest is not None:
                    await source.confirm(version, access)
                    await self._note_reader(form, access)
            if digest is not None:
                return Mirrored(digest, form)
        return None

    async def _note_reader(self, version: SourceVersion, access: SourceAccess) -> None:
        if access.reader != "token":
            await asyncio.to_thread(self.blobs.note_reader, version.key, access.reader)

    @asynccontextmanager
    async def _slot(self, source: Source, tenant: str) -> AsyncGenerator[None]:
        """Wait for a fetch slot of the source, and for one of the tenant's."""
        own = self._tenant_slots.setdefault((source, tenant), asyncio.Semaphore(self._tenant_parallel))
        async with own if tenant else nullcontext(), self._slots[source]:
            yield

    def _open_to(self, version: str, access: SourceAccess) -> str | None:
        """Return the digest of a version that `access` is known to be allowed to read; None if that is not known."""
        proofs = {"anyone"} if access.reader == "token" else {"anyone", access.reader}
        return self.blobs.digest_of(version) if proofs & self.blobs.readers_of(version) else None

    def _check_sizes(self, version: SourceVersion) -> None:
        """Raise AdapterRefused for files that are too large according to the source."""
        limits = {CONFIG_FILE: MAX_CONFIG_BYTES, **{name: max_bytes(name) for name in MORE_FILES}}
        reasons = [
            f"{name} has {file.num_bytes} bytes; the limit is {limit}"
            for name, file in version.files.items()
            if file.num_bytes > (limit := min(limits.get(name, self._max_bytes), self._max_bytes))
        ]
        if reasons:
            raise AdapterRefused(reasons)

    async def _fetch_measured(
        self, source: Source, version: SourceVersion, bases: Sequence[ServedModel], access: SourceAccess, tenant: str
    ) -> Mirrored:
        scheme, outcome = version.source.partition(":")[0], "failed"
        try:
            with STORE_FETCH_SECONDS.labels(scheme).time():
                mirrored = await self._fetch_or_restore(source, version, bases, access, tenant)
            outcome = "taken"
            return mirrored
        except ToConvert:
            outcome = "taken"
            raise
        except AdapterRefused:
            outcome = "refused"
            raise
        finally:
            STORE_FETCHES.labels(scheme, outcome).inc()

    async def restore(self, digest: str) -> bool:
        """Copy a blob from the shared bucket; return whether the bucket has it with content that matches the digest."""
        if self._bucket is None:
            return False
        key = f"bucket:{digest}"
        async with self._locks.setdefault(key, asyncio.Lock()):
            return digest in self.blobs or await asyncio.to_thread(self._pull, self._bucket, key, digest)

    def _pull(self, bucket: SharedBucket, version: str, digest: str) -> bool:
        folder = self.blobs.staging(version)
        try:

            def room(num_bytes: int) -> AbstractContextManager[None]:
                return self.blobs.room(num_bytes, num_bytes + size_of(folder), folder)

            found = bucket.pull(digest, folder, room) and AdapterFolder.open(folder).digest() == digest
            if found:
                self.blobs.put(version, AdapterFolder.open(folder), sync=True)
            return found
        except AdapterRefused as error:
            logger.warning("adapter %.12s is damaged in the shared bucket: %s", digest, error)
            return False
        finally:
            self.blobs.discard(version)

    async def _fetch_or_restore(
        self, source: Source, version: SourceVersion, bases: Sequence[ServedModel], access: SourceAccess, tenant: str
    ) -> Mirrored:
        try:
            for form in self._forms(version, bases[0] if len(bases) == 1 else None):
                if self._bucket is None or version.at_hand:
                    break
                digest, named = await asyncio.to_thread(self._bucket.note_of, form.key)
                if digest:
                    await source.confirm(version, access)
                    if await self.restore(digest):
                        await asyncio.to_thread(self.blobs.note_version, form.key, digest, named)
                        return Mirrored(digest, form)
            digest = await self._fetch(source, version, bases, access, tenant)
        except (AdapterRefused, Changed, NoRoom):  # not for lack of rights: others may be fetching the same files
            await asyncio.to_thread(self.blobs.discard, version.key)
            raise
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            await asyncio.to_thread(self.blobs.discard, version.key)
            raise NoRoom(f"the adapter store's disk has no room: {error.strerror}") from error
        if self._bucket is not None:
            await asyncio.to_thread(self._bucket.push_blob, version.key, digest, self.blobs)
        return Mirrored(digest, version)

    async def _fetch(
        self, source: Source, version: SourceVersion, bases: Sequence[ServedModel], access: SourceAccess, tenant: str
    ) -> str:
        """Fetch a version and return its digest. Raises as `take`."""
        folder = await asyncio.to_thread(self.blobs.staging, version.key)
        weights, config = version.weights, version.files.get(CONFIG_FILE)
        num_bytes = version.files[weights].num_bytes
        head_bytes = min(num_bytes, HEAD_BYTES)
        to_convert: ToConvert | None = None
        has_config = config is None or await asyncio.to_thread(_drop_unless, folder / CONFIG_FILE, config.num_bytes)
        if has_config and await asyncio.to_thread(_size, folder / weights) >= head_bytes:
            await source.confirm(version, access)  # these files may have been read with others' rights
        if config is not None:
            await source.fetch(version, CONFIG_FILE, folder / CONFIG_FILE, config.num_bytes, access)
            to_convert = await asyncio.to_thread(self._to_convert, version, folder, bases, tenant)
        await source.fetch(version, weights, folder / weights, head_bytes, access)
        conversion = None
        if to_convert is None:
            conversion = await asyncio.to_thread(_check_head, folder, weights, num_bytes, bases)
        made = conversion.num_bytes if conversion else 0
        text_bytes = sum(file.num_bytes for name, file in version.files.items() if name in MORE_FILES)
        # A conversion's result is beside its source until it is done, and texts beside the file into which they are
        # merged.
        most = sum(file.num_bytes for file in version.files.values()) + made + text_bytes
        with self.blobs.room((made or num_bytes) + text_bytes, most, folder):
            await source.fetch(version, weights, folder / weights, num_bytes, access)
            for name in version.files.keys() & set(MORE_FILES):
                await source.fetch(version, name, folder / name, version.files[name].num_bytes, access)
            if to_convert is not None:
                await asyncio.to_thread(_check_sums, version, folder)
                raise to_convert
            return await asyncio.to_thread(self._finish, version, folder, conversion)

    def _finish(self, version: SourceVersion, folder: Path, conversion: Conversion | None) -> str:
        _check_sums(version, folder)
        named = ""
        if CONFIG_FILE in version.files:  # a conversion overwrites it
            named = named_in(parse_config((folder / CONFIG_FILE).read_bytes()))
        if conversion is not None:
            convert(folder, version.weights, conversion, folder, self.blobs.reserve)
        files = AdapterFolder.open_fetched(folder)
        files.keep_texts()
        return self.blobs.put(version.key, files, named, sync=not version.at_hand)

    # ------------------------------------------------------------ kinds of full rank

    def _to_convert(
        self, version: SourceVersion, folder: Path, bases: Sequence[ServedModel], tenant: str
    ) -> ToConvert | None:
        """Return the conversion that an adapter with a staged config needs; None if it needs none.

        Raises AdapterRefused; NeedsBase if it depends on one of several bases; Unavailable if no base is known or too
        many conversions wait.
        """
        if self._approximation is None or version.weights != WEIGHTS_FILE:
            return None
        config = parse_config((folder / CONFIG_FILE).read_bytes())
        if not self._approximation.takes(config):
            return None
        if len(bases) > 1:
            raise NeedsBase(named_in(config))
        if not bases:
            raise Unavailable(f"{version.source} can be converted once a worker has reported its base model")
        self._approximation.turns.check(tenant)
        return ToConvert(version, bases[0], tenant)

    async def converted(self, take: Callable[[], Awaitable[Taken]]) -> Taken:
        """Return the result of `take`, doing the conversions that it asks for first. Raises as both."""
        return await (take() if self._approximation is None else self._approximation.converted(take))

    # ------------------------------------------------------------ blobs

    async def describe(self, digest: str, source: str, base: ServedModel) -> AdapterRecord:
        """Check a blob against the base model and return its catalogue record.

        Raises AdapterRefused if it does not fit the base, Changed if the blob was evicted.
        """
        return await asyncio.to_thread(self._describe, digest, source, base)

    def _describe(self, digest: str, source: str, base: ServedModel) -> AdapterRecord:
        files = self.blobs.open(digest)
        if files is None:
            raise Changed(f"adapter {digest:.12} was evicted from disk")
        spec = read_adapter(files.config, files.tensors, base)
        files.check_idle(spec)
        if files.texts is not None:
            files.texts.check_base(base)
        tested = self._effect_test == "all" or (self._effect_test == "folders" and source.startswith("local:"))
        no_effect = tested and not files.has_effect(spec)
        if no_effect:
            logger.warning("adapter %s has no effect: everything that it adds to the base model is zero", source)
        return AdapterRecord(
            digest=digest,
            rank=spec.rank,
            vocab_size=spec.vocab_size,
            num_labels=spec.num_labels,
            num_virtual=spec.virtual.num if spec.virtual is not None else 0,
            num_bytes=files.num_bytes,
            config=canonical_config(files.config),
            modules=spec.modules,
            mapped=dict(spec.mapped),
            converted=read_converted(files.config, files.tensors),
            no_effect=no_effect,
            source=source,
            created_ms=now_ms(),
        )


def _drop_unless(config: Path, num_bytes: int) -> bool:
    """Delete a config of another length, which a store that died may have rewritten in canonical form.

    Returns whether a config of the right length exists.
    """
    if not config.exists():
        return False
    if config.stat().st_size != num_bytes:
        config.unlink()
        return False
    return True


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _for_base(version: SourceVersion, base: ServedModel | None, any_of: Sequence[ServedModel]) -> SourceVersion:
    """Return a version with the facts about the base on which its conversion depends in its key.

    Raises NeedsBase if it may be any of several, Unavailable if none is known.
    """
    if not depends_on_base(version.weights):
        return version
    if base is None and any_of:
        raise NeedsBase(None)
    if base is None:
        raise Unavailable(f"{version.source} can be read once a worker has reported its base model")
    return replace(version, key=f"{version.key}:{base.model_type}:{base.head_dim}")


def _check_sums(version: SourceVersion, folder: Path) -> None:
    """Raise Changed for a file whose checksum differs from the source's."""
    for name, file in version.files.items():
        if file.checksum is not None and _checksum(folder / name, file.checksum[0]) != file.checksum[1]:
            raise Changed(f"{name} of {version.source} does not match the {file.checksum[0]} of its source")


def _check_head(folder: Path, weights: str, num_bytes: int, bases: Sequence[ServedModel]) -> Conversion | None:
    """Check the config and the weights header against the bases; they must fit one of them, if any are known.

    Returns the plan of the conversion, None without one. Raises AdapterRefused.
    """
    conversion = plan_conversion(folder, weights, num_bytes, bases[0] if len(bases) == 1 else None)
    if conversion is not None:
        config, tensors = conversion.config, conversion.infos()
    else:
        with (folder / CONFIG_FILE).open("rb") as file:
            config = parse_config(file.read(MAX_CONFIG_BYTES + 1))
        with (folder / WEIGHTS_FILE).open("rb") as file:
            tensors = parse_header(file.read(HEAD_BYTES), num_bytes)
    if len(bases) <= 1:
        read_adapter(config, tensors, bases[0] if bases else None)
        return conversion
    refused: dict[str, AdapterRefused] = {}
    for base in bases:
        try:
            read_adapter(config, tensors, base)
        except AdapterRefused as error:
            refused[base.name] = error
    if len(refused) == len(bases):
        raise fits_none(refused)
    return conversion


def fits_none(refused: Mapping[str, AdapterRefused]) -> AdapterRefused:
    """Return the error for an adapter that every base has refused. refused: by base name."""
    reasons = "; ".join(f"{name}: {error.message[:MAX_REASON]}" for name, error in refused.items())
    return AdapterRefused([f"it fits no base of this fleet; {reasons}"])


def _checksum(path: Path, algorithm: str) -> str:
    """Return a file's sha256 or md5 in hex, or its id as a git blob."""
    with path.open("rb") as file:
        if algorithm != "git":
            return hashlib.file_digest(file, algorithm).hexdigest()
        content = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        while chunk := file.read(1 << 20):
            content.update(chunk)
        return content.hexdigest()
