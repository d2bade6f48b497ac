"""What an adapter changes, as tensors of its file at places of the base model. See `peft_format.read_adapter`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """LoRA at one place. Its tensors, by name:

    at a layer a [rank, in], b [out, rank]; at an embedding a [rank, entries], b [width, rank]; at a parameter of
    several experts a [experts * rank, in], b [out, rank * experts].
    """

    site: str  # SiteShape.name
    rank: int
    scale: float
    a: str
    b: str
    bias: str = ""  # of b: [out]
    magnitude: str = ""  # DoRA's: [out], at an embedding [width]
    singular: str = ""  # AdaLoRA's values: [rank, 1], they multiply the rows of a
    experts: tuple[tuple[tuple[str, str], ...], ...] = ()
    """Instead of a and b, for each expert: a [rank / n, in] and b [out / n, rank / n] of each of its n layers."""


@dataclass(frozen=True, slots=True)
class ReplacedWeights:
    """A parameter of a module for which the adapter brings another."""

    site: str
    parameter: Literal["weight", "bias"]
    tensor: str


@dataclass(frozen=True, slots=True)
class TrainedTokens:
    """Rows of an embedding or head that the adapter replaces."""

    site: str
    indices: tuple[int, ...]
    tensor: str  # [len(indices), width]


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What an adapter changes, in the order of the base model's sites."""

    sites: tuple[LoraWeights, ...]  # linear layers
    embeddings: tuple[LoraWeights, ...] = ()
    parameters: tuple[LoraWeights, ...] = ()
    replaced: tuple[ReplacedWeights, ...] = ()
    tokens: tuple[TrainedTokens, ...] = ()
    invocation: tuple[int, ...] = ()  # activated LoRA: it counts from the last of these in the prompt on
    vocab_size: int = 0  # tokens the adapter knows, 0: those of the base

    @property
    def rank(self) -> int:
        """The largest rank anywhere."""
        return max((part.rank for part in (*self.sites, *self.embeddings, *self.parameters)), default=0)

    @property
    def modules(self) -> list[str]:
        """Kinds of modules touched, such as "q_proj"."""
        parts = (*self.sites, *self.embeddings, *self.parameters, *self.replaced, *self.tokens)
        return sorted({part.site.rpartition(".")[2] for part in parts})
