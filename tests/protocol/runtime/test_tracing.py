"""The places of spans in a trace; and disabled tracing does not exist in the process."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys

import pytest

from protocol.runtime.service import JsonLines, TextLines
from protocol.runtime.settings import Settings
from protocol.runtime.tracing import MAX_WAITING, TRACE_ID, TRACING, Trace, place_of, run_place, tracing
from protocol.wire import messages as m

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_a_traceparent_is_read_and_written() -> None:
    place = place_of(PARENT)
    assert place is not None
    assert place.traceparent == PARENT
    assert place.child(7) == Trace(place.trace_id, 7, place.span_id)


@pytest.mark.parametrize(
    "text",
    ["", "nothing", PARENT[:-2] + "00", PARENT.upper(), PARENT + "-more", f"00-{'0' * 32}-{'1' * 16}-01", "x" * 10_000],
    ids=["empty", "words", "unsampled", "upper", "longer", "zero", "long"],
)
def test_what_is_wrong_or_not_sampled_is_no_place(text: str) -> None:
    assert place_of(text) is None


def test_an_assignment_has_the_same_place_everywhere() -> None:
    first, again, other = (run_place(PARENT, "r-0", epoch) for epoch in (1, 1, 3))
    assert first == again != other
    assert first is not None
    assert first.parent_id == int(PARENT[36:52], 16)
    assert run_place("", "r-0", 1) is None


def test_off_there_is_no_tracer_and_no_library() -> None:
    with tracing(Settings(), "gateway", "g"):
        assert TRACING.tracer is None
    kinds = ("opentelemetry.sdk.trace", "opentelemetry.exporter")  # redis-py itself imports that of metrics
    code = (
        "import sys, gateway.service, scheduler.service, gpu_worker.service.program;"
        f"print([name for name in sys.modules if name.startswith({kinds})])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_collector_that_does_not_answer_holds_nobody_up() -> None:
    pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # accepts connections and never answers
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with tracing(Settings(otlp_endpoint=url, trace_share=1.0), "gateway", "g"):
            tracer = TRACING.tracer
            assert tracer is not None
            tracer.flush_s = 0.05
            place = tracer.begin("")
            assert place is not None
            for _ in range(3 * MAX_WAITING):
                tracer.tell("span", place.child(), 1, 2, {})
            processor = tracer._processor._batch_processor
            assert len(processor._queue) <= MAX_WAITING
    assert TRACING.tracer is None
    processor._worker_thread.join(60)
    assert not processor._worker_thread.is_alive()


@pytest.mark.parametrize(("share", "traced"), [(0.0, False), (1.0, True)])
def test_a_client_s_decision_comes_before_the_share(share: float, traced: bool) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
    with tracing(Settings(otlp_endpoint="http://127.0.0.1:9", trace_share=share), "gateway", "g"):
        tracer = TRACING.tracer
        assert tracer is not None
        assert (tracer.begin("") is not None) == traced
        below = tracer.begin(PARENT)
        assert below is not None
        assert (below.hex, below.parent_id) == (PARENT[3:35], int(PARENT[36:52], 16))
        assert tracer.begin(PARENT[:-2] + "00") is None


def test_off_messages_are_as_long_as_without_tracing() -> None:
    submit = m.RequestHead(
        rid="r", tenant="t", cls="interactive", digest="", gateway="g", num_prompt_tokens=1, max_new_tokens=1,
        deadline_ms=1,
    )  # fmt: skip
    assert b"trace" not in m.encode(submit)


def test_log_lines_name_the_trace_of_their_request() -> None:
    record = logging.LogRecord("gateway", logging.INFO, "", 0, "a call failed", (), None)
    token = TRACE_ID.set("ab" * 16)
    try:
        assert json.loads(JsonLines("gateway").format(record))["trace_id"] == "ab" * 16
        assert TextLines("%(message)s").format(record) == f"a call failed [trace {'ab' * 16}]"
    finally:
        TRACE_ID.reset(token)
    assert "trace_id" not in json.loads(JsonLines("gateway").format(record))
