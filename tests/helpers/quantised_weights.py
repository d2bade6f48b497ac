"""Random quantized weights of every kind: blocks of random bits, except for their fp16 scales."""

from __future__ import annotations

import numpy as np
import torch

from lora_kernels.quantised import Kind, QuantisedWeight, block_inputs, row_bytes

_HALVES: dict[Kind, tuple[int, ...]] = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q4_k": (0, 2), "q5_k": (0, 2),
    "q6_k": (208,),
}  # fmt: skip
_SPREAD: dict[Kind, float] = {
    "q4_0": 0.15, "q4_1": 0.1, "q5_0": 0.08, "q5_1": 0.06, "q8_0": 0.012, "q4_k": 0.003, "q5_k": 0.002, "q6_k": 0.0007,
}  # fmt: skip
"""Scales with which weights are of order 1."""


def random_weight(
    kind: Kind, n: int, k: int, seed: int = 0, scale: float = 1.0, byte: int | None = None
) -> QuantisedWeight:
    """Return a weight [n, k] of a kind; its products with numbers of order 1 are of order `scale`.

    byte: the value of all its bytes except the scales; None: random bytes.
    """
    generator = np.random.default_rng(seed)
    low, end = (0, 256) if byte is None else (byte, byte + 1)
    rows = generator.integers(low, end, (n, row_bytes(kind, k)), dtype=np.uint8)
    blocks = rows.reshape(-1, row_bytes(kind, block_inputs(kind)))
    for at in _HALVES[kind]:
        scales = generator.standard_normal(len(blocks)) * _SPREAD[kind] * scale / k**0.5
        blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return QuantisedWeight(kind, torch.from_numpy(rows), k)
