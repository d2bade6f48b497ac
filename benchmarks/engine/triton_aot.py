"""Compile every Triton kernel variant for cards that this machine need not have, and list their resources.

The operations plan their launches with tensors on the meta device, for the shapes of real models. Each distinct launch
is then compiled for each target, without a GPU, and the table in docs/triton.md lists its registers and shared memory.
The tests run `--check`: the committed table must list the variants that are planned now, and the heaviest variants of
each kernel are compiled again. A kernel that spills registers or needs more shared memory than the card has is an
error.

    python -m benchmarks.engine.triton_aot             compile all, rewrite the table
    python -m benchmarks.engine.triton_aot --missing   compile variants missing in the table, drop unplanned ones
    python -m benchmarks.engine.triton_aot --check     compare the list, compile the heaviest
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from lora_kernels.ops import PAGE_ROWS, AdapterTable, LoraSite, build_attention_batch, build_lora_batch
from lora_kernels.triton_ops.attention import Logits, plan_attention
from lora_kernels.triton_ops.launch import Device, Launch
from lora_kernels.triton_ops.lora import plan_lora
from lora_kernels.triton_ops.matmul import plan_linear
from lora_kernels.triton_ops.pointwise import plan_gated_act, plan_kv_write, plan_rms_norm, plan_rotary
from protocol.runtime.environment import child_environment

DOC = Path(__file__).resolve().parents[2] / "docs" / "triton.md"
BEGIN, END = "<!-- variants: begin -->", "<!-- variants: end -->"
HEAVIEST = 2  # variants of each kernel and target that --check compiles


@dataclass(frozen=True, slots=True)
class Target:
    """A card, and the maximum shared memory of one program on it."""

    name: str
    gpu: GPUTarget
    device: Device
    max_shared_bytes: int


TARGETS = (
    Target("sm_80 (A100)", GPUTarget("cuda", 80, 32), Device("cuda", num_sms=108, capability=80), 163 * 1024),
    Target("sm_90 (H100)", GPUTarget("cuda", 90, 32), Device("cuda", num_sms=132, capability=90), 227 * 1024),
    Target("gfx942 (MI300X)", GPUTarget("hip", "gfx942", 64), Device("hip", num_sms=304, capability=94), 64 * 1024),
    Target("sm_100 (B200)", GPUTarget("cuda", 100, 32), Device("cuda", num_sms=148, capability=100), 227 * 1024),
)


@dataclass(frozen=True, slots=True)
class Model:
    """The shapes of a model that determine its kernel variants."""

    name: str
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    logits: Logits


SINKS = torch.empty(64, device="meta")
MODELS = (
    Model("SmolLM2-135M", 576, 1536, 9, 3, 64, 64, Logits(0.125)),
    Model("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128, Logits(0.088)),
    Model("Qwen2.5-7B", 3584, 18944, 28, 4, 128, 128, Logits(0.088)),
    Model("Phi-2", 2560, 10240, 32, 32, 80, 80, Logits(0.11)),
    Model("Gemma-2-9B", 3584, 14336, 16, 8, 256, 256, Logits(0.0625, window=4096, softcap=50.0)),
    Model("gpt-oss-20b", 2880, 2880, 64, 8, 64, 64, Logits(0.125, window=128, sinks=SINKS)),
    Model("DeepSeek-V2-Lite", 2048, 10944, 16, 16, 192, 128, Logits(0.072)),
    Model("Falcon-7B", 4544, 18176, 71, 1, 64, 64, Logits(0.125)),
    Model("wide heads", 2048, 8192, 8, 1, 512, 512, Logits(0.044)),
)


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel with the arguments with which it is compiled for one target."""

    target: Target
    launch: Launch
    name: str

    @property
    def weight(self) -> int:
        """Number of elements of the blocks that a program holds; more elements make spills more likely."""
        args: dict[str, Any] = self.launch.args
        blocks = [args[key] for key in args if key.startswith("BLOCK_") and key != "BLOCK_TOKENS"]
        return math.prod(sorted(blocks)[-2:]) * args.get("SPLITS", 1)


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources of a compiled kernel, per thread or program."""

    registers: int
    shared_bytes: int
    spill_bytes: int


def variants(target: Target) -> list[Variant]:
    """Return every distinct variant that serving MODELS needs on a target, ordered by name."""
    found: dict[str, Variant] = {}
    for i, model in enumerate(MODELS):
        # fp32 for two shapes only, since it changes just the element size. fp16 has bf16's size and instructions.
        for dtype in (torch.bfloat16, torch.float32) if i < 2 else (torch.bfloat16,):
            for launch in _launches(model, dtype, target.device):
                variant = Variant(target, launch, _name(launch))
                found.setdefault(variant.name, variant)
    return [found[name] for name in sorted(found)]


def _launches(model: Model, dtype: torch.dtype, device: Device) -> Iterator[Launch]:
    """Yield the launches of one layer, for steps from one token to a long mixed prefill."""
    qkv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim, model.num_kv_heads * model.head_dim_v
    layers = (
        (model.hidden, qkv),
        (model.num_heads * model.head_dim_v, (model.hidden,)),
        (model.hidden, (model.intermediate,) * 2),
        (model.intermediate, (model.hidden,)),
    )
    for token_slots in (np.arange(1), np.arange(8), np.arange(256) % 64, np.arange(4096) // 512):
        for max_pages in (1, 2, 4):
            for k, widths in layers:
                yield from lora_launches(token_slots, max_pages, k, widths, dtype, device)
    for query_lens in ((1,), (1,) * 16, (1,) * 256, (1,) * 32 + (2048,)):
        yield from attention_launches(model, np.array(query_lens), 4096, dtype, device)
    # With fixed sums, LoRA and attention launch the same variants as above, except for constants of their steps.
    rows, weight = _meta(256, model.hidden, dtype=dtype), _meta(model.intermediate, model.hidden, dtype=dtype)
    yield plan_linear(_meta(256, model.intermediate, dtype=dtype), rows, weight, None, device)


def lora_launches(
    token_slots: np.ndarray,
    max_pages: int,
    k: int,
    widths: tuple[int, ...],
    dtype: torch.dtype,
    device: Device,
    first_site: int = 0,
) -> Iterator[Launch]:
    """Yield the LoRA launches of one set of sibling layers."""
    num_slots, rows = 64, 64 * max_pages * PAGE_ROWS
    table = AdapterTable(
        ranks=_meta(num_slots, 7, dtype=torch.int32),
        scales=_meta(num_slots, 7),
        pages=_meta(num_slots, 2, max_pages, dtype=torch.int32),
    )
    sites = [
        LoraSite(first_site + i, first_site % 2, _meta(rows, k, dtype=dtype), _meta(rows, n, dtype=dtype))
        for i, n in enumerate(widths)
    ]
    num_tokens = len(token_slots)
    # Per-request factors add only one multiplication, so they are compiled for the mixed decode step alone.
    ones = np.ones(num_tokens, dtype=np.float32)
    for scales in (None, ones) if num_tokens == 256 else (None,):
        batch = build_lora_batch(token_slots, "meta", scales)
        assert batch is not None
        outs = [_meta(num_tokens, n, dtype=dtype) for n in widths]
        yield from plan_lora(outs, _meta(num_tokens, k, dtype=dtype), sites, table, batch, device)


def attention_launches(
    model: Model, query_lens: np.ndarray, kv_len: int, dtype: torch.dtype, device: Device
) -> Iterator[Launch]:
    """Yield the launches of one attention layer, and of the pointwise operations around it."""
    num_seqs, num_tokens, num_blocks = len(query_lens), int(query_lens.sum()), 256
    tables = np.zeros((num_seqs, -(-kv_len // 16)), np.int32)
    batch = build_attention_batch(query_lens, np.full(num_seqs, kv_len), tables, "meta")
    q = _meta(num_tokens, model.num_heads, model.head_dim, dtype=dtype)
    k = _meta(num_tokens, model.num_kv_heads, model.head_dim, dtype=dtype)
    v = _meta(num_tokens, model.num_kv_heads, model.head_dim_v, dtype=dtype)
    k_cache = _meta(num_blocks, model.num_kv_heads, 16, model.head_dim, dtype=dtype)
    v_cache = _meta(num_blocks, model.num_kv_heads, 16, model.head_dim_v, dtype=dtype)
    out = _meta(num_tokens, model.num_heads, model.head_dim_v, dtype=dtype)
    yield from plan_attention(out, q, k_cache, v_cache, batch, model.logits, device)
    yield plan_kv_write(k, v, k_cache, v_cache, batch)

    x, weight = _meta(num_tokens, model.hidden, dtype=dtype), _meta(model.hidden, dtype=dtype)
    yield plan_rms_norm(torch.empty_like(x), x, weight, 1e-6, None, plus_one=False)
    yield plan_rms_norm(torch.empty_like(x), x, weight, 1e-6, x, plus_one=True)
    angles = _meta(num_tokens, model.head_dim, dtype=dtype)
    yield plan_rotary(q, angles, angles)
    gate = _meta(num_tokens, model.intermediate, dtype=dtype)
    for act in ("silu", "gelu", "gelu_tanh"):
        yield plan_gated_act(torch.empty_like(gate), gate, gate, act)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _name(launch: Launch) -> str:
    """Name a variant by what distinguishes its code: element type, constants, optional arguments, warps, stages."""
    parts = [launch.kernel.fn.__name__.removesuffix("_kernel")]
    dtypes = {
        str(t.dtype).removeprefix("torch.")
        for t in _tensors(launch.args.values())
        if t.dtype in (torch.bfloat16, torch.float16)
    }
    parts.append(dtypes.pop() if dtypes else "float32")
    for key, value in launch.args.items():
        if value is None or (key.isupper() and key not in ("SITE_BITS", "PAGE_ROWS", "BLOCK_TOKENS", "UPCAST")):
            parts.append(f"{key}={int(value) if isinstance(value, bool) else value}".lower())
    return " ".join([*parts, f"warps={launch.limits.num_warps}", f"stages={launch.limits.num_stages}"])


def _tensors(args: Iterable[object]) -> Iterator[torch.Tensor]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from _tensors(arg)


def source_of(launch: Launch, gpu: GPUTarget) -> tuple[ASTSource, dict[str, object]]:
    """Return the source and options of a launch: the kernel specialized by its arguments, as at run time."""
    backend, kernel = make_backend(gpu), launch.kernel
    bind: Any = create_function_from_signature(kernel.signature, kernel.params, backend)
    settings = launch.limits.options()
    bound, specialization, options = bind(**launch.args, **settings)
    options, signature, constants, attrs = kernel._pack_args(
        backend, settings | {"debug": False}, bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attrs), options.__dict__


def compile_launch(launch: Launch, gpu: GPUTarget) -> Resources:
    """Compile a launch exactly as on the card; return the resources that the machine code declares."""
    source, options = source_of(launch, gpu)
    compiled: Any = triton.compile(source, target=gpu, options=options)
    if gpu.backend == "hip":
        return _amd_resources(compiled.asm["amdgcn"], compiled.metadata.shared)
    return _nvidia_resources(compiled.asm["cubin"], compiled.metadata.shared)


def _nvidia_resources(cubin: bytes, shared_bytes: int) -> Resources:
    # A kernel without a stack spills nothing; ptxas' own report is empty for some targets.
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True, env=child_environment()
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no registers: {usage!r}")
    return Resources(int(found[1]), shared_bytes, int(found[2]))


def _amd_resources(amdgcn: str, shared_bytes: int) -> Resources:
    def read(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", amdgcn)
        if found is None:
            raise RuntimeError(f"no .{key} in the assembly")
        return int(found[1])

    # Scalar registers are spilled into lanes of vector registers (.sgpr_spill_count), which touches no memory.
    spilled = 4 * read("vgpr_spill_count") + read("private_segment_fixed_size")
    return Resources(read("vgpr_count") + read("agpr_count"), shared_bytes, spilled)


def _compile_named(target_index: int, name: str) -> Resources:
    """Compile a variant in a worker process, which plans the launches again, since kernels cannot be pickled."""
    target = TARGETS[target_index]
    launch = next(variant.launch for variant in _planned(target_index) if variant.name == name)
    return compile_launch(launch, target.gpu)


_plans: dict[int, list[Variant]] = {}


def _planned(target_index: int) -> list[Variant]:
    if target_index not in _plans:
        _plans[target_index] = variants(TARGETS[target_index])
    return _plans[target_index]


def compile_all(chosen: list[tuple[int, str]]) -> dict[tuple[int, str], Resources]:
    """Compile variants, given by target index and name, on all cores."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        indices, names = zip(*chosen, strict=True)
        return dict(zip(chosen, pool.map(_compile_named, indices, names), strict=True))


