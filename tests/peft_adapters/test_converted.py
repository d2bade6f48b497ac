"""An adapter's record of its conversion is shown only if we may have written it, and only up to the limits."""

from __future__ import annotations

import math
from typing import Any

import pytest

from peft_adapters.kinds.converted import CONVERTED_FIELD, MAX_LAYERS, MAX_NAME, read_converted, written_converted

GOOD: dict[str, Any] = {"peft_type": "C3A", "keep": 0.999, "errors": {"a": 0.1, "b": 0.25, "c": 0}}


def file(*layers: str) -> set[str]:
    """Return the tensor names of an adapter with rank rows at these layers."""
    return {f"base_model.model.{layer}.lora_{half}.weight" for layer in layers for half in "AB"}


FILE = file("a", "b", "c", "", "a\x1b[31m", "x" * (MAX_NAME + 1))


def config(**fields: Any) -> dict[str, Any]:
    return {CONVERTED_FIELD: GOOD | fields}


def test_the_largest_errors_come_first_and_stay_when_written_again() -> None:
    found = read_converted(config(), FILE)
    assert found is not None
    assert list(found.errors.items()) == [("b", 0.25), ("a", 0.1), ("c", 0.0)]
    assert read_converted(written_converted(config(), FILE), FILE) == found
    assert written_converted({}, FILE) == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"peft_type": 7}, {"peft_type": ""}, {"peft_type": "x" * (MAX_NAME + 1)}, {"peft_type": "a\nb"},
        {"peft_type": "CALL +1-555 TO VERIFY"}, {"peft_type": "IA3"}, {"errors": {"a": 0.1, "of no layer": 0.1}},
        {"errors": {"x" * (MAX_NAME + 1): 0.1}}, {"keep": 1.5},
        {"keep": -1}, {"keep": math.nan}, {"keep": True}, {"keep": None}, {"errors": []}, {"errors": {"a": "0"}},
        {"errors": {"a": math.inf}}, {"errors": {"a": -0.1}}, {"errors": {"a\x1b[31m": 0.1}}, {"errors": {"": 0.1}},
        {"errors": {"a": 1 << 5000}},
    ],
)  # fmt: skip
def test_what_has_another_form_is_not_told(fields: dict[str, Any]) -> None:
    assert read_converted(config(**fields), FILE) is None
    assert written_converted(config(**fields), FILE) == {}


def test_no_more_layers_than_the_catalogue_holds() -> None:
    layers = [f"layer.{i}" for i in range(2 * MAX_LAYERS)]
    found = read_converted(config(errors={layer: i for i, layer in enumerate(layers)}), file(*layers))
    assert found is not None
    assert next(iter(found.errors)) == f"layer.{2 * MAX_LAYERS - 1}"
    assert len(found.errors) == MAX_LAYERS
