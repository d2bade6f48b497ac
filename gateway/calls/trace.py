"""The spans of one call in its gateway: the times of its stages, and attributes of request and answer."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from gateway.calls.parsed_call import ChatPrompt, ParsedCall
from gateway.calls.writers import CallUsage
from protocol.runtime.tracing import Trace, Tracer

OPERATIONS = {"embed": "embeddings", "classify": "classify", "score": "score"}
"""Task -> `gen_ai.operation.name`. Generation is `chat` or `text_completion`."""

_NOTHING = nullcontext()


@dataclass(slots=True)
class CallTrace:
    """The trace of one call; its span is exported when the call has been answered."""

    place: Trace
    began_ns: int = field(default_factory=time.time_ns)
    name: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    stages: list[tuple[str, int, int]] = field(default_factory=list)  # name, begin and end in unix ns

    def about(self, call: ParsedCall) -> None:
        """Set the request's attributes by OpenTelemetry's conventions for generative AI, without prompts."""
        options, models = call.options, ",".join(call.models.names)[:256]
        is_chat = isinstance(call.inputs, ChatPrompt)
        operation = OPERATIONS.get(call.task) or ("chat" if is_chat else "text_completion")
        self.name = f"{operation} {models}"
        self.attributes |= {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "lorafleet",
            "gen_ai.request.model": models,
            "gen_ai.request.choice.count": options.n,
            "gen_ai.request.temperature": options.sampling.temperature,
            "gen_ai.request.top_p": options.sampling.top_p,
            "lorafleet.class": call.cls,
            "lorafleet.tenant": call.caller.owner,
        }
        if options.max_tokens is not None:
            self.attributes["gen_ai.request.max_tokens"] = options.max_tokens

    def answered(self, call_id: str, usage: CallUsage, finishes: Sequence[str]) -> None:
        """Set the answer's attributes."""
        self.attributes |= {
            "gen_ai.response.id": call_id,
            "gen_ai.response.finish_reasons": list(finishes),
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "lorafleet.usage.cached_tokens": usage.cached_tokens,
        }

    def stage(self, name: str, begin_ns: int, end_ns: int = 0) -> None:
        """Record a stage that ended at `end_ns`, or now if that is 0."""
        self.stages.append((name, begin_ns, end_ns or time.time_ns()))

    def tell(self, tracer: Tracer, status: int, route: str) -> None:
        """Export the spans of the call and of its stages."""
        for name, begin_ns, end_ns in self.stages:
            tracer.tell(name, self.place.child(), begin_ns, end_ns, {})
        more = {"http.request.method": "POST", "http.route": route, "http.response.status_code": status}
        tracer.tell(
            self.name or f"POST {route}",
            self.place,
            self.began_ns,
            time.time_ns(),
            self.attributes | more,
            kind="SERVER",
            error=f"HTTP {status}" if status >= 500 or not status else "",
        )


TRACE_OF: ContextVar[CallTrace | None] = ContextVar("call_trace", default=None)
"""The trace of the current task's call, None if it is not traced."""


def stage(name: str) -> AbstractContextManager[None]:
    """Return a context manager whose duration is recorded as a stage of the current call."""
    trace = TRACE_OF.get()
    return _NOTHING if trace is None else _timed(trace, name)


@contextmanager
def _timed(trace: CallTrace, name: str) -> Generator[None]:
    begin_ns = time.time_ns()
    try:
        yield
    finally:
        trace.stage(name, begin_ns)
