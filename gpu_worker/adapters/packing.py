"""From an adapter's files to what the pool wants: low-rank rows in the pool's dtype, and extras."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from gpu_worker.adapters.extras import (
    Dora,
    EmbeddingExtras,
    Extras,
    LinearExtras,
    LowRank,
    ParameterLora,
    Tokens,
    map_tensors,
)
from gpu_worker.adapters.rows import MAX_RANK, Rows, RowSite, layout
from gpu_worker.model.adaptable_modules import AdaptableModules
from gpu_worker.model.lora import GROUPS, SiteInfo
from lora_kernels.ops import PAGE_ROWS
from peft_adapters.format import AdapterSpec, LoraWeights, ReplacedWeights, parse_header, read_adapter
from peft_adapters.safetensors_header import MAX_HEADER_BYTES, TensorInfo
from protocol.wire.errors import AdapterRefused
from protocol.wire.messages import ServedModel

EXTRA_PAGE_BYTES = 1 << 16
"""Extras are counted in pages of this size; they are not stored in pages."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

GetTensor = Callable[[str], Tensor]
"""A tensor of the adapter by name, in the file's dtype."""


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter in host memory: the rows to copy, in the pool's dtype, and its extras."""

    digest: str
    ranks: np.ndarray  # int32 [sites]; 0: not touched
    scales: np.ndarray  # float32 [sites]
    rows: list[tuple[int, Tensor, Tensor]]  # (site, A [rank, K], B transposed [rank, N])
    num_pages: tuple[int, ...]  # by group of the pool, extras last
    num_bytes: int
    extras: Extras = field(default_factory=Extras)
    invocation: tuple[int, ...] = ()  # activated LoRA, see `AdapterSpec`
    tokenizer: Tokenizer | None = None  # its own, if it brings one


