"""Merges several adapters into one, like PEFT's `add_weighted_adapter` or LoRAX. Runs in merge threads.

The pruning strategies that end with `_svd` need each layer's whole matrix, because PEFT prunes its elements: seconds to
minutes for a large layer. `svd`, and these where nothing is pruned, work on the factors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from gpu_worker.adapters.loader.fetch import FetchedAdapter
from gpu_worker.adapters.merges import MergeWatch
from gpu_worker.adapters.packing.extras_packer import GetTensor, lora_matrices
from gpu_worker.adapters.packing.packer import HostAdapter, Packer
from peft_adapters.config import AdapterConfig, read_config
from peft_adapters.format import AdapterSpec, LoraWeights
from peft_adapters.reasons import Reasons
from peft_adapters.recipe import Merge
from peft_adapters.targets import NameTargets
from protocol.wire.errors import AdapterRefused
from protocol.wire.messages import ServedModel


def check_bytes(num_bytes: int, max_bytes: int) -> None:
    """Raise AdapterRefused if a merge would exceed its memory limit."""
    if num_bytes > max_bytes:
        raise AdapterRefused(
            [
                f"merging these adapters takes {num_bytes} bytes of memory; {max_bytes} are available: use fewer or"
                " smaller adapters, or merge_strategy svd, which needs no whole matrices"
            ]
        )


@cache
def _svd_s_per_operation(size: int = 384) -> float:
    """Measure and return this machine's SVD time of a square matrix of `size`, divided by the cube of its size."""
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    times_s: list[float] = []
    for _ in range(2):  # the first one also loads the library
        began_s = time.perf_counter()
        torch.linalg.svd(matrix, full_matrices=False)
        times_s.append(time.perf_counter() - began_s)
    return min(times_s) / size**3


@dataclass(frozen=True, slots=True)
class MergeInput:
    """One of the adapters to merge."""

    config: AdapterConfig
    spec: AdapterSpec
    get: GetTensor
    weight: float

    @property
    def rank(self) -> int:
        """The rank that PEFT assumes for the adapter: the largest one in its config."""
        return max((self.config.r, *self.config.ranks.numbers.values()))


