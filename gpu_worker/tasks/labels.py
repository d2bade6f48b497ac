"""What a model's config says of the labels of whole texts: their names, and how scores are made of logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from protocol.wire.errors import BadRequest
from protocol.wire.messages import MAX_LABELS, Activation

SETTINGS = "config_sentence_transformers.json"

_OF_PROBLEMS: dict[str | None, Activation] = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
    None: "",
}

_OF_CLASSES: dict[str, Activation] = {"Sigmoid": "sigmoid", "Identity": "none", "Softmax": "softmax"}
"""Classes of torch, as sentence-transformers names them in a config."""


def labels_of(config: PreTrainedConfig) -> list[str]:
    """Return the names of a classifier's labels, by index. Raises BadRequest for more than are served."""
    names: dict[Any, str] = config.id2label or {}
    if len(names) > MAX_LABELS:
        raise BadRequest(f"the model has {len(names)} labels; the limit is {MAX_LABELS}")
    return [str(names[index]) for index in sorted(names)]


def activation_of(config: PreTrainedConfig) -> Activation:
    """Return what makes probabilities of a text's logits, by `problem_type`. Raises BadRequest for an unknown one."""
    problem: Any = getattr(config, "problem_type", None)
    if problem not in _OF_PROBLEMS:
        raise BadRequest(f"problem_type {problem!r} is not served")
    return _OF_PROBLEMS[problem]


def pair_activation_of(config: PreTrainedConfig) -> Activation:
    """Return what makes the score of a pair of its logit, as a CrossEncoder of sentence-transformers does.

    It writes the class's name into the config; before its version 4 under another name. Raises BadRequest for a
    function that is not served.
    """
    own: Any = getattr(config, "sentence_transformers", None) or {}
    path = own.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None)
    return "" if path is None else _named(path)


def folder_activation(folder: Path) -> Activation | None:
    """Return the same by sentence-transformers' own file, which counts before the config; None where it says nothing.

    Raises BadRequest for a file that is no JSON object, and as `pair_activation_of`.
    """
    file = folder / SETTINGS
    if not file.is_file():
        return None
    try:
        path = json.loads(file.read_text()).get("activation_fn")
    except (OSError, ValueError, AttributeError) as error:
        raise BadRequest(f"{file} cannot be read: {error}") from error
    return None if path is None else _named(path)


def _named(path: object) -> Activation:
    """Map a dotted class path (`torch.nn.Sigmoid`) to an activation."""
    name = str(path).rpartition(".")[2]
    if name not in _OF_CLASSES:
        raise BadRequest(f"scores by the activation {path!r} are not served; {', '.join(_OF_CLASSES)} are")
    return _OF_CLASSES[name]
