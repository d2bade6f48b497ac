"""Whether draft tokens of a draft model pay, and how many of them: decided by measured times. Pure.

Of a draft, a step keeps what comes before the first wrong token, and adds the token that it chose itself. Where a share
`r` of draft tokens is right, a draft of `k` tokens therefore brings 1 + r + r² + … + rᵏ tokens, for the time of `k`
passes of the draft model and a step with `k` tokens more (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpu_worker.engine.step_model import MIN_STEPS, StepMeter, StepWork

HOPE = 0.8
"""Share of right draft tokens that is assumed while nothing is known."""

PRIOR_TOKENS = 8.0
"""Draft tokens for which that assumption counts."""

REMEMBERING = 0.94
"""Weight that a draft token keeps per later one: about the last 16 count."""

FORGETTING = 1 / 1024
"""Part of the way back to `HOPE` in a step without a draft, so that what did not pay is tried again: a token in about
thirty steps, where all are wrong."""

MIN_GAIN = 1.25
"""Times as many tokens a second as without that are expected of draft tokens at least. Estimates are not exact: where
1.1 times was enough, steps of four sequences came out as fast as without, and of eight slower by 7 % (measured)."""

VARIED = 2 * MIN_STEPS
"""Steps that must have had more tokens than the shortest one. What more tokens take is not known before, and counted as
nothing, so that steps with draft tokens show it."""

MIN_CHUNK = 16
"""Tokens that the draft model may read at once, however short a step of the base is."""

MAX_GROWTH = 2
"""Times as many tokens as in any pass before that it may read at once: what many take is not to be told from few."""

PROBE_PART = 128
"""One part in so many of the time is for passes that are only measured, where nothing is drafted. Without them passes
that were slow by chance, beside other processes, would count as slow for ever."""


class Acceptance:
    """The share of draft tokens that prove right, as a running average."""

    __slots__ = ("_right", "_tried")

    def __init__(self, rate: float = HOPE) -> None:
        """rate: share that is assumed at first."""
        self._right, self._tried = rate * PRIOR_TOKENS, PRIOR_TOKENS

    @property
    def rate(self) -> float:
        """The share."""
        return self._right / self._tried

    def learn(self, num_drafted: int, num_right: int) -> None:
        """Learn from a draft whose first `num_right` tokens were right. Nothing is known of those after a wrong one."""
        num_tried = min(num_drafted, num_right + 1)
        kept = REMEMBERING**num_tried
        self._right, self._tried = kept * self._right + num_right, kept * self._tried + num_tried

    def rest(self) -> None:
        """Note a step without a draft."""
        self._right += FORGETTING * (HOPE * self._tried - self._right)


def length_that_pays(
    guesses: Sequence[tuple[float, int]], most: int, seconds: Callable[[int], float], *, repeats: bool = False
) -> tuple[int, float]:
    """Return how many draft tokens each sequence of a step should get, and how many times as fast that makes it.

    Counted is the sequence that gains least, since all of them wait for the drafts. (0, 1) where it gains too little.

    guesses: of each sequence, the share of its draft tokens that prove right, and the most that it can use. most: draft
    tokens of a sequence. seconds: from a number of draft tokens of each to the time of drafting and of the step.
    repeats: whether behind a wrong one comes a step more, as long as that, which brings one token.
    """
    best, alone_s = (0, 1.0), seconds(0)
    expected, powers = [1.0] * len(guesses), [1.0] * len(guesses)  # tokens of each, and what one more would bring
    for num in range(1, most + 1):
        for i, (rate, limit) in enumerate(guesses):
            if num <= limit:
                powers[i] *= rate
                expected[i] += powers[i]
        misses = [1 - power if repeats else 0.0 for power in powers]
        tokens = min((own + miss) / (1 + miss) for own, miss in zip(expected, misses, strict=True))
        gain = tokens * alone_s / seconds(num)
        if gain >= MIN_GAIN and gain > best[1]:
            best = num, gain
    return best


@dataclass(frozen=True, slots=True)
class Draftable:
    """A sequence that may get draft tokens."""

    rate: float  # share of its draft tokens that prove right
    limit: int  # draft tokens that it can use
    num_unread: int  # tokens of its text that the draft model has not read, at least the last one
    num_steps: int  # steps that it has had, or as many as are left if these are fewer


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """What the draft model does in a step."""

    num_drafts: int = 0  # draft tokens of each sequence; 0: nothing is done
    num_read: int = 0  # tokens that it reads at once at most; with more before it, it reads, and does not draft yet


class Payoff:
    """What passes of the draft model and short steps of the base take by their tokens, and what follows from that.

    How long the texts are is left out: lately measured times have it in them.
    """

    def __init__(self) -> None:
        self.repeats = False  # see `length_that_pays`: so it is where the base's layers keep states
        self._passes, self._steps = StepMeter(), StepMeter()
        self._fewest = 0  # tokens of the shortest step
        self._num_longer = 0  # steps that had more
        self._longest = 0  # tokens of the longest pass so far
        self._unprobed_s = 0.0  # seconds of steps since the last pass

    def note_pass(self, num_tokens: int, seconds: float) -> None:
        """Learn from a pass of the draft model."""
        self._passes.learn(seconds, StepWork(num_tokens, 0, 0))
        self._longest, self._unprobed_s = max(self._longest, num_tokens), 0.0

    def note_step(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step of the base that is short enough for draft tokens."""
        self._steps.learn(seconds, StepWork(num_tokens, 0, 0))
        self._fewest = min(self._fewest or num_tokens, num_tokens)
        self._num_longer += num_tokens > self._fewest
        self._unprobed_s += seconds

    def is_probe_due(self, num_tokens: int) -> bool:
        """Return whether a pass of so many tokens should be run to be measured: none was for long."""
        return self._unprobed_s > PROBE_PART * self._passes.model.seconds(num_tokens, 0, 0)

    def choose(self, seqs: Sequence[Draftable], most: int, num_tokens: int) -> DraftChoice:
        """Choose for a step of so many tokens, of which `seqs` may get `most` draft tokens each.

        Texts that were not read yet are read once that costs no more, all together, than drafts would have saved in as
        many steps as their sequences have had: so a request that soon ends costs nothing.
        """
        passes, steps, num = self._passes.model, self._steps.model, len(seqs)

        def seconds(num_drafts: int) -> float:
            more = num * num_drafts if self._num_longer >= VARIED else 0
            step_s = steps.seconds(num_tokens + more, 0, 0)
            if not num_drafts:
                return step_s
            first_s = passes.seconds(2 * num, 0, 0)  # it has mostly two tokens of each to read
            return step_s + first_s + (num_drafts - 1) * passes.seconds(num, 0, 0)

        alone_s = seconds(0)
        if not alone_s:  # nothing has been measured
            return DraftChoice()
        num_drafts, gain = length_that_pays(
            [(one.rate, one.limit) for one in seqs], most, seconds, repeats=self.repeats
        )
        saved_s = (1 - 1 / gain) * alone_s  # in each step
        room = (alone_s - passes.a) / passes.b if passes.b else math.inf
        num_read = max(MIN_CHUNK, 2 * num, int(min(room, MAX_GROWTH * self._longest)))
        num_unread = sum(one.num_unread for one in seqs)
        token_s = passes.b + num_unread // num_read * passes.a / num_unread  # of reading, where that takes more passes
        if not num_drafts or not all(one.num_steps for one in seqs):
            return DraftChoice()
        if sum(token_s * one.num_unread / one.num_steps for one in seqs) > saved_s:
            return DraftChoice()
        return DraftChoice(num_drafts, num_read)
