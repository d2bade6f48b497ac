"""Adapters on the fused experts of any model type."""

from __future__ import annotations

from oracle.conformance import adapters_for
from oracle.peft_oracle import Lora
from transformers import PreTrainedModel

from gpu_worker.model.model import BaseModel


def stacks(model: BaseModel) -> list[str]:
    """Return the names of the stacked expert matrices that adapters may change."""
    return [
        f"{name}.{parameter}"
        for name, adaptable in model.adaptable.modules.items()
        for parameter, weight in adaptable.module.named_parameters(recurse=False)
        if weight.ndim == 3 and len(weight) > 1
    ]


def expert_adapters(model: PreTrainedModel, tried: BaseModel) -> dict[str, Lora]:
    """Return three adapters: rank 2 on all experts and attention, rank 20 on all experts, and one on linear layers."""
    dense = adapters_for(model, tried.sites)["few"]
    options = dense.options | {"target_parameters": stacks(tried)}
    return {"low": Lora(2, dense.targets, options), "high": Lora(20, (), options), "dense": dense}
