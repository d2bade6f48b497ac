"""Errors on the wire: an error is decoded as the class with which it was encoded, and the docs list every class."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.wire import errors
from protocol.wire.error_codec import CLASSES, error_from, error_json
from protocol.wire.errors import AdapterRefused, Internal, LorafleetError, ModelNotFound, Overloaded, Unavailable

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("adapter_store", "gateway", "gpu_worker", "lorafleet", "peft_adapters", "protocol", "scheduler")


def make(cls: type[LorafleetError]) -> LorafleetError:
    """Return an error of a class, whatever arguments its constructor takes."""
    if cls is AdapterRefused:
        return AdapterRefused(["rank 512; the limit is 256", "no config"])
    if cls is Overloaded:
        return Overloaded("the queue is full", 12.5)
    if cls is ModelNotFound:
        return ModelNotFound("org/none", "Ask for it first.")
    return cls("something is wrong", param="prompt", code="special")


def facts(error: LorafleetError) -> tuple[object, ...]:
    """Return everything that a client sees of an error."""
    reasons = error.reasons if isinstance(error, AdapterRefused) else None
    return (
        type(error), str(error), error.message, error.param, error.code, error.status, error.type, error.retryable,
        error.retry_after_s, reasons,
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_class_of_the_tree_survives_the_wire(name: str) -> None:
    error = make(CLASSES[name])
    assert facts(error_from(error_json(error))) == facts(error)


def test_an_errors_own_time_to_retry_survives_the_wire() -> None:
    error = Unavailable("the source is away")
    assert error_from(error_json(error)).retry_after_s == 2.0
    error.retry_after_s = 30.0
    assert error_from(error_json(error)).retry_after_s == 30.0


def test_an_error_from_elsewhere_arrives_as_its_nearest_base() -> None:
    class Lost(ModelNotFound):
        """Not in the hierarchy."""

    assert type(error_from(error_json(Lost("a")))) is ModelNotFound


@pytest.mark.parametrize("raw", ["", "{}", "[1]", '{"message": "m", "kind": "Unheard"}'])
def test_what_cannot_be_read_is_an_internal_error(raw: str) -> None:
    assert type(error_from(raw)) is Internal


def test_no_error_is_no_text() -> None:
    assert error_json(None) == ""


def class_bases() -> Iterator[tuple[str, set[str]]]:
    """Yield every class of the packages and the names of its bases."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            for node in ast.walk(ast.parse(text, path)) if re.search(r"^ *class ", text, re.MULTILINE) else ():
                if isinstance(node, ast.ClassDef):
                    yield node.name, {base.id for base in node.bases if isinstance(base, ast.Name)}


def test_the_drawn_tree_names_every_error_of_the_project() -> None:
    found = {"LorafleetError"}
    classes = list(class_bases())
    while more := {name for name, bases in classes if bases & found} - found:
        found |= more
    assert CLASSES.keys() < found
    drawn = {word.strip("├└│─ ()") for line in (errors.__doc__ or "").splitlines() for word in line.split()}
    assert found <= drawn
