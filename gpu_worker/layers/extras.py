"""The types of an adapter's extras: all changes besides the low-rank rows that the pool holds.

These are replaced weights and biases, DoRA's magnitudes, biases of LoRA, trained tokens, LoRA on embeddings and other
parameters, norms, another vocabulary, and virtual tokens. `gpu_worker.layers.apply_extras` applies them in a forward
pass, `gpu_worker.layers.attention` the keys and values of virtual tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from protocol.wire.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Dora:
    """DoRA's factor of each output of a layer: magnitude / |W + s * B @ A|, at the adapter's scale s or a multiple.

    See "DoRA: Weight-Decomposed Low-Rank Adaptation" (Liu et al., 2024).
    """

    magnitude: Tensor  # fp32 [N]
    factor: Tensor  # fp32 [N] at the adapter's own scale
    squares: Tensor  # fp32 [3, N]: |W|², 2 * s * W·BA, s² * |BA|²

    def at(self, scale: float) -> Tensor:
        """Return the factors, fp32 [N], for a request that multiplies the adapter's scale by `scale`."""
        if scale == 1.0:
            return self.factor
        whole, mixed, own = self.squares
        return self.magnitude / (whole + scale * mixed + scale * scale * own).clamp(min=0).sqrt()


@dataclass(frozen=True, slots=True)
class LowRank:
    """LoRA outside the pool: x -> scale * (x @ a.T) @ b; for an embedding, a.T[ids] replaces x @ a.T."""

    a: Tensor  # [rank, K]
    b: Tensor  # [rank, N]
    scale: float


@dataclass(frozen=True, slots=True)
class Tokens:
    """Trained rows of an embedding or of the head."""

    indices: Tensor  # int64 [n], ascending
    rows: Tensor  # [n, D]
    lora: LowRank | None = None  # the head's LoRA for these tokens, added to the trained rows


@dataclass(frozen=True, slots=True)
class LinearTransform:
    """A linear change of vectors [n, D] in fp32; see `peft_adapters.kinds.kind.Transform`."""

    scale: Tensor | None = None  # [D], or [n, D] with numbers per vector
    across: Tensor | None = None  # like `scale`
    group: int = 0
    blocks: Tensor | None = None  # [D / size, size, size]

    @property
    def width(self) -> int:
        """The vectors' width D."""
        if self.blocks is not None:
            return self.blocks.shape[0] * self.blocks.shape[1]
        assert self.scale is not None
        return self.scale.shape[-1]

    def apply(self, x: Tensor) -> Tensor:
        """Return the transform of x [n, D], in its dtype."""
        y = x.float()
        if self.blocks is not None:
            num, size, _ = self.blocks.shape
            # One product per block, over all rows.
            changed = torch.bmm(y.view(len(y), num, size).transpose(0, 1), self.blocks)
            return changed.transpose(0, 1).reshape(y.shape).to(x.dtype)
        assert self.scale is not None
        turned = None
        if self.across is not None:
            first, second = y.view(len(y), -1, 2, self.group // 2).unbind(2)
            turned = torch.stack([-second, first], 2).view(y.shape).mul_(self.across)
        y = y * self.scale if y is x else y.mul_(self.scale)
        return (y if turned is None else y.add_(turned)).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Places:
    """Numbers that an adapter adds to a weight [N, K] at a few places."""

    indices: Tensor  # int64 [2, n]: output and input; ascending, unique, within the weight
    numbers: Tensor  # fp32 [n]


@dataclass(frozen=True, slots=True)
class LinearExtras:
    """An adapter's extras at one linear layer. N differs from the layer's if the vocabulary does."""

    inputs: LinearTransform | None = None  # applied to the layer's input
    outputs: LinearTransform | None = None  # applied to its output, including bias
    places: Places | None = None

    weight: Tensor | None = None  # [N, K], replaces the layer's
    bias: Tensor | None = None  # [N], replaces the layer's
    lora: LowRank | None = None  # LoRA that the pool cannot hold
    lora_bias: Tensor | None = None  # fp32 [N], including the adapter's scale
    dora: Dora | None = None
    tokens: Tokens | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingExtras:
    """An adapter's extras at one embedding."""

    weight: Tensor | None = None  # [V, D], replaces the model's
    lora: LowRank | None = None
    dora: Dora | None = None
    tokens: Tokens | None = None
    virtual: Tensor | None = None  # [num, D], embeddings of virtual tokens, scaled like the module's output


@dataclass(frozen=True, slots=True)
class ParameterLora:
    """LoRA on a module's parameter W: W + scale * lhs @ rhs, batched if W has three dimensions."""

    parameter: str
    lhs: Tensor
    rhs: Tensor
    scale: float


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Extras:
    """All changes of one adapter besides pooled LoRA rows. Falsy if there are none.

    Compares by identity, so that derived data can be cached for its lifetime.
    """

    linear: dict[int, LinearExtras] = field(default_factory=dict)  # by site index
    embeddings: dict[str, EmbeddingExtras] = field(default_factory=dict)  # by module name
    norms: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # module name -> its parameters by name
    parameters: dict[str, list[ParameterLora]] = field(default_factory=dict)  # by module name
    vocab_size: int = 0  # 0: the base model's
    in_layers: bool = False  # whether any of it is inside the decoder layers
    unscaled: str = ""  # the adapter's kind, if it cannot be scaled
    head: Tensor | None = None  # [labels, D], head of the sequence classifier that the adapter makes of the model
    num_virtual: int = 0
    """Virtual tokens at the start of every text, with ids -1, -2, …; for a decoder, these are the only change."""
    prefix: Tensor | None = None  # [layers, 2, num_virtual, Hkv, D], replaces computed keys and values

    def __bool__(self) -> bool:
        return self.in_steps or self.head is not None

    def scale_error(self, scale: float) -> BadRequest | None:
        """Return the error for a request that scales an adapter without a scale, else None."""
        if not self.unscaled or scale == 1.0:
            return None
        return BadRequest(f"lora_scale {scale:g}: adapters of kind {self.unscaled} have no scale", param="lora_scale")

    @property
    def in_steps(self) -> bool:
        """Whether any of it is applied inside a forward pass; a head is applied to its result."""
        changes = self.linear or self.embeddings or self.norms or self.parameters or self.vocab_size
        return bool(changes) or self.prefix is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in tensors_of(self))

    @property
    def reaches_all_rows(self) -> bool:
        """Whether rows change on which an activated LoRA is inactive, so that KV blocks are not the base's."""
        linear = any(part.weight is not None or part.bias is not None or part.tokens for part in self.linear.values())
        return bool(linear or self.embeddings or self.norms or self.vocab_size)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of nested dataclasses, lists and dicts with every tensor replaced by `change(tensor)`."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_tensors(item, change) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return type(value)(**{f.name: map_tensors(getattr(value, f.name), change) for f in fields})
    return value


def tensors_of(extras: Extras) -> list[Tensor]:
    """Return all tensors of an adapter's extras, in a fixed order."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(extras, collect)
    return found
