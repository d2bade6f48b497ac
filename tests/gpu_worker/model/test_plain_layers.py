"""Which linear layers are only a product with their weight, so that the weight may be used without them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gpu_worker.layers.lora import is_plain


class Apart(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x @ self.weight.T + self.bias


class Ternary(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return nn.functional.linear(x, self.weight.sign(), self.bias)


class Router(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits = super().forward(x)
        return logits, logits.softmax(-1)


class Asking(nn.Linear):
    def forward(self, x: Tensor, which: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x)[which]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_is_plain_by_what_it_computes(dtype: torch.dtype) -> None:
    assert all(is_plain(layer.to(dtype)) for layer in (nn.Linear(8, 4), Conv1D(4, 8), Apart(8, 4)))
    assert not any(is_plain(layer.to(dtype)) for layer in (Ternary(8, 4), Router(8, 4), Asking(8, 4)))


def test_a_layer_with_more_parameters_is_not_plain() -> None:
    layer = Apart(8, 4)
    layer.register_buffer("scale", torch.ones(4))
    assert not is_plain(layer)
