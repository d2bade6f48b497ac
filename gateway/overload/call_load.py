"""What a call adds to the queue."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallLoad:
    """The load that a call adds to the queue, as far as it is known."""

    cls: str
    num: int = 1  # requests
    num_tokens: int = 0  # prompts, virtual tokens and maximum outputs; 0: not tokenized yet
    timeout_s: float = math.inf  # a request that has not begun by then fails; inf: not known yet
    tenant: str = ""  # that of its requests, without keys the model; "": not known yet
