"""Parameters of fused experts that stay in quantized blocks.

A module of experts is transformers' own and cannot compute with blocks. It only holds them, in the attribute
`expert_blocks` by parameter name, until `gpu_worker.layers.expert_modules.compute_with_blocks` replaces its forward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_kernels import ops
from lora_kernels.quantised import block_inputs

_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
"""Names that transformers' shared code for experts (`integrations/moe.py`) reads."""


@dataclass(slots=True)
class ExpertBlocks:
    """A parameter [E, N, K] in blocks."""

    weight: ops.QuantisedWeight  # [E * N, K]
    packed: ops.QuantisedLinear  # for `impl`
    num_experts: int
    dtype: torch.dtype  # of the computation
    impl: ops.Impl | None

    def numbers(self, at: Tensor | None = None) -> Tensor:
        """Return the dequantized parameter, or its experts `at`, int64. Only one expert at a time is in fp32."""
        rows = self.weight.rows.unflatten(0, (self.num_experts, -1))
        experts = range(self.num_experts) if at is None else at.tolist()
        found = torch.empty(len(experts), rows.shape[1], self.weight.in_features, dtype=self.dtype)
        for i, expert in enumerate(experts):
            found[i] = replace(self.weight, rows=rows[expert]).dequantise()
        return found


def blocks_of(module: nn.Module) -> dict[str, ExpertBlocks]:
    """Return the parameters of a module of experts that are in blocks, by name."""
    return getattr(module, "expert_blocks", {})


def fitting_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of fused experts [E, N, K] that can be in blocks of 32 inputs, by name.

    Each expert fills whole panels of a packed weight, and its rows whole blocks.
    """
    if getattr(module, "is_transposed", True) is not False:  # no experts, or stored as [E, K, N]
        return {}
    own = {name: module._parameters.get(name) for name in _PARAMETERS}
    return {
        name: parameter
        for name, parameter in own.items()
        if parameter is not None
        and parameter.ndim == 3
        and parameter.shape[1] % ops.PANEL_COLUMNS == 0
        and parameter.shape[2] % block_inputs("q8_0") == 0
    }
