"""The charts' queries use only declared series and labels, and cover every number that the charts show."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Literal

import pytest

from gateway.fleet.timeseries import FIELDS, FleetSample
from protocol.metrics import charts
from protocol.metrics.series import DECLARED

SELECTOR = re.compile(r"\b(lora[a-z0-9_]+)\{([^}]*)\}")


@pytest.mark.parametrize("group", ["model", "tenant", None])
def test_queries_name_series_and_labels_that_exist(group: Literal["tenant", "model"] | None) -> None:
    query = charts.chart(group, ["one"], 300, "")
    if group is not None:
        query += charts.busiest(group, 6, 86_400, "")
    found = SELECTOR.findall(query)
    assert len(found) == query.count("[")
    for name, matchers in found:
        series = DECLARED[re.sub(r"_(bucket|count)$", "", name) if name not in DECLARED else name]
        assert set(re.findall(r"(\w+)[=!]", matchers)) <= set(series.labels), name


def test_charts_have_the_numbers_that_a_gateway_has() -> None:
    counts = {*FIELDS, "ttft_p50_ms", "ttft_p95_ms"}
    assert charts.TOTAL.keys() == counts
    assert charts.MODEL.keys() | charts.TENANT.keys() < counts
    assert charts.FLEET.keys() == {field.name for field in fields(FleetSample)}
