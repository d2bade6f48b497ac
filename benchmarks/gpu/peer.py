"""vLLM on the same card, with the same shape, prompts and adapters: the figures of `steps`, if vLLM is installed.

Its weights are random too (`load_format="dummy"`). Its prefix cache is off, as is Lorafleet's; everything else is its
default. Decode time is the difference of two runs, one that emits a single token and one that emits `decode_steps`
more.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from benchmarks.common.fleet import make_adapters
from benchmarks.gpu.shapes import Shape, names_of

MOST_ADAPTERS = 32
"""Adapters that vLLM keeps on the device: the maximum in a mix of our first batch size."""


Modules = Callable[[str], Any]
"""Returns a module by its name. Raises ImportError."""


def run(
    shape: Shape, device: torch.device, deadline_s: float, modules: Modules = importlib.import_module
) -> dict[str, Any]:
    """Return vLLM's speeds; `skipped` says why all or one of them is missing."""
    try:
        vllm, lora = modules("vllm"), modules("vllm.lora.request")
    except ModuleNotFoundError:
        return {"skipped": "vLLM is not installed here"}
    num_seqs = shape.num_seqs[0]
    counts = [num for num in (0, *shape.num_adapters) if num <= min(num_seqs, MOST_ADAPTERS)]
    names = names_of(max(counts))
    with tempfile.TemporaryDirectory(prefix="lorafleet-peer-") as scratch:
        folder = Path(scratch)
        config = LlamaConfig(**shape.config, architectures=["LlamaForCausalLM"])
        config.dtype = shape.dtype
        config.save_pretrained(folder / "model")
        make_adapters(folder / "model", folder / "adapters", names, shape.ranks)
        llm = vllm.LLM(
            model=str(folder / "model"), load_format="dummy", skip_tokenizer_init=True,
            dtype=str(shape.dtype).removeprefix("torch."), max_num_seqs=max(shape.num_seqs), enable_lora=True,
            max_loras=max(counts), max_lora_rank=max(shape.ranks), enable_prefix_caching=False,
            max_model_len=shape.prompt_tokens + shape.decode_steps + 16, gpu_memory_utilization=0.85,
        )  # fmt: skip
        requests = {
            name: lora.LoRARequest(name, i + 1, str(folder / "adapters" / name)) for i, name in enumerate(names)
        }
        found: list[dict[str, Any]] = []
        for num in counts:
            mix = [requests.get(names_of(num)[i % max(1, num)]) for i in range(num_seqs)]
            if found and time.monotonic() > deadline_s:
                break
            speeds = [_speed(vllm, llm, shape, mix) for _ in range(shape.rounds + 1)]
            counted = speeds[1:] or speeds
            prefill, decode = (float(np.median(column)) for column in zip(*counted, strict=True))
            found.append({"num_seqs": num_seqs, "num_adapters": num, "decode_tok_s": decode, "prefill_tok_s": prefill})
    skipped = {} if len(found) == len(counts) else {"skipped": f"{counts[len(found) :]} adapters: no time left"}
    return {"version": vllm.__version__, "device": device.type, "cases": found, **skipped}


def _speed(vllm: Any, llm: Any, shape: Shape, mix: Sequence[Any]) -> tuple[float, float]:
    """Return prompt tokens per second, and output tokens per second while all sequences decode."""
    first_s, whole_s = (_seconds(vllm, llm, shape, mix, num) for num in (1, 1 + shape.decode_steps))
    return len(mix) * shape.prompt_tokens / first_s, len(mix) * shape.decode_steps / max(whole_s - first_s, 1e-9)


def _seconds(vllm: Any, llm: Any, shape: Shape, mix: Sequence[Any], num_tokens: int) -> float:
    rng, size = np.random.default_rng(), (len(mix), shape.prompt_tokens)
    prompts = [{"prompt_token_ids": ids} for ids in rng.integers(shape.config["vocab_size"], size=size).tolist()]
    wish = vllm.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    requests = list(mix) if any(one is not None for one in mix) else None
    started = time.perf_counter()
    llm.generate(prompts, wish, lora_request=requests, use_tqdm=False)
    return time.perf_counter() - started
