"""Packs an adapter's extras on the host: its changes of a model besides pooled LoRA rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.adapters.packing.rows import quantise
from gpu_worker.layers.adaptable_modules import AdaptableModules
from gpu_worker.layers.extras import (
    Dora,
    EmbeddingExtras,
    Extras,
    LinearExtras,
    LinearTransform,
    LowRank,
    ParameterLora,
    Places,
    Tokens,
)
from gpu_worker.layers.lora import SiteInfo
from peft_adapters.format import AdapterSpec, LoraWeights, ReplacedWeights, TrainedTokens
from peft_adapters.spec import LayerOperation, VirtualTokens
from protocol.wire.errors import AdapterRefused

GetTensor = Callable[[str], Tensor]
"""Return a tensor of the adapter by name, in the file's dtype."""


def pack_extras(
    spec: AdapterSpec, get: GetTensor, sites: dict[str, SiteInfo], adaptable: AdaptableModules, *, int8: bool = False
) -> Extras:
    """Return an adapter's extras in the model's dtypes. sites: linear layers by name.

    int8: whether the pool holds int8 rows; results computed from rows here then use the rounded values. Raises
    AdapterRefused for changes that need the weights of quantized layers, or of layers whose weights it replaces.
    """
    return _ExtrasPacker(sites, adaptable, get, int8=int8).pack(spec)


def matrices_of(part: LoraWeights, get: GetTensor, adaptable: AdaptableModules) -> tuple[Tensor, Tensor]:
    """Return A [rank, in] and B [out, rank] of one module like `lora_matrices`; for kinds other than LoRA in fp32.

    Raises AdapterRefused for a kind that needs the weights of quantized layers.
    """
    if part.of_kind is None:
        return lora_matrices(part, get)
    weight = None
    if part.needs_weight:
        base = adaptable.parameter(part.site, "weight")
        assert base is not None
        weight = base.float().cpu().numpy()
    a, b = part.of_kind.matrices(lambda name: _as_numpy(get(name)), weight)
    return torch.from_numpy(np.ascontiguousarray(a)), torch.from_numpy(np.ascontiguousarray(b))


def _as_numpy(tensor: Tensor) -> NDArray[Any]:
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _tensor(numbers: NDArray[Any] | None) -> Any:
    return None if numbers is None else torch.from_numpy(np.ascontiguousarray(numbers))


def lora_matrices(part: LoraWeights, get: GetTensor) -> tuple[Tensor, Tensor]:
    """Return A [rank, in] and B [out, rank] of one module in the file's dtype, AdaLoRA's values multiplied into A."""
    if part.blocks:
        return _block_matrices(part, get)
    a, b = get(part.a), get(part.b)
    return (a * get(part.singular) if part.singular else a), b


def _block_matrices(part: LoraWeights, get: GetTensor) -> tuple[Tensor, Tensor]:
    """Return A and B of a layer that the adapter's model fuses or splits differently; B in fp32 if it is scaled."""
    a = torch.cat([get(block.a) for block in part.blocks])
    rows = [get(block.b)[block.begin : block.end] for block in part.blocks]
    if any(block.factor != 1.0 for block in part.blocks):
        rows = [block.factor * own.float() for block, own in zip(part.blocks, rows, strict=True)]
    b = torch.zeros(part.width, len(a), dtype=rows[0].dtype)
    column = 0
    for block, own in zip(part.blocks, rows, strict=True):
        b[block.at : block.at + len(own), column : column + own.shape[1]] = own
        column += own.shape[1]
    return a, b


def _rounded(rows: Tensor) -> Tensor:
    """Return the values that rows have after int8 rounding, in fp32."""
    numbers, steps = quantise(rows.float().contiguous().numpy())
    return torch.from_numpy(numbers * steps[:, None])