@dataclass(frozen=True, slots=True)
class _Factor:
    """LoRA of one adapter on one module, fp32."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scale: float
    weight: float

    def delta(self, *, transposed: bool) -> Tensor:
        """Return its change of the weight [out, in], or of the transposed weight."""
        product = self.b @ self.a
        return (product.T if transposed else product) * self.scale


def merge_adapters(
    digest: str,
    merge: Merge,
    files: Sequence[FetchedAdapter],
    packer: Packer,
    order: Sequence[str],
    watch: MergeWatch,
    max_bytes: int,
) -> HostAdapter:
    """Merge the adapters in `files` as `merge` says, and pack the result under `digest`.

    order: names of all modules in the model's own order, in which random pruning draws numbers. max_bytes: memory limit
    for the merge of one layer. Raises AdapterRefused for adapters that cannot be merged, at all or within the time and
    memory limits; and GivenUp.
    """
    parts = [_read(file, packer, weight) for file, weight in zip(files, merge.weights, strict=True)]
    merger = Merger(merge, parts, watch, max_bytes)
    tensors: dict[str, Tensor] = {}
    merged: dict[str, list[LoraWeights]] = {"sites": [], "embeddings": []}
    targets = _targets(parts)
    kinds = {site.name: site.kind for site in packer.served.sites}
    by_site = [{lora.site: lora for lora in (*part.spec.sites, *part.spec.embeddings)} for part in parts]
    chosen = [name for name in order if kinds.get(name) and targets.chosen(name)]
    merger.check_cost([(name, [own[name] for own in by_site if name in own]) for name in chosen], packer.served)
    for name in chosen:
        watch.check()
        found = [(part, own[name]) for part, own in zip(parts, by_site, strict=True) if name in own]
        if not found:
            raise AdapterRefused([f"{name} is targeted, but none of the merged adapters has LoRA there"])
        a, b, scale = merger.merge(found, transposed=kinds[name] in ("conv1d", "embedding"))
        tensors |= {f"{name}.a": a, f"{name}.b": b}
        kind = "embeddings" if kinds[name] == "embedding" else "sites"
        merged[kind].append(LoraWeights(name, len(a), scale, f"{name}.a", f"{name}.b"))
    spec = AdapterSpec(tuple(merged["sites"]), tuple(merged["embeddings"]))
    return packer.pack_spec(digest, spec, tensors.__getitem__)


def _read(files: FetchedAdapter, packer: Packer, weight: float) -> MergeInput:
    """Read one adapter. Raises AdapterRefused if it has more than LoRA on linear layers and embeddings."""
    spec, get = packer.read(files.config, files.weights)
    if spec.virtual is not None:
        raise AdapterRefused(
            [f"merging supports plain LoRA only; one of the adapters has peft_type {spec.virtual.kind}"]
        )
    config = read_config(files.config, Reasons())
    assert config is not None  # `Packer.read` refuses an invalid config
    loras = (*spec.sites, *spec.embeddings)
    more = {
        f"peft_type {config.kind}": config.own is not None,
        "DoRA": any(lora.magnitude for lora in loras),
        "lora_bias": any(lora.bias for lora in loras),
        "AdaLoRA": any(lora.singular for lora in loras),
        "alora_invocation_tokens": bool(spec.invocation),
        "target_parameters": bool(config.parameters),
        "trained tokens": bool(spec.tokens),
        "another vocabulary": bool(spec.vocab_size),
        "names that are not the base model's": bool(spec.mapped),  # the merge finds layers by names in the config
        "LoRA on experts": bool(spec.parameters and not config.parameters),
        "whole modules or biases": bool(
            packer.pack_spec("", replace(spec, sites=(), embeddings=(), parameters=()), get).extras
        ),
    }
    reasons = [
        f"merging supports plain LoRA only; one of the adapters has {name}" for name, is_on in more.items() if is_on
    ]
    if reasons:
        raise AdapterRefused(reasons)
    if config.all_linear:  # PEFT too takes the names that this stands for
        names = NameTargets(frozenset(lora.site for lora in spec.sites))
        config = replace(config, targets=replace(config.targets, targets=names))
    return MergeInput(config, spec, get, weight)


def _targets(parts: Sequence[MergeInput]) -> _JointTargets:
    """Return the targets of the merged adapter. Raises AdapterRefused if PEFT cannot join them."""
    if len({part.config.targets.targets.pattern is None for part in parts}) > 1:
        raise AdapterRefused(["target_modules of some merged adapters are lists, of others patterns"])
    return _JointTargets(parts)


@dataclass(frozen=True, slots=True)
class _JointTargets:
    """The union of all adapters' targets, with the other fields of the first adapter's config."""

    parts: Sequence[MergeInput]

    def chosen(self, module: str) -> bool:
        first = self.parts[0].config
        return not first.saved.excludes(module) and any(
            replace(first.targets, targets=part.config.targets.targets).chosen(module) for part in self.parts
        )


class Merger:
    """Merges module by module in the model's order, because random pruning draws numbers in that order."""

    def __init__(self, merge: Merge, parts: Sequence[MergeInput], watch: MergeWatch, max_bytes: int) -> None:
        # PEFT merges a single adapter linearly, whatever the strategy.
        self.strategy = "linear" if len(parts) == 1 and merge.arithmetic == "peft" else merge.strategy
        if self.strategy in ("dare_linear_svd", "magnitude_prune_svd") and merge.density >= 1:
            self.strategy = "svd"  # nothing is pruned: the sum is the same
        self._merge = merge
        self._watch = watch
        self._max_bytes = max_bytes
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
        # PEFT gives the result the first adapter's rsLoRA, with alpha = rank.
        self._scale = math.sqrt(self._rank) if parts[0].config.use_rslora else 1.0

    @property
    def _is_whole(self) -> bool:
        """Whether each layer's whole matrix is needed."""
        return self.strategy.endswith("_svd")

    def check_cost(self, layers: Sequence[tuple[str, Sequence[LoraWeights]]], served: ServedModel) -> None:
        """Raise AdapterRefused if whole matrices would exceed the memory or time limit. layers: by name."""
        if not self._is_whole:
            return
        sizes = {site.name: (site.in_features, site.out_features) for site in served.sites}
        num_operations = 0.0
        for name, loras in layers:
            rows, columns = sizes[name]
            # All products, one stack of them, its weights and signs, and the matrix that is decomposed.
            check_bytes((4 * len(loras) + 4) * rows * columns * 4, self._max_bytes)
            num_operations += rows * columns * min(rows, columns)
        # The estimate may be off by a factor; actual overruns are detected between layers.
        self._watch.check(0.5 * num_operations * _svd_s_per_operation())

    def merge(
        self, found: Sequence[tuple[MergeInput, LoraWeights]], *, transposed: bool
    ) -> tuple[Tensor, Tensor, float]:
        """Return A [rank, in], B [out, rank] and the scale for one module.

        found: the LoRA of each adapter that has one here. transposed: whether the base stores the weight as [in, out].
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
            self._watch.check()
            delta = self._combine(deltas, [factor.weight for factor in factors], self.strategy.removesuffix("_svd"))
            u, s, vh = torch.linalg.svd(delta.T if transposed else delta, full_matrices=False)
            return vh[: self._rank].contiguous(), (u * s)[:, : self._rank].contiguous(), self._scale
        return self._elementwise(factors)

    def _svd(self, factors: Sequence[_Factor]) -> tuple[Tensor, Tensor]:
        """Return A, B of the best approximation of the weighted sum of B @ A, by decomposing the thin factors."""
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
        """Return the weighted sum of equally shaped tensors, pruned by the strategy.

        With "ties", only elements with the elected sign count (TIES-Merging, Yadav et al., 2023).
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
        """Keep the share `density` of the elements, those with the largest magnitudes."""
        if self._merge.density >= 1:
            return tensor
        flat = tensor.reshape(-1)
        kept = torch.zeros_like(flat)
        kept[flat.abs().topk(int(self._merge.density * flat.numel())).indices] = 1
        return tensor * kept.view(tensor.shape)

    def _prune_random(self, tensor: Tensor) -> Tensor:
        """Keep each element with probability `density` (DARE, Yu et al., 2023)."""
        density = self._merge.density
        if density >= 1:
            return tensor
        pruned = tensor * torch.bernoulli(torch.full_like(tensor, density), generator=self._random)
        return pruned if self._merge.arithmetic == "lorax" else pruned / density
