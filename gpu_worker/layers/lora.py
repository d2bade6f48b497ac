"""The linear layers of a model as LoRA sites: each adds the LoRA of the step's adapters to its base output.

Layers that read the same input (q, k, v; gate, up) are siblings: a trial run detects them, and they share one matrix
product and one LoRA operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gpu_worker.layers.apply_extras import ExtraRows, apply_linear, transformed_inputs
from gpu_worker.layers.attention import StepContext
from gpu_worker.quantised.modules import BlockLinear, beside_each_other
from lora_kernels import ops
from protocol.wire.errors import AdapterRefused
from protocol.wire.messages import OPAQUE

GROUPS = ("attention", "mlp", "other")
"""Page spaces of the adapter pool: an adapter takes no pages in a group whose layers it does not change."""


@dataclass(frozen=True, slots=True)
class SiteInfo:
    """A linear layer that LoRA can adapt."""

    name: str  # the model's name for it, such as "model.layers.0.self_attn.q_proj"
    index: int  # column in the adapter table
    group: int  # index into GROUPS
    in_features: int
    out_features: int
    kind: Literal["linear", "conv1d", "opaque"]
    dtype: torch.dtype
    has_bias: bool = False


@dataclass(slots=True)
class LinearCall:
    """The calls of a linear layer in a trial run."""

    name: str
    module: nn.Module
    xs: list[Tensor]  # inputs, whose identity shows which layers are siblings; several if the model loops
    is_head: bool  # whether it gets only the rows that need logits, not all tokens


class SharedInput:
    """Sibling linear layers: the first one called computes the outputs of all."""

    def __init__(
        self,
        linears: list[nn.Module],
        context: StepContext,
        *,
        is_head: bool,
        impl: ops.Impl | None,
        num_lead: int = 0,
    ) -> None:
        """is_head: see `LinearCall`. num_lead: dimensions before the token dimension in the model's own calls."""
        self.context = context
        self.is_head = is_head
        self.position = 0  # among all siblings of the model, in call order
        self.impl: ops.Impl | None = impl
        self.lora_sites: list[ops.LoraSite] = []  # set once the pool is allocated
        self.table: ops.AdapterTable | None = None
        shapes = [_shape(linear) for linear in linears]
        self.sizes = [out_features for out_features, _ in shapes]
        self.in_features = shapes[0][1]
        self._opaque: list[nn.Module] = []  # layers that can only be called, such as libraries' quantized ones
        self._lead: list[int] = [1] * num_lead  # some opaque layers find the token dimension by number of dimensions
        self._packed: ops.PackedLinear | ops.QuantisedLinear | None = None
        if is_plain(linears[0]):
            self._packed = ops.pack_linear(*(_weight(linear) for linear in linears), impl=impl)
        elif isinstance(linears[0], BlockLinear):
            self._packed = beside_each_other([linear for linear in linears if isinstance(linear, BlockLinear)])
        if self._packed is not None:
            self._bias = _joint_bias(linears, self.sizes)
            self._biases = [None] * len(self.sizes) if self._bias is None else list(self._bias.split(self.sizes))
        else:
            self._opaque = linears
            self._biases = [getattr(linear, "bias", None) for linear in linears]
        self.handle: Tensor | None = None  # key by which compiled layers find it, see `compiled.py`
        self._x: Tensor | None = None
        self._outs: list[Tensor] = []

    @property
    def linears(self) -> ops.SiblingLinears:
        """The siblings as input of a whole-layer operation. They must not be opaque."""
        assert self._packed is not None
        return ops.SiblingLinears(self._packed, self._bias, self.sizes, self.lora_sites)

    @property
    def packed(self) -> ops.PackedLinear | ops.QuantisedLinear | None:
        """The weights of all siblings; None if the layers are opaque."""
        return self._packed

    @property
    def is_opaque(self) -> bool:
        """Whether the layers can only be called, because the format of their weights is unknown."""
        return bool(self._opaque)

    @property
    def num_siblings(self) -> int:
        """The number of sibling layers."""
        return len(self.sizes)

    def output(self, index: int, x: Tensor) -> Tensor:
        """Return the output [..., N] of sibling `index` for x [..., K].

        The first call for an x computes the outputs of all siblings.
        """
        if x is not self._x:
            rows = x.reshape(-1, x.shape[-1])
            rows = rows if rows.stride(-1) == 1 else rows.contiguous()
            if torch.compiler.is_compiling():
                self._x, self._outs = x, torch.ops.lorafleet_layers.project(rows, self.handle, self.sizes)
            else:
                self._x, self._outs = x, self.project(rows)
        out = self._outs[index]
        if index == len(self._outs) - 1:
            self._x, self._outs = None, []
        return out.view(*x.shape[:-1], out.shape[-1])

    def project(self, rows: Tensor) -> list[Tensor]:
        """Return the outputs [T, N] of all siblings for rows [T, K], including adapters.

        Outputs of plain layers are slices of one tensor.
        """
        if self.context.of_all is not None:
            batch, extras = self.context.of_all(len(rows))
        elif self.is_head:
            batch, extras = self.context.lora_logits, self.context.extras_logits
        else:
            batch, extras = self.context.lora, self.context.extras
        outs = self._transformed_products(extras, rows) if extras else self._products(rows)
        if batch is not None and self.table is not None:
            ops.lora_add_(outs, rows, self.lora_sites, self.table, batch, impl=self.impl)
        if extras:
            for i, site in enumerate(self.lora_sites):
                outs[i] = apply_linear(extras, site.index, outs[i], rows, self._biases[i])
        return outs

    def _products(self, rows: Tensor) -> list[Tensor]:
        """Return the layers' own outputs [T, N] for rows [T, K]."""
        if self._packed is None:
            x = rows.view(*self._lead, *rows.shape)
            return [linear(x).reshape(len(rows), -1).contiguous() for linear in self._opaque]
        out = ops.linear(rows, self._packed, self._bias, impl=self.impl)
        return list(out.split_with_sizes(self.sizes, -1)) if len(self.sizes) > 1 else [out]

    def _transformed_products(self, extras: list[ExtraRows], rows: Tensor) -> list[Tensor]:
        """Return the layers' own outputs, with inputs changed by adapters.

        Siblings with changed inputs are computed once more, for the changed rows of all adapters only. In most models
        adapters change inputs of layers without siblings; these take one product for all rows.
        """
        changes = [transformed_inputs(extras, site.index, rows) for site in self.lora_sites]
        if self.num_siblings == 1 and changes and changes[0] is not None:
            where, inputs = changes[0]
            return self._products(rows.index_copy(0, where, inputs))
        outs = self._products(rows)
        for i, change in enumerate(changes):
            if change is not None:
                where, inputs = change
                outs[i][where] = self._products(inputs)[i]
        return outs

    def weight(self, index: int) -> Tensor:
        """Return the weight [N, K] of sibling `index`. Raises AdapterRefused if it is quantized."""
        if not isinstance(self._packed, ops.PackedLinear):
            raise AdapterRefused(["it needs weights of the base model, which are quantised"])
        first = sum(self.sizes[:index])
        return ops.unpack_linear(self._packed)[first : first + self.sizes[index]]

    def bias(self, index: int) -> Tensor | None:
        """Return the bias [N] of sibling `index`, None without one."""
        return self._biases[index]


