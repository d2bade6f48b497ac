"""`suite.py` compares an answer with a snapshot of another model only by its form, and reads servers' flags."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from examples.tours.tools.suite import Snapshot, arguments, differences

TOKEN = {"id": 1, "text": "a", "logprob": -0.5, "special": False}
SNAPSHOT: dict[str, Any] = {"text": "a", "details": {"seed": None, "tokens": [TOKEN]}, "usage": {"total": 3}}


def test_an_answer_of_the_same_form_is_equal_whatever_it_says() -> None:
    answer = deepcopy(SNAPSHOT) | {"text": "other", "more": 1}
    answer["details"] |= {"seed": 7, "tokens": [TOKEN | {"logprob": 0}, TOKEN | {"id": 9}]}
    assert differences(SNAPSHOT, answer) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"usage": None}, ".usage is None, which is no dict"),
        ({"usage": {"total": "3"}}, ".usage.total is '3', which is no int"),
        ({"usage": {"total": True}}, ".usage.total is True, which is no int"),
        ({"details": {"tokens": [TOKEN]}}, ".details.seed is not there"),
        ({"details": {"seed": None, "tokens": []}}, ".details.tokens is empty"),
        ({"details": {"seed": None, "tokens": [TOKEN, TOKEN | {"id": "9"}]}}, ".details.tokens[1].id is '9'"),
        ({"details": {"seed": None, "tokens": [TOKEN | {"special": 0}]}}, ".details.tokens[0].special is 0"),
    ],
)
def test_what_an_answer_lacks_is_told(change: dict[str, Any], told: str) -> None:
    [found] = differences(SNAPSHOT, {**SNAPSHOT, **change})
    assert found.startswith(told)


def test_parts_of_a_list_may_have_each_the_form_of_another_part() -> None:
    chunks = [{"choices": [{"text": "a"}], "usage": None}, {"choices": [], "usage": {"total": 3}}]
    assert differences(chunks, [chunks[0], chunks[0], chunks[1]]) == []
    assert differences(chunks, [chunks[0], {"choices": [{"text": 1}], "usage": None}]) != []


def test_snapshots_are_compared_one_after_another(tmp_path: Path) -> None:
    class Answer(BaseModel):
        total: int

    (tmp_path / "test_one.json").write_text(json.dumps({"total": 3}))
    (tmp_path / "test_one.1.json").write_text(json.dumps([{"total": "three"}]))
    snapshot = Snapshot(tmp_path, "test_one")
    assert Answer(total=5) == snapshot
    assert [Answer(total=5)] != snapshot
    with pytest.raises(FileNotFoundError):
        assert snapshot == {}


def test_flags_are_read_with_their_values() -> None:
    words = ["--max-model-len=8", "--lora_modules", "a=b", '{"c": 1}', "--x"]
    assert arguments(words) == {"--max-model-len": ["8"], "--lora-modules": ["a=b", '{"c": 1}'], "--x": []}
