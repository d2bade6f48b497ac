"""The number of kernels that a step launches, counted on a CPU: eagerly, and recorded.

    python -m benchmarks.engine.launches

The engine runs its GPU path in Triton's interpreter, on a tiny Llama with two and with three layers; the difference per
layer gives the number for 32. It counts launches of Triton kernels, torch operators that write, and copies to the
device. The time of a launch depends on the machine: 5 to 20 us of the host, while the device computes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

NUM_LAYERS = 32
PROMPT_TOKENS, NUM_DECODES = 40, 3
MAKES_NOTHING = {
    "promote_types", "zeros", "empty", "empty_like", "new_empty", "empty_strided", "detach", "lift_fresh",
    "_unsafe_view", "pin_memory",
}  # fmt: skip
"""Operators that launch nothing; zeros are lists on the host here.

Views, which share memory with their input, are recognized by their schema."""


class Launches(TorchDispatchMode):
    """Counts what would be launched on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        returns = func._schema.returns
        is_view = bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)
        if not is_view and name not in MAKES_NOTHING:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Nothing:
    """Records steps as no-ops, so that only the launches around a replay remain."""

    def record(self, step: Callable[[], object]) -> Callable[[], object]:
        """Return a replay that does nothing."""
        return lambda: None


def count(num_layers: int, *, recorded: bool) -> Counter[str]:
    """Return the launches of one step with a chunk and a few decodes, by kernel or operator."""
    from benchmarks.gpu.shapes import SHAPES, RandomAdapters, random_model
    from benchmarks.gpu.steps import engine_of, load
    from gpu_worker.planning.request import EngineRequest
    from lora_kernels.triton_ops.launch import Launch
    from protocol.wire.messages import Sampling

    shape = SHAPES["tiny"]
    shape.config["num_hidden_layers"] = num_layers
    model, adapters = random_model(shape, torch.device("cpu"), "triton"), RandomAdapters(shape)
    engine = engine_of(shape, model, adapters, 4, max_num_seqs=8)
    names = ["mixed-0", "mixed-1"]
    load(engine, names)
    if recorded:
        engine.runner.record(Nothing(), 8, engine.config.max_model_len, engine.config.limits.max_step_tokens)
    wish = Sampling(temperature=0.0, ignore_eos=True)

    def add(rid: str, num: int) -> None:
        prompt = np.arange(num, dtype=np.int32) % 99
        engine.add(EngineRequest(rid, 1, names[num % 2], prompt, wish, 9))

    for i in range(NUM_DECODES):
        add(str(i), 3 + i)
    engine.step()
    add("chunk", PROMPT_TOKENS)
    launches = Launches()
    kernels, call = Counter[str](), Launch.__call__

    def counted(self: Launch) -> None:
        kernels[self.kernel.fn.__name__] += 1
        with _disable_current_modes():
            call(self)

    Launch.__call__ = counted
    try:
        with launches:
            engine.step()
    finally:
        Launch.__call__ = call
    return launches.found + kernels


def main() -> None:
    """Count, and print a table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.engine.launches"], os.environ | {"TRITON_INTERPRET": "1"}
        )
    for recorded in (False, True):
        two, three = count(2, recorded=recorded), count(3, recorded=recorded)
        layer = three - two
        total = two.total() + (NUM_LAYERS - 2) * layer.total()
        print(f"{'recorded' if recorded else 'eager'}: {two.total()} launches with 2 layers, {layer.total()} a layer, "
              f"{total} with {NUM_LAYERS}" + (", and one replay" if recorded else ""))  # fmt: skip
        print(f"  of two layers: {dict(two)}\n  a layer: {dict(layer)}")


if __name__ == "__main__":
    main()
