"""Converts adapters of full-rank kinds to LoRA in a process that has torch: one at a time, tenants in turn.

Only a store with `convert_adapters` does this. The result is an approximation and says so in its files
(`peft_adapters.kinds.converted`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from adapter_store.blobs import AdapterFolder, Blobs, named_in
from adapter_store.sources import MORE_FILES, SourceVersion
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE, parse_config, read_adapter
from peft_adapters.kinds.refused import is_converted
from peft_adapters.reasons import show
from protocol.runtime.environment import COMPUTE, HUB_CACHE, child_environment
from protocol.runtime.fair_slots import FairSlots
from protocol.runtime.model_files import WEIGHT_FILES, base_settings, model_folder
from protocol.runtime.settings import Settings
from protocol.wire.brief import brief
from protocol.wire.errors import AdapterRefused, BadRequest, Unavailable
from protocol.wire.lines import lines_of
from protocol.wire.messages import ServedModel

if TYPE_CHECKING:
    from adapter_store.shared_bucket import SharedBucket

logger = logging.getLogger(__name__)

Taken = TypeVar("Taken")

KEEP = 0.999
"""Fraction of each layer's Frobenius norm that the kept singular values must have."""

MAX_WAITING = 64
MAX_TENANT_WAITING = 16
"""Maximum number of waiting conversions: of all tenants together, and of one tenant."""

MAX_TAKES = 4
"""Maximum attempts to take an adapter after conversions, in case another caller uses up or deletes its files."""

MEMORY_BYTES = 4 << 30
"""Memory that a conversion may use besides three times the base's fp32 weights: for torch, and to decompose a layer."""

SAID_BYTES = 1 << 16
"""Last bytes kept of the process's stderr, whose last line is the reason why an adapter is refused."""

NEEDED = ("torch", "transformers", "peft", "gpu_worker")


class ToConvert(Exception):
    """Raised for an adapter that can be served once it is converted. Its files are staged."""

    def __init__(self, version: SourceVersion, base: ServedModel, tenant: str) -> None:
        """version: as in its source. tenant: whose share of conversions it uses."""
        super().__init__(version.source)
        self.version, self.base, self.tenant = version, base, tenant


def as_lora(version: SourceVersion, base: ServedModel) -> SourceVersion:
    """Return the version whose key stands for the result of a conversion with the weights of a base."""
    return replace(version, key=f"{version.key}:as LoRA for {base.fingerprint}:{base.weights}")


def _too_many(_: int) -> Unavailable:
    return Unavailable(
        f"it must be converted first, and too many conversions are waiting: the limits are {MAX_TENANT_WAITING} per"
        f" tenant and {MAX_WAITING} in all"
    )


