"""KV blocks: none is lost, handed out twice, or found under the hash of other content."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from helpers import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from gpu_worker.planning.blocks import BlockPool, chain_hash, chain_seed
from lora_kernels import ops
from protocol.runtime.settings import BLOCK_TOKENS

NUM_BLOCKS = 8


class BlockMachine(RuleBasedStateMachine):
    """Random operations on a small pool, compared with a plain model of each block's content."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.held: dict[int, list[int]] = {}  # table id -> blocks
        self.content: dict[int, bytes] = {}  # block -> hash under which it was published, until it is reused
        self.ever_used: set[int] = set()
        self.next_id = 0

    def _keep(self, blocks: list[int]) -> int:
        self.next_id += 1
        self.held[self.next_id] = blocks
        return self.next_id

    @rule(target=tables, num=st.integers(1, NUM_BLOCKS))
    def allocate(self, num: int) -> int:
        if num > self.pool.num_free:
            with pytest.raises(ValueError, match="blocks asked for"):
                self.pool.allocate(num)
            return self._keep([])
        blocks = self.pool.allocate(num)
        in_use = {block for table in self.held.values() for block in table}
        assert len(set(blocks)) == num
        assert not in_use & set(blocks)
        for block in blocks:
            self.content.pop(block, None)
        self.ever_used |= set(blocks)
        return self._keep(blocks)

    @rule(table=tables, chain=st.integers(0, 3), owner=st.sampled_from(["a", "b"]))
    def publish(self, table: int, chain: int, owner: str) -> None:
        for i, block in enumerate(self.held.get(table, [])):
            hash_ = f"{chain}:{i}".encode()
            if hash_ not in self.content.values():
                self.content.setdefault(block, hash_)
            self.pool.publish(block, hash_, owner)

    @rule(target=tables, chain=st.integers(0, 3), length=st.integers(1, NUM_BLOCKS))
    def hit(self, chain: int, length: int) -> int:
        hashes = [f"{chain}:{i}".encode() for i in range(length)]
        found = self.pool.lookup(hashes)
        assert [self.content[block] for block in found] == hashes[: len(found)]
        if len(found) < length:
            assert hashes[len(found)] not in self.content.values()
        free = self.pool.num_free
        idle = self.pool.num_idle(found)
        self.pool.take(found)
        assert self.pool.num_free == free - idle
        return self._keep(found)

    @rule(table=consumes(tables))
    def release(self, table: int) -> None:
        self.pool.release(self.held.pop(table, []))

    @rule(owner=st.sampled_from(["a", "b", "c"]))
    def demote(self, owner: str) -> None:
        self.pool.demote(owner)

    @invariant()
    def consistent(self) -> None:
        self.pool.check_integrity(self.held.values())

    @invariant()
    def blocks_ever_used_are_the_first(self) -> None:
        assert self.ever_used == set(range(self.pool.num_ever_used))

    @invariant()
    def free_and_used_blocks_are_all(self) -> None:
        used = {block for table in self.held.values() for block in table}
        assert self.pool.num_free + len(used) == NUM_BLOCKS

    @invariant()
    def only_cached_blocks_are_in_two_tables(self) -> None:
        tables = Counter(block for table in self.held.values() for block in table)
        assert all(block in self.content for block, num_tables in tables.items() if num_tables > 1)

    @rule(kept=st.sets(st.integers(0, NUM_BLOCKS - 1)), data=st.data())
    def predict_release(self, kept: set[int], data: st.DataObject) -> None:
        """Check that `num_freed`, over tables freed in sequence, counts the blocks that no other table holds."""
        ids = data.draw(st.lists(st.sampled_from(sorted(self.held)), unique=True)) if self.held else []
        dropped = Counter[int]()
        num_freed = sum(self.pool.num_freed(self.held[table], dropped, kept) for table in ids)
        gone = {block for table in ids for block in self.held[table]} - kept
        stay = {block for table, blocks in self.held.items() if table not in ids for block in blocks}
        assert num_freed == len(gone - stay)


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=examples.of(60), stateful_step_count=40, deadline=None)


def publish_chain(pool: BlockPool, blocks: list[int], name: str, owner: str = "") -> list[bytes]:
    hashes = [f"{name}{i}".encode() for i in range(len(blocks))]
    for block, hash_ in zip(blocks, hashes, strict=True):
        pool.publish(block, hash_, owner)
    return hashes


def test_the_end_of_a_chain_is_reused_before_its_beginning() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    hashes = publish_chain(pool, blocks, "x")
    pool.release(blocks)
    pool.allocate(1)
    assert pool.lookup(hashes) == blocks[:3]


def test_blocks_of_one_allocation_ascend() -> None:
    pool = BlockPool(6)
    blocks = pool.allocate(6)
    publish_chain(pool, blocks, "x")
    pool.release(blocks)
    assert pool.allocate(4) == [2, 3, 4, 5]


def test_blocks_without_content_are_reused_first() -> None:
    pool = BlockPool(4)
    cached = pool.allocate(2)
    hashes = publish_chain(pool, cached, "x")
    plain = pool.allocate(2)
    pool.release(cached)
    pool.release(plain)
    assert set(pool.allocate(2)) == set(plain)
    assert pool.lookup(hashes) == cached


def test_an_owner_that_left_loses_its_blocks_first() -> None:
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    old_hashes = publish_chain(pool, old, "old", owner="old")
    new_hashes = publish_chain(pool, new, "new", owner="new")
    pool.release(old)
    pool.release(new)
    pool.demote("new")
    pool.allocate(2)
    assert pool.lookup(old_hashes) == old
    assert pool.lookup(new_hashes) == []


@pytest.mark.parametrize(
    "other",
    [("other", "d", 1.0, "s"), ("base", "e", 1.0, "s"), ("base", "d", 2.0, "s"), ("base", "d", 1.0, "t")],
    ids=["model", "adapter", "scale", "tenant"],
)
def test_whatever_changes_keys_and_values_changes_the_hash(other: tuple[str, str, float, str]) -> None:
    tokens = np.arange(16, dtype=np.int32)
    seed = chain_seed("base", "d", 1.0, "s")
    assert chain_hash(seed, tokens) == chain_hash(seed, tokens.copy())
    assert chain_hash(seed, tokens) != chain_hash(chain_seed(*other), tokens)
    assert chain_hash(seed, tokens) != chain_hash(seed, tokens + 1)


def test_the_scale_of_no_adapter_does_not_matter() -> None:
    assert chain_seed("base", "", 1.0, "s") == chain_seed("base", "", 2.0, "s")


def test_a_leak_is_found() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="references"):
        pool.check_integrity([blocks[:1]])
    with pytest.raises(AssertionError, match="references"):
        pool.check_integrity([blocks, blocks[:1]])


def test_all_parts_mean_blocks_of_the_same_size() -> None:
    """The kernels import none of our modules, so they define the number a second time."""
    assert ops.BLOCK_TOKENS == BLOCK_TOKENS
