"""Applies adapters' extras in a forward pass: each adapter's to its own rows, in plain torch.

A step without extras costs nothing: its context holds no `ExtraRows`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_worker.layers.extras import (
    EmbeddingExtras,
    Extras,
    LinearExtras,
    LinearTransform,
    LowRank,
    ParameterLora,
    Places,
    Tokens,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ExtraRows:
    """The rows of a step that belong to one adapter with extras, at one request scale.

    Compares by identity, as `Extras` do.
    """

    extras: Extras
    rows: Tensor  # int64
    active: Tensor  # int64: rows on which its LoRA is active; fewer than `rows` only for an activated LoRA
    scale: float  # the request's factor on the adapter's scale


# ---------------------------------------------------------------- linear layers


def transformed_inputs(groups: list[ExtraRows], site: int, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the rows of a layer's inputs x [T, K] that adapters transform, int64 [n], and their new values [n, K].

    None if no adapter does.
    """
    found = [(group.rows, part.inputs) for group in groups if (part := group.extras.linear.get(site)) and part.inputs]
    return _transformed(found, x) if found else None


def _transformed(changes: list[tuple[Tensor, LinearTransform]], x: Tensor) -> tuple[Tensor, Tensor]:
    """Apply transforms of equal width to their rows of x [T, >= D]. Return all these rows and their new values.

    Elementwise transforms are applied together: an operation on few rows costs as much as on many.
    """
    alike: dict[tuple[bool, int], list[tuple[Tensor, LinearTransform]]] = {}
    for rows, transform in changes:
        key = (transform.across is not None, transform.group) if transform.blocks is None else (True, -len(alike) - 1)
        alike.setdefault(key, []).append((rows, transform))
    where: list[Tensor] = []
    values: list[Tensor] = []
    for own in alike.values():
        rows = torch.cat([rows for rows, _ in own]) if len(own) > 1 else own[0][0]
        where.append(rows)
        values.append(_joint(own).apply(x[rows, : own[0][1].width]))
    return (where[0], values[0]) if len(where) == 1 else (torch.cat(where), torch.cat(values))


def _joint(changes: list[tuple[Tensor, LinearTransform]]) -> LinearTransform:
    """Return a single transform for the rows of several elementwise ones, in order; a lone transform unchanged."""
    first = changes[0][1]
    if len(changes) == 1:
        return first
    scale = _each_row([(rows, transform.scale) for rows, transform in changes if transform.scale is not None])
    across = [(rows, transform.across) for rows, transform in changes if transform.across is not None]
    return LinearTransform(scale, _each_row(across) if across else None, first.group)


