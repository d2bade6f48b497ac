"""The default dtype and instruction set, where the settings name none."""

from __future__ import annotations

import platform

import pytest
import torch

from gpu_worker.model.model import choose_dtype, choose_isa
from lora_kernels.cpu.build import ISA_FLAGS
from protocol.wire.errors import BadRequest

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("multiplies", "isa", "is_encoder", "wanted"),
    [
        (True, "amx_bf16", False, torch.bfloat16),
        (True, "", False, torch.bfloat16),  # a GPU
        (True, "avx512_bf16", True, torch.bfloat16),
        (False, "avx512", False, torch.bfloat16),
        (False, "avx2", False, torch.bfloat16),
        (False, "avx2", True, torch.float32),
        (False, "", False, torch.float32),
    ],
)
def test_weights_have_16_bits_wherever_kernels_read_them(
    multiplies: bool, isa: str, is_encoder: bool, wanted: torch.dtype
) -> None:
    dtype, reason = choose_dtype("auto", multiplies=multiplies, isa=isa, is_encoder=is_encoder)
    assert dtype is wanted
    assert reason


def test_what_is_set_is_taken() -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        found = choose_dtype(dtype, multiplies=True, isa="", is_encoder=False)
        assert found == (getattr(torch, dtype), "as set")


def test_an_instruction_set_that_is_not_there_is_refused_by_name() -> None:
    missing = "neon" if platform.machine() in ("x86_64", "AMD64") else "avx2"
    with pytest.raises(BadRequest, match=f"kernels is {missing}: this processor has no {missing}"):
        choose_isa(missing, CPU)
    with pytest.raises(BadRequest, match="kernels is avx2, which is an instruction set of CPUs; the device is cuda"):
        choose_isa("avx2", torch.device("cuda"))


def test_the_best_instruction_set_is_told() -> None:
    assert choose_isa("reference", CPU) == ""
    assert choose_isa("auto", CPU) in ("", *ISA_FLAGS.get(platform.machine(), {}))
