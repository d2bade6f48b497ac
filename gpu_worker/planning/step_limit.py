"""Limits how much the yielding class may lengthen a step. Pure; the batcher applies it.

All sequences of a step wait for its end, so a tenant that fills steps slows all others, however evenly slots are
shared. Requests that yield (`scheduler.fairness`) are therefore added only while the step takes at most `max_slowdown`
times as long as the others' decodes alone; batch work, `max_batch_slowdown` times.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median_low

from protocol.wire.messages import StepModel

ALONE_EVERY = 32
"""One in this many limited steps leaves out the yielding class, to measure the time of the others alone.

The same share of steps is measured while no sequence yields, so that the limit is known when one arrives. The step
model alone would not do: it is linear and fitted to the steps that occur. If all are long, its prediction for a short
one may be far off, and no step would ever become short.
"""

NUM_MEASURED = 5
"""Number of recent measured steps kept, of each kind.

For steps of the others alone the median counts: step times vary, and the fastest would make the limit stricter than
`max_slowdown` says and leave steps empty. For the yielding class the fastest counts: a randomly slow step must not
reduce its share.
"""

PROMPT_SHARE = 0.5
"""Share of the yielding class's time reserved for its prompts, if it has any.

Otherwise its decodes would leave them none, and all prompts would come in long steps once the first class is gone.
"""

BATCH_STEP = 3.0
"""Maximum time of a step of batch work only, as a multiple of an empty step, while other requests may come soon: a
newcomer waits for the step's end."""

SHORT_STEP_TOKENS_PER_SEQ = 2
"""Maximum tokens of a short step, per request that a worker may run at once.

Yielding prompts are computed in short steps while other requests are present: a prompt that arrives during a step waits
for its end. At two tokens per sequence, decodes take one each and leave as many for prompts.
"""

SHORT_STEPS_AFTER = 64
"""Steps that stay short after the last request that does not yield: an occasional client soon sends another."""


class StepTime:
    """Predicts how long a step takes while work is added to it."""

    def __init__(self, model: StepModel) -> None:
        self.model = model
        self.seconds = model.a
        self.limit_s = math.inf
        self.others_s = 0.0  # the predicted time when the limit was set
        self.reserved_s = 0.0  # part of the remaining time reserved for later
        self.is_empty = True  # nothing has been added since the limit was set
        self.num_tokens = 0  # tokens in the step
        self._digests: set[str] = set()

    def add(self, num_tokens: int, num_kv_tokens: float, digest: str = "", rank: float = 0) -> None:
        """Add a sequence's new tokens. num_kv_tokens: tokens they attend to. digest, rank: their adapter's."""
        model = self.model
        self.seconds += model.b * num_tokens + model.c * num_kv_tokens + self._rank_s(digest, rank) + model.e
        self._digests.add(digest)
        self.num_tokens += num_tokens
        self.is_empty = False

    def room(self, num_kv_tokens: float, digest: str = "", rank: float = 0) -> float:
        """Return how many new tokens of a sequence fit within the limit. num_kv_tokens: its computed tokens."""
        model = self.model
        own_s = model.c * num_kv_tokens + self._rank_s(digest, rank) + model.e
        left_s = self.limit_s - self.reserved_s - self.seconds - own_s
        per_token_s = model.b + model.c
        if left_s < 0:
            return 0
        return left_s / per_token_s if per_token_s else math.inf

    def reserve(self, share: float) -> None:
        """Reserve a share of the remaining time for later; 0: release the reservation."""
        self.reserved_s = share * max(0.0, self.limit_s - self.seconds) if share else 0.0

    def _rank_s(self, digest: str, rank: float) -> float:
        return 0.0 if digest in self._digests else self.model.d * rank


class StepLimit:
    """Limits the steps of one engine."""

    def __init__(self) -> None:
        self._left = 0  # limited steps until the next measurement without the yielding class
        self._alone: deque[float] = deque(maxlen=NUM_MEASURED)  # measured ÷ predicted time of the first class alone
        self._more: deque[float] = deque(maxlen=NUM_MEASURED)  # measured ÷ predicted time added by the yielding class

    def applies(self, model: StepModel) -> bool:
        """Return whether steps can be limited, which needs a fitted step model."""
        return model.seconds(1, 1, 1, 1) > 0

    def set_limit(self, time: StepTime, slowdown: float) -> StepTime:
        """Limit a step that so far holds only the first class's decodes; return its time.

        slowdown: factor by which the yielding class may lengthen it.
        """
        measured = median_low(self._alone) if self._alone else 1.0
        left_s = (slowdown * measured - 1) * time.seconds
        time.others_s = time.seconds
        time.limit_s = time.seconds + left_s / max(1.0, min(self._more, default=1.0))
        time.is_empty = True
        self._left -= 1
        return time

    @property
    def is_alone_due(self) -> bool:
        """Whether the first class's decodes should run alone in this step."""
        return self._left < 0

    def note_limited(self, time: StepTime, seconds: float) -> None:
        """Record the measured time of a limited step.

        The step model knows token counts only. Other costs, such as logprobs or a busy core, reach it late and only on
        average; until then every step would miss the limit by that much.
        """
        predicted_s = time.seconds - time.others_s
        if predicted_s > (time.limit_s - time.others_s) / 2 > 0:
            self._more.append((seconds - time.others_s) / predicted_s)

    def note_alone(self, predicted_s: float, seconds: float) -> None:
        """Record the measured time of a step with only the first class's decodes."""
        self._alone.append(seconds / predicted_s)
        self._left = ALONE_EVERY - 1
