"""Packed adapters in host memory, from which the pool copies them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator

from gpu_worker.adapters.packing.packer import HostAdapter


class HostTier:
    """Packed adapters by digest, least recently used first, within a budget of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._adapters: OrderedDict[str, HostAdapter] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def get(self, digest: str) -> HostAdapter | None:
        """Return an adapter and mark it as most recently used; None if it is not here."""
        adapter = self._adapters.get(digest)
        if adapter is not None:
            self._adapters.move_to_end(digest)
        return adapter

    def put(self, adapter: HostAdapter, keep: Container[str]) -> dict[str, int]:
        """Add an adapter and drop the least recently used ones until the budget holds.

        The new one and those in `keep` are never dropped, even if the budget is exceeded. Return the bytes of each
        dropped adapter by digest.
        """
        self.drop(adapter.digest)
        self._adapters[adapter.digest] = adapter
        self.num_bytes += adapter.num_bytes
        dropped: dict[str, int] = {}
        for digest in list(self._adapters):
            if self.num_bytes <= self.max_bytes:
                break
            if digest != adapter.digest and digest not in keep:
                dropped[digest] = self.drop(digest)
        return dropped

    def drop(self, digest: str) -> int:
        """Remove an adapter, if it is here. Return the bytes freed."""
        adapter = self._adapters.pop(digest, None)
        if adapter is None:
            return 0
        self.num_bytes -= adapter.num_bytes
        return adapter.num_bytes