def problems(results: dict[tuple[int, str], Resources]) -> list[str]:
    """Return a line for every reason why a variant does not fit its card."""
    found = []
    for (index, name), used in results.items():
        target = TARGETS[index]
        if used.spill_bytes:
            found.append(f"{target.name}: {name}: {used.spill_bytes} bytes of spills or stack")
        if used.shared_bytes > target.max_shared_bytes:
            limit = target.max_shared_bytes
            found.append(f"{target.name}: {name}: {used.shared_bytes} bytes of shared memory; the card has {limit}")
    return found


def _table(results: dict[tuple[int, str], Resources], rows: dict[str, list[str]]) -> str:
    """Return the table of results, merged with already known rows. rows: variant -> its cells."""
    for (index, name), used in results.items():
        variant, _, settings = name.partition(" warps=")
        spilled = f", {used.spill_bytes} B spilled" if used.spill_bytes else ""
        cell = f"{used.registers} · {used.shared_bytes / 1024:.1f} · {settings.replace(' stages=', 'x')}{spilled}"
        rows.setdefault(variant, ["-"] * len(TARGETS))[index] = cell
    lines = [f"| variant | {' | '.join(target.name for target in TARGETS)} |", "|---" * (len(TARGETS) + 1) + "|"]
    return "\n".join(lines + [f"| {variant} | {' | '.join(cells)} |" for variant, cells in sorted(rows.items())])


