"""The Triton kernels without a GPU: interpreted, compiled ahead of time, and never compiled anew by a mere step."""

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

from benchmarks import triton_aot
from lora_kernels.triton_ops.attention import attention_kernel

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "triton"


def run(*args: str, **env: str) -> str:
    """Run python in the repository's root and return what it printed; its failure is the test's."""
    command = [sys.executable, *args]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_kernels_match_the_reference_in_the_interpreter() -> None:
    """The interpreter must be chosen before triton is first imported, hence a process of its own."""
    output = run("-m", "pytest", str(FOLDER), "-p", "no:cacheprovider", TRITON_INTERPRET="1")
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None, output
    assert int(passed[1]) > 70


@pytest.mark.timeout(600)
def test_variants_compile_without_spills_and_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert triton_aot.main(["--check"]) == 0
    assert " 0 unfit" in capsys.readouterr().out


def test_a_kernel_that_spills_is_found_unfit() -> None:
    """The check can fail: an attention tile four times too large for its registers."""
    target = triton_aot.TARGETS[0]
    launch = next(v.launch for v in triton_aot.variants(target) if v.launch.kernel is attention_kernel)
    crowded = replace(launch, args=launch.args | {"BLOCK_M": 256, "BLOCK_N": 64})
    used = triton_aot.compile_launch(crowded, target.gpu)
    assert used.spill_bytes > 0
    assert any("crowded" in problem for problem in triton_aot.problems({(0, "crowded"): used}))


def test_steps_of_one_shape_share_their_kernels() -> None:
    """A compilation in the middle of serving stalls every request: what changes by the step may not cause one.

    Steps of nearly one size (the size decides tiles and splits), at other sites, lengths and alignments.
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
