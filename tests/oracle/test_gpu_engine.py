"""The engine on a CUDA device: the tokens of the untouched model, and no kernel compiled after the first request.

Written without access to a GPU: none of it has run yet.
"""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Literal

import pytest
import torch
from oracle.adapters.expert_adapters import expert_adapters
from oracle.peft_oracle import TINY_VOCAB, Lora, Oracle, ask, greedy_request, prompts, tiny_llama
from oracle.tiny_models import tiny_model

from gpu_worker.build import build_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.model.prepare import prepare_model
from protocol.runtime.settings import Settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),  # the first run compiles every variant
]

LORAS = {
    "one": Lora(3),
    "two": Lora(16, ("q_proj", "v_proj", "lm_head")),
    "three": Lora(40, ("down_proj",)),
    "dora": Lora(5, options={"use_dora": True}),
}


def gpu_engine(oracle: Oracle, cuda_graphs: Literal["on", "off"]) -> Engine:
    module = copy.deepcopy(oracle.untouched)
    torch.nn.Module.to(module, "cuda")
    model = prepare_model(module, frozenset(), None)
    settings = Settings(
        model="oracle", device="cuda", cuda_graphs=cuda_graphs, max_num_seqs=16, max_step_tokens=256,
        adapter_pool_bytes=64 << 20, kv_cache_bytes=64 << 20,
    )  # fmt: skip
    return build_engine(model, settings, oracle.fetch)[0]


def num_compiled() -> int:
    """Return how many kernel variants Triton has compiled or loaded in this process."""
    from lora_kernels.triton_ops import attention, lora, pointwise

    modules: tuple[ModuleType, ...] = (attention, lora, pointwise)
    kernels = [value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")]
    assert len(kernels) >= 8
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


@pytest.mark.parametrize("cuda_graphs", ["on", "off"])
def test_a_mixed_soak_equals_one_by_one_and_compiles_nothing(cuda_graphs: Literal["on", "off"]) -> None:
    oracle = Oracle(tiny_llama(), LORAS, scale=0.4)
    engine = gpu_engine(oracle, cuda_graphs)
    before = num_compiled()
    assert before > 20
    wanted = {
        f"{name}/{i}": (name, prompt, 3 + 2 * i)
        for name in oracle.names
        for i, prompt in enumerate(prompts(7, TINY_VOCAB, (5, 33, 120, 12, 64, 200)))
    }
    asked = ask(engine, [greedy_request(rid, *one) for rid, one in wanted.items()])
    for rid, (name, prompt, num) in wanted.items():
        assert asked.ids[rid] == oracle.greedy(name, prompt, num), rid
        assert not name or asked.ids[rid] != oracle.greedy("", prompt, num), "the adapter must change the answer"
    assert num_compiled() == before


def test_experts_of_a_mixture_equal_one_by_one_and_compile_nothing() -> None:
    model = tiny_model("qwen3_moe")
    loras = expert_adapters(model, prepare_model(copy.deepcopy(model), frozenset(), None))
    oracle = Oracle(model, loras, scale=0.4)
    engine = gpu_engine(oracle, "on")
    before = num_compiled()
    wanted = {
        f"{name}/{i}": (name, prompt, 3 + 2 * i)
        for name in oracle.names
        for i, prompt in enumerate(prompts(4, TINY_VOCAB, (5, 33, 120)))
    }
    asked = ask(engine, [greedy_request(rid, *one) for rid, one in wanted.items()])
    assert {rid: oracle.greedy(*one) for rid, one in wanted.items()} == asked.ids
    assert num_compiled() == before
