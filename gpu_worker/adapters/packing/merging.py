"""Merges several adapters into one, as PEFT's `add_weighted_adapter` or LoRAX does. Runs in loader threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpu_worker.adapters.loader.fetch import FetchedAdapter
from gpu_worker.adapters.packing.extras_packer import GetTensor, lora_matrices
from gpu_worker.adapters.packing.packer import HostAdapter, Packer
from peft_adapters.config import AdapterConfig, read_config
from peft_adapters.format import AdapterSpec, LoraWeights
from peft_adapters.reasons import Reasons
from peft_adapters.recipe import Merge
from protocol.wire.errors import AdapterRefused


@dataclass(frozen=True, slots=True)
class MergeInput:
    """One of the adapters to merge."""

    config: AdapterConfig
    spec: AdapterSpec
    get: GetTensor
    weight: float

    @property
    def rank(self) -> int:
        """The rank that PEFT takes the adapter to have: the largest one in its config."""
        return max((self.config.r, *self.config.ranks.numbers.values()))


@dataclass(frozen=True, slots=True)
class _Factor:
    """LoRA of one adapter on one module, fp32."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scale: float
    weight: float

    def delta(self, *, transposed: bool) -> Tensor:
        """Return what it adds to the weight [out, in], or to the transposed weight."""
        product = self.b @ self.a
        return (product.T if transposed else product) * self.scale


def merge_adapters(
    digest: str, merge: Merge, files: Sequence[FetchedAdapter], packer: Packer, order: Sequence[str]
) -> HostAdapter:
    """Merge the adapters in `files` as `merge` says, and pack the result under `digest`.

    order: names of all the model's modules in its own order, in which random pruning draws. Raises AdapterRefused for
    adapters that cannot be merged.
    """
    parts = [_read(file, packer, weight) for file, weight in zip(files, merge.weights, strict=True)]
    merger = _Merger(merge, parts)
    tensors: dict[str, Tensor] = {}
    merged: dict[str, list[LoraWeights]] = {"sites": [], "embeddings": []}
    targets = _targets(parts)
    kinds = {site.name: site.kind for site in packer.served.sites}
    for name in (name for name in order if kinds.get(name) and targets.chosen(name)):
        found = [
            (part, lora) for part in parts for lora in (*part.spec.sites, *part.spec.embeddings) if lora.site == name
        ]
        if not found:
            raise AdapterRefused([f"{name} is targeted, but none of the merged adapters has LoRA there"])
        a, b, scale = merger.merge(found, transposed=kinds[name] in ("conv1d", "embedding"))
        tensors |= {f"{name}.a": a, f"{name}.b": b}
        kind = "embeddings" if kinds[name] == "embedding" else "sites"
        merged[kind].append(LoraWeights(name, len(a), scale, f"{name}.a", f"{name}.b"))
    spec = AdapterSpec(tuple(merged["sites"]), tuple(merged["embeddings"]))
    return packer.pack_spec(digest, spec, tensors.__getitem__)


def _read(files: FetchedAdapter, packer: Packer, weight: float) -> MergeInput:
    """Read one adapter. Raises AdapterRefused if it is more than LoRA on linear layers and embeddings."""
    config = read_config(files.config, Reasons())
    spec, get = packer.read(files.config, files.weights)
    assert config is not None  # `Packer.read` refuses a config with anything wrong
    loras = (*spec.sites, *spec.embeddings)
    more = {
        "DoRA": any(lora.magnitude for lora in loras),
        "lora_bias": any(lora.bias for lora in loras),
        "AdaLoRA": any(lora.singular for lora in loras),
        "alora_invocation_tokens": bool(spec.invocation),
        "target_parameters": bool(config.parameters),
        "trained tokens": bool(spec.tokens),
        "another vocabulary": bool(spec.vocab_size),
        "whole modules or biases": bool(packer.pack_spec("", replace(spec, sites=(), embeddings=()), get).extras),
    }
    reasons = [
        f"merging knows plain LoRA only; one of the adapters has {name}" for name, is_on in more.items() if is_on
    ]
    if reasons:
        raise AdapterRefused(reasons)
    return MergeInput(config, spec, get, weight)


def _targets(parts: Sequence[MergeInput]) -> _JointTargets:
    """Return the targets of the merged adapter. Raises AdapterRefused where PEFT cannot join them."""
    if len({part.config.targets.targets.pattern is None for part in parts}) > 1:
        raise AdapterRefused(["target_modules of some merged adapters are lists, of others patterns"])
    return _JointTargets(parts)


@dataclass(frozen=True, slots=True)
class _JointTargets:
    """The targets of all adapters together, under the other fields of the first one's config."""

    parts: Sequence[MergeInput]

    def chosen(self, module: str) -> bool:
        first = self.parts[0].config
        return not first.saved.excludes(module) and any(
            replace(first.targets, targets=part.config.targets.targets).chosen(module) for part in self.parts
        )


