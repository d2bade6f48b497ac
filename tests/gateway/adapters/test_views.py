"""What `/v1/adapters` and `/v1/models` say of an adapter without effect, and of one under other names."""

from __future__ import annotations

from typing import Any

from helpers.adapter_files import BASE

from gateway.adapters.views import AdapterObjects, adapter_object
from protocol.wire import messages as m

ALIAS = m.Alias(name="a", state="on_disk", digest="d", source="local:a")


def record(**fields: Any) -> m.AdapterRecord:
    return m.AdapterRecord(
        digest="d", rank=4, num_bytes=100, config={}, modules=["q_proj"], source="local:a", created_ms=0, **fields
    )


def test_one_without_effect_says_so_in_both_lists() -> None:
    shown = AdapterObjects([], {}).of(ALIAS, record(no_effect=True), None)
    assert shown["state"] == "no_effect"
    assert "is zero" in shown["warning"]
    assert adapter_object(ALIAS, record(no_effect=True), BASE)["state"] == "no_effect"


def test_any_other_has_its_place_and_no_warning() -> None:
    shown = AdapterObjects([], {}).of(ALIAS, record(), None)
    assert (shown["state"], shown["warning"], shown["mapped"]) == ("on_disk", None, {})
    assert adapter_object(ALIAS, record(), BASE)["state"] == "on_disk"
    assert AdapterObjects([], {}).of(m.Alias(name="b", state="failed"), None, None)["state"] == "failed"


def test_what_was_mapped_is_shown() -> None:
    mapped = {"model.*": "model.language_model.*"}
    assert AdapterObjects([], {}).of(ALIAS, record(mapped=mapped), None)["mapped"] == mapped