def _each_row(numbers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return each group's numbers [D] repeated for each of its rows, [n, D]; those of a lone group unchanged."""
    return torch.cat([own.expand(len(rows), -1) for rows, own in numbers]) if len(numbers) > 1 else numbers[0][1]


def apply_linear(groups: list[ExtraRows], site: int, out: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Apply the extras of every group to the output of one linear layer, except changes of its inputs.

    out: [T, N], the base output with bias [N] and pooled LoRA already added; changed in place. x: [T, K], the input.
    Returns `out`, or a wider tensor if an adapter has more tokens than the head; other adapters then change only their
    own width.
    """
    found = [(group, part) for group in groups if (part := group.extras.linear.get(site)) is not None]
    for group, part in found:
        out = _apply_linear(part, group, out, x, bias)
    by_width: dict[int, list[tuple[Tensor, LinearTransform]]] = {}
    for group, part in found:
        if part.outputs is not None:
            by_width.setdefault(part.outputs.width, []).append((group.rows, part.outputs))
    for width, changes in by_width.items():
        rows, values = _transformed(changes, out)
        out[rows, :width] = values
    _scale_dora(found, out, bias)
    for group, part in found:
        if part.tokens is not None:
            out = _apply_tokens(part, part.tokens, group, out, x)
    return out


def _scale_dora(found: list[tuple[ExtraRows, LinearExtras]], out: Tensor, bias: Tensor | None) -> None:
    """Multiply outputs [T, N] without bias by DoRA's factors, in place, for all adapters at once.

    Needs memory for three fp32 numbers per output that is multiplied, and for N per adapter that a request scales.
    """
    scaled = [(group, part.bias, part.dora) for group, part in found if part.dora is not None]
    base = bias.float() if scaled and bias is not None else None
    by_width: dict[int, list[tuple[Tensor, Tensor, Tensor | None]]] = {}
    for group, own_bias, dora in scaled:
        factor = dora.at(group.scale)
        by_width.setdefault(len(factor), []).append(
            (group.rows, factor, base if own_bias is None else own_bias.float())
        )
    for width, own in by_width.items():
        rows = torch.cat([rows for rows, _, _ in own])
        y = out[rows, :width].float()
        factors, offsets = _each_row([(rows, factor) for rows, factor, _ in own]), None
        if any(own_bias is not None for _, _, own_bias in own):
            none = y.new_zeros(width)
            offsets = _each_row([(rows, none if own_bias is None else own_bias) for rows, _, own_bias in own])
            y.sub_(offsets)
        y.mul_(factors)
        if offsets is not None:
            y.add_(offsets)
        del factors, offsets
        out[rows, :width] = y.to(out.dtype)


def _apply_linear(part: LinearExtras, group: ExtraRows, out: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Apply an adapter's changes that precede its transform of the outputs."""
    rows, active = group.rows, group.active
    own_bias = bias if part.bias is None else part.bias
    if part.weight is not None:
        out = _put(out, rows, F.linear(x[rows], part.weight, own_bias))
    elif part.bias is not None and bias is not None:
        out[rows, : len(bias)] += part.bias - bias
    if part.lora is not None:
        delta = _low_rank(part.lora, x[active], group.scale)
        width = delta.shape[-1]
        out[active, :width] = (out[active, :width].float() + delta).to(out.dtype)
    if part.lora_bias is not None:
        width = len(part.lora_bias)
        out[active, :width] = (out[active, :width].float() + part.lora_bias * group.scale).to(out.dtype)
    if part.places is not None:
        out[active] = (out[active].float() + _at_places(part.places, x[active], out.shape[-1], group.scale)).to(
            out.dtype
        )
    return out


def _apply_tokens(part: LinearExtras, tokens: Tokens, group: ExtraRows, out: Tensor, x: Tensor) -> Tensor:
    """Write the logits of trained tokens. Returns `out`, or a wider one."""
    out = _widen(out, int(tokens.indices[-1]) + 1)
    out[group.rows[:, None], tokens.indices] = F.linear(x[group.rows], tokens.rows)
    if tokens.lora is not None:
        delta = _low_rank(tokens.lora, x[group.active], group.scale)
        if part.lora_bias is not None:
            delta += part.lora_bias[tokens.indices] * group.scale
        out[group.active[:, None], tokens.indices] += delta.to(out.dtype)
    return out


def _low_rank(lora: LowRank, x: Tensor, scale: float) -> Tensor:
    """Return LoRA's addition for x [n, K]: fp32 [n, N]."""
    return (x.float() @ lora.a.float().T) @ lora.b.float() * (lora.scale * scale)


def _at_places(places: Places, x: Tensor, width: int, scale: float) -> Tensor:
    """Return the addition, for x [n, K], of numbers at a few places of a weight [width, K]: fp32 [n, width]."""
    size = (width, x.shape[-1])
    weight = torch.sparse_coo_tensor(places.indices, places.numbers, size, is_coalesced=True, check_invariants=False)
    return torch.sparse.mm(weight, x.float().T).T * scale


def _put(out: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Write values [n, M] to rows of `out`, widening it to M columns if necessary."""
    out = _widen(out, values.shape[-1])
    out[rows, : values.shape[-1]] = values
    return out


def _widen(out: Tensor, width: int) -> Tensor:
    return F.pad(out, (0, width - out.shape[-1])) if width > out.shape[-1] else out


# ---------------------------------------------------------------- embeddings


class AdaptableEmbedding:
    """An embedding of the model, called with one id per token, whose rows adapters may change."""

    def __init__(self, name: str, module: nn.Embedding) -> None:
        self.name = name
        self.module = module
        self.numbers: Callable[[], Tensor] = module.weight.detach  # returns the weight [V, D]
        self.scale = getattr(module, "embed_scale", 1.0)

    def apply(self, groups: list[ExtraRows], ids: Tensor) -> Tensor:
        """Return the embeddings [1, T, D] of ids, int64 [1, T].

        Adapters may have ids beyond the base's vocabulary; ids below 0 are their virtual tokens.
        """
        flat = ids.view(-1)
        out = original_forward(self.module)(ids.clamp(0, self.module.num_embeddings - 1))
        hidden = out.view(-1, out.shape[-1])
        for group in groups:
            part = group.extras.embeddings.get(self.name)
            if part is not None:
                hidden[group.rows] = self._rows(part, group.scale, flat[group.rows], hidden[group.rows])
        return out

    def _rows(self, part: EmbeddingExtras, scale: float, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the embeddings [n, D] of ids [n] under an adapter. hidden: the base's."""
        if part.weight is not None:
            hidden = part.weight[ids.clamp(min=0)] * self._scale(part.weight)
        if part.virtual is not None:
            rows = part.virtual[(-1 - ids).clamp(min=0)]
            return torch.where((ids < 0)[:, None], rows, hidden)
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


# ---------------------------------------------------------------- norms and parameters of other modules


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """The token dimension of each tensor among a module's arguments and results."""

    args: tuple[int, ...]
    outs: tuple[int, ...]
    num_dims: int  # number of dimensions of the first tensor argument

    @classmethod
    def of(cls, args: Sequence[Any], out: Any, num_tokens: int) -> TokenLayout | None:
        """Return the layout of a call with `num_tokens` tokens; None if a tensor has no token dimension, or several."""
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


class AdaptableModule:
    """A module computed token by token: an adapter's rows are computed again, with the adapter's parameters."""

    def __init__(self, name: str, module: nn.Module, layout: TokenLayout) -> None:
        self.name = name
        self.module = module
        self.layout = layout
        self.packed: dict[str, Callable[[Tensor | None], Tensor]] = {}
        """Reads packed parameters, see `parameter`: the module itself has only their shapes."""
        self.few_experts: bool | None = None
        """Whether it can run with a subset of its experts; None until its first adapter tries."""

    def parameter(self, name: str, at: Tensor | None = None) -> Tensor:
        """Return a parameter, or its entries `at` of the first dimension, int64; a copy if the parameter is packed."""
        if name in self.packed:
            return self.packed[name](at)
        parameter = self.module.get_parameter(name).detach()
        return parameter if at is None else parameter[at]

    def apply_norms(self, groups: list[ExtraRows], out: Tensor, x: Tensor, *gates: Tensor) -> Tensor:
        """Overwrite the rows of `out` whose adapters replace the norm's parameters.

        x, out, gates: of equal shape, with tokens where `layout` says; or [T, D], as shortcuts call it. gates: further
        inputs of a gated norm. Returns `out`.
        """
        dim = self.layout.args[0] if x.ndim == self.layout.num_dims else 0
        for group in groups:
            own = group.extras.norms.get(self.name)
            if own is not None:
                inputs = [value.index_select(dim, group.rows) for value in (x, *gates)]
                out.index_copy_(dim, group.rows, run_with(self.module, own, *inputs))
        return out

    def apply_parameters(self, groups: list[ExtraRows], out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Overwrite the rows of `out` whose adapters have LoRA on the module's parameters.

        args, kwargs: the module's arguments. out: its result, one or several tensors. Returns `out`.
        """
        for group in groups:
            loras = group.extras.parameters.get(self.name)
            if loras is None or not len(group.active):
                continue
            dims = iter(self.layout.args)
            own_args = [_pick(value, group.active, dims) for value in args]
            own_kwargs = {key: _pick(value, group.active, dims) for key, value in kwargs.items()}
            result = self._run_adapted(loras, group, out, own_args, own_kwargs)
            for dim, whole, part in zip(self.layout.outs, tensors_in(out), tensors_in(result), strict=True):
                whole.index_copy_(dim, group.active, part)
        return out

    def _run_adapted(
        self, loras: list[ParameterLora], group: ExtraRows, out: Any, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Return the module's result for a group's rows with an adapter's LoRA on its parameters.

        out: its result for all rows, without LoRA. args, kwargs: its arguments, limited to the group's rows.
        """
        if self.few_experts is not False and all(lora.lhs.ndim == 3 for lora in loras):
            call = ExpertsCall.of(self, args, kwargs)
            if call is not None and self.few_experts is None:
                self.few_experts = self._agrees(call, group, out)
                which = "with the experts that its rows go to" if self.few_experts else "whole"
                logger.warning("LoRA on %s cannot use the pool: it runs once per adapter, %s", self.name, which)
            if call is not None and self.few_experts:
                return call.run(loras, group.scale)
        own = {name: self.parameter(name) for name in self.packed}
        for lora in loras:
            weight = own[lora.parameter] if lora.parameter in own else self.parameter(lora.parameter)
            own[lora.parameter] = adapted(weight, lora, group.scale)
        return run_with(self.module, own, *args, **kwargs)

    def _agrees(self, call: ExpertsCall, group: ExtraRows, out: Any) -> bool:
        """Return whether the module gives the same outputs for these rows when run with only the experts they need."""
        found = tensors_in(call.run([], 1.0))
        expected = [
            part.index_select(dim, group.active) for dim, part in zip(self.layout.outs, tensors_in(out), strict=True)
        ]
        return len(found) == len(expected) and all(map(alike, found, expected))


class ExpertsCall:
    """A call of a module of experts, reduced to the experts that its rows use.

    A step sends few rows to few experts, so only these experts' weights are read and adapted: for eight experts of 256,
    a thirty-second of the memory and time.
    """

    def __init__(
        self, owner: AdaptableModule, hit: Tensor, num_experts: int, args: list[Any], kwargs: dict[str, Any]
    ) -> None:
        """hit: int64, ascending, the experts that rows use. args, kwargs: with these renumbered from 0."""
        self._owner, self._hit, self._num_experts = owner, hit, num_experts
        self._args, self._kwargs = args, kwargs

    @classmethod
    def of(cls, owner: AdaptableModule, args: list[Any], kwargs: dict[str, Any]) -> ExpertsCall | None:
        """Return a call with only the experts it needs; None if these are unknown, or more than half."""
        parameters = owner.module._parameters.values()
        sizes = {len(parameter) for parameter in parameters if parameter is not None and parameter.ndim == 3}
        chosen = [
            value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and not value.is_floating_point()
        ]
        if len(sizes) != 1 or len(chosen) != 1 or chosen[0].ndim != 2:
            return None
        [index], [num_experts] = chosen, sizes
        hit = index.unique()  # waits for the device
        if 2 * len(hit) > num_experts or int(hit[-1]) >= num_experts or int(hit[0]) < 0:
            return None
        renumbered = torch.searchsorted(hit, index).to(index.dtype)

        def own(value: Any) -> Any:
            return renumbered if value is index else value

        return cls(owner, hit, num_experts, [own(value) for value in args], {k: own(v) for k, v in kwargs.items()})

    def run(self, loras: list[ParameterLora], scale: float) -> Any:
        """Return the module's result for the call with LoRA on parameters. scale: the request's."""
        parameters: dict[str, Tensor] = {}
        module = self._owner.module
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim >= 2 and len(parameter) == self._num_experts:
                parameters[name] = self._owner.parameter(name, self._hit)
        for lora in loras:
            own = ParameterLora(lora.parameter, lora.lhs[self._hit], lora.rhs[self._hit], lora.scale)
            parameters[lora.parameter] = adapted(parameters[lora.parameter], own, scale)
        numbers = {
            key: len(self._hit)
            for key, value in vars(module).items()
            if type(value) is int and value == self._num_experts and "expert" in key
        }
        return run_with(module, parameters, *self._args, numbers=numbers, **self._kwargs)


def adapted(weight: Tensor, lora: ParameterLora, scale: float) -> Tensor:
    """Return a parameter with an adapter's LoRA added, in the parameter's dtype. scale: the request's."""
    product = torch.baddbmm if weight.ndim == 3 else torch.addmm
    return product(weight, lora.lhs, lora.rhs, alpha=lora.scale * scale)


def alike(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal to within rounding."""
    if found.shape != expected.shape:
        return False
    spread = expected.float().abs().amax().clamp(min=1e-20)
    return bool((found.float() - expected.float()).abs().amax() <= 16 * torch.finfo(expected.dtype).eps * spread)


def _pick(value: Any, rows: Tensor, dims: Iterator[int]) -> Any:
    """Return the rows of a tensor argument; any other argument unchanged. dims: the tensors' token dimensions."""
    return value.index_select(next(dims), rows) if isinstance(value, Tensor) else value


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a module's result: the tensor itself, or those in a tuple."""
    return [value] if isinstance(value, Tensor) else [item for item in value if isinstance(item, Tensor)]


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the forward of a module's class, even if the instance overrides it."""
    return type(module).forward.__get__(module)


def run_with(
    module: nn.Module, parameters: dict[str, Tensor], *args: Any, numbers: dict[str, int] | None = None, **kwargs: Any
) -> Any:
    """Return what a module would compute with other parameters, by name. The module itself does not change.

    numbers: attributes to override too.
    """
    other = object.__new__(type(module))
    other.__dict__ = {**module.__dict__, "_parameters": {**module._parameters, **parameters}, **(numbers or {})}
    other.__dict__.pop("forward", None)
    return other.forward(*args, **kwargs)