class SiteLinear(nn.Module):
    """Replaces a linear layer. Its `weight` is on the meta device (shape and dtype only); the data is in `shared`."""

    def __init__(self, linear: nn.Module, shared: SharedInput, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = shared.sizes[index], shared.in_features
        if is_plain(linear):
            self.weight = nn.Parameter(linear.get_parameter("weight").to("meta"), requires_grad=False)
        else:
            self.weight = nn.Parameter(torch.empty(_shape(linear), dtype=dtype, device="meta"), requires_grad=False)
        self.shared = shared
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output [..., N] for x [..., K], including adapters."""
        return self.shared.output(self._index, x)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (output features, input features) of a module that looks like a linear layer, None for any other.

    Quantization libraries have classes of their own, all with the attributes of `nn.Linear`.
    """
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if next(module.children(), None) is not None or not all(isinstance(size, int) for size in shape):
        return None
    return shape  # pyright: ignore[reportReturnType] - both are int


def is_plain(linear: nn.Module) -> bool:
    """Return whether a layer computes exactly x @ weight.T + bias, so that its weight may be repacked."""
    if not isinstance(linear, (nn.Linear, Conv1D)) or "forward" in vars(linear):
        return False
    names = {name for name, _ in (*linear.named_parameters(), *linear.named_buffers())}
    if not names <= {"weight", "bias"} or not is_number(linear.get_parameter("weight")):
        return False
    return type(linear) in (nn.Linear, Conv1D) or _computes_its_product(linear)


def _computes_its_product(linear: nn.Module) -> bool:
    """Return whether a layer of another class, such as Falcon's, computes the same as `nn.Linear`."""
    weight = linear.get_parameter("weight")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    try:
        with torch.inference_mode():
            found, expected = linear(x), F.linear(x, weight, getattr(linear, "bias", None))
    except Exception:  # noqa: BLE001  it may need any arguments, and raise anything without them
        return False
    tolerance = 4 * torch.finfo(weight.dtype).eps
    return isinstance(found, Tensor) and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def is_number(parameter: Tensor) -> bool:
    """Return whether a parameter holds float weights, not a quantized form of them."""
    return type(parameter) is nn.Parameter and parameter.dtype in (torch.float32, torch.float16, torch.bfloat16)


def find_siblings(calls: list[LinearCall]) -> list[list[LinearCall]]:
    """Group the layers of a trial run by the tensors they read, in call order."""
    groups: dict[tuple[Any, ...], list[LinearCall]] = {}
    for call in calls:
        key = (*map(id, call.xs), _dtype(call), is_plain(call.module), isinstance(call.module, BlockLinear))
        groups.setdefault(key, []).append(call)
    return list(groups.values())


def install_sites(
    model: nn.Module, calls: list[LinearCall], attention_names: set[str], context: StepContext, impl: ops.Impl | None
) -> tuple[list[SiteInfo], list[SharedInput]]:
    """Replace every linear layer of a trial run with a `SiteLinear`. Return the sites, and the siblings in site order.

    attention_names: names of the modules that call attention; linear layers under them form the attention group.
    """
    infos: list[SiteInfo] = []
    shareds: list[SharedInput] = []
    for siblings in find_siblings(calls):
        modules, first = [call.module for call in siblings], siblings[0]
        num_lead = first.xs[0].ndim - 2
        shared = SharedInput(modules, context, is_head=first.is_head, impl=impl, num_lead=num_lead)
        shared.position = len(shareds)
        shareds.append(shared)
        for index, call in enumerate(siblings):
            infos.append(_site_info(call, len(infos), attention_names))
            parent, _, child = call.name.rpartition(".")
            setattr(model.get_submodule(parent), child, SiteLinear(call.module, shared, index, _dtype(call)))
    return infos, shareds


def _site_info(call: LinearCall, index: int, attention_names: set[str]) -> SiteInfo:
    parent = call.name.rpartition(".")[0]
    in_layer = any(part.isdigit() for part in parent.split("."))
    if any(parent == name or parent.startswith(f"{name}.") for name in attention_names):
        group = 0
    else:
        group = 1 if in_layer else 2
    out_features, in_features = _shape(call.module)
    kind = "conv1d" if isinstance(call.module, Conv1D) else "linear" if is_plain(call.module) else OPAQUE
    has_bias = getattr(call.module, "bias", None) is not None
    return SiteInfo(call.name, index, group, in_features, out_features, kind, _dtype(call), has_bias)


def _shape(linear: nn.Module) -> tuple[int, int]:
    shape = linear_shape(linear)
    assert shape is not None
    return shape


def _dtype(call: LinearCall) -> torch.dtype:
    """Return the dtype in which a layer computes: its weight's, or its input's if the weight is quantized."""
    return _weight(call.module).dtype if is_plain(call.module) else call.xs[0].dtype


def _weight(linear: nn.Module) -> Tensor:
    """Return the weight as [out, in]; transformers' Conv1D stores it transposed."""
    weight = linear.get_parameter("weight").detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def _joint_bias(linears: list[nn.Module], sizes: list[int]) -> Tensor | None:
    biases = [dict(linear.named_parameters(recurse=False)).get("bias") for linear in linears]
    known = next((bias for bias in biases if bias is not None), None)
    if known is None:
        return None
    return torch.cat(
        [known.new_zeros(size) if bias is None else bias.detach() for bias, size in zip(biases, sizes, strict=True)]
    )
