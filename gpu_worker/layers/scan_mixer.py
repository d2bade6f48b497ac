"""Mamba2's mixer as two products with one native operation between them; replaces the module's forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gpu_worker.layers.lora import SharedInput
from gpu_worker.layers.mixers import MixerStates
from lora_kernels import ops


class ScanMixer:
    """out(scan(in(x))): see `ops.gated_scan`.

    The output of `in` is gates, the convolution's input, and heads' steps.
    """

    def __init__(
        self,
        mixers: MixerStates,
        index: int,
        module: nn.Module,
        projection: SharedInput,
        out: SharedInput,
        conv: nn.Conv1d,
        norm: nn.Module,
    ) -> None:
        """index: of its convolution's call among the mixers'; the scan's call is the next. module: has A_log and D.

        norm: has a weight, and a `group_size` unless all columns are one group.
        """
        self.mixers = mixers
        self.index = index
        self.projection = projection
        self.out = out
        self._forward = module.forward
        self._weight = conv.weight.detach().squeeze(1)
        self._bias = None if conv.bias is None else conv.bias.detach()
        own = {name: parameter.detach().float() for name, parameter in module.named_parameters(recurse=False)}
        self._per_head = (-own["A_log"].exp(), own["dt_bias"], own["D"])
        self._norm_weight = norm.get_parameter("weight").detach()
        eps: Any = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        self._eps = float(eps)
        self._group = int(getattr(norm, "group_size", len(self._norm_weight)))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output for hidden_states [1, T, width], as the model calls it."""
        if self.projection.context.extras:  # an adapter may replace the norm, which the module handles
            return self._forward(hidden_states, *args, **kwargs)
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        layer, (projected,) = self.constants, self.projection.project(rows)
        inner, channels, heads = len(self._norm_weight), len(self._weight), layer.states.shape[1]
        gate, xbc, dt = projected.split([inner, channels, heads], 1)
        mixed = ops.gated_scan(gate, xbc, dt, layer, self.mixers.runs_of(self.index, 2))
        return self.out.project(mixed)[0].view(hidden_states.shape)

    @property
    def constants(self) -> ops.GatedScan:
        """The scan as input of its operation. The states must be allocated."""
        taps, states = (call.states for call in self.mixers.calls[self.index : self.index + 2])
        assert taps is not None
        assert states is not None
        return ops.GatedScan(
            self._weight, self._bias, taps, *self._per_head, states, self._norm_weight, self._eps, self._group
        )
