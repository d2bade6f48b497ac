"""The Triton kernels without a GPU: interpreted, compiled ahead of time, and never recompiled because of a step."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.fixed_sums import fixed_sums

from benchmarks.engine import triton_aot
from lora_kernels.ops import AdapterTable, LoraSite, build_attention_batch, build_lora_batch
from lora_kernels.triton_ops.attention import Logits, attention_kernel, plan_attention
from lora_kernels.triton_ops.lora import plan_lora
from lora_kernels.triton_ops.matmul import plan_linear
from lora_kernels.triton_ops.pointwise import plan_gated_act, plan_rotary

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "triton"


def run(*args: str, **env: str) -> str:
    """Run python in the repository's root and return its output; its failure fails the test."""
    command = [sys.executable, *args]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_kernels_match_the_reference_in_the_interpreter() -> None:
    """The interpreter must be enabled before triton is first imported, so this needs a process of its own."""
    output = run("-m", "pytest", str(FOLDER), "-p", "no:cacheprovider", TRITON_INTERPRET="1")
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None, output
    assert int(passed[1]) > 70


@pytest.mark.timeout(600)
def test_variants_compile_without_spills_and_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert triton_aot.main(["--check"]) == 0
    assert " 0 unfit" in capsys.readouterr().out


def test_a_kernel_that_spills_is_found_unfit() -> None:
    """Proof that the check can fail: an attention tile four times too large for the registers."""
    target = triton_aot.TARGETS[0]
    launch = next(v.launch for v in triton_aot.variants(target) if v.launch.kernel is attention_kernel)
    crowded = replace(launch, args=launch.args | {"BLOCK_M": 256, "BLOCK_N": 64})
    used = triton_aot.compile_launch(crowded, target.gpu)
    assert used.spill_bytes > 0
    assert any("crowded" in problem for problem in triton_aot.problems({(0, "crowded"): used}))


def test_steps_of_one_shape_share_their_kernels() -> None:
    """Compiling while serving stalls every request, so no property that varies from step to step may cause it.

    The steps have nearly one size, which decides tiles and splits, but other sites, lengths and alignments.
    """
    target, model = triton_aot.TARGETS[1], triton_aot.MODELS[1]

    def variants(num_tokens: int, site: int, kv_len: int) -> list[object]:
        lora = triton_aot.lora_launches(
            np.arange(num_tokens), 2, 256, (128, 64), torch.bfloat16, target.device, first_site=site
        )
        query_lens = np.ones(num_tokens, dtype=np.int64)
        attention = triton_aot.attention_launches(model, query_lens, kv_len, torch.bfloat16, target.device)
        sources = [triton_aot.source_of(launch, target.gpu) for launch in (*lora, *attention)]
        return [(source.hash(), str(options)) for source, options in sources]

    first = variants(32, site=0, kv_len=16)
    for num_tokens, site, kv_len in ((32, 1, 17), (31, 16, 1000), (30, 31, 1), (29, 2, 4096)):
        assert variants(num_tokens, site, kv_len) == first


def test_with_fixed_sums_no_step_chooses_another_kernel() -> None:
    """For any sequences, adapters and tokens, the tiles are the same and nothing is split, so a row has equal bits."""
    target, model = triton_aot.TARGETS[1], triton_aot.MODELS[1]

    def variants(query_lens: list[int], num_adapters: int) -> set[str]:
        lens, num = np.array(query_lens), sum(query_lens)
        slots = np.arange(num) % num_adapters
        lora = triton_aot.lora_launches(slots, 2, 256, (128, 64), torch.bfloat16, target.device, first_site=0)
        attention = triton_aot.attention_launches(model, lens, int(lens.max()) + 900, torch.bfloat16, target.device)
        product = plan_linear(meta(num, 128), meta(num, 256), meta(128, 256), None, target.device)
        by_row = ("kv_write_kernel", "rms_norm_kernel", "rotary_kernel", "gated_act_kernel")
        launches = [one for one in (*lora, *attention, product) if one.kernel.__name__ not in by_row]
        sources = [triton_aot.source_of(launch, target.gpu) for launch in launches]
        return {source.hash() + str(options) for source, options in sources}

    with fixed_sums():
        first = variants([1], 1)
        assert len(first) == 4, "shrink, expand, one attention, one product"
        for step in ([1] * 200, [700], [1, 1, 1, 300], [5] * 9):
            assert variants(step, 1) == first
            assert variants(step, 9) == first
    assert variants([1] * 200, 1) != variants([1], 1), "or nothing would be fixed"


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class TestTensorsThatKernelsWouldReadWronglyAreRefused:
    device = triton_aot.TARGETS[1].device

    def attend(self, q: torch.Tensor, k_cache: torch.Tensor) -> None:
        one = np.ones(4, np.int64)
        batch = build_attention_batch(one, one, np.zeros((4, 1), np.int32), "meta")
        list(plan_attention(meta(4, 8, 64), q, k_cache, meta(9, 2, 16, 64), batch, Logits(0.125), self.device))

    def test_attention(self) -> None:
        self.attend(meta(4, 8, 64), meta(9, 2, 16, 64))
        with pytest.raises(ValueError, match=r"strides \(512, 1, 8\): the last must be 1"):
            self.attend(meta(4, 64, 8).transpose(1, 2), meta(9, 2, 16, 64))
        with pytest.raises(ValueError, match="cannot be computed with together"):
            self.attend(meta(4, 8, 64, dtype=torch.float32), meta(9, 2, 16, 64))
        with pytest.raises(ValueError, match="must be contiguous"):
            self.attend(meta(4, 8, 64), meta(9, 16, 2, 64).transpose(1, 2))

    def test_lora(self) -> None:
        table = AdapterTable(meta(2, 1, dtype=torch.int32), meta(2, 1), meta(2, 1, 1, dtype=torch.int32))
        sites = [LoraSite(0, 0, meta(32, 64), meta(32, 48))]
        batch = build_lora_batch(np.zeros(4, np.int32), "meta")
        assert batch is not None
        plan_lora([meta(4, 48)], meta(4, 64), sites, table, batch, self.device)
        with pytest.raises(ValueError, match="the last must be 1"):
            plan_lora([meta(48, 4).T], meta(4, 64), sites, table, batch, self.device)
        with pytest.raises(ValueError, match="cannot be computed with together"):
            plan_lora([meta(4, 48)], meta(4, 64, dtype=torch.float16), sites, table, batch, self.device)

    def test_pointwise(self) -> None:
        plan_gated_act(meta(4, 64), meta(4, 64), meta(4, 64), "silu")
        with pytest.raises(ValueError, match="the last must be 1"):
            plan_gated_act(meta(4, 64), meta(64, 4).T, meta(4, 64), "silu")
        with pytest.raises(ValueError, match="the last must be 1"):
            plan_rotary(meta(4, 64, 8).transpose(1, 2), meta(4, 64), meta(4, 64))