class _ExtrasPacker:
    """Packs the extras of one adapter. Replaced weights come first, because DoRA and LoRA refer to them."""

    def __init__(self, sites: dict[str, SiteInfo], adaptable: AdaptableModules, get: GetTensor, *, int8: bool) -> None:
        self._int8 = int8
        self._sites = sites
        self._adaptable = adaptable
        self._get = get
        self._linear: defaultdict[str, dict[str, Any]] = defaultdict(dict)  # module -> fields of LinearExtras
        self._embeddings: defaultdict[str, dict[str, Any]] = defaultdict(dict)  # module -> fields of EmbeddingExtras
        self._norms: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)

    def pack(self, spec: AdapterSpec) -> Extras:
        for part in spec.replaced:
            self._replace(part)
        self._check_kinds(spec)
        for part in spec.sites:
            self._pack_linear(part)
        for part in spec.operations:
            self._pack_operation(part)
        for part in spec.embeddings:
            self._pack_embedding(part)
        for part in spec.tokens:
            self._pack_tokens(part, spec)
        parameters: defaultdict[str, list[ParameterLora]] = defaultdict(list)
        for part in spec.parameters:
            module, _, parameter = part.site.rpartition(".")
            parameters[module].append(self._parameter(part, module, parameter))
        prefix = self._pack_virtual(spec.virtual) if spec.virtual is not None else None
        inner = [*self._linear, *self._norms, *parameters]
        return Extras(
            linear={self._sites[name].index: LinearExtras(**fields) for name, fields in self._linear.items()},
            embeddings={name: EmbeddingExtras(**fields) for name, fields in self._embeddings.items()},
            norms=dict(self._norms),
            parameters=dict(parameters),
            vocab_size=spec.vocab_size,
            unscaled=spec.unscaled,
            head=self._get(spec.head).to(next(iter(self._sites.values())).dtype) if spec.head else None,
            in_layers=prefix is not None or any(part.isdigit() for name in inner for part in name.split(".")),
            num_virtual=spec.virtual.num if spec.virtual is not None else 0,
            prefix=prefix,
        )

    # ------------------------------------------------------------ by kind of change

    def _replace(self, part: ReplacedWeights) -> None:
        """Store a replaced parameter, unless it equals the base model's: PEFT saves those too."""
        base = self._adaptable.parameter(part.site, part.parameter)
        assert base is not None
        tensor = self._get(part.tensor).to(base.dtype)
        site = self._sites.get(part.site)
        if site is not None and site.kind == "conv1d" and part.parameter == "weight":
            tensor = tensor.T.contiguous()
        if tensor.shape == base.shape and torch.equal(tensor, base.cpu()):
            return
        if site is not None:
            self._linear[part.site][part.parameter] = tensor
        elif part.site in self._adaptable.embeddings:
            self._embeddings[part.site][part.parameter] = tensor
        else:
            self._norms[part.site][part.parameter] = tensor

    def _check_kinds(self, spec: AdapterSpec) -> None:
        """Raise AdapterRefused where a kind that is served on the base's weights only would change a replaced one."""
        kinds = {part.site: part.kind for part in spec.operations}
        kinds |= {part.site: part.of_kind.kind for part in spec.sites if part.of_kind and part.needs_weight}
        reasons = [
            f"{kind} is not served on a layer whose weight the adapter replaces: {site}"
            for site, kind in kinds.items()
            if "weight" in self._linear.get(site, {})
        ]
        if reasons:
            raise AdapterRefused(reasons)

    def _pack_linear(self, part: LoraWeights) -> None:
        """Store the parts of a linear layer's LoRA that are not rows for the pool."""
        site = self._sites[part.site]
        width = part.width or len(self._get(part.b))
        # Pooled rows are added to the output of the base's weight, so they fit neither a replaced weight nor another
        # vocabulary.
        if width != site.out_features or "weight" in self._linear.get(part.site, {}):
            a, b = matrices_of(part, self._get, self._adaptable)
            self._linear[part.site]["lora"] = LowRank(a.to(site.dtype), b.T.to(site.dtype).contiguous(), part.scale)
        if part.bias:
            self._linear[part.site]["lora_bias"] = part.scale * self._bias(part)
        if part.magnitude:
            self._linear[part.site]["dora"] = self._dora(part, self._weight(part.site))

    def _pack_operation(self, part: LayerOperation) -> None:
        """Store an adapter's changes of a linear layer other than rank rows."""
        change = part.change(lambda name: _as_numpy(self._get(name)))
        fields = self._linear[part.site]
        for name, own in (("inputs", change.inputs), ("outputs", change.outputs)):
            if own is not None:
                fields[name] = LinearTransform(_tensor(own.scale), _tensor(own.across), own.group, _tensor(own.blocks))
        if change.bias is not None:
            fields["lora_bias"] = _tensor(change.bias)
        if change.places is not None:
            fields["places"] = Places(_tensor(change.places), _tensor(change.numbers))

    def _pack_embedding(self, part: LoraWeights) -> None:
        a, b = (tensor.to(self._dtype(part.site)) for tensor in lora_matrices(part, self._get))
        self._embeddings[part.site]["lora"] = LowRank(a, b.T.contiguous(), part.scale)
        if part.magnitude:
            # For DoRA an embedding is a linear layer with the transposed weight.
            self._embeddings[part.site]["dora"] = self._dora(part, self._weight(part.site).T)

    def _pack_tokens(self, part: TrainedTokens, spec: AdapterSpec) -> None:
        order = sorted(range(len(part.indices)), key=part.indices.__getitem__)
        rows = self._get(part.tensor)[order].to(self._dtype(part.site))
        indices = torch.tensor(sorted(part.indices))
        lora = next((self._columns(lora, indices) for lora in spec.sites if lora.site == part.site), None)
        fields = self._linear if part.site in self._sites else self._embeddings
        fields[part.site]["tokens"] = Tokens(indices, rows, lora)

    def _columns(self, part: LoraWeights, indices: Tensor) -> LowRank:
        """Return the LoRA of a linear layer, limited to some of its outputs."""
        a, b = (tensor.to(self._dtype(part.site)) for tensor in self._added(part))
        return LowRank(a, b[indices].T.contiguous(), part.scale)

    def _parameter(self, part: LoraWeights, module: str, parameter: str) -> ParameterLora:
        owner = self._adaptable.modules[module].module
        weight = owner.get_parameter(parameter)
        if part.experts:
            return ParameterLora(parameter, *self._experts(part, weight.dtype), part.scale)
        a, b = self._get(part.a).to(weight.dtype), self._get(part.b).to(weight.dtype)
        if weight.ndim == 2:
            return ParameterLora(parameter, b, a, part.scale)
        num_experts = len(weight)
        a = a.reshape(num_experts, -1, a.shape[-1])  # [experts, rank, in]
        b = b.reshape(len(b), -1, num_experts).permute(2, 0, 1)  # [experts, out, rank]
        if getattr(owner, "is_transposed", False):
            a, b = b.transpose(-2, -1), a.transpose(-2, -1)
        return ParameterLora(parameter, b.contiguous(), a.contiguous(), part.scale)

    def _experts(self, part: LoraWeights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return b [experts, out, rank] and a [experts, rank, in] of experts whose layers have separate matrices."""
        a = [torch.cat([self._get(name) for name, _ in pairs]) for pairs in part.experts]
        b = [torch.block_diag(*(self._get(name) for _, name in pairs)) for pairs in part.experts]
        return torch.stack(b).to(dtype), torch.stack(a).to(dtype)

    def _added(self, part: LoraWeights) -> tuple[Tensor, Tensor]:
        """Return the A and B that steps will add: with int8 rounding if the pool holds them in int8."""
        a, b = matrices_of(part, self._get, self._adaptable)
        if not self._int8 or part.site not in self._sites or "lora" in self._linear[part.site]:
            return a, b
        return _rounded(a), _rounded(b.T).T

    def _pack_virtual(self, part: VirtualTokens) -> Tensor | None:
        """Store virtual tokens. Return their keys and values [layers, 2, num, Hkv, D], None if they are embeddings."""
        values = self._get(part.tensor)
        if part.shape:
            layers, heads, entries = part.shape
            dtype = next(iter(self._adaptable.embeddings.values())).module.weight.dtype
            return values.to(dtype).view(part.num, layers, 2, heads, entries).permute(1, 2, 0, 3, 4).contiguous()
        if part.task:
            columns, rows = (self._get(name)[0].float() for name in part.task)
            values = values.float() * (columns @ rows)
        self._embeddings[part.site]["virtual"] = values.to(self._adaptable.embeddings[part.site].module.weight.dtype)
        return None

    # ------------------------------------------------------------ weights in force

    def _weight(self, site: str) -> Tensor:
        """Return a site's effective weight: the adapter's own, else the base model's."""
        own = (self._linear if site in self._sites else self._embeddings)[site].get("weight")
        base = own if own is not None else self._adaptable.parameter(site, "weight")
        assert base is not None
        return base

    def _dtype(self, site: str) -> torch.dtype:
        """Return the dtype of `_weight`, without dequantizing."""
        own = (self._linear if site in self._sites else self._embeddings)[site].get("weight")
        if own is not None:
            return own.dtype
        if site in self._sites:
            return self._sites[site].dtype
        return self._adaptable.embeddings[site].module.weight.dtype

    def _bias(self, part: LoraWeights) -> Tensor:
        """Return LoRA's bias [N] in fp32, zero for outputs without one."""
        if not part.blocks:
            return self._get(part.bias).float()
        found = torch.zeros(part.width)
        for block in part.blocks:
            rows = self._get(block.bias)[block.begin : block.end].float()
            found[block.at : block.at + len(rows)] = block.factor * rows
        return found

    def _magnitude(self, part: LoraWeights, weight: Tensor) -> Tensor:
        """Return DoRA's magnitudes [N] in fp32; for outputs without one, the norm of the weight's row.

        weight: [N, K].
        """
        if not part.blocks:
            return self._get(part.magnitude).float()
        found = torch.linalg.norm(weight, dim=1).cpu()
        for block in part.blocks:
            rows = self._get(block.magnitude)[block.begin : block.end].float()
            found[block.at : block.at + len(rows)] = rows
        return found

    def _dora(self, part: LoraWeights, weight: Tensor) -> Dora:
        """Compute DoRA's factors as PEFT does: in fp32, from the effective weight [N, K] and LoRA's change of it."""
        a, b = (tensor.to(weight.device).float() for tensor in self._added(part))
        weight = weight.float()
        delta = b @ a
        magnitude = self._magnitude(part, weight)
        norm = torch.linalg.norm(weight + part.scale * delta, dim=1).cpu()
        squares = [
            weight.square().sum(1),
            2 * part.scale * (weight * delta).sum(1),
            (part.scale * delta).square().sum(1),
        ]
        return Dora(magnitude, magnitude / norm, torch.stack(squares).cpu())
