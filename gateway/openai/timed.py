"""Answers of OpenAI's routes that report their timings, in the form of vLLM's `metrics`."""

from __future__ import annotations

from typing import Any

import orjson

from gateway.answers.sse import GenerationAnswer
from gateway.calls.choices import Piece
from protocol.wire.records import RequestFacts

FIELDS = ("time_to_first_token_ms", "generation_time_ms", "queue_time_ms", "mean_itl_ms", "tokens_per_second")
_END = b"}\n\n"


def metrics_of(known: RequestFacts | None) -> dict[str, float | None]:
    """Return the timings of a request by vLLM's names; all null if the queue has lost them.

    Waiting for a worker is `queue_time_ms`; from the assignment to the first token is `time_to_first_token_ms`; from
    there to the end is `generation_time_ms`. The queue's times are whole milliseconds.
    """
    if known is None or not (known.assigned_ms and known.first_ms and known.ended_ms):
        return dict.fromkeys(FIELDS)
    num, generation = known.num_output_tokens, max(0, known.ended_ms - known.first_ms)
    computed = known.ended_ms - known.assigned_ms
    return {
        "time_to_first_token_ms": float(max(0, known.first_ms - known.assigned_ms)),
        "generation_time_ms": float(generation),
        "queue_time_ms": float(max(0, known.assigned_ms - known.submitted_ms)),
        "mean_itl_ms": generation / (num - 1) if num > 1 else None,
        "tokens_per_second": 1000 * num / computed if computed > 0 else None,
    }


class TimedAnswer(GenerationAnswer):
    """An answer with `metrics`, for calls with one choice: timings of several choices are not the call's."""

    async def last_frames(self) -> bytes:
        """Return the end of a stream, whose usage chunk, if any, includes the timings.

        An undefined timing, such as the time between tokens of a one-token answer, is null in a whole answer and left
        out of a stream, as in vLLM.
        """
        frame = self.writer.usage_frame(self.generation.usage) if self.options.include_usage else b""
        if frame:
            known = {name: value for name, value in (await self._metrics() or {}).items() if value is not None}
            frame = frame.removesuffix(_END) + b',"metrics":' + orjson.dumps(known or None) + _END
        return frame + self.done

    async def whole(self, choices: list[Piece]) -> tuple[Any, dict[str, str]]:
        """Return the answer of a call that is not streamed, and its headers."""
        answer, headers = await super().whole(choices)
        return {**answer, "metrics": await self._metrics()}, headers

    async def _metrics(self) -> dict[str, float | None] | None:
        return metrics_of(await self.generation.facts()) if len(self.generation.choices) == 1 else None
