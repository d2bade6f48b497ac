"""`/v1/adapters` and `/v1/models` for adapters without effect, converted ones, and those with paths to hide."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from helpers.adapter_files import BASE

from gateway.adapters.operations import AdapterOperations
from gateway.adapters.views import AdapterObjects, adapter_object
from gateway.auth.callers import EVERYBODY, Caller
from gateway.http.http_client import HttpClient
from protocol.queue.books.api_keys import Tenant
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import PermissionDenied

ALIAS = m.Alias(name="a", state="on_disk", digest="d", source="local:a")


def record(**fields: Any) -> m.AdapterRecord:
    return m.AdapterRecord(
        digest="d", rank=4, num_bytes=100, config={}, modules=["q_proj"], source="local:a", created_ms=0, **fields
    )


def test_one_without_effect_says_so_in_both_lists() -> None:
    shown = AdapterObjects([], {}).of(ALIAS, record(no_effect=True), None)
    assert shown["state"] == "no_effect"
    assert "is zero" in shown["warning"]
    assert adapter_object(ALIAS, record(no_effect=True), BASE.name)["state"] == "no_effect"


def test_any_other_has_its_place_and_no_warning() -> None:
    shown = AdapterObjects([], {}).of(ALIAS, record(), None)
    assert (shown["state"], shown["warning"], shown["mapped"]) == ("on_disk", None, {})
    assert adapter_object(ALIAS, record(), BASE.name)["state"] == "on_disk"
    assert AdapterObjects([], {}).of(m.Alias(name="b", state="failed"), None, None)["state"] == "failed"


def test_what_was_mapped_is_shown() -> None:
    mapped = {"model.*": "model.language_model.*"}
    assert AdapterObjects([], {}).of(ALIAS, record(mapped=mapped), None)["mapped"] == mapped


def test_what_a_conversion_cost_is_shown() -> None:
    """`/v1/adapters` shows the errors of all layers, `/v1/models` only the largest."""
    converted = m.Converted(kind="C3A", keep=0.999, errors={"q_proj": 0.03, "v_proj": 0.01})
    shown = AdapterObjects([], {}).of(ALIAS, record(converted=converted), None)
    assert shown["converted"] == {"peft_type": "C3A", "keep": 0.999, "errors": {"q_proj": 0.03, "v_proj": 0.01}}
    assert adapter_object(ALIAS, record(converted=converted), BASE.name)["converted"]["errors"] == {"q_proj": 0.03}
    assert adapter_object(ALIAS, record(), BASE.name)["converted"] is None


def test_paths_of_this_machine_are_told_to_who_may_know_them() -> None:
    """For a folder in a further root, operators get the path, and everybody else only the name."""
    alias = m.Alias(name="rl", state="on_disk", source="local:/srv/runs/step_1")
    assert adapter_object(alias, None, BASE.name)["root"] == "local:step_1"
    for folder in (Path("/srv/adapters"), None):  # a fleet may have further roots only
        assert adapter_object(alias, None, BASE.name, folder)["root"] == "local:step_1"
        assert adapter_object(alias, None, BASE.name, folder, shows_paths=True)["root"] == "/srv/runs/step_1"
    own = msgspec.structs.replace(alias, source="local:rl")
    assert adapter_object(own, None, BASE.name)["root"] == "local:rl"
    assert adapter_object(own, None, BASE.name, Path("/srv/adapters"), shows_paths=True)["root"] == "/srv/adapters/rl"
    assert AdapterObjects([], {}, shows_paths=False).of(alias, None, None)["source"] == "local:step_1"
    assert AdapterObjects([], {}).of(alias, None, None)["source"] == alias.source


def test_further_roots_are_for_operators(tmp_path: Path) -> None:
    settings = Settings(adapter_roots=str(tmp_path), api_keys=True)
    operations = AdapterOperations(None, settings, SimpleNamespace(listeners=[]), None, HttpClient())  # type: ignore[arg-type]
    reference = operations.reference_of(f"{tmp_path}/step_1")
    assert reference.source == f"local:{tmp_path}/step_1"
    tenant = Caller(Tenant("acme"), ("adapters", "infer"))
    with pytest.raises(PermissionDenied, match="only keys with the scope admin may load from --adapter-roots"):
        operations._check_place(reference, tenant)
    assert operations._check_place(reference, Caller(Tenant("ops"), ("admin",)))
    assert operations._check_place(reference, EVERYBODY)
