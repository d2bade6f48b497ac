"""An adapter with int8 rows gives PEFT's results for the values that the rows represent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import examples
from oracle.adapters.peft_kinds import KINDS, LLAMA, MAX_DIFFERENCE, Kind, make_adapter, make_engine, measure
from oracle.conformance import watch_logits
from oracle.peft_oracle import Lora, Oracle, ask, greedy_request, prompts, tiny_llama, warm

from gpu_worker.build import refuse_unless_on_cpu
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

ROUNDED = [
    "lora", "rslora", "patterns", "conv1d", "lora_bias", "bias all", "dora", "dora conv1d", "dora and biases", "head",
    "embedding", "dora embedding", "modules_to_save norms", "alora", "experts", "router",
    "weights as parameters",
]  # fmt: skip


@pytest.mark.parametrize(
    "name", examples.some(ROUNDED, "lora", "conv1d", "dora and biases", "dora embedding", "alora", "experts")
)
def test_kinds_are_those_of_peft_on_the_same_numbers(name: str, tmp_path: Path) -> None:
    """Parts that are not rows stay unrounded, such as biases, embeddings and experts. DoRA's norms use rounded rows."""
    make_adapter(KINDS[name], tmp_path)
    measured = measure(KINDS[name], tmp_path, max_step_tokens=16, max_num_seqs=8, lora_dtype="int8")
    assert measured.difference <= MAX_DIFFERENCE


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_mixed_batch_has_pefts_tokens(kernels: str) -> None:
    loras = {"one": Lora(1), "few": Lora(5), "page": Lora(16), "many": Lora(40)}
    oracle = Oracle(tiny_llama(), loras, scale=0.4)
    oracle.round_rows()
    engine = oracle.engine(kernels=kernels, max_step_tokens=24, max_num_seqs=8, lora_dtype="int8")
    seen, texts = watch_logits(engine), prompts(2, 199, (5, 33))
    wanted = [(f"{name}/{i}", name, text) for i, text in enumerate(texts) for name in oracle.names]
    warm(engine, list(loras))
    asked = ask(engine, [greedy_request(rid, name, text, 6) for rid, name, text in wanted])
    for rid, name, text in wanted:
        ids, logits = oracle.generate(name, text, 6)
        assert asked.ids[rid] == ids
        assert (torch.stack([seen[rid, i] for i in range(6)]) - logits).abs().max() <= MAX_DIFFERENCE


def test_a_gpu_is_refused_at_start() -> None:
    settings = Settings(model="m", lora_dtype="int8")
    refuse_unless_on_cpu(settings, torch.device("cpu"))
    with pytest.raises(BadRequest, match="lora_dtype is int8, which is served on a CPU only; the device is cuda"):
        refuse_unless_on_cpu(settings, torch.device("cuda"))


def test_host_and_pool_count_what_int8_takes(tmp_path: Path) -> None:
    kind = Kind(LLAMA)
    make_adapter(kind, tmp_path)
    sizes: dict[str, tuple[int, int]] = {}
    for dtype in ("auto", "int8"):
        engine = make_engine(kind.base, {"tuned": tmp_path}, lora_dtype=dtype)
        warm(engine, ["tuned"])
        sizes[dtype] = engine.adapters.pool.residents["tuned"].num_bytes, engine.adapters.host.num_bytes
    for fp32, int8 in zip(sizes["auto"], sizes["int8"], strict=True):
        assert fp32 / 4 < int8 < fp32 / 2
