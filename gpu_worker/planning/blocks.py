"""KV blocks: reference counts, the prefix cache, and the free list, which is the cache's LRU order. Pure.

A block is found by the hash of its tokens and of all tokens before them, as in vLLM (Kwon et al., 2023).
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np


def chain_seed(fingerprint: str, digest: str, lora_scale: float, salt: str) -> bytes:
    """Return the parent hash of a sequence's first block: of all inputs of its keys and values besides the tokens.

    fingerprint: the base model's. digest: the adapter's, "" for none. salt: separates the caches of tenants.
    """
    scale = repr(lora_scale) if digest else ""
    return hashlib.sha256("\0".join((fingerprint, digest, scale, salt)).encode()).digest()


def chain_hash(parent: bytes, tokens: np.ndarray) -> bytes:
    """Return the hash of a full block of int32 `tokens` after `parent`. SHA-256, so that a hit needs no comparison."""
    return hashlib.sha256(parent + tokens.tobytes()).digest()


class BlockPool:
    """Blocks 0 … num_blocks - 1. A free block keeps its content, and can be found, until it is reallocated."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently used first
        self._hash: list[bytes | None] = [None] * num_blocks
        self._owner = [""] * num_blocks  # owner of each published block, see `publish`
        self._block: dict[bytes, int] = {}  # hash -> published block
        self._owned: dict[str, set[int]] = {}  # owner -> its published blocks
        self.num_ever_used = 0  # these are the first blocks: unused ones are allocated in ascending order
        self.on_forget: Callable[[bytes], object] = lambda _: None  # called with the hash of each evicted block

    @property
    def num_free(self) -> int:
        """Blocks without a reference."""
        return len(self._free)

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest cached prefix of a chain of hashes. Changes nothing."""
        found: list[int] = []
        for hash_ in hashes:
            block = self._block.get(hash_)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Iterable[int]) -> int:
        """Return how many of `blocks` are free now and would not be after `take`."""
        return sum(self._refs[block] == 0 for block in blocks)

    def take(self, blocks: Iterable[int]) -> None:
        """Add a reference to cached blocks."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def allocate(self, num: int) -> list[int]:
        """Return the `num` least recently used free blocks, each with one reference; their cached content is dropped.

        Sorted in ascending order: attention reads a table's blocks in sequence, and cores prefetch upward. Descending
        order, in which `release` leaves a chain, is half as fast. Raises ValueError if too few blocks are free.
        """
        if num > len(self._free):
            raise ValueError(f"{num} blocks asked for, {len(self._free)} are free")
        blocks = sorted(self._free.popitem(last=False)[0] for _ in range(num))
        for block in blocks:
            self._forget(block)
            self._refs[block] = 1
        if blocks:
            self.num_ever_used = max(self.num_ever_used, blocks[-1] + 1)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each of a sequence's blocks. The end of a chain is reused before its beginning."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if self._hash[block] is None:
                    self._free.move_to_end(block, last=False)

    def num_freed(self, table: Sequence[int], dropped: Counter[int], kept: Collection[int]) -> int:
        """Return how many more blocks would be free if a block table's references were dropped. Frees nothing.

        dropped: block -> references already assumed dropped; those of `table` are added. kept: blocks about to be
        taken, which do not count.
        """
        dropped.update(table)
        return sum(dropped[block] == self._refs[block] and block not in kept for block in table)

    def publish(self, block: int, hash_: bytes, owner: str) -> None:
        """Make a full, computed block findable by its hash. owner: digest of the adapter that computed it.

        If a block with the same hash is published already, that one remains in use.
        """
        if hash_ in self._block or self._hash[block] is not None:
            return
        self._block[hash_] = block
        self._hash[block] = hash_
        self._owner[block] = owner
        self._owned.setdefault(owner, set()).add(block)

    def demote(self, owner: str) -> None:
        """Make an owner's free blocks the next to be reused: its adapter was evicted, so that hits are unlikely."""
        for block in self._owned.get(owner, ()):
            if block in self._free:
                self._free.move_to_end(block, last=False)

    def _forget(self, block: int) -> None:
        hash_ = self._hash[block]
        if hash_ is None:
            return
        del self._block[hash_]
        self._hash[block] = None
        self.on_forget(hash_)
        owned = self._owned[self._owner[block]]
        owned.discard(block)
        if not owned:
            del self._owned[self._owner[block]]

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless reference counts, free list and cache agree with the block tables in use."""
        used = Counter(block for table in tables for block in table)
        for block in range(self.num_blocks):
            if self._refs[block] != used[block]:
                raise AssertionError(f"block {block} has {self._refs[block]} references, {used[block]} tables hold it")
            if (block in self._free) != (used[block] == 0):
                raise AssertionError(f"block {block} is held by {used[block]} tables and free: {block in self._free}")
            if used[block] > 1 and self._hash[block] is None:
                raise AssertionError(f"block {block} is in {used[block]} tables but not in the prefix cache")
        hashed = {block for block in range(self.num_blocks) if self._hash[block] is not None}
        if hashed != set(self._block.values()) or hashed != {b for blocks in self._owned.values() for b in blocks}:
            raise AssertionError("the prefix cache and the blocks disagree")
