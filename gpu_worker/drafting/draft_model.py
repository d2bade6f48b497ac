"""A draft model: what it has read of each sequence, and its greedy guesses at how these go on.

It knows no adapters: it drafts for each of them what it would say itself. It reads the same tokens as the base, into
blocks of its own, and what it wrote there of draft tokens that were wrong is written over, as the base does it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from gpu_worker.drafting.head import BaseHead
from gpu_worker.drafting.payoff import Acceptance, Draftable, Payoff
from gpu_worker.engine.step_model import MIN_STEPS
from gpu_worker.memory import send
from gpu_worker.model.model import BaseModel
from gpu_worker.planning.blocks import BlockPool
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.step_plan import StepPlan
from lora_kernels import ops

logger = logging.getLogger(__name__)

MEASURED_TOKENS = (1, 2, 8, 16)
"""Tokens of the passes that are measured at the start."""

FAILURE_STEPS = 1024
"""Steps without drafts after a pass has failed: whatever made it fail, nobody waits long for what fails again."""


@dataclass(slots=True, eq=False)
class ReadText:
    """What the draft model has read of a sequence."""

    seq: Sequence
    acceptance: Acceptance
    start: int  # its first token that is read; an adapter's virtual ones mean nothing to a draft model
    blocks: list[int] = field(default_factory=list[int])
    num_read: int = 0  # tokens of its text whose keys and values are in the blocks
    guessed: list[int] = field(default_factory=list[int])  # draft tokens whose keys and values follow these
    num_before: int = 0  # tokens of output when blocks were last taken from it

    @property
    def text(self) -> np.ndarray:
        """The tokens that the draft model reads: int32 [n]."""
        return self.seq.tokens[self.start :]

    @property
    def num_tokens(self) -> int:
        """Tokens of the text."""
        return self.seq.num_tokens - self.start

    @property
    def num_unread(self) -> int:
        """Tokens of the text that are not read."""
        return self.num_tokens - self.num_read

    @property
    def num_steps(self) -> int:
        """Tokens that it has put out since nothing of it was read, or that it may yet if these are fewer."""
        return min(self.seq.num_output - self.num_before, self.seq.max_tokens - self.seq.num_tokens)

    def settle(self) -> None:
        """Count as read what was guessed and has come true; never the last token, which is read for the next one."""
        if self.guessed:
            came = self.text[self.num_read :][: len(self.guessed)].tolist()
            for guess, token in zip(self.guessed, came, strict=False):
                if guess != token:
                    break
                self.num_read += 1
            self.guessed = []
        self.num_read = min(self.num_read, self.num_tokens - 1)


class DraftModel:
    """Drafts for the sequences of a step together: greedily, as many tokens as pay for each of them."""

    def __init__(
        self, model: BaseModel | BaseHead, num_blocks: int, vocab_size: int, max_pass_tokens: int, payoff: Payoff
    ) -> None:
        """Take a model whose cache has so many blocks, and another one, and measure its passes.

        vocab_size: the base's. max_pass_tokens: those of a pass that reads.
        """
        self.model = model
        self.blocks = BlockPool(num_blocks)
        self._spent_s = 0.0  # seconds that drafting took since they were last taken
        self._num_probes = 0  # passes that were only measured
        self._num_idle = 0  # steps without drafts that are still to come, after a failure
        self._payoff = payoff
        self._max_pass_tokens = max_pass_tokens
        self._vocab_size = min(vocab_size, model.vocab_size)
        self._readings: dict[Sequence, ReadText] = {}  # those that were drafted for longest ago come first
        self._typical = Acceptance()  # of all sequences, with which new ones begin
        self._measure()

    def propose(self, limits: Mapping[Sequence, int], plan: StepPlan) -> dict[Sequence, list[int]]:
        """Return draft tokens for sequences of a step whose last token it computes; none while they do not pay.

        limits: the most that each can use, at least 1. plan: the step without them, which takes nothing but decodes.
        While it is behind with the texts it reads on instead, in passes that take no longer than the step. Raises
        nothing: without drafts the step is right, too.
        """
        if self._num_idle:
            self._num_idle -= 1
            return {}
        with self._guarded():
            return self._propose(limits, plan)
        return {}

    def watching(self, plan: StepPlan) -> AbstractContextManager[None]:
        """Return a context for the pass of a step, whose hidden states a head of the base keeps."""
        return nullcontext()

    def take_seconds(self) -> float:
        """Return how long drafting took since the last call."""
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s

    def learn(self, seq: Sequence, num_drafted: int, num_right: int) -> None:
        """Learn from a draft whose first `num_right` tokens were right."""
        self._typical.learn(num_drafted, num_right)
        if seq in self._readings:
            self._readings[seq].acceptance.learn(num_drafted, num_right)

    def note_step(self, plan: StepPlan, seconds: float) -> None:
        """Learn from a step of the base that is short enough for draft tokens."""
        self._payoff.note_step(plan.num_tokens, seconds)

    def forget(self, seq: Sequence) -> None:
        """Free what is kept of a sequence, if anything is."""
        own = self._readings.pop(seq, None)
        if own is not None:
            self.blocks.release(own.blocks)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is accounted for."""
        self.blocks.check_integrity(own.blocks for own in self._readings.values())

    def _propose(self, limits: Mapping[Sequence, int], plan: StepPlan) -> dict[Sequence, list[int]]:
        readings = [self._open(seq) for seq in limits]
        candidates = [
            Draftable(own.acceptance.rate, limits[own.seq], own.num_unread, own.num_steps) for own in readings
        ]
        most = max(limits.values())
        if self.model.max_positions:
            most = min(most, max(0, self.model.max_positions - max(own.num_tokens for own in readings)))
        choice = self._payoff.choose(candidates, most, plan.num_tokens)
        ends = [own.num_tokens + choice.num_drafts for own in readings]
        if not choice.num_drafts or not self._make_room(readings, ends):
            self._rest(readings)
            return {}
        num_read = min(choice.num_read, self._max_pass_tokens)
        if sum(own.num_unread for own in readings) > num_read:
            self._read(readings, num_read)
            return {}
        drafts = self._draft(readings, choice.num_drafts)
        return {own.seq: draft[: limits[own.seq]] for own, draft in zip(readings, drafts, strict=True)}

    def _rest(self, readings: Many[ReadText]) -> None:
        """Note a step without drafts, and measure a pass if that is due."""
        for acceptance in (self._typical, *(own.acceptance for own in readings)):
            acceptance.rest()
        self._probe()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Go on without drafts where the inside fails, and note how long it took."""
        started_s = time.perf_counter()
        try:
            yield
        except BaseException as error:  # the draft model's edge, also for panics of libraries in Rust
            logger.warning("the draft model failed; no drafts in the next %d steps", FAILURE_STEPS, exc_info=error)
            for own in self._readings.values():
                self._take_blocks(own)
            self._num_idle = FAILURE_STEPS
        finally:
            self._spent_s += time.perf_counter() - started_s

    # ------------------------------------------------------------ what is kept

    def _open(self, seq: Sequence) -> ReadText:
        """Return what is kept of a sequence, as the one that was drafted for last."""
        own = self._readings.pop(seq, None) or self._new_text(seq)
        self._readings[seq] = own
        own.settle()
        return own

    def _new_text(self, seq: Sequence) -> ReadText:
        return ReadText(seq, Acceptance(self._typical.rate), seq.num_virtual)

    def _make_room(self, readings: Many[ReadText], ends: list[int]) -> bool:
        """Give each text the blocks for so many tokens, if need be those of texts drafted for longest ago.

        Returns False, and gives none, where even all of them would not be enough.
        """
        missing = [-(-end // ops.BLOCK_TOKENS) - len(own.blocks) for own, end in zip(readings, ends, strict=True)]
        num_missing = sum(max(0, num) for num in missing)
        if num_missing > self.blocks.num_blocks - sum(len(own.blocks) for own in readings):
            return False
        for seq in [seq for seq, own in self._readings.items() if own not in readings]:
            if num_missing <= self.blocks.num_free:
                break
            self._take_blocks(self._readings[seq])
        for own, num in zip(readings, missing, strict=True):
            if num > 0:
                own.blocks += self.blocks.allocate(num)
        return True

    def _take_blocks(self, own: ReadText) -> None:
        """Free a text's blocks: it is to be read again, once it has had as many steps again as that needs."""
        self.blocks.release(own.blocks)
        own.blocks, own.num_read, own.guessed = [], 0, []
        own.num_before = own.seq.num_output

    # ------------------------------------------------------------ passes

    def _draft(self, readings: list[ReadText], num: int) -> list[list[int]]:
        """Read the rest of each text, and return `num` draft tokens for each."""
        ends = [own.num_tokens for own in readings]
        tokens = self._pass(readings, [own.text[own.num_read :] for own in readings], ends)
        drafts = [[token] for token in tokens]
        for own, end in zip(readings, ends, strict=True):
            own.num_read = end
        for i in range(1, num):
            tokens = self._pass(readings, [np.array([token]) for token in tokens], [end + i for end in ends])
            for draft, token in zip(drafts, tokens, strict=True):
                draft.append(token)
        for own, draft in zip(readings, drafts, strict=True):
            own.guessed = draft[:-1]  # the last one was not read
        return drafts

    def _read(self, readings: list[ReadText], most: int) -> None:
        """Read up to `most` tokens of the texts, in their order, and of none the last one."""
        parts: list[tuple[ReadText, np.ndarray]] = []
        for own in readings:
            part = own.text[own.num_read : -1][:most]
            if len(part):
                parts.append((own, part))
                most -= len(part)
        self._pass([own for own, _ in parts], [part for _, part in parts], [own.num_read + len(p) for own, p in parts])
        for own, part in parts:
            own.num_read += len(part)

    def _pass(self, readings: list[ReadText], parts: list[np.ndarray], ends: list[int]) -> list[int]:
        """Return the likeliest token after each text's part, int [n], that ends at a position; one pass for all."""
        tables = np.zeros((len(readings), max(len(own.blocks) for own in readings)), np.int32)
        for row, own in zip(tables, readings, strict=True):
            row[: len(own.blocks)] = own.blocks
        lens = np.array([len(part) for part in parts])
        return self._forward(np.concatenate(parts, dtype=np.int64), lens, np.array(ends), tables)

    def _forward(self, ids: np.ndarray, lens: np.ndarray, ends: np.ndarray, tables: np.ndarray) -> list[int]:
        """Return the likeliest token after the last one of each of S texts, and note how long that took.

        ids: int64 [T], new tokens, text after text. lens, ends: int [S], new tokens, and tokens with them. tables:
        int32 [S, max_blocks]. Tokens that an adapter has added, and virtual ones, are unknown here: token 0 is
        read in their place.
        """
        started_s = time.perf_counter()
        model, device = self.model, self.model.device
        ids[(ids < 0) | (ids >= model.vocab_size)] = 0
        model.context.attention = ops.build_attention_batch(lens, ends, tables, device)
        rows = None if len(ids) == len(lens) else send(np.cumsum(lens) - 1, device)
        with torch.inference_mode():
            logits = model.forward(send(ids, device), model.context.attention.positions, rows)
            tokens: list[int] = logits[:, : self._vocab_size].argmax(-1).tolist()
        self._payoff.note_pass(len(ids), time.perf_counter() - started_s)
        return tokens

    def _measure(self) -> None:
        """Run passes of few and of more tokens, so that it is known what they take."""
        for _ in range(MIN_STEPS):
            self._probe(is_due=True)

    def _probe(self, *, is_due: bool = False) -> None:
        """Run a pass of nothing but unread tokens, if one is due to be measured. Nothing of it is kept."""
        num = MEASURED_TOKENS[self._num_probes % len(MEASURED_TOKENS)]
        if is_due or self._payoff.is_probe_due(num):
            self._num_probes += 1
            ones = np.ones(num, np.int64)
            unused = np.full((num, 1), self.blocks.num_blocks, np.int32)
            self._forward(np.zeros(num, np.int64), ones, ones, unused)
