"""Time and memory to fetch, check, pack and copy an adapter of all experts of a large model.

    python -m benchmarks.engine.large_adapter [--short]

The adapter has rank 16 on every layer of every expert of a mixture of 48 layers of 64 experts, 5,120 and 768 wide (36
billion parameters). It is saved expert by expert in fp32, as PEFT does by default: 18,432 random tensors, 3.5 GB, in a
temporary folder behind an HTTP server on this machine. It takes the path of any adapter: the loader process fetches,
checks and packs it in bf16, for a base of that shape whose own weights take no memory here; the worker copies it into a
pool with space for one such adapter. Peaks are the memory that both processes hold together beyond their start: unique
and shared memory, with shared pages counted once.
"""

from __future__ import annotations

import json
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.common import report
from gpu_worker.adapters.expert_pool import EXPERT_SHARE, ExpertPool, page_bytes
from gpu_worker.adapters.loader.client import Loader
from gpu_worker.adapters.packing.expert_rows import expert_shapes
from gpu_worker.adapters.packing.packer import Packer
from gpu_worker.adapters.packing.rows import PackedRows
from gpu_worker.layers.adaptable_modules import AdaptableModules, parameter_shapes
from gpu_worker.layers.apply_extras import AdaptableModule, TokenLayout
from gpu_worker.layers.attention import StepContext
from gpu_worker.layers.expert_modules import GroupedExperts
from gpu_worker.layers.lora import GROUPS
from peft_adapters.format import adapter_digest, parse_config, parse_header
from protocol.wire.messages import ServedModel

RANK = 16
TARGETS = ("gate_proj", "up_proj", "down_proj")


def shape(*, short: bool) -> Qwen3MoeConfig:
    """Return the base's shape."""
    layers, experts = (2, 8) if short else (48, 64)
    return Qwen3MoeConfig(
        vocab_size=1024, hidden_size=5120, moe_intermediate_size=768, intermediate_size=768, num_hidden_layers=layers,
        num_attention_heads=40, num_key_value_heads=4, num_experts=experts, num_experts_per_tok=8,
    )  # fmt: skip


def write_adapter(config: Qwen3MoeConfig, folder: Path) -> int:
    """Write the adapter, one tensor at a time. Return the number of tensors."""
    header: dict[str, Any] = {}
    at, hidden, inner = 0, config.hidden_size, config.moe_intermediate_size
    for layer in range(config.num_hidden_layers):
        for expert in range(config.num_experts):
            for target in TARGETS:
                width_in, width_out = (inner, hidden) if target == "down_proj" else (hidden, inner)
                for half, size in (("A", (RANK, width_in)), ("B", (width_out, RANK))):
                    name = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{target}.lora_{half}.weight"
                    end = at + 4 * size[0] * size[1]
                    header[name] = {"dtype": "F32", "shape": list(size), "data_offsets": [at, end]}
                    at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    numbers = np.random.default_rng(0).standard_normal(RANK * max(hidden, inner), np.float32) / 64
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for entry in header.values():
            begin, end = entry["data_offsets"]
            file.write(numbers[: (end - begin) // 4].tobytes())
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0,
              "bias": "none", "target_modules": list(TARGETS)}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return len(header)


@contextmanager
def served_folder(folder: Path, digest: str) -> Iterator[str]:
    """Serve an adapter's folder as a store does. Yield the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = folder / self.path.removeprefix(f"/adapters/{digest}/")
            self.send_response(200)
            self.send_header("Content-Length", str(path.stat().st_size))
            self.end_headers()
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    self.wfile.write(piece)

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class Peak:
    """Samples the peak of the memory that processes hold together, in bytes beyond their start."""

    def __init__(self, *pids: int) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self._start = self._held()
        self.num_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _held(self) -> int:
        return sum(process.memory_full_info().pss for process in self._processes)

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.num_bytes = max(self.num_bytes, self._held() - self._start)

    def stop(self) -> int:
        """Stop sampling; return the peak in bytes."""
        self._done.set()
        self._thread.join()
        return self.num_bytes


def packer_for(config: Qwen3MoeConfig) -> Packer:
    """Return a packer for a base of that shape, on the meta device."""
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    torch.nn.Module.to(model, torch.bfloat16)
    adaptable = AdaptableModules(StepContext())
    shapes = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            adaptable.modules[name] = AdaptableModule(name, module, TokenLayout((0, 0, 0), (0,), 2))
            shapes += parameter_shapes(name, module)
    grouped = {name: GroupedExperts.of(name, one.module, None) for name, one in adaptable.modules.items()}
    adaptable.experts = {name: experts for name, experts in grouped.items() if experts is not None}
    served = ServedModel(
        model="large", name="large", fingerprint="f", model_type=config.model_type, vocab_size=config.vocab_size,
        max_model_len=4096, sites=shapes, dtype="bfloat16",
    )  # fmt: skip
    return Packer([], served, adaptable)


def pool_for(packer: Packer, num_pages: int) -> ExpertPool:
    """Return a pool with space for `num_pages` pages of each shape of experts."""
    sizes = [page_bytes(shape) for shape in expert_shapes(packer.expert_sites)]
    return ExpertPool(packer.expert_sites, int(num_pages * sum(sizes) / EXPERT_SHARE) + 1, 1, torch.device("cpu"))


def main() -> None:
    """Measure, and print a table."""
    args = report.parser(__doc__, without=("model", "out")).parse_args()
    config, times = shape(short=args.short), dict[str, float]()

    def timed(name: str, started: float) -> None:
        times[name] = time.perf_counter() - started

    with tempfile.TemporaryDirectory(prefix="lorafleet-large-") as scratch:
        folder = Path(scratch)
        num_tensors = write_adapter(config, folder)
        file = folder / "adapter_model.safetensors"
        raw = np.memmap(file, np.uint8, "r")
        started = time.perf_counter()
        tensors = parse_header(bytes(raw[: 8 + (4 << 20)]), len(raw))
        timed("read the header", started)
        digest = adapter_digest(parse_config((folder / "adapter_config.json").read_bytes()), tensors, raw.data)
        del raw
        packer, loader = packer_for(config), Loader()
        try:
            with served_folder(folder, digest) as url:
                loader.set_urls((url,))
                loader.describe(packer.row_sites, packer.served)
                peak = Peak(loader.pid, psutil.Process().pid)
                started = time.perf_counter()
                rows = loader.fetch(digest)
                timed("fetch, check and pack", started)
                assert isinstance(rows, PackedRows)
                adapter = packer.wrap(digest, rows)
                started = time.perf_counter()
                pages = adapter.num_pages[len(GROUPS) : -1]
                pool = pool_for(packer, max(pages))
                pool.copy(adapter.experts, [range(num) for num in pages], torch.Tensor.copy_)
                pool.publish(0, adapter.experts, [range(num) for num in pages])
                timed("copy into the pool", started)
                most = peak.stop()
        finally:
            loader.close()
        num_bytes = file.stat().st_size
    print(report.table(("what", ""), [
        ("tensors", f"{num_tensors:,}"), ("bytes in the file", f"{num_bytes / 1e9:.2f} GB"),
        ("bytes packed", f"{adapter.num_bytes / 1e9:.2f} GB"),
        *((name, f"{seconds:.1f} s") for name, seconds in times.items()),
        ("peak of loader and worker", f"{most / 1e9:.2f} GB"), ("peak ÷ file", f"{most / num_bytes:.2f}"),
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
