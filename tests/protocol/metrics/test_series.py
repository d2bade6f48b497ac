"""The list of series is complete: every registered series is declared and documented."""

from __future__ import annotations

from prometheus_client import REGISTRY
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from protocol.metrics import fleet, pages, table
from protocol.metrics.series import ADAPTER_FIRST_TOKEN_SECONDS, DECLARED
from protocol.wire import messages as m

BEAT = m.WorkerBeat(
    wid="w", name="one", capacity=4, kv_blocks_free=1, kv_blocks_total=4, kv_bytes_total=4096, host_bytes_used=10,
    host_bytes_total=40, load_seconds={"store": [0.0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 1.5]},
)  # fmt: skip


def names_of_families() -> set[str]:
    found = {family.name + ("_total" if family.type == "counter" else "") for family in REGISTRY.collect()}
    return {name.removesuffix("_total") if name.startswith("lorax_") else name for name in found}


def test_everything_shown_is_declared() -> None:
    fleet.WORKERS.show([BEAT])
    fleet.RESIDENCY.seen = fleet.Seen("base", holdings=[fleet.Holding("one", "mine", "host", False, 8)])
    try:
        own = {name for name in names_of_families() if name.startswith(("lora", "vllm:"))}
        assert own == {name.removesuffix("_total") if name.startswith("lorax_") else name for name in DECLARED}
    finally:
        fleet.WORKERS.show([])
        fleet.RESIDENCY.seen = None
    assert all(series.text for series in DECLARED.values())


def test_the_page_of_docs_is_the_list() -> None:
    assert table.PAGE.read_text().endswith(table.MARK + table.table()), "python -m protocol.metrics.table"


def test_a_worker_s_bytes_and_loads() -> None:
    shown = fleet.WorkerCollector()
    shown.show([BEAT])
    values = {(s.name, *s.labels.values()): s.value for metric in shown.collect() for s in metric.samples}
    assert values["lorafleet_worker_kv_bytes", "one", "used"] == 3072
    assert values["lorafleet_worker_adapter_host_bytes", "one", "free"] == 30
    load = "lorafleet_worker_adapter_load_seconds"
    assert values[f"{load}_bucket", "one", "store", "0.005"] == 2
    assert values[f"{load}_bucket", "one", "store", "+Inf"] == values[f"{load}_count", "one", "store"] == 3
    assert values[f"{load}_sum", "one", "store"] == 1.5


def test_openmetrics_with_an_exemplar_and_lorax_s_names() -> None:
    ADAPTER_FIRST_TOKEN_SECONDS.labels("of-this-test").observe(0.2, {"trace_id": "ab" * 16})
    try:
        text, kind = pages.page("text/html;q=0.1, application/openmetrics-text;version=1.0.0,*/*")
        assert kind.startswith("application/openmetrics-text")
        families = {family.name: family for family in text_string_to_metric_families(text.decode())}
        samples = families["lorafleet_adapter_first_token_seconds"].samples
        exemplars = [s.exemplar.labels for s in samples if s.exemplar and s.labels["adapter"] == "of-this-test"]
        assert exemplars == [{"trace_id": "ab" * 16}]
        assert families["lorax_request_count"].samples[0].name == "lorax_request_count"
        plain, kind = pages.page("*/*")
        assert kind.startswith("text/plain")
        assert b"\n# TYPE lorax_request_count counter\nlorax_request_count " in plain
    finally:
        ADAPTER_FIRST_TOKEN_SECONDS.remove("of-this-test")
