"""Finds the activation function of a module or a gate, by its values."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import ops

_ACTIVATIONS: dict[ops.Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def find_activation(module: nn.Module) -> ops.Activation | None:
    """Return the activation function that a module has as a child or attribute, None if there is none."""
    x = torch.linspace(-6, 6, 101)
    held = [child for child in module.children() if next(child.parameters(), None) is None]
    held += [value for value in vars(module).values() if callable(value)]
    for value in held:
        try:
            y = value(x)
        except Exception:  # noqa: BLE001  any callable attribute is tried, and may raise anything
            continue
        for name, function in _ACTIVATIONS.items():
            if isinstance(y, Tensor) and torch.allclose(y, function(x), rtol=1e-5, atol=1e-6):
                return name
    return None


def find_gate(gate: Callable[[Tensor], Tensor]) -> ops.Activation | None:
    """Return the activation function with which `gate` of [gates, ups] is act(gates) * ups, None if there is none.

    gate: takes fp32 [n, 2 * columns]. Tried with numbers of any size, because some gates clip large ones.
    """
    large = 2.0 ** torch.arange(2, 17)
    values = torch.cat([torch.linspace(-6, 6, 101), large, -large])
    gates, ups = torch.cartesian_prod(values, values).unbind(1)
    try:
        y = gate(torch.cat([gates, ups])[None])
    except Exception:  # noqa: BLE001  any module's gate is tried, and may raise anything
        return None
    if not isinstance(y, Tensor) or y.shape != (1, len(ups)):
        return None
    size = ups.abs().clamp(min=1)  # by which `ups` multiply the error of an activation
    for name, function in _ACTIVATIONS.items():
        expected = function(gates) * ups
        if torch.allclose(y[0] / size, expected / size, rtol=1e-5, atol=1e-6):
            return name
    return None
