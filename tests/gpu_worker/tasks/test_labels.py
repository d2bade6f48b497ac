"""What a model's config and sentence-transformers' files say about labels and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig

from gpu_worker.tasks.labels import SETTINGS, activation_of, folder_activation, labels_of, pair_activation_of
from protocol.wire.errors import BadRequest
from protocol.wire.messages import MAX_LABELS

SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"


def config(**fields: Any) -> BertConfig:
    return BertConfig(**fields)


def test_names_and_numbers_of_labels() -> None:
    assert labels_of(config(id2label={1: "good", 0: "bad"})) == ["bad", "good"]
    with pytest.raises(BadRequest, match=f"has {MAX_LABELS + 1} labels; the limit is {MAX_LABELS}"):
        labels_of(config(num_labels=MAX_LABELS + 1))


def test_activations_are_those_of_the_problem() -> None:
    found = {
        problem: activation_of(config(problem_type=problem))
        for problem in ("single_label_classification", "multi_label_classification", "regression", None)
    }
    assert list(found.values()) == ["softmax", "sigmoid", "none", ""]


def test_activations_of_pairs_are_sentence_transformers(tmp_path: Path) -> None:
    assert pair_activation_of(config()) == ""
    assert pair_activation_of(config(sentence_transformers={"activation_fn": IDENTITY})) == "none"
    assert pair_activation_of(config(sbert_ce_default_activation_function=SIGMOID)) == "sigmoid"
    with pytest.raises(BadRequest, match=r"scores by the activation 'torch\.nn\.Tanh' are not served"):
        pair_activation_of(config(sentence_transformers={"activation_fn": "torch.nn.Tanh"}))
    assert folder_activation(tmp_path) is None
    for value, expected in (({}, None), ({"activation_fn": IDENTITY}, "none")):
        (tmp_path / SETTINGS).write_text(json.dumps(value))
        assert folder_activation(tmp_path) == expected
    (tmp_path / SETTINGS).write_text("[]")
    with pytest.raises(BadRequest, match="cannot be read"):
        folder_activation(tmp_path)