class _Merger:
    """Merges module by module, in the model's order, because random pruning draws numbers in that order."""

    def __init__(self, merge: Merge, parts: Sequence[MergeInput]) -> None:
        # PEFT merges a single adapter linearly, whatever the strategy.
        self.strategy = "linear" if len(parts) == 1 and merge.arithmetic == "peft" else merge.strategy
        self._merge = merge
        self._random = torch.Generator().manual_seed(merge.seed)
        ranks = [part.rank for part in parts]
        if self.strategy == "cat":
            self._rank = sum(ranks)
        elif self.strategy.endswith("svd"):
            self._rank = merge.svd_rank or max(ranks)
        elif len(set(ranks)) == 1:
            self._rank = ranks[0]
        else:
            shown = ", ".join(map(str, ranks))
            raise AdapterRefused(
                [f"merge_strategy {self.strategy} needs equal ranks; these have {shown}: take cat or svd"]
            )
        # PEFT gives the result the first one's rsLoRA, with alpha = rank.
        self._scale = math.sqrt(self._rank) if parts[0].config.use_rslora else 1.0

    def merge(
        self, found: Sequence[tuple[MergeInput, LoraWeights]], *, transposed: bool
    ) -> tuple[Tensor, Tensor, float]:
        """Return A [rank, in], B [out, rank] and scale on one module.

        found: the LoRA of each adapter that has any there. transposed: whether the base stores the weight as [in, out].
        """
        factors = []
        for part, lora in found:
            a, b = lora_matrices(lora, part.get)
            factors.append(_Factor(a.float(), b.float(), lora.scale, part.weight))
        if self.strategy == "cat":
            a = torch.cat([factor.a * factor.weight * factor.scale for factor in factors])
            return a, torch.cat([factor.b for factor in factors], dim=1), self._scale
        if self.strategy == "svd":
            return *self._svd(factors), self._scale
        if self.strategy.endswith("svd"):
            deltas = [factor.delta(transposed=transposed) for factor in factors]
            delta = self._combine(deltas, [factor.weight for factor in factors], self.strategy.removesuffix("_svd"))
            u, s, vh = torch.linalg.svd(delta.T if transposed else delta, full_matrices=False)
            return vh[: self._rank].contiguous(), (u * s)[:, : self._rank].contiguous(), self._scale
        return self._elementwise(factors)

    def _svd(self, factors: Sequence[_Factor]) -> tuple[Tensor, Tensor]:
        """Return A, B of the best approximation of the weighted sum B @ A, from decompositions of the thin factors."""
        qb, rb = torch.linalg.qr(torch.cat([factor.b for factor in factors], dim=1))
        qa, ra = torch.linalg.qr(torch.cat([factor.a * (factor.weight * factor.scale) for factor in factors]).T)
        u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
        return (vh[: self._rank] @ qa.T).contiguous(), (qb @ (u * s)[:, : self._rank]).contiguous()

    def _elementwise(self, factors: Sequence[_Factor]) -> tuple[Tensor, Tensor, float]:
        """Merge all A, and all B, element by element."""
        if len({factor.a.shape for factor in factors}) > 1:
            raise AdapterRefused([f"merge_strategy {self.strategy} needs equal ranks at every layer: take cat or svd"])
        if self._merge.arithmetic == "lorax":
            of_a = of_b = [factor.weight for factor in factors]
            scale = factors[0].scale
        else:
            products = [factor.weight * factor.scale for factor in factors]
            of_b = [math.sqrt(abs(product)) for product in products]
            of_a = [math.copysign(root, product) for root, product in zip(of_b, products, strict=True)]
            scale = self._scale
        a = self._combine([factor.a for factor in factors], of_a, self.strategy)
        b = self._combine([factor.b for factor in factors], of_b, self.strategy)
        return a, b, scale

    def _combine(self, tensors: Sequence[Tensor], weights: Sequence[float], strategy: str) -> Tensor:
        """Return the weighted sum of tensors of one shape, pruned as the strategy says.

        With "ties", numbers whose sign is not the elected one do not count (TIES-Merging, Yadav et al., 2023).
        """
        if strategy.startswith("dare"):
            tensors = [self._prune_random(tensor) for tensor in tensors]
        elif strategy in ("ties", "magnitude_prune"):
            tensors = [self._prune_small(tensor) for tensor in tensors]
        stack = torch.stack(list(tensors))
        weighted = stack * torch.tensor(weights).view(-1, *[1] * (stack.ndim - 1))
        if not strategy.endswith("ties"):
            return weighted.sum(0)
        votes = stack.sum(0) if self._merge.majority_sign == "total" else stack.sign().sum(0)
        agrees = stack.sign() == torch.where(votes >= 0, 1, -1)
        return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1.0)

    def _prune_small(self, tensor: Tensor) -> Tensor:
        """Keep the share `density` of the numbers with the largest magnitudes."""
        if self._merge.density >= 1:
            return tensor
        flat = tensor.reshape(-1)
        kept = torch.zeros_like(flat)
        kept[flat.abs().topk(int(self._merge.density * flat.numel())).indices] = 1
        return tensor * kept.view(tensor.shape)

    def _prune_random(self, tensor: Tensor) -> Tensor:
        """Keep each number with probability `density` (DARE, Yu et al., 2023)."""
        density = self._merge.density
        if density >= 1:
            return tensor
        pruned = tensor * torch.bernoulli(torch.full_like(tensor, density), generator=self._random)
        return pruned if self._merge.arithmetic == "lorax" else pruned / density
