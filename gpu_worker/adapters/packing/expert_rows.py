"""An adapter's rows for experts on the host, and their packing for adapters with other extras.

The loader process packs those of plain adapters, see `gpu_worker.adapters.packing.rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.adapters.packing.rows import MAX_EXPERT_RANK
from gpu_worker.layers.expert_modules import ExpertShape, ExpertSite, GroupedExperts
from lora_kernels.ops import PAGE_ROWS
from peft_adapters.format import LoraWeights


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """An adapter's rows for one layer of experts."""

    site: int  # index into the sites of the model's grouped experts
    a: Tensor  # [E, rank, K]
    b: Tensor  # [E, rank, N]: B transposed
    scale: float

    @property
    def num_pages(self) -> int:
        """The number of pages it takes, of its layer's shape."""
        return -(-self.a.shape[1] // PAGE_ROWS)


def expert_sites(experts: Mapping[str, GroupedExperts]) -> list[ExpertSite]:
    """Return all sites for LoRA on grouped experts, in a fixed order."""
    return [site for module in experts.values() for site in module.sites]


def expert_shapes(sites: Iterable[ExpertSite]) -> list[ExpertShape]:
    """Return the distinct shapes of sites; rows of one shape share pages."""
    return list(dict.fromkeys(site.shape for site in sites))


def pages_by_shape(rows: Iterable[ExpertRows], sites: Sequence[ExpertSite]) -> list[int]:
    """Return the number of pages that rows take, for each of `expert_shapes`."""
    shapes = expert_shapes(sites)
    counts = [0] * len(shapes)
    for part in rows:
        counts[shapes.index(sites[part.site].shape)] += part.num_pages
    return counts


def pack_experts(
    parts: Sequence[LoraWeights], get: Callable[[str], Tensor], experts: Mapping[str, GroupedExperts]
) -> tuple[list[ExpertRows], list[LoraWeights]]:
    """Return an adapter's rows for experts, in their dtype, and the remaining parts.

    parts: LoRA on parameters. If a module has anything else, such as LoRA on a bias, all its parts remain.
    """
    sites = {site.name: i for i, site in enumerate(expert_sites(experts))}
    others = {_module_of(part) for part in parts if part.site not in sites or _rank_of(part, get) > MAX_EXPERT_RANK}
    mine = [part for part in parts if _module_of(part) not in others]
    shapes = [site.shape for site in expert_sites(experts)]
    rows = [_rows(part, get, sites[part.site], shapes[sites[part.site]]) for part in mine]
    return rows, [part for part in parts if _module_of(part) in others]


def _module_of(part: LoraWeights) -> str:
    return part.site.rpartition(".")[0]


def _rank_of(part: LoraWeights, get: Callable[[str], Tensor]) -> int:
    """Return the number of rows of A of one expert, over all layers that the parameter fuses."""
    return sum(len(get(name)) for name, _ in part.experts[0]) if part.experts else part.rank


def _rows(part: LoraWeights, get: Callable[[str], Tensor], site: int, shape: ExpertShape) -> ExpertRows:
    num, dtype = shape.num_experts, shape.dtype
    if not part.experts:
        # PEFT stores A as [E * rank, in], and B as [out, rank * E] with interleaved columns of the experts.
        a = get(part.a).to(dtype).reshape(num, -1, shape.in_features)
        b = get(part.b).to(dtype).reshape(shape.out_features, -1, num).permute(2, 1, 0)
        return ExpertRows(site, a.contiguous(), b.contiguous(), part.scale)
    rank = _rank_of(part, get)
    a = torch.empty(num, rank, shape.in_features, dtype=dtype)
    b = torch.zeros(num, rank, shape.out_features, dtype=dtype)
    for expert, layers in enumerate(part.experts):
        row = column = 0
        for name_a, name_b in layers:  # stacked in A; in B each layer has its own outputs
            own_a, own_b = get(name_a), get(name_b)
            a[expert, row : row + len(own_a)] = own_a
            b[expert, row : row + len(own_a), column : column + len(own_b)] = own_b.T
            row, column = row + len(own_a), column + len(own_b)
    return ExpertRows(site, a, b, part.scale)
