"""Embeddings whose weight is also the head's: their rows are read from the head's packed weight.

Packing copies a weight. In a small model with a large vocabulary the embedding is a fifth of all memory, and would be
stored twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpu_worker.layers.adaptable_modules import AdaptableModules
from gpu_worker.layers.lora import LinearCall, is_plain
from lora_kernels import ops


class TiedEmbedding(nn.Embedding):
    """An embedding without storage of its own. Its `weight` has only a shape and dtype."""

    def __init__(self, embedding: nn.Embedding, packed: ops.PackedLinear) -> None:
        """embedding: the module to replace, which may scale its rows. packed: the same weight, bit for bit."""
        num, width = embedding.weight.shape
        super().__init__(num, width, _weight=embedding.weight.detach().to("meta"), _freeze=True)
        self.embed_scale = getattr(embedding, "embed_scale", None)
        self.packed = packed

    def forward(self, input: Tensor) -> Tensor:  # torch's own name
        """Return the rows [..., D] of token ids."""
        rows, scale = ops.unpack_rows(self.packed, input), self.embed_scale
        if scale is None:
            return rows
        return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)

    def numbers(self) -> Tensor:
        """Return the weight [V, D] in newly allocated memory."""
        return ops.unpack_linear(self.packed)


def install_tied(model: nn.Module, calls: Sequence[LinearCall], adaptable: AdaptableModules) -> None:
    """Replace embeddings that share a linear layer's weight with `TiedEmbedding`, if packing copied the weight.

    calls: the linear layers before they became sites. Embeddings that do more than return rows, perhaps scaled, are not
    replaced.
    """
    heads = {call.module.get_parameter("weight").data_ptr(): call for call in calls if is_plain(call.module)}
    for name, embedding in [*model.named_modules()]:
        call = heads.get(embedding.weight.data_ptr()) if isinstance(embedding, nn.Embedding) else None
        if call is None or not isinstance(embedding, nn.Embedding):
            continue
        shared, _ = adaptable.linear[call.name]
        if shared.num_siblings > 1 or not isinstance(shared.packed, ops.PackedLinear):
            continue
        made = _alike(embedding, shared.packed)
        if made is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made)
            if name in adaptable.embeddings:
                adaptable.embeddings[name].module, adaptable.embeddings[name].numbers = made, made.numbers


def _alike(embedding: nn.Embedding, packed: ops.PackedLinear) -> TiedEmbedding | None:
    """Return a replacement with bit-identical rows; None if there is none or packing did not copy the weight."""
    num, width = embedding.weight.shape
    if packed.layout == "plain" or (packed.out_features, packed.in_features) != (num, width):
        return None
    made, ids = TiedEmbedding(embedding, packed), torch.tensor([[0, num // 2, num - 1]])
    with torch.inference_mode():
        return made if torch.equal(made(ids), embedding(ids)) else None
