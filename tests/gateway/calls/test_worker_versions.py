"""Calls with features that no worker supports are refused, instead of answered without them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gateway.calls.admit import CallAdmission
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import Unavailable


def admission(status: m.SchedulerStatus | None) -> CallAdmission:
    fleet: Any = SimpleNamespace(status=status)
    unused: Any = None
    return CallAdmission(Settings(), fleet, unused)


def test_a_call_is_refused_that_no_worker_knows_all_of() -> None:
    status = m.SchedulerStatus(queued=0, running=0, workers=2, drain_rate=0.0, knows=["later"])
    admission(status).check_known([])
    admission(status).check_known(["later"])
    with pytest.raises(Unavailable, match="no worker supports forbidden, last: all run an older version") as caught:
        admission(status).check_known(["later", "last", "forbidden"])
    assert (caught.value.status, caught.value.code, caught.value.retryable) == (503, "workers_too_old", True)


def test_nothing_is_refused_before_the_scheduler_has_met_a_worker() -> None:
    admission(None).check_known(["later"])
    admission(m.SchedulerStatus(queued=0, running=0, workers=0, drain_rate=0.0)).check_known(["later"])