@dataclass(frozen=True)
class Packer:
    """Packs adapters for one model."""

    sites: Sequence[SiteInfo]
    served: ServedModel
    adaptable: AdaptableModules
    pin: bool  # keep the rows in page-locked memory, from which a GPU copies beside its computing

    @cached_property
    def row_sites(self) -> list[RowSite]:
        return row_sites(self.sites)

    def pack(self, digest: str, config: dict[str, Any], weights: Any) -> HostAdapter:
        """Read a PEFT adapter. weights: a safetensors file as a buffer. Raises AdapterRefused."""
        return self.pack_spec(digest, *self.read(config, weights))

    def read(self, config: dict[str, Any], weights: Any) -> tuple[AdapterSpec, GetTensor]:
        """Read a PEFT adapter without packing it. Raises AdapterRefused."""
        view = memoryview(weights)
        tensors = parse_header(bytes(view[: 8 + MAX_HEADER_BYTES]), len(view))
        spec = read_adapter(config, tensors, self.served)
        file = torch.frombuffer(bytearray(view), dtype=torch.uint8)
        return spec, lambda name: _read(file, tensors[name])

    def wrap(self, digest: str, packed: Rows) -> HostAdapter:
        """Return an adapter whose rows have been packed elsewhere; they stay where they are."""
        memory = torch.frombuffer(packed.buffer, dtype=torch.uint8)
        if self.pin:
            memory = memory.pin_memory()
        typed = {site.dtype: memory.view(site.dtype) for site in self.sites}
        rows: list[tuple[int, Tensor, Tensor]] = []
        group_ranks = [0] * len(GROUPS)
        for index, begin_a, begin_b, _ in layout(packed.ranks, self.row_sites):
            site, rank, item_bytes = self.sites[index], int(packed.ranks[index]), self.row_sites[index].item_bytes
            numbers, k, n = typed[site.dtype], site.in_features, site.out_features
            a = numbers.as_strided((rank, k), (k, 1), begin_a // item_bytes)
            b = numbers.as_strided((rank, n), (n, 1), begin_b // item_bytes)
            rows.append((index, a, b))
            group_ranks[site.group] = max(group_ranks[site.group], rank)
        num_pages = (*(-(-rank // PAGE_ROWS) for rank in group_ranks), 0)
        return HostAdapter(
            digest, packed.ranks, packed.scales, rows, num_pages, memory.nbytes, invocation=packed.invocation
        )

    def pack_spec(self, digest: str, spec: AdapterSpec, get: GetTensor) -> HostAdapter:
        """Pack what has been read. Raises AdapterRefused."""
        if spec.rank > MAX_RANK:
            raise AdapterRefused([f"rank {spec.rank} is over this worker's limit of {MAX_RANK}"])
        by_name = {site.name: site for site in self.sites}
        ranks, scales = np.zeros(len(self.sites), np.int32), np.zeros(len(self.sites), np.float32)
        group_ranks = [0] * len(GROUPS)
        rows: list[tuple[int, Tensor, Tensor]] = []
        names: list[str] = []
        with torch.inference_mode():
            extras = _ExtrasPacker(by_name, self.adaptable, get).pack(spec)
            for part in spec.sites:
                site = by_name[part.site]
                a, b = lora_matrices(part, get)
                own = extras.linear.get(site.index)
                if own is not None and own.lora is not None:
                    continue  # not in the pool
                rows.append((site.index, a.to(site.dtype), b.T.to(site.dtype).contiguous()))
                names += [part.a, part.b]
                ranks[site.index], scales[site.index] = part.rank, part.scale
                group_ranks[site.group] = max(group_ranks[site.group], part.rank)
        _check_finite(rows, names, extras)
        if self.pin:
            rows = [(index, a.pin_memory(), b.pin_memory()) for index, a, b in rows]
            extras = map_tensors(extras, Tensor.pin_memory)
        extra_bytes = extras.num_bytes
        num_pages = (*(-(-rank // PAGE_ROWS) for rank in group_ranks), -(-extra_bytes // EXTRA_PAGE_BYTES))
        num_bytes = sum(a.nbytes + b.nbytes for _, a, b in rows) + extra_bytes
        return HostAdapter(digest, ranks, scales, rows, num_pages, num_bytes, extras, spec.invocation)


def row_sites(sites: Sequence[SiteInfo]) -> list[RowSite]:
    """Return what packing rows elsewhere needs to know of the sites."""
    return [RowSite(s.name, s.in_features, s.out_features, str(s.dtype).removeprefix("torch.")) for s in sites]


def lora_matrices(part: LoraWeights, get: GetTensor) -> tuple[Tensor, Tensor]:
    """Return A [rank, in] and B [out, rank] of one place in the file's dtype, AdaLoRA's values multiplied in."""
    a, b = get(part.a), get(part.b)
    return (a * get(part.singular) if part.singular else a), b


def _read(file: Tensor, info: TensorInfo) -> Tensor:
    """Return one tensor of a file (uint8 [bytes])."""
    part = file[info.begin : info.end]
    if info.begin % _DTYPES[info.dtype].itemsize:
        part = part.clone()  # a view needs aligned numbers
    return part.view(_DTYPES[info.dtype]).view(info.shape)


def _check_finite(rows: Sequence[tuple[int, Tensor, Tensor]], names: Sequence[str], extras: Extras) -> None:
    """Raise AdapterRefused when a number is not finite in the pool's dtype. names: of the rows' tensors."""
    # isfinite is twenty times slower on bf16 than this, which NaN and infinity pass through as well.
    tensors = [tensor for _, a, b in rows for tensor in (a, b)]
    others: list[Tensor] = []
    map_tensors(extras, lambda tensor: others.append(tensor) or tensor)
    extremes = [torch.stack(torch.aminmax(tensor)).float() for tensor in (*tensors, *others) if tensor.numel()]
    if not extremes:
        return
    bad = ~torch.isfinite(torch.stack(extremes)).all(-1)
    if bad.any():
        places = [*names, *["what it changes besides"] * len(others)]
        found = dict.fromkeys(places[i] for i in bad.nonzero()[:, 0].tolist())
        dtype = rows[0][1].dtype if rows else torch.float32
        raise AdapterRefused([f"numbers that are not finite in {dtype}: {', '.join(list(found)[:5])}"])


class _ExtrasPacker:
    """Packs one adapter's extras."""

    def __init__(self, sites: dict[str, SiteInfo], adaptable: AdaptableModules, get: GetTensor) -> None:
        self._sites = sites
        self._adaptable = adaptable
        self._get = get
        self._linear: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        self._embeddings: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        self._norms: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)

    def pack(self, spec: AdapterSpec) -> Extras:
        for part in spec.replaced:
            self._replace(part)
        for part in spec.sites:
            self._pack_linear(part)
        for part in spec.embeddings:
            a, b = (tensor.to(self._dtype(part.site)) for tensor in lora_matrices(part, self._get))
            self._embeddings[part.site]["lora"] = LowRank(a, b.T.contiguous(), part.scale)
            if part.magnitude:
                # DoRA takes an embedding for a linear layer of its transpose.
                self._embeddings[part.site]["dora"] = self._dora(part, self._weight(part.site).T)
        for part in spec.tokens:
            order = sorted(range(len(part.indices)), key=part.indices.__getitem__)
            rows = self._get(part.tensor)[order].to(self._dtype(part.site))
            indices = torch.tensor(sorted(part.indices))
            lora = next((self._columns(lora, indices) for lora in spec.sites if lora.site == part.site), None)
            fields = self._linear if part.site in self._sites else self._embeddings
            fields[part.site]["tokens"] = Tokens(indices, rows, lora)
        parameters: defaultdict[str, list[ParameterLora]] = defaultdict(list)
        for part in spec.parameters:
            module, _, parameter = part.site.rpartition(".")
            parameters[module].append(self._parameter(part, module, parameter))
        inner = [*self._linear, *self._norms, *parameters]
        return Extras(
            linear={self._sites[name].index: LinearExtras(**fields) for name, fields in self._linear.items()},
            embeddings={name: EmbeddingExtras(**fields) for name, fields in self._embeddings.items()},
            norms=dict(self._norms),
            parameters=dict(parameters),
            vocab_size=spec.vocab_size,
            in_layers=any(part.isdigit() for name in inner for part in name.split(".")),
        )

    def _replace(self, part: ReplacedWeights) -> None:
        """Take a replaced parameter, unless it is just the base's: PEFT saves those too."""
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

    def _pack_linear(self, part: LoraWeights) -> None:
        site = self._sites[part.site]
        a, b = lora_matrices(part, self._get)
        # The pool holds what is added to the base's output: not to another layer's, or to that of another vocabulary.
        if len(b) != site.out_features or "weight" in self._linear.get(part.site, {}):
            self._linear[part.site]["lora"] = LowRank(a.to(site.dtype), b.T.to(site.dtype).contiguous(), part.scale)
        if part.bias:
            self._linear[part.site]["lora_bias"] = part.scale * self._get(part.bias).float()
        if part.magnitude:
            self._linear[part.site]["dora"] = self._dora(part, self._weight(part.site))

    def _columns(self, part: LoraWeights, indices: Tensor) -> LowRank:
        """Return the LoRA of a layer for some of its outputs."""
        a, b = (tensor.to(self._dtype(part.site)) for tensor in lora_matrices(part, self._get))
        return LowRank(a, b[indices].T.contiguous(), part.scale)

    def _weight(self, site: str) -> Tensor:
        """Return the weight that is in force under the adapter."""
        own = (self._linear if site in self._sites else self._embeddings)[site].get("weight")
        base = own if own is not None else self._adaptable.parameter(site, "weight")
        assert base is not None
        return base

    def _dora(self, part: LoraWeights, weight: Tensor) -> Dora:
        """Compute DoRA's factors as PEFT does: fp32, from the weight [N, K] and what LoRA adds to it."""
        a, b = (tensor.to(weight.device).float() for tensor in lora_matrices(part, self._get))
        weight = weight.float()
        delta = b @ a
        magnitude = self._get(part.magnitude).float()
        norm = torch.linalg.norm(weight + part.scale * delta, dim=1).cpu()
        squares = [
            weight.square().sum(1),
            2 * part.scale * (weight * delta).sum(1),
            (part.scale * delta).square().sum(1),
        ]
        return Dora(magnitude, magnitude / norm, torch.stack(squares).cpu())

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
        """Return b [experts, out, rank] and a [experts, rank, in] of experts whose layers have their own matrices."""
        a = [torch.cat([self._get(name) for name, _ in pairs]) for pairs in part.experts]
        b = [torch.block_diag(*(self._get(name) for _, name in pairs)) for pairs in part.experts]
        return torch.stack(b).to(dtype), torch.stack(a).to(dtype)

    def _dtype(self, site: str) -> torch.dtype:
        return self._weight(site).dtype
