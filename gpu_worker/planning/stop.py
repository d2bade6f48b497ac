"""When a request ends: end-of-text tokens, stop tokens, stop strings, stop expressions, maximum length."""

from __future__ import annotations

import numpy as np

from gpu_worker.planning.request import EngineRequest
from protocol.wire.errors import BadRequest
from protocol.wire.text import OutputText, StopRule
from protocol.wire.tokens import TokenTable

_NONE = np.empty(0, np.int64)


class StopRules:
    """One request's stop rules, fed every output token in order, including those produced before a resumption.

    Among the first `min_tokens` output tokens no stop token is sampled (see `banned`), and neither stop strings nor
    matches of an expression count.
    """

    def __init__(
        self, request: EngineRequest, max_output: int, eos_ids: frozenset[int], tokens: TokenTable | None
    ) -> None:
        """max_output: maximum output tokens. tokens: the tokenizer's table, None without a tokenizer.

        Raises BadRequest if stop strings or expressions need a tokenizer that is missing or cannot decode.
        """
        self._rule = StopRule.of(request.stop, request.stop_token_ids, request.sampling, eos_ids)
        self._end_ids = np.array(sorted(self._rule.end_ids), np.int64)
        self._max_output = max_output
        reads_text = self._rule.reads_text
        if reads_text and tokens is None:
            raise BadRequest("this model has no tokenizer.json: nothing that ends a text can be served", param="stop")
        self._output = OutputText(tokens, self._rule) if reads_text else None  # None: only ids and length end it
        self._num_tokens = 0

    def banned(self, num_ahead: int = 0) -> np.ndarray:
        """Return the ids forbidden for the output token `num_ahead` places after the next: int64 [b], a view."""
        return self._end_ids if self._num_tokens + num_ahead < self._rule.min_tokens else _NONE

    @property
    def stop(self) -> str:
        """The stop string or expression that was found, else ""."""
        return (self._output.stop if self._output is not None else None) or ""

    def add(self, token: int) -> str:
        """Add the next output token; return the finish reason: "stop", "length" or ""."""
        self._num_tokens += 1
        if self._output is not None:
            self._output.add((token,))
            if self._output.ended:
                return "stop"
        elif token in self._rule.end_ids and self._num_tokens > self._rule.min_tokens:
            return "stop"
        return "length" if self._num_tokens >= self._max_output else ""