class Approximation:
    """Converts the adapters of a store's bases."""

    def __init__(
        self, blobs: Blobs, models: Mapping[str, str], *, timeout_s: float, max_bytes: int, bucket: SharedBucket | None
    ) -> None:
        """models: base name -> folder or Hub id. timeout_s: per conversion. max_bytes: maximum size of its result."""
        self._blobs = blobs
        self._bucket = bucket
        self._models = models
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self.turns = FairSlots(1, 1, MAX_WAITING, MAX_TENANT_WAITING, _too_many)

    @classmethod
    def of(
        cls, settings: Settings, blobs: Blobs, bucket: SharedBucket | None, needed: Sequence[str] = NEEDED
    ) -> Approximation | None:
        """Return the converter that the settings ask for; None if they ask for none.

        needed: packages that the process imports. Raises BadRequest if conversions are impossible here.
        """
        if not settings.convert_adapters:
            return None
        if missing := [name for name in needed if find_spec(name) is None]:
            raise BadRequest(
                f"convert_adapters: adapters are converted by PEFT, and {', '.join(missing)} cannot be imported by the"
                " store: install lorafleet[worker] where it runs, or leave the setting out"
            )
        if not settings.model:
            raise BadRequest("convert_adapters needs the weights of the base: give the store the same --model")
        models = {name: one.model for name, one in base_settings(settings).items()}
        return cls(
            blobs,
            models,
            timeout_s=settings.convert_timeout_s,
            max_bytes=settings.max_adapter_bytes,
            bucket=bucket,
        )

    @staticmethod
    def takes(config: Mapping[str, Any]) -> bool:
        """Return whether an adapter with this config must be converted."""
        return is_converted(config.get("peft_type"))

    def most_bytes(self, base: ServedModel) -> int:
        """Return the maximum bytes of the weights file of an adapter of a base: LoRA of full rank, fp32."""
        sites = [site for site in base.sites if site.kind in ("linear", "conv1d", "opaque")]
        full = sum(4 * (one.in_features + one.out_features) * min(one.in_features, one.out_features) for one in sites)
        return min(self._max_bytes, full + (1 << 20))

    async def converted(self, take: Callable[[], Awaitable[Taken]]) -> Taken:
        """Return the result of `take`, doing the conversions that it asks for first. Raises as `take` and `write`."""
        for _ in range(MAX_TAKES):
            try:
                return await take()
            except ToConvert as needed:
                await self._convert(needed)
        raise Unavailable("its conversion was deleted, or its source changed meanwhile")

    async def _convert(self, needed: ToConvert) -> None:
        """Convert a staged adapter and put the result into the blobs; do nothing if another caller has done so.

        Raises as `write`, and NoRoom.
        """
        version, own, base = needed.version, as_lora(needed.version, needed.base), needed.base
        async with self.turns.held(needed.tenant):
            folder = await asyncio.to_thread(self._blobs.staging, version.key)
            if not (folder / WEIGHTS_FILE).exists() or self._blobs.digest_of(own.key) is not None:
                return
            scratch = await asyncio.to_thread(self._blobs.staging, own.key)
            try:
                with self._blobs.room(0, self.most_bytes(base), scratch):
                    await self.write(folder, scratch / "lora", base)
                    digest = await asyncio.to_thread(self._finish, own, folder, scratch / "lora", base)
                await asyncio.to_thread(self._blobs.discard, version.key)
            except AdapterRefused:
                await asyncio.to_thread(self._blobs.discard, version.key)
                raise
            finally:
                await asyncio.to_thread(self._blobs.discard, own.key)
        logger.info("%s is converted to LoRA: %.12s", version.source, digest)
        if self._bucket is not None:
            await asyncio.to_thread(self._bucket.push_blob, own.key, digest, self._blobs)

    def _finish(self, own: SourceVersion, folder: Path, made: Path, base: ServedModel) -> str:
        named = named_in(parse_config((folder / CONFIG_FILE).read_bytes()))
        for name in own.files.keys() & set(MORE_FILES):
            (folder / name).rename(made / name)
        files = AdapterFolder.open_fetched(made)
        read_adapter(files.config, files.tensors, base)
        files.keep_texts()
        return self._blobs.put(own.key, files, named, sync=not own.at_hand)

    async def write(self, source: Path, target: Path, base: ServedModel) -> None:
        """Convert the adapter in folder `source` to LoRA in the new folder `target`.

        Uses at most `timeout_s` seconds, and memory and disk space according to the base's size. Raises AdapterRefused
        if PEFT cannot convert it within these limits, Unavailable if the base is missing here.
        """
        model = self._models.get(base.name)
        if model is None:
            text = f"adapters of the base {brief(base.name)} cannot be converted here"
            raise Unavailable(f"{text}; this store has {', '.join(self._models)}")
        try:
            folder = await asyncio.to_thread(model_folder, model, WEIGHT_FILES)
        except (BadRequest, OSError) as error:
            text = error.message if isinstance(error, BadRequest) else str(error.strerror or error)
            raise Unavailable(f"the base cannot be read to convert adapters: {show(text)}") from error
        weights = sum(4 * site.in_features * site.out_features * max(1, site.num_experts) for site in base.sites)
        limits = ("--memory", str(3 * weights + MEMORY_BYTES), "--file", str(self.most_bytes(base)))
        code, said = await self._run(str(folder), str(source), str(target), str(KEEP), *limits)
        if code:
            raise AdapterRefused([f"it cannot be converted to LoRA: {said}"])

    async def _run(self, *words: str) -> tuple[int, str]:
        """Run the process; return its exit code and the last line of its stderr, shortened."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gpu_worker.svd_convert",
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=child_environment(*COMPUTE, *HUB_CACHE) | {"HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                assert process.stderr is not None
                said = await _end_of(process.stderr)
                await process.wait()
        except TimeoutError:
            return -1, f"it takes longer than {self._timeout_s:g} s (convert_timeout_s)"
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        lines = lines_of(said.decode(errors="replace").strip())
        return process.returncode or 0, show(lines[-1]) if lines else f"its process ended with {process.returncode}"


async def _end_of(stream: asyncio.StreamReader) -> bytes:
    """Read a stream to its end; return its last SAID_BYTES bytes."""
    end = b""
    while piece := await stream.read(SAID_BYTES):
        end = (end + piece)[-SAID_BYTES:]
    return end
