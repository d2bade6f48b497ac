"""KV blocks: reference counts, the prefix cache, and the free list that is also its LRU. Pure."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

import numpy as np


def chain_seed(fingerprint: str, digest: str, lora_scale: float, salt: str) -> bytes:
    """Return the parent of a sequence's first block: all that its keys and values depend on besides its tokens."""
    scale = repr(lora_scale) if digest else ""
    return hashlib.sha256("\0".join((fingerprint, digest, scale, salt)).encode()).digest()


def chain_hash(parent: bytes, tokens: np.ndarray) -> bytes:
    """Return the hash of a full block of int32 `tokens` that follows `parent`. sha256, so a hit needs no check."""
    return hashlib.sha256(parent + tokens.tobytes()).digest()


class BlockPool:
    """Blocks 0 … num_blocks - 1. A freed block keeps its content and can be hit until it is handed out again."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently used first
        self._hash: list[bytes | None] = [None] * num_blocks
        self._owner = [""] * num_blocks  # of a hashed block, see `publish`
        self._block: dict[bytes, int] = {}
        self._owned: dict[str, set[int]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks that hold the longest cached beginning of a hash chain. Changes nothing."""
        found: list[int] = []
        for hash_ in hashes:
            block = self._block.get(hash_)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Iterable[int]) -> int:
        """Return how many of `blocks` are on the free list: taking them makes that many fewer free."""
        return sum(self._refs[block] == 0 for block in blocks)

    def take(self, blocks: Iterable[int]) -> None:
        """Add a reference to cached blocks."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def allocate(self, num: int) -> list[int]:
        """Hand out `num` blocks, forgetting what the least recently used held. The caller has checked `num_free`."""
        if num > len(self._free):
            raise ValueError(f"{num} blocks asked for, {len(self._free)} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(num)]
        for block in blocks:
            self._forget(block)
            self._refs[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each of a sequence's blocks; the end of a chain is reused before its beginning."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if self._hash[block] is None:
                    self._free.move_to_end(block, last=False)

    def freeing(self, kept: Iterable[int]) -> Callable[[Sequence[int]], int]:
        """Return a function that tells for one table after the other how many more blocks would be free without it.

        Not counted are those that are `kept`. Changes nothing.
        """
        stay, dropped = set(kept), Counter[int]()

        def free(table: Sequence[int]) -> int:
            dropped.update(table)
            return sum(dropped[block] == self._refs[block] and block not in stay for block in table)

        return free

    def publish(self, block: int, hash_: bytes, owner: str) -> None:
        """Let a full, computed block be found by its hash. `owner` is the adapter it was computed with.

        Of two blocks with equal content the first stays the one that is found.
        """
        if hash_ in self._block or self._hash[block] is not None:
            return
        self._block[hash_] = block
        self._hash[block] = hash_
        self._owner[block] = owner
        self._owned.setdefault(owner, set()).add(block)

    def demote(self, owner: str) -> None:
        """Make an owner's idle blocks the next to be reused: its adapter has left, so hits have become unlikely."""
        for block in self._owned.get(owner, ()):
            if block in self._free:
                self._free.move_to_end(block, last=False)

    def _forget(self, block: int) -> None:
        hash_ = self._hash[block]
        if hash_ is None:
            return
        del self._block[hash_]
        self._hash[block] = None
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
