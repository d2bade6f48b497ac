"""How much longer a step may become for what yields. Pure; the batcher decides by it.

Everybody in a step waits for its end, so a tenant that fills steps slows all others, however evenly slots are shared.
What yields (`scheduler.fairness`) therefore takes part only as far as a step becomes no longer than `max_slowdown`
times what the others' decodes take alone; batch work, `max_batch_slowdown` times.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median_low

from protocol.wire.messages import StepModel

ALONE_EVERY = 32
"""One in this many limited steps leaves out what yields, so that the time of the others alone is measured. So it is in
as many steps while nothing that yields is there: the limit is known when somebody comes.

The step model alone would not do: it is linear and learns from the steps there are. Where all are long, what it says of
a short one may be far off, and then none would ever become short.
"""

NUM_MEASURED = 5
"""Measured steps of a kind that are kept.

Of steps of the others alone the median counts: where the time of steps varies, the fastest would make the limit
stricter than `max_slowdown` says, and steps stay empty. Of what yields the fastest counts: being slower by chance than
predicted must take nothing from it.
"""

PROMPT_SHARE = 0.5
"""Share of the time left to what yields that is its prompts', if it has any: decodes would never leave them any, and
once no others are left all of them would come in long steps."""

BATCH_STEP = 3.0
"""Times as long as an empty step a step of nothing but batch work may take, while others may come soon: a newcomer
waits for its end."""

SHORT_STEP_TOKENS_PER_SEQ = 2
"""Tokens of a short step, per request that a worker may run at once.

Prompts that yield are computed in short steps while there are requests that do not: a prompt that arrives during a step
waits for its end. At two tokens per sequence, decodes take one each and leave as many for prompts.
"""

SHORT_STEPS_AFTER = 64
"""Steps that stay short after the last request that does not yield: an occasional client soon asks again."""


class StepTime:
    """Predicts how long a step takes while work is added to it."""

    def __init__(self, model: StepModel) -> None:
        self.model = model
        self.seconds = model.a
        self.limit_s = math.inf
        self.others_s = 0.0  # part of it present when the limit was set
        self.reserved_s = 0.0  # part of the remaining time that is reserved for later
        self.is_empty = True  # nothing has been added since the limit was set
        self.num_tokens = 0  # tokens in the step
        self._digests: set[str] = set()

    def add(self, num_tokens: int, num_kv_tokens: float, digest: str = "", rank: float = 0) -> None:
        """Add new tokens of a sequence. num_kv_tokens: that they attend to. digest, rank: of their adapter."""
        model = self.model
        self.seconds += model.b * num_tokens + model.c * num_kv_tokens + self._rank_s(digest, rank) + model.e
        self._digests.add(digest)
        self.num_tokens += num_tokens
        self.is_empty = False

    def room(self, num_kv_tokens: float, digest: str = "", rank: float = 0) -> float:
        """Return how many new tokens of a sequence, of which `num_kv_tokens` are computed, fit below the limit."""
        model = self.model
        own_s = model.c * num_kv_tokens + self._rank_s(digest, rank) + model.e
        left_s = self.limit_s - self.reserved_s - self.seconds - own_s
        per_token_s = model.b + model.c
        if left_s < 0:
            return 0
        return left_s / per_token_s if per_token_s else math.inf

    def reserve(self, share: float) -> None:
        """Keep a share of the time that is left for later; 0: nothing any more."""
        self.reserved_s = share * max(0.0, self.limit_s - self.seconds) if share else 0.0

    def _rank_s(self, digest: str, rank: float) -> float:
        return 0.0 if digest in self._digests else self.model.d * rank


class StepLimit:
    """Limits the steps of one engine."""

    def __init__(self) -> None:
        self._left = 0  # limited steps until the next one without what yields
        self._alone: deque[float] = deque(maxlen=NUM_MEASURED)  # measured ÷ predicted time of higher-priority work
        self._more: deque[float] = deque(maxlen=NUM_MEASURED)  # measured ÷ predicted time of lower-priority work

    def applies(self, model: StepModel) -> bool:
        """Return whether steps can be limited: something is known of their time."""
        return model.seconds(1, 1, 1, 1) > 0

    def set_limit(self, time: StepTime, slowdown: float) -> StepTime:
        """Limit a step that holds the others' decodes and nothing else so far; return its time.

        slowdown: how many times as long it may take for what yields.
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
        """Whether the others' decodes should have this step for themselves."""
        return self._left < 0

    def note_limited(self, time: StepTime, seconds: float) -> None:
        """Learn from a limited step.

        The step model knows tokens. What they take besides, such as logprobs or a core that others use, it learns too
        late, and only on average: until then the limit would be missed by as much in every step.
        """
        predicted_s = time.seconds - time.others_s
        if predicted_s > (time.limit_s - time.others_s) / 2 > 0:
            self._more.append((seconds - time.others_s) / predicted_s)

    def note_alone(self, predicted_s: float, seconds: float) -> None:
        """Learn from a step that held nothing but the others' decodes."""
        self._alone.append(seconds / predicted_s)
        self._left = ALONE_EVERY - 1
