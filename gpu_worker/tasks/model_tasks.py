"""A decoder's tasks besides text: embeddings of its hidden states, and scores by a head or by tokens.

The head of a sequence classifier is the model's own (a `…ForSequenceClassification` folder) or an adapter's (PEFT's
SEQ_CLS). A reranker such as Qwen3-Reranker has none: its score is one token's logit minus another's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from gpu_worker.tasks.pooling import MODULES, Pooling, module_kinds, module_settings, read_pooling
from peft_adapters.texts.files import TOKENIZER
from peft_adapters.texts.tokenizer_json import BaseTokens
from protocol.wire.errors import BadRequest
from protocol.wire.messages import Task

DEFAULT_POOLING = Pooling("lasttoken", unit_length=True)
"""The pooling of decoders without sentence-transformers' files in the folder; the same as in vLLM."""

SCORE_MODULE = "LogitScore"
"""sentence-transformers' module for rerankers whose score comes from the language model's head."""


@dataclass(frozen=True, slots=True)
class ModelTasks:
    """The tasks of one decoder."""

    generates: bool = True  # whether it has a language model's head
    pooling: Pooling | None = DEFAULT_POOLING  # None: no embeddings
    head: Tensor | None = None  # [labels, D], its own head for scores
    head_name: str = ""  # linear layer that is this model type's classification head; "": none
    labels: list[str] = field(default_factory=list[str])  # labels of scores without an adapter's head, by index
    score_tokens: tuple[int, int] | None = None  # score = logit of the first minus that of the second, if this is >= 0

    @property
    def scores(self) -> bool:
        """Whether texts can be scored without an adapter's head."""
        return self.head is not None or self.score_tokens is not None

    @property
    def main(self) -> Task:
        """The model's main task."""
        return "generate" if self.generates else "score" if self.head is not None else "embed"

    @property
    def names(self) -> set[Task]:
        """All tasks of the model, including those with an adapter."""
        wanted: dict[Task, bool] = {
            "generate": self.generates,
            "embed": self.pooling is not None,
            "score": self.pooling is not None and (self.scores or bool(self.head_name)),
        }
        return {task for task, is_on in wanted.items() if is_on}

    @property
    def fingerprint(self) -> str:
        """A key that distinguishes results of models with equal weights; "" for a plain causal LM."""
        pooling = self.pooling
        if self.generates and pooling == DEFAULT_POOLING and self.score_tokens is None:
            return ""
        how = f"{pooling.mode}:{pooling.unit_length}" if pooling is not None else ""
        return f":{self.main}:{how}:{self.score_tokens or ''}"


def head_name_of(config: PreTrainedConfig) -> str:
    """Return the name of the linear layer that makes a decoder of this type a sequence classifier.

    "" if transformers has no such class, or one with more than a decoder and a linear layer without bias.
    """
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return ""
    cls: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    if issubclass(cls, GenericForSequenceClassification):
        return "score"
    with torch.device("meta"):
        found = head_in(cls(config))
    return found[0] if found is not None else ""


def head_in(module: PreTrainedModel) -> tuple[str, nn.Linear] | None:
    """Return the name and head of a sequence classifier; None if the head is more than a matrix."""
    heads = [(name, child) for name, child in module.named_children() if name != module.base_model_prefix]
    if len(heads) != 1:
        return None
    name, head = heads[0]
    return (name, head) if type(head) is nn.Linear and head.bias is None else None


def decoder_of(module: PreTrainedModel) -> nn.Module | None:
    """Return the part of a model that `AutoModel` would load on its own, None if there is none."""
    config, found = module.config, getattr(module, module.base_model_prefix, None)
    if found is module or type(config) not in MODEL_MAPPING:
        return None
    classes: Any = MODEL_MAPPING[type(config)]
    return found if isinstance(found, classes) else None


@contextmanager
def hidden_states(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the hidden states [1, T, D] of each pass of a decoder inside the block."""
    found: list[Tensor] = []

    def hook(_: nn.Module, _args: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", None)
        if isinstance(hidden, Tensor):
            found.append(hidden)

    handle = decoder.register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def read_decoder_pooling(folder: Path) -> Pooling:
    """Return the pooling for a decoder's folder. Raises BadRequest for an unsupported one."""
    if not (folder / MODULES).is_file() or SCORE_MODULE in module_kinds(folder):
        return DEFAULT_POOLING
    return read_pooling(folder)


def read_score_tokens(folder: Path, named: str = "") -> tuple[int, int] | None:
    """Return the tokens of a reranker's score, (relevant, not relevant); None if the model is not a reranker.

    The second is -1 if the first token's logit is the score. named: the texts of both in reverse order, as in "no,yes";
    "": use sentence-transformers' files. Raises BadRequest.
    """
    if named:
        return _named_tokens(folder, named)
    if not (folder / MODULES).is_file() or SCORE_MODULE not in module_kinds(folder):
        return None
    settings = module_settings(folder, SCORE_MODULE)
    ids = [settings.get(name) for name in ("true_token_id", "false_token_id")]
    if type(ids[0]) is not int or not (ids[1] is None or type(ids[1]) is int):
        raise BadRequest(f"{folder / MODULES}: {SCORE_MODULE} names no tokens by their ids")
    return ids[0], -1 if ids[1] is None else ids[1]


def _named_tokens(folder: Path, named: str) -> tuple[int, int]:
    words = named.split(",")
    file = folder / TOKENIZER
    if len(words) != 2 or not file.is_file():
        raise BadRequest(f"score_tokens is {named!r}: it names two tokens of the model's {TOKENIZER}, as no,yes does")
    pieces = BaseTokens(file.read_text()).table.pieces
    missing = [word for word in words if word.encode() not in pieces]
    if missing:
        raise BadRequest(f"score_tokens: the model's {TOKENIZER} has no token {missing[0]!r}")
    no, yes = (pieces.index(word.encode()) for word in words)
    return yes, no
