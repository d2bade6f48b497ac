"""What adapters change besides adding low-rank products to linear layers, applied to their own rows in plain torch.

A step in which no row's adapter has any of it pays nothing: its context holds no `ExtraRows`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Dora:
    """DoRA's length per output: magnitude / |W + s·BA|, for the adapter's own s and, as squares, for any other."""

    magnitude: Tensor  # fp32 [N]
    factor: Tensor  # fp32 [N] at the adapter's own scale
    squares: Tensor  # fp32 [3, N]: |W|², 2s·W·BA, s²|BA|²

    def at(self, scale: float) -> Tensor:
        """Return the factors [N] for a request that multiplies the adapter's scale."""
        if scale == 1.0:
            return self.factor
        whole, mixed, own = self.squares
        return self.magnitude / (whole + scale * mixed + scale * scale * own).clamp(min=0).sqrt()


@dataclass(frozen=True, slots=True)
class LowRank:
    """x -> scale * (x @ a.T) @ b, at an embedding a.T[ids] instead of the first product. a [rank, K], b [rank, N]."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Tokens:
    """Trained rows of an embedding or head."""

    indices: Tensor  # int64 [n], ascending
    rows: Tensor  # [n, D]
    lora: LowRank | None = None  # the head's LoRA for these tokens: it is added to the trained rows as well


@dataclass(frozen=True, slots=True)
class LinearExtras:
    """At one linear layer. N may differ from the layer's where the vocabulary does."""

    weight: Tensor | None = None  # [N, K] instead of the layer's
    bias: Tensor | None = None  # [N] instead of the layer's
    lora: LowRank | None = None  # where the pool cannot hold it
    lora_bias: Tensor | None = None  # [N] scaled
    dora: Dora | None = None
    tokens: Tokens | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingExtras:
    """At one embedding."""

    weight: Tensor | None = None  # [V, D] instead of the model's
    lora: LowRank | None = None
    dora: Dora | None = None
    tokens: Tokens | None = None


@dataclass(frozen=True, slots=True)
class ParameterLora:
    """W + scale * lhs @ rhs for a parameter of a module: batches of matrices where it holds several."""

    parameter: str
    lhs: Tensor
    rhs: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Extras:
    """All of one adapter's."""

    linear: dict[int, LinearExtras] = field(default_factory=dict)  # by site index
    embeddings: dict[str, EmbeddingExtras] = field(default_factory=dict)
    norms: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # module -> its parameters
    parameters: dict[str, list[ParameterLora]] = field(default_factory=dict)  # module -> LoRA on its parameters
    vocab_size: int = 0  # 0: the base's
    in_layers: bool = False  # some of it is within the decoder layers

    def __bool__(self) -> bool:
        return bool(self.linear or self.embeddings or self.norms or self.parameters or self.vocab_size)

    @property
    def num_bytes(self) -> int:
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        map_tensors(self, count)
        return total

    @property
    def reaches_all_rows(self) -> bool:
        """Whether rows are changed on which an activated LoRA is not active: what was computed there is not base's."""
        linear = any(part.weight is not None or part.bias is not None or part.tokens for part in self.linear.values())
        return bool(linear or self.embeddings or self.norms or self.vocab_size)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of nested dataclasses, lists and dicts with every tensor changed."""
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


@dataclass(frozen=True, slots=True)
class ExtraRows:
    """The rows of a step that belong to one adapter with extras, at one scale of the requests'."""

    extras: Extras
    rows: Tensor  # int64
    active: Tensor  # int64: those on which its LoRA counts; fewer only for an activated LoRA
    scale: float


# ---------------------------------------------------------------- linear layers


