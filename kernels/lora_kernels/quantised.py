"""Weights quantized in GGUF's blocks: their layout, dequantization and quantization.

A row of a weight is a sequence of blocks of 32 or 256 numbers, each with its own scales; a number is scale * code, or
scale * code plus an addend. The formats are those in ggml's `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lora_kernels import kv_codes

Kind = Literal["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight [N, K] in GGUF's blocks; may be a mapped file's memory."""

    kind: Kind
    rows: Tensor  # uint8 [N, row_bytes(kind, K)], contiguous
    in_features: int

    @property
    def out_features(self) -> int:
        """The number of rows, N."""
        return len(self.rows)

    def dequantise(self, ids: Tensor | None = None) -> Tensor:
        """Return the weight in fp32: [N, K], or its rows [*ids.shape, K] at `ids`."""
        if ids is None:
            return dequantise(self.kind, self.rows, self.in_features)
        found = dequantise(self.kind, self.rows[ids.reshape(-1)], self.in_features)
        return found.view(*ids.shape, self.in_features)


@dataclass(frozen=True, slots=True)
class _Format:
    inputs: int  # numbers in a block
    num_bytes: int
    read: Callable[[Tensor], Tensor]  # uint8 [blocks, num_bytes] -> fp32 [blocks, inputs]


def block_inputs(kind: Kind) -> int:
    """Return how many consecutive numbers of a row share a block."""
    return _FORMATS[kind].inputs


def row_bytes(kind: Kind, in_features: int) -> int:
    """Return the bytes of a row of K numbers. Raises ValueError unless K is a multiple of the block size."""
    found = _FORMATS[kind]
    if in_features % found.inputs:
        raise ValueError(f"{kind} has blocks of {found.inputs} numbers: rows of {in_features} cannot be made of them")
    return in_features // found.inputs * found.num_bytes


def dequantise(kind: Kind, rows: Tensor, in_features: int) -> Tensor:
    """Return the dequantized rows: fp32 [N, K]. rows: uint8 [N, row_bytes(kind, K)]."""
    found = _FORMATS[kind]
    return found.read(rows.reshape(-1, found.num_bytes)).view(len(rows), in_features)


def quantise(weight: Tensor, kind: Literal["q8_0", "q4_0"]) -> QuantisedWeight:
    """Quantize a weight [N, K] by rounding to nearest, as llama.cpp does without an importance matrix.

    Raises ValueError if K is not a multiple of 32.
    """
    row_bytes(kind, weight.shape[1])
    blocks = weight.float().reshape(-1, 32)
    if kind == "q8_0":
        d = blocks.abs().amax(1, keepdim=True) / 127
        codes = _divide(blocks, d).round().to(torch.int8).view(torch.uint8)
    else:
        # The number farthest from zero maps to -8, the only code without a positive counterpart.
        d = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
        levels = (_divide(blocks, d) + 8.5).floor().clamp(0, 15).to(torch.uint8)
        codes = levels[:, :16] | levels[:, 16:] << 4
    rows = torch.cat([d.half().view(torch.uint8), codes], dim=1)
    return QuantisedWeight(kind, rows.view(len(weight), -1), weight.shape[1])


def round_inputs(x: Tensor) -> Tensor:
    """Return inputs [..., K] rounded to int8 codes and back: fp32, each group of 32 with its own scale.

    The largest magnitude of a group becomes 127. K is a multiple of 32.
    """
    codes, scales = kv_codes.encode(x.unflatten(-1, (-1, 32)))
    return (codes.float() * scales[..., None]).flatten(-2)


def _divide(blocks: Tensor, d: Tensor) -> Tensor:
    return torch.where(d == 0, 0.0, blocks / d)


def _half(blocks: Tensor, at: int) -> Tensor:
    """Return the fp16 number at byte `at` of each block: fp32 [blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: Tensor) -> Tensor:
    """Return the low nibbles of bytes, then the high ones, per group of the last dimension."""
    return torch.cat([codes & 15, codes >> 4], dim=-1)


def _fifth_bits(codes: Tensor) -> Tensor:
    """Return the bits of bytes [..., n], lowest first, each as 0 or 16: [..., 8 n]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes[..., None] >> shifts) & 1).flatten(-2) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * ((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])).float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _factors(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the six-bit factors on the scales and minima of a block's 8 groups: fp32 [blocks, 8, 1] each."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=1)
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=1)
    return scales.float()[..., None], minima.float()[..., None]


def _with_factors(blocks: Tensor, codes: Tensor) -> Tensor:
    """Return the numbers for codes [blocks, 8, 32] of blocks that begin with their scales and minima."""
    scales, minima = _factors(blocks[:, 4:16])
    return (_half(blocks, 0)[..., None] * scales * codes.float() - _half(blocks, 2)[..., None] * minima).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _with_factors(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).view(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32)
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    return _with_factors(blocks, codes | ((blocks[:, None, 16:48] >> shifts) & 1) << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).view(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    codes = (low | high << 4).float() - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (scales[..., None] * codes.view(-1, 16, 16)).flatten(1)


_FORMATS: dict[Kind, _Format] = {
    "q4_0": _Format(32, 18, _q4_0),
    "q4_1": _Format(32, 20, _q4_1),
    "q5_0": _Format(32, 22, _q5_0),
    "q5_1": _Format(32, 24, _q5_1),
    "q8_0": _Format(32, 34, _q8_0),
    "q4_k": _Format(256, 144, _q4_k),
    "q5_k": _Format(256, 176, _q5_k),
    "q6_k": _Format(256, 210, _q6_k),
}
