"""Adapters on the fused experts of any type of model."""

from __future__ import annotations

from oracle.conformance import adapters_for
from oracle.peft_oracle import Lora
from transformers import PreTrainedModel

from gpu_worker.model.model import BaseModel


def stacks(model: BaseModel) -> list[str]:
    """Return the names of the stacks of experts' matrices that adapters may change."""
    return [
        f"{name}.{parameter}"
        for name, adaptable in model.adaptable.modules.items()
        for parameter, weight in adaptable.module.named_parameters(recurse=False)
        if weight.ndim == 3 and len(weight) > 1
    ]


def expert_adapters(model: PreTrainedModel, tried: BaseModel) -> dict[str, Lora]:
    """Two of different ranks on all experts, one with attention beside them, and one on linear layers alone."""
    dense = adapters_for(model, tried.sites)["few"]
    options = dense.options | {"target_parameters": stacks(tried)}
    return {"low": Lora(2, dense.targets, options), "high": Lora(20, (), options), "dense": dense}
