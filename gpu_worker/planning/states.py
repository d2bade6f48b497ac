"""Slots for the states of layers that keep a state in place of keys and values. Pure.

A running sequence has a slot of its own. The other slots hold saved states of texts, for the prefix cache. Each is
keyed by the hash of the block that it follows, and is valid at that position only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from gpu_worker.planning.sequence import Sequence
from protocol.runtime.settings import BLOCK_TOKENS

PROMPT_TOKENS = 256
"""Prompt states are saved at multiples of this, and at the last full block, for prompts with a common prefix."""

OUTPUT_TOKENS = 64
"""The newest output state at a multiple of this is saved, for the next turn of a conversation."""


def worth_saving(num_prompt: int, first: int, end: int, *, with_output: bool = True) -> list[int]:
    """Return the positions after `first`, up to `end`, at which a sequence's states are worth saving.

    num_prompt: tokens of its prompt. with_output: whether output states count. A text's last token is never taken from
    the prefix cache, because its logits are needed. So the last useful block of a prompt is full before that token.
    """
    last = (num_prompt - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    positions = {*range(PROMPT_TOKENS, last, PROMPT_TOKENS), last}
    output = end // OUTPUT_TOKENS * OUTPUT_TOKENS
    if with_output and output > num_prompt:
        positions.add(output)
    return sorted(position for position in positions if first < position <= end)


class StatePool:
    """Slots 0 … num_slots - 1. Saved states are evicted in LRU order when a slot is needed."""

    def __init__(self, num_slots: int, *, saves_outputs: bool = True) -> None:
        """saves_outputs: whether the state after an output equals that of a prompt with the same tokens."""
        self.num_slots = num_slots
        self.saves_outputs = saves_outputs
        self.zero = num_slots  # one more slot, with the state in which every text begins
        self._free = list(range(num_slots))
        self._saved: OrderedDict[bytes, int] = OrderedDict()  # hash -> slot, least recently used first
        self._reading: dict[Sequence, int] = {}  # sequence -> saved state that its next step reads: not evicted before

    def allocate(self) -> int | None:
        """Return a slot, evicting the least recently used saved state if necessary; None if none can be evicted."""
        if self._free:
            return self._free.pop()
        for hash_, slot in self._saved.items():
            if slot not in self._reading.values():
                del self._saved[hash_]
                return slot
        return None

    def release(self, slots: Iterable[int]) -> None:
        """Free slots."""
        self._free.extend(slots)

    def longest(self, hashes: list[bytes]) -> tuple[int, int]:
        """Return how many of a text's first blocks a saved state covers, and its slot; 0 and the zero slot if none."""
        for num in range(len(hashes), 0, -1):
            slot = self._saved.get(hashes[num - 1])
            if slot is not None:
                return num, slot
        return 0, self.zero

    def save(self, hash_: bytes, slot: int) -> None:
        """Make a state findable by the hash of the block it follows; free its slot if that hash is saved already."""
        if hash_ in self._saved:
            self._saved.move_to_end(hash_)
            self._free.append(slot)
        else:
            self._saved[hash_] = slot

    def forget(self, hash_: bytes) -> None:
        """Free the slot of a saved state, if it exists and no step is about to read it."""
        slot = self._saved.get(hash_)
        if slot is not None and slot not in self._reading.values():
            del self._saved[hash_]
            self._free.append(slot)

    def take(self, seq: Sequence, num_cached: int) -> bool:
        """Give a waiting sequence slots for its states. Return False, giving none, if too few are available.

        num_cached: blocks found for its beginning; a saved state follows the last of them. A sequence with a grammar or
        draft tokens has two slots, one read and one written by each step, because a step is repeated if its mask is
        late or its draft tokens were wrong.
        """
        seq.state_read = self.longest(seq.hashes[:num_cached])[1]
        if num_cached:
            self._saved.move_to_end(seq.hashes[num_cached - 1])
            self._reading[seq] = seq.state_read
        for _ in range(1 if seq.matcher is None and seq.drafter is None else 2):
            slot = self.allocate()
            if slot is None:
                self.free(seq)
                return False
            seq.state_slots.append(slot)
        return True

    def free(self, seq: Sequence) -> None:
        """Free a sequence's slots."""
        self._reading.pop(seq, None)
        self.release(seq.state_slots)
        seq.state_slots = []

    def plan_saves(self, seq: Sequence, num_new: int) -> dict[int, int]:
        """Return the positions in a sequence's next tokens after which its states are saved, with a slot for each."""
        first, end = seq.num_computed, seq.num_computed + num_new
        saves = dict[int, int]()
        for position in worth_saving(seq.num_prompt, first, end, with_output=self.saves_outputs):
            slot = self.allocate()
            if slot is not None:
                saves[position] = slot
        return saves

    def complete(self, seq: Sequence, num_new: int, saves: Mapping[int, int]) -> None:
        """Record that a sequence's next tokens are computed, and make saved states findable.

        num_new: 0 if the tokens were undone, because the next mask is late or drafts were wrong.
        """
        if num_new > 0:
            self._reading.pop(seq, None)
            seq.state_slots.reverse()
            seq.state_read = seq.state_slots[-1]
        for position, slot in saves.items():
            if position > seq.num_computed:
                self.release([slot])
                continue
            hash_ = seq.hashes[position // BLOCK_TOKENS - 1]
            self.save(hash_, slot)
            if position > seq.num_prompt:
                self.forget(seq.state_saved)
                seq.state_saved = hash_

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raise AssertionError unless every slot is held by one sequence, saved or free."""
        slots = sorted([*held, *self._saved.values(), *self._free])
        if slots != list(range(self.num_slots)):
            raise AssertionError(f"state slots are lost or held twice: {slots} of {self.num_slots}")
