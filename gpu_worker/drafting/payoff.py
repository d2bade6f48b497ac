"""Whether a draft model's tokens pay off, and how many to draft: decided from measured times. Pure.

A step keeps the draft tokens before the first wrong one, and adds the token that it chose itself. If a share `r` of
draft tokens is right, a draft of `k` tokens yields 1 + r + r² + … + rᵏ tokens. It costs `k` passes of the draft model
and a step with `k` more tokens (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpu_worker.engine.step_model import MIN_STEPS, StepMeter, StepWork

HOPE = 0.8
"""Assumed share of right draft tokens before any are observed."""

PRIOR_TOKENS = 8.0
"""Number of draft tokens as which that assumption counts."""

REMEMBERING = 0.94
"""Weight that a draft token keeps per later one, so that about the last 16 count."""

FORGETTING = 1 / 1024
"""Share of the distance to `HOPE` recovered per step without a draft, so that drafting is retried: about one token in
thirty steps if all are wrong."""

MIN_GAIN = 1.25
"""Minimum expected speedup, in tokens per second, for drafting.

Estimates are inexact: with 1.1, steps of four sequences were as fast as without drafts, and those of eight 7 % slower
(measured).
"""

VARIED = 2 * MIN_STEPS
"""Number of steps larger than the smallest before the cost of more tokens is trusted.

Until then it counts as zero, so that steps with draft tokens measure it.
"""

MIN_CHUNK = 16
"""Tokens that the draft model may read in one pass, however short a step of the base is."""

MAX_GROWTH = 2
"""Maximum tokens of a reading pass, as a multiple of the largest pass so far: large passes cannot be predicted from
small ones."""

PROBE_PART = 128
"""Passes run only for measurement take 1 / PROBE_PART of the time while nothing is drafted.

Without them, passes that were slow by chance, beside other processes, would count as slow forever.
"""


class Acceptance:
    """A running average of the share of right draft tokens."""

    __slots__ = ("_right", "_tried")

    def __init__(self, rate: float = HOPE) -> None:
        """rate: initial value."""
        self._right, self._tried = rate * PRIOR_TOKENS, PRIOR_TOKENS

    @property
    def rate(self) -> float:
        """The current share, 0 to 1."""
        return self._right / self._tried

    def learn(self, num_drafted: int, num_right: int) -> None:
        """Record a draft whose first `num_right` tokens were right. Tokens after a wrong one prove nothing."""
        num_tried = min(num_drafted, num_right + 1)
        kept = REMEMBERING**num_tried
        self._right, self._tried = kept * self._right + num_right, kept * self._tried + num_tried

    def rest(self) -> None:
        """Record a step without a draft."""
        self._right += FORGETTING * (HOPE * self._tried - self._right)


def length_that_pays(
    guesses: Sequence[tuple[float, int]], most: int, seconds: Callable[[int], float], *, repeats: bool = False
) -> tuple[int, float]:
    """Return the number of draft tokens for each sequence of a step and the speedup; (0, 1) if it is too small.

    The sequence that gains least decides, since all wait for the drafts. guesses: for each sequence, the share of its
    draft tokens that is right, and the maximum number it can use. most: maximum draft tokens per sequence. seconds:
    time of drafting and of the step, for a number of draft tokens per sequence. repeats: whether a wrong draft token
    costs a further, equally long step that yields one token.
    """
    best, alone_s = (0, 1.0), seconds(0)
    expected, powers = [1.0] * len(guesses), [1.0] * len(guesses)  # expected tokens of each, and the gain from one more
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
    """A sequence that may receive draft tokens."""

    rate: float  # share of its draft tokens that is right
    limit: int  # maximum draft tokens that it can use
    num_unread: int  # tokens that the draft model has not read, at least the last one
    num_steps: int  # steps that it has had, or that remain, whichever is less


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """The draft model's work in a step."""

    num_drafts: int = 0  # draft tokens per sequence; 0: no drafting
    num_read: int = 0  # maximum tokens of a reading pass; with more unread tokens, it reads and does not draft yet


class Payoff:
    """Measured times of draft passes and of the base's short steps by token count, and the choice that follows.

    Text length is not modeled: recent measurements include its effect.
    """

    def __init__(self) -> None:
        self.repeats = False  # see `length_that_pays`; true if the base's layers keep states
        self._passes, self._steps = StepMeter(), StepMeter()
        self._fewest = 0  # tokens of the smallest step
        self._num_longer = 0  # number of larger steps
        self._longest = 0  # tokens of the largest pass so far
        self._unprobed_s = 0.0  # seconds of steps since the last pass

    def note_pass(self, num_tokens: int, seconds: float) -> None:
        """Record the time of a pass of the draft model."""
        self._passes.learn(seconds, StepWork(num_tokens, 0, 0))
        self._longest, self._unprobed_s = max(self._longest, num_tokens), 0.0

    def note_step(self, num_tokens: int, seconds: float) -> None:
        """Record the time of a step of the base that is small enough for draft tokens."""
        self._steps.learn(seconds, StepWork(num_tokens, 0, 0))
        self._fewest = min(self._fewest or num_tokens, num_tokens)
        self._num_longer += num_tokens > self._fewest
        self._unprobed_s += seconds

    def is_probe_due(self, num_tokens: int) -> bool:
        """Return whether a measuring pass of `num_tokens` is due, because none has run for long."""
        return self._unprobed_s > PROBE_PART * self._passes.model.seconds(num_tokens, 0, 0)

    def choose(self, seqs: Sequence[Draftable], most: int, num_tokens: int) -> DraftChoice:
        """Choose the drafting for a step of `num_tokens`, in which each of `seqs` may get up to `most` draft tokens.

        Unread texts are read once that costs no more, in total, than drafts would have saved in the steps that their
        sequences have had: thus a request that ends soon costs nothing.
        """
        passes, steps, num = self._passes.model, self._steps.model, len(seqs)

        def seconds(num_drafts: int) -> float:
            more = num * num_drafts if self._num_longer >= VARIED else 0
            step_s = steps.seconds(num_tokens + more, 0, 0)
            if not num_drafts:
                return step_s
            first_s = passes.seconds(2 * num, 0, 0)  # there are usually two unread tokens per sequence
            return step_s + first_s + (num_drafts - 1) * passes.seconds(num, 0, 0)

        alone_s = seconds(0)
        if not alone_s:  # nothing has been measured yet
            return DraftChoice()
        num_drafts, gain = length_that_pays(
            [(one.rate, one.limit) for one in seqs], most, seconds, repeats=self.repeats
        )
        saved_s = (1 - 1 / gain) * alone_s  # per step
        room = (alone_s - passes.a) / passes.b if passes.b else math.inf
        num_read = max(MIN_CHUNK, 2 * num, int(min(room, MAX_GROWTH * self._longest)))
        num_unread = sum(one.num_unread for one in seqs)
        token_s = passes.b + num_unread // num_read * passes.a / num_unread  # reading time, including extra passes
        if not num_drafts or not all(one.num_steps for one in seqs):
            return DraftChoice()
        if sum(token_s * one.num_unread / one.num_steps for one in seqs) > saved_s:
            return DraftChoice()
        return DraftChoice(num_drafts, num_read)
