"""Modules of fused experts, computed with each token's own LoRA on them.

transformers computes such modules with shared code (`integrations/moe.py`): token-expert pairs sorted by expert, one
product, the module's gate, a second product, the routing weights. `GroupedExperts` computes the same and adds LoRA to
the result of each product. A module that differs, or fails a trial, is run again with changed weights instead
(`gpu_worker.layers.apply_extras`). On a CPU, weights are packed for native products where these exist. Weights that
stay quantized are packed when the model is read; `compute_with_blocks` makes modules compute with them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_worker.layers.activations import find_gate
from gpu_worker.layers.apply_extras import AdaptableModule, ExpertsCall, TokenLayout, alike, original_forward
from gpu_worker.quantised.expert_blocks import ExpertBlocks, blocks_of
from lora_kernels import ops, sums
from lora_kernels.experts import ExpertOrder, ExpertPages, expert_batch, order_by_expert
from lora_kernels.segments import LoraBatch

_MARKS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")
"""Attributes that transformers' decorator sets on modules whose products it can compute."""

_NUM_TRIAL_TOKENS = 5


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The shape of expert layers that share pool rows: E experts of K inputs and N outputs."""

    num_experts: int
    in_features: int
    out_features: int
    dtype: torch.dtype


@dataclass(slots=True)
class ExpertSite:
    """One of the two products of a module of experts, as a site for LoRA."""

    name: str  # parameter name, "model.layers.0.mlp.experts.gate_up_proj"
    weight: Tensor  # [E, N, K], or [E, K, N] if the module stores it transposed; once released, only their shape
    bias: Tensor | None  # [E, N]
    shape: ExpertShape
    is_transposed: bool = False
    packed: ops.PackedLinear | ops.QuantisedLinear | None = None  # of the weights [E * N, K]
    blocks: ExpertBlocks | None = None  # if the weights stay quantized: what `packed` is made of
    pages: ExpertPages | None = None  # set once the pool is allocated, like `first_pages`
    first_pages: Tensor | None = None  # int32 [num_slots]: first page of each adapter's rows for this layer; -1: none

    def pack(self, impl: ops.Impl | None) -> None:
        """Pack the weights, if there are native products for them."""
        shape = self.shape
        if self.packed is not None or not ops.is_native(self.weight):
            return
        weights = self.weight.transpose(-2, -1) if self.is_transposed else self.weight
        one = ops.pack_linear(weights[0], impl=impl)  # all take long
        if one.layout == "vnni" and shape.out_features % one.weight.shape[2] == 0:
            self.packed = ops.pack_linear(weights.reshape(-1, shape.in_features), impl=impl)

    def unpacked(self, at: Tensor | None = None) -> Tensor:
        """Return a copy of the packed weights, as the module stores them: all, or of the experts `at`, int64."""
        shape = self.shape
        if self.blocks is not None:
            return self.blocks.numbers(at)
        assert isinstance(self.packed, ops.PackedLinear)
        panels = self.packed.weight.unflatten(0, (shape.num_experts, -1))
        panels = panels if at is None else panels[at]
        num = len(panels) * shape.out_features
        weights = ops.unpack_linear(replace(self.packed, weight=panels.flatten(0, 1), out_features=num))
        weights = weights.view(len(panels), shape.out_features, shape.in_features)
        return weights.transpose(-2, -1) if self.is_transposed else weights


@dataclass(slots=True)
class GroupedExperts:
    """A module of experts whose products support LoRA."""

    module: Any
    sites: list[ExpertSite]  # of its first and second product
    num_experts: int
    impl: ops.Impl | None = None
    names: list[str] = field(default_factory=list[str])  # argument names: hidden states, expert ids, routing weights
    gated: ops.GatedExperts | None = None  # the whole module as one operation

    @classmethod
    def of(cls, name: str, module: nn.Module, impl: ops.Impl | None) -> GroupedExperts | None:
        """Return a module as one of fused experts; None if it lacks the parts of one."""
        owner: Any = module
        if not all(hasattr(module, mark) for mark in _MARKS) or getattr(owner, "_is_expert_parallel", False):
            return None
        if owner.has_post_expert_norm and not hasattr(module, "post_expert_norm"):
            return None
        names = [p.name for p in inspect.signature(type(module).forward).parameters.values()][1:]
        sites: list[ExpertSite] = []
        for parameter in ("gate_up_proj" if owner.has_gate else "up_proj", "down_proj"):
            weight = module._parameters.get(parameter)
            if weight is None or weight.ndim != 3:
                return None
            num, first, second = weight.shape
            wide, narrow = (second, first) if owner.is_transposed else (first, second)
            shape = ExpertShape(num, narrow, wide, weight.dtype)
            bias = module._parameters.get(f"{parameter}_bias") if owner.has_bias else None
            site = ExpertSite(f"{name}.{parameter}", weight.detach(), bias, shape, owner.is_transposed)
            site.blocks = blocks_of(module).get(parameter)
            if site.blocks is not None:
                site.packed, impl = site.blocks.packed, site.blocks.impl
            sites.append(site)
        if len({site.shape.num_experts for site in sites}) > 1 or len(names) != 3:
            return None
        return cls(module, sites, sites[0].shape.num_experts, impl, names)

    def pack(self) -> None:
        """Pack the weights where that helps. The module still has its own."""
        for site in self.sites:
            site.pack(self.impl)
        self._join()

    def _join(self) -> None:
        """Let the whole module be one operation, if there is one for it."""
        module, [up, down] = self.module, [site.packed for site in self.sites]
        act = find_gate(module._apply_gate) if module.has_gate else None
        if up is None or down is None or act is None or module.has_bias or module.has_post_expert_norm:
            return
        self.gated = ops.GatedExperts(self.num_experts, up, down, act)

    def use_blocks(self) -> bool:
        """Compute the module with its sites' blocks from now on, if a trial agrees. Return whether it does.

        Its other weights are its own. The trial does not round inputs. The module keeps this object as
        `block_experts`.
        """
        packed = [site.packed for site in self.sites]
        for site in self.sites:
            if isinstance(site.packed, ops.QuantisedLinear):
                site.packed = replace(site.packed, int8_inputs=False)
        self._join()
        grouped, gated = self.ways()
        for site, own in zip(self.sites, packed, strict=True):
            site.packed = own
        up, down = packed
        self.gated = replace(self.gated, gate_up=up, down=down) if gated and self.gated is not None else None
        if grouped:
            self.module.block_experts = self
            self.module.forward = self._run
        return grouped

    def release(self, owner: AdaptableModule) -> None:
        """Free the module's own weights that are packed, and replace its forward. owner: of the module."""
        for site in self.sites:
            if site.packed is not None:
                parameter = site.name.rpartition(".")[2]
                site.weight = site.weight.to("meta")
                self.module._parameters[parameter] = nn.Parameter(site.weight, requires_grad=False)
                owner.packed[parameter] = site.unpacked
        if owner.packed:
            self.module.forward = self._run

    def _run(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden, expert_ids, weights = self.arguments(args, kwargs)
        return self.forward(hidden, expert_ids, weights)

    @property
    def is_packed(self) -> bool:
        """Whether the module's own forward lacks its weights."""
        return any(site.packed is not None for site in self.sites)

    def ways(self) -> tuple[bool, bool]:
        """Return whether the two products give the module's result, and whether the single operation does."""
        gated, self.gated = self.gated, None
        grouped, self.gated = self.agrees(), gated
        return grouped, gated is not None and self.agrees()

    def agrees(self) -> bool:
        """Return whether a random call without LoRA gives the same result as the module's own forward."""
        shape, num = self.sites[0].shape, min(2, self.num_experts)
        has_blocks = any(site.blocks is not None for site in self.sites)
        device = "cpu" if has_blocks else self.sites[0].weight.device
        num_chosen_from = num if has_blocks else self.num_experts
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(_NUM_TRIAL_TOKENS, shape.in_features, generator=generator)
        chosen = [torch.randperm(num_chosen_from, generator=generator)[:num] for _ in range(_NUM_TRIAL_TOKENS)]
        weights = torch.rand(_NUM_TRIAL_TOKENS, num, generator=generator)
        hidden, weights = (numbers.to(device, shape.dtype) for numbers in (hidden, weights))
        ids = torch.stack(chosen).to(device)
        try:
            with torch.inference_mode():
                if has_blocks:
                    expected = self._with_numbers(hidden, ids, weights, torch.arange(num))
                else:
                    expected = original_forward(self.module)(hidden, ids, weights)
                return alike(self.forward(hidden, ids, weights), expected)
        except Exception:  # noqa: BLE001  a module that only looks like experts may raise anything
            return False

    def _with_numbers(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor, used: Tensor) -> Tensor:
        """Return what the module's class computes with dequantized weights of the experts `used`, 0, 1 and so on."""
        owner = AdaptableModule("experts", self.module, TokenLayout((0, 0, 0), (0,), 2))
        for site in self.sites:
            if site.blocks is not None:
                owner.packed[site.name.rpartition(".")[2]] = site.unpacked
        return ExpertsCall(owner, used, self.num_experts, [hidden, expert_ids, weights], {}).run([], 1.0)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the arguments of a call, in order."""
        return [*args, *(kwargs[name] for name in self.names[len(args) :])]

    def forward(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor, batch: LoraBatch | None = None) -> Tensor:
        """Return the weighted sum over experts [T, D] for hidden [T, D], with the LoRA of `batch`.

        expert_ids: int [T, top_k]. weights: routing weights [T, top_k].
        """
        module, num_tokens = self.module, len(hidden)
        slots, num_slots = None if batch is None else batch.token_slots, 0
        first_pages = self.sites[0].first_pages
        if slots is None or first_pages is None:
            # With fixed sums, LoRA elsewhere in the step must not change a row's rounding.
            if self.gated is not None and not sums.are_fixed():
                found = ops.experts(hidden.to(self.sites[0].weight.dtype), expert_ids, weights, self.gated, self.impl)
                return found.to(hidden.dtype)
            batch, slots = None, torch.full((num_tokens,), -1, dtype=torch.int32, device=hidden.device)
        else:
            num_slots = len(first_pages)
        order = order_by_expert(expert_ids, slots, self.num_experts, num_slots)
        x = hidden.index_select(0, order.tokens)
        up = self._product(self.sites[0], x, order, batch)
        y = self._product(self.sites[1], module._apply_gate(up) if module.has_gate else module.act_fn(up), order, batch)
        if module.has_post_expert_norm:
            y = module.post_expert_norm(y)
        y = y * weights.reshape(-1).index_select(0, order.pairs)[:, None]
        summed = torch.empty_like(y).index_copy_(0, order.pairs, y).view(num_tokens, -1, y.shape[-1]).sum(1)
        return summed.to(hidden.dtype)

    def _product(self, site: ExpertSite, x: Tensor, order: ExpertOrder, batch: LoraBatch | None) -> Tensor:
        """Return a product [S, N] for x [S, K], in the order of `order`."""
        x = x.to(site.shape.dtype)
        if site.packed is not None:
            y = ops.grouped_linear(x, site.packed, order.ends, impl=self.impl)
        else:
            weight = site.weight if site.is_transposed else site.weight.transpose(-2, -1)
            y = F.grouped_mm(x, weight, offs=order.ends)
        if site.bias is not None:
            y += site.bias.index_select(0, order.experts)
        if batch is not None and site.pages is not None and site.first_pages is not None:
            pages = site.pages
            own = expert_batch(order, pages, site.first_pages, batch.token_scales)
            ops.lora_add_([y], x.contiguous(), [pages.site], pages.table, own, impl=self.impl)
        return y


def compute_with_blocks(model: nn.Module) -> None:
    """Make the modules of experts whose weights stay quantized compute with them.

    A module for which that gives another result gets the dequantized numbers.
    """
    for name, module in model.named_modules():
        blocks = blocks_of(module)
        experts = GroupedExperts.of(name, module, None) if blocks else None
        if not blocks or "block_experts" in vars(module) or (experts is not None and experts.use_blocks()):
            continue
        for own, found in blocks.items():
            module.register_parameter(own, nn.Parameter(found.numbers(), requires_grad=False))
        del module.expert_blocks


def find_grouped_experts(
    modules: Mapping[str, AdaptableModule], impl: ops.Impl | None, *, packs: bool = True
) -> dict[str, GroupedExperts]:
    """Return the modules of experts whose products support LoRA, by name. One of each class and shape is tried.

    packs: whether to pack their weights, which replaces the modules' forward.
    """
    found: dict[str, GroupedExperts] = {}
    tried: dict[tuple[Any, ...], tuple[bool, bool]] = {}
    for name, adaptable in modules.items():
        layout = adaptable.layout
        kept: GroupedExperts | None = getattr(adaptable.module, "block_experts", None)
        if kept is not None:
            kept.release(adaptable)
            found[name] = kept
            continue
        experts = GroupedExperts.of(name, adaptable.module, impl)
        if experts is None or layout.args != (0, 0, 0) or layout.outs != (0,) or layout.num_dims != 2:
            continue
        kind = (type(adaptable.module), *(site.shape for site in experts.sites))
        if packs and tried.get(kind, (True, True))[0]:
            experts.pack()
        if kind not in tried:
            tried[kind] = experts.ways()
        grouped, gated = tried[kind]
        if grouped:
            experts.gated = experts.gated if gated else None
            experts.release(adaptable)
            found[name] = experts
    return found
