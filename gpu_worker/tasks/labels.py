"""The labels of whole texts in a model's config: their names, and the activation that turns logits into scores."""

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
    """Return the names of a classifier's labels, by index. Raises BadRequest if there are too many."""
    names: dict[Any, str] = config.id2label or {}
    if len(names) > MAX_LABELS:
        raise BadRequest(f"the model has {len(names)} labels; the limit is {MAX_LABELS}")
    return [str(names[index]) for index in sorted(names)]


def activation_of(config: PreTrainedConfig) -> Activation:
    """Return the activation for a text's logits, by `problem_type`. Raises BadRequest for an unknown one."""
    problem: Any = getattr(config, "problem_type", None)
    if problem not in _OF_PROBLEMS:
        raise BadRequest(f"problem_type {problem!r} is not served")
    return _OF_PROBLEMS[problem]


def pair_activation_of(config: PreTrainedConfig) -> Activation:
    """Return the activation for the logit of a pair, as in a sentence-transformers CrossEncoder.

    That class writes the activation's class name into the config; before version 4 under another key. Raises BadRequest
    for an unsupported function.
    """
    own: Any = getattr(config, "sentence_transformers", None) or {}
    path = own.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None)
    return "" if path is None else _named(path)


def folder_activation(folder: Path) -> Activation | None:
    """Return the activation in sentence-transformers' own file, which overrides the config; None if it has none.

    Raises BadRequest for a file that is not a JSON object, and like `pair_activation_of`.
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