def apply_linear(groups: list[ExtraRows], site: int, out: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return out [T, N] of one layer with the extras of every group applied; it may have become wider.

    out: base output, bias [N] and the pool's LoRA already added; changed in place. x: [T, K].
    """
    for group in groups:
        part = group.extras.linear.get(site)
        if part is not None:
            out = _apply_linear(part, group, out, x, bias)
    return out


def _apply_linear(part: LinearExtras, group: ExtraRows, out: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    rows, active = group.rows, group.active
    own_bias = bias if part.bias is None else part.bias
    if part.weight is not None:
        out = _put(out, rows, F.linear(x[rows], part.weight, own_bias))
    elif part.bias is not None and bias is not None:
        out[rows] += part.bias - bias
    if part.lora is not None:
        delta = _low_rank(part.lora, x[active], group.scale)
        width = delta.shape[-1]
        out[active, :width] = (out[active, :width].float() + delta).to(out.dtype)
    if part.lora_bias is not None:
        out[active] = (out[active].float() + part.lora_bias * group.scale).to(out.dtype)
    if part.dora is not None:
        factor = part.dora.at(group.scale)
        y = out[rows, : len(factor)].float()
        offset = 0.0 if own_bias is None else own_bias.float()
        out[rows, : len(factor)] = (factor * (y - offset) + offset).to(out.dtype)
    if part.tokens is not None:
        tokens = part.tokens
        out = _widen(out, int(tokens.indices[-1]) + 1)
        out[rows[:, None], tokens.indices] = F.linear(x[rows], tokens.rows)
        if tokens.lora is not None:
            delta = _low_rank(tokens.lora, x[active], group.scale)
            out[active[:, None], tokens.indices] += delta.to(out.dtype)
    return out


def _low_rank(lora: LowRank, x: Tensor, scale: float) -> Tensor:
    """Return what LoRA adds, in fp32."""
    return (x.float() @ lora.a.float().T) @ lora.b.float() * (lora.scale * scale)


def _put(out: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    out = _widen(out, values.shape[-1])
    out[rows, : values.shape[-1]] = values
    return out


def _widen(out: Tensor, width: int) -> Tensor:
    return F.pad(out, (0, width - out.shape[-1])) if width > out.shape[-1] else out


# ---------------------------------------------------------------- other modules


class EmbeddingPlace:
    """An embedding of the model, one id per token, whose rows adapters may change."""

    def __init__(self, name: str, module: nn.Embedding) -> None:
        self.name = name
        self.module = module
        self.scale = getattr(module, "embed_scale", 1.0)

    def apply(self, groups: list[ExtraRows], ids: Tensor) -> Tensor:
        """Return the embeddings [1, T, D] of ids [1, T]; some may be beyond the base's vocabulary."""
        flat = ids.view(-1)
        out = original_forward(self.module)(ids.clamp(max=self.module.num_embeddings - 1))
        hidden = out.view(-1, out.shape[-1])
        for group in groups:
            part = group.extras.embeddings.get(self.name)
            if part is not None:
                hidden[group.rows] = self._rows(part, group.scale, flat[group.rows], hidden[group.rows])
        return out

    def _rows(self, part: EmbeddingExtras, scale: float, ids: Tensor, hidden: Tensor) -> Tensor:
        if part.weight is not None:
            hidden = part.weight[ids] * self._scale(part.weight)
        if part.tokens is not None:
            at = torch.searchsorted(part.tokens.indices, ids).clamp(max=len(part.tokens.indices) - 1)
            rows = part.tokens.rows[at] * self._scale(part.tokens.rows)
            hidden = torch.where((part.tokens.indices[at] == ids)[:, None], rows, hidden)
        if part.lora is not None:
            lora = part.lora
            delta = lora.a.T[ids].float() @ lora.b.float() * (lora.scale * scale) * self.scale
            hidden = hidden.float()
            if part.dora is not None:
                factor = part.dora.at(scale)
                hidden, delta = hidden * factor, delta * factor
            hidden = hidden + delta
        return hidden.to(self.module.weight.dtype)

    def _scale(self, weight: Tensor) -> Any:
        return self.scale.to(weight.dtype) if isinstance(self.scale, Tensor) else self.scale


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Which dimension the tokens are in, of each tensor among a module's arguments and results."""

    args: tuple[int, ...]
    outs: tuple[int, ...]
    num_dims: int  # of the first argument

    @classmethod
    def of(cls, args: Sequence[Any], out: Any, num_tokens: int) -> TokenLayout | None:
        """Read it off a call with `num_tokens` tokens; None if a tensor has no such dimension, or more than one."""
        if not isinstance(out, (Tensor, tuple)) or (isinstance(out, tuple) and len(tensors_in(out)) != len(out)):
            return None
        tensors = [value for value in args if isinstance(value, Tensor)]
        ins, outs = ([_token_dim(tensor, num_tokens) for tensor in part] for part in (tensors, tensors_in(out)))
        if not ins or not outs or None in ins or None in outs:
            return None
        return cls(tuple(ins), tuple(outs), tensors[0].ndim)  # pyright: ignore[reportArgumentType]


def _token_dim(tensor: Tensor, num_tokens: int) -> int | None:
    shape = tensor.shape
    if not shape or shape[0] == num_tokens:
        return 0 if shape else None
    dims = [dim for dim in (1, 2) if shape[0] == 1 and dim < len(shape) and shape[dim] == num_tokens]
    return dims[0] if len(dims) == 1 else None


class ModulePlace:
    """A module computed token by token, which is run again on an adapter's rows with the adapter's parameters."""

    def __init__(self, name: str, module: nn.Module, layout: TokenLayout) -> None:
        self.name = name
        self.module = module
        self.layout = layout

    def apply_norms(self, groups: list[ExtraRows], out: Tensor, x: Tensor) -> Tensor:
        """Put what x becomes under replaced parameters into `out`, in place. A shortcut's tokens are dimension 0."""
        dim = self.layout.args[0] if x.ndim == self.layout.num_dims else 0
        for group in groups:
            own = group.extras.norms.get(self.name)
            if own is not None:
                out.index_copy_(dim, group.rows, run_with(self.module, own, x.index_select(dim, group.rows)))
        return out

    def apply_parameters(self, groups: list[ExtraRows], out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put what the arguments become under LoRA on parameters into `out`, in place."""
        for group in groups:
            loras = group.extras.parameters.get(self.name)
            if loras is None or not len(group.active):
                continue
            own = {lora.parameter: self._adapted(lora, group.scale) for lora in loras}
            dims = iter(self.layout.args)
            own_args = [_pick(value, group.active, dims) for value in args]
            own_kwargs = {key: _pick(value, group.active, dims) for key, value in kwargs.items()}
            result = run_with(self.module, own, *own_args, **own_kwargs)
            for dim, whole, part in zip(self.layout.outs, tensors_in(out), tensors_in(result), strict=True):
                whole.index_copy_(dim, group.active, part)
        return out

    def _adapted(self, lora: ParameterLora, scale: float) -> Tensor:
        weight = self.module.get_parameter(lora.parameter)
        product = torch.baddbmm if weight.ndim == 3 else torch.addmm
        return product(weight, lora.lhs, lora.rhs, alpha=lora.scale * scale)


def _pick(value: Any, rows: Tensor, dims: Iterator[int]) -> Any:
    """Return the rows of an argument that is a tensor, others as they are. dims: the tensors' token dimension."""
    return value.index_select(next(dims), rows) if isinstance(value, Tensor) else value


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a module's result."""
    return [value] if isinstance(value, Tensor) else [item for item in value if isinstance(item, Tensor)]


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """Return a module's own forward, whatever replaces it on the instance."""
    return type(module).forward.__get__(module)


def run_with(module: nn.Module, parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Return what a module would compute with other parameters. It stays as it is."""
    other = object.__new__(type(module))
    other.__dict__ = {**module.__dict__, "_parameters": {**module._parameters, **parameters}}
    other.__dict__.pop("forward", None)
    return other.forward(*args, **kwargs)