def _documented() -> dict[tuple[int, str], str]:
    """Return the variants of the committed table, and their cells."""
    found: dict[tuple[int, str], str] = {}
    for line in DOC.read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]:
        variant, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        for index, cell in enumerate(cells):
            if cell != "-":
                warps, stages = re.findall(r"(\d+)x(\d+)", cell)[0]
                found[index, f"{variant} warps={warps} stages={stages}"] = cell
    return found


def _write(results: dict[tuple[int, str], Resources], known: dict[tuple[int, str], str]) -> None:
    rows: dict[str, list[str]] = {}
    for (index, name), cell in known.items():
        rows.setdefault(name.partition(" warps=")[0], ["-"] * len(TARGETS))[index] = cell
    before, rest = DOC.read_text().split(BEGIN)
    after = rest.split(END)[1]
    DOC.write_text(f"{before}{BEGIN}\n\n{_table(results, rows)}\n{END}{after}")


def _heaviest(index: int) -> list[tuple[int, str]]:
    by_kernel: dict[object, list[Variant]] = {}
    for variant in _planned(index):
        by_kernel.setdefault(variant.launch.kernel, []).append(variant)
    return [
        (index, variant.name)
        for found in by_kernel.values()
        for variant in sorted(found, key=lambda variant: variant.weight)[-HEAVIEST:]
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Compile or check; return the exit code."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for several cards.")
    parser.add_argument("--check", action="store_true", help="compare with the committed table, compile the heaviest")
    parser.add_argument("--missing", action="store_true", help="compile what the committed table lacks")
    args = parser.parse_args(argv)
    targets, known = range(len(TARGETS)), _documented()
    planned = {(index, variant.name) for index in targets for variant in _planned(index)}
    if args.check:
        differing = known.keys() ^ planned
        if differing:
            print(f"{DOC.name} is out of date, run this with --missing:", *sorted(differing), sep="\n")
            return 1
        # In this process, which has planned them: for a few variants, starting other processes would take longer.
        results = {chosen: _compile_named(*chosen) for index in targets for chosen in _heaviest(index)}
    else:
        known = {chosen: cell for chosen, cell in known.items() if args.missing and chosen in planned}
        results = compile_all(sorted(planned - known.keys()))
        _write(results, known)
    found = problems(results)
    print(*found, f"{len(results)} variants compiled, {len(found)} unfit", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
