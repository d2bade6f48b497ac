"""The head of a sequence classifier, run separately from the body, on just the rows of a step that it reads.

A head is whatever transformers' class does with the body's hidden states. So the class's own forward runs, with the
body replaced by a stand-in that returns precomputed states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass
class _Output(BaseModelOutputWithPooling):
    """A body's result; missing attributes are None, since heads only pass on a body's other outputs."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return


class _Computed(nn.Module):
    """Replaces a body: returns given hidden states [S, L, D], with the output of the body's pooler."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.hidden = torch.empty(0)
        self.__dict__["body"] = body  # not registered as a child: its modules keep their names

    def forward(self, *_: Any, **__: Any) -> _Output:
        pooled = None
        pooler: Any = getattr(self.body, "pooler", None)
        activation: Any = getattr(self.body, "pooler_activation", None)
        if activation is not None:  # ALBERT's pooler is a linear layer with a separate activation
            pooled = activation(pooler(self.hidden[:, 0]))
        elif pooler is not None:
            pooled = pooler(self.hidden)
        return _Output(last_hidden_state=self.hidden, pooler_output=pooled)  # pyright: ignore


class _NoPooler(nn.Module):
    """Replaces a body's pooler, which runs with the head; the output is not used."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


@dataclass(slots=True)
class Classifier:
    """A sequence classifier split into body and head, which share their modules with the original."""

    body: Any
    head: Any
    computed: _Computed
    sees_first: bool = False  # whether the head reads only the first token's state

    @classmethod
    def of(cls, module: PreTrainedModel, *, sees_first: bool = False) -> Classifier:
        """Split a model. Its modules must not be replaced afterwards."""
        body: Any = module.base_model
        computed = _Computed(body)
        without_pooler = _with(body, pooler=_NoPooler()) if getattr(body, "pooler", None) is not None else body
        return cls(without_pooler, _with(module, **{module.base_model_prefix: computed}), computed, sees_first)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [S, N] of S texts of equal length, from their hidden states [S, L, D]."""
        self.computed.hidden = hidden
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)  # some heads read the ids' shape
        return self.head(input_ids=ids).logits

    def groups(self, hidden: Tensor, starts: Sequence[int], ends: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Yield groups of texts of a packed step that go through the head together, with their states [S, L, D].

        hidden: [T, D]. starts, ends: of each text's rows.
        """
        if self.sees_first:
            yield list(range(len(starts))), hidden[list(starts)][:, None]
            return
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            yield [i], hidden[None, start:end]


def reads_first_alone(classifier: Classifier, hidden: Tensor) -> bool:
    """Return whether the head's result for a text [1, L, D] depends only on its first token's state."""
    return torch.equal(classifier.logits(hidden), classifier.logits(hidden[:, :1]))


def _with(module: nn.Module, **children: nn.Module | None) -> Any:
    """Return a copy of a module with some children replaced; everything else is shared."""
    other = object.__new__(type(module))
    other.__dict__ = {**module.__dict__, "_modules": {**module._modules, **children}}
    return other
