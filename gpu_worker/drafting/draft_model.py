"""A draft model: the tokens that it has read of each sequence, and its greedy guesses at the next ones.

It ignores adapters: for each it drafts its own continuation. It reads the same tokens as the base into blocks of its
own; entries of wrong draft tokens are overwritten, as in the base.
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
"""Numbers of tokens in the passes that are measured at the start."""

FAILURE_STEPS = 1024
"""Steps without drafts after a failed pass, so that repeated failures delay requests little."""


@dataclass(slots=True, eq=False)
class ReadText:
    """The state of a sequence in the draft model."""

    seq: Sequence
    acceptance: Acceptance
    start: int  # first token that is read; an adapter's virtual tokens mean nothing to a draft model
    blocks: list[int] = field(default_factory=list[int])
    num_read: int = 0  # tokens of its text with keys and values in the blocks
    guessed: list[int] = field(default_factory=list[int])  # draft tokens whose keys and values follow those
    num_before: int = 0  # output tokens when blocks were last taken from it

    @property
    def text(self) -> np.ndarray:
        """The tokens that the draft model reads: int32 [n]."""
        return self.seq.tokens[self.start :]

    @property
    def num_tokens(self) -> int:
        """The number of tokens in the text."""
        return self.seq.num_tokens - self.start

    @property
    def num_unread(self) -> int:
        """The number of tokens in the text that have not been read."""
        return self.num_tokens - self.num_read

    @property
    def num_steps(self) -> int:
        """The tokens emitted since its text was last entirely unread, or the maximum left, whichever is less."""
        return min(self.seq.num_output - self.num_before, self.seq.max_tokens - self.seq.num_tokens)

    def settle(self) -> None:
        """Count correct guesses as read, but never the last token, which is read to predict the next."""
        if self.guessed:
            came = self.text[self.num_read :][: len(self.guessed)].tolist()
            for guess, token in zip(self.guessed, came, strict=False):
                if guess != token:
                    break
                self.num_read += 1
            self.guessed = []
        self.num_read = min(self.num_read, self.num_tokens - 1)


class DraftModel:
    """Drafts for all sequences of a step together: greedily, as many tokens as pay off."""

    def __init__(
        self, model: BaseModel | BaseHead, num_blocks: int, vocab_size: int, max_pass_tokens: int, payoff: Payoff
    ) -> None:
        """Use a model whose cache has `num_blocks` blocks and a spare one, and measure its passes.

        vocab_size: the base's. max_pass_tokens: maximum tokens of a reading pass.
        """
        self.model = model
        self.blocks = BlockPool(num_blocks)
        self._spent_s = 0.0  # seconds spent drafting since the last `take_seconds`
        self._num_probes = 0  # passes run only for measurement
        self._num_idle = 0  # remaining steps without drafts after a failure
        self._payoff = payoff
        self._max_pass_tokens = max_pass_tokens
        self._vocab_size = min(vocab_size, model.vocab_size)
        self._readings: dict[Sequence, ReadText] = {}  # least recently used first
        self._typical = Acceptance()  # over all sequences; the initial value for new ones
        self._measure()

    def propose(self, limits: Mapping[Sequence, int], plan: StepPlan) -> dict[Sequence, list[int]]:
        """Return draft tokens for sequences whose last token a step computes; none while drafting does not pay off.

        limits: maximum draft tokens of each, at least 1. plan: the step without drafts; it holds decodes only. While
        the draft model is behind with the texts, it reads instead, in passes that take no longer than the step. Never
        raises: a step without drafts is still correct.
        """
        if self._num_idle:
            self._num_idle -= 1
            return {}
        with self._guarded():
            return self._propose(limits, plan)
        return {}

    def watching(self, plan: StepPlan) -> AbstractContextManager[None]:
        """Return a context for a step's forward pass, in which a head of the base stores the hidden states."""
        return nullcontext()

    def take_seconds(self) -> float:
        """Return the seconds spent drafting since the last call."""
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s

    def learn(self, seq: Sequence, num_drafted: int, num_right: int) -> None:
        """Record that the first `num_right` tokens of a draft were right."""
        self._typical.learn(num_drafted, num_right)
        if seq in self._readings:
            self._readings[seq].acceptance.learn(num_drafted, num_right)

    def note_step(self, plan: StepPlan, seconds: float) -> None:
        """Record the time of a step of the base that is small enough for draft tokens."""
        self._payoff.note_step(plan.num_tokens, seconds)

    def forget(self, seq: Sequence) -> None:
        """Free what is stored for a sequence, if anything."""
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
        """Record a step without drafts, and run a measuring pass if one is due."""
        for acceptance in (self._typical, *(own.acceptance for own in readings)):
            acceptance.rest()
        self._probe()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Continue without drafts if the block fails, and add its time."""
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
        """Return the state of a sequence, created if necessary, and mark it as most recently used."""
        own = self._readings.pop(seq, None) or self._new_text(seq)
        self._readings[seq] = own
        own.settle()
        return own

    def _new_text(self, seq: Sequence) -> ReadText:
        return ReadText(seq, Acceptance(self._typical.rate), seq.num_virtual)

    def _make_room(self, readings: Many[ReadText], ends: list[int]) -> bool:
        """Allocate each text's blocks for tokens up to `ends`, taking those of least recently used texts if necessary.

        Return False, allocating none, if even all of those would not suffice.
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
        """Free a text's blocks: it is read again once it has had enough further steps to pay off."""
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
        """Read up to `most` tokens of the texts, in order, never a text's last token."""
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
        """Return the most likely token after each text's part, whose end position is in `ends`; one pass for all."""
        tables = np.zeros((len(readings), max(len(own.blocks) for own in readings)), np.int32)
        for row, own in zip(tables, readings, strict=True):
            row[: len(own.blocks)] = own.blocks
        lens = np.array([len(part) for part in parts])
        return self._forward(np.concatenate(parts, dtype=np.int64), lens, np.array(ends), tables)

    def _forward(self, ids: np.ndarray, lens: np.ndarray, ends: np.ndarray, tables: np.ndarray) -> list[int]:
        """Return the most likely token after each of S texts, and record the pass's time.

        ids: int64 [T], new tokens, text after text. lens, ends: int [S], new tokens, and tokens including them. tables:
        int32 [S, max_blocks]. Virtual tokens and tokens added by adapters are unknown to the draft model, which reads
        token 0 instead.
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
        """Run passes of few and of more tokens, to learn their times."""
        for _ in range(MIN_STEPS):
            self._probe(is_due=True)

    def _probe(self, *, is_due: bool = False) -> None:
        """Run a pass with dummy tokens, if a measurement is due. Its results are discarded."""
        num = MEASURED_TOKENS[self._num_probes % len(MEASURED_TOKENS)]
        if is_due or self._payoff.is_probe_due(num):
            self._num_probes += 1
            ones = np.ones(num, np.int64)
            unused = np.full((num, 1), self.blocks.num_blocks, np.int32)
            self._forward(np.zeros(num, np.int64), ones, ones, unused)
