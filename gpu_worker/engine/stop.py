"""When a request ends: end-of-text tokens, stop tokens, stop strings, length."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from gpu_worker.engine.request import EngineRequest
from protocol.wire.errors import BadRequest
from protocol.wire.text import OutputText, StopRule


class StopRules:
    """One request's stop rules, fed with every output token in order, those made before a resumption included.

    Among the first `min_tokens` output tokens no stop token is sampled (see `banned`) and no stop string counts.
    """

    def __init__(
        self, request: EngineRequest, max_output: int, eos_ids: frozenset[int], tokenizer: Tokenizer | None
    ) -> None:
        """max_output: output tokens that end it. Raises BadRequest where stop strings need a missing tokenizer."""
        self._rule = StopRule.of(request.stop, request.stop_token_ids, request.sampling, eos_ids)
        self._end_ids = np.array(sorted(self._rule.end_ids), np.int64)
        self._max_output = max_output
        self._num_output = 0
        self._text: OutputText | None = None  # None where there is no stop string to look for
        if any(self._rule.stop):
            if tokenizer is None:
                raise BadRequest("this model has no tokenizer.json: stop strings cannot be served", param="stop")
            self._text = OutputText(tokenizer, self._rule)

    def banned(self, num_ahead: int = 0) -> np.ndarray:
        """Return the ids that the output token `num_ahead` after the next one may not be: int64 [b], a view."""
        return self._end_ids if self._num_output + num_ahead < self._rule.min_tokens else self._end_ids[:0]

    @property
    def stop(self) -> str:
        """The stop string that was found, or ""."""
        return (self._text and self._text.stop) or ""

    def add(self, token: int) -> str:
        """Take the next output token; return how it ends the request: "stop", "length" or ""."""
        self._num_output += 1
        if self._text is not None:
            self._text.add([token])
        if token in self._rule.end_ids or self.stop:
            return "stop"
        return "length" if self._num_output >= self._max_output else ""
