"""A file of a few kB that expands to gigabytes is refused before it is expanded, with its name and the number."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from helpers.adapter_files import BASE, parsed, read_file, refusal
from helpers.kind_files import kind_config, kind_tensors
from msgspec import structs

from peft_adapters.format import read_adapter
from peft_adapters.kinds.kind import MAX_KIND_NUMBERS, MAX_KIND_PRODUCTS, MAX_KIND_ROWS, MAX_WHOLE
from protocol.wire.messages import SiteShape

SIZE = 8192
MAX_BYTES = 4 << 20
WIDE = structs.replace(BASE, sites=[SiteShape(f"model.layers.{i}.q_proj", SIZE, SIZE) for i in range(64)])
FOUR = [f"{i}.q_proj" for i in range(4)]

BOMBS: dict[str, dict[str, Any]] = {
    "LOHA": {"r": MAX_WHOLE}, "LOKR": {"r": 4096, "decompose_factor": 64}, "VERA": {"r": MAX_WHOLE},
    "MISS": {"r": MAX_KIND_ROWS, "init_weights": "mini", "mini_r": 1}, "DELORA": {"r": MAX_WHOLE},
    "GRALORA": {"r": SIZE, "gralora_k": SIZE}, "VBLORA": {"r": MAX_KIND_ROWS, "vector_length": 1, "num_vectors": 2},
    "VBLORA, long sums": {"r": 128, "vector_length": SIZE, "num_vectors": 256, "topk": 256},
    "VBLORA, a large bank": {"r": 1, "vector_length": SIZE, "num_vectors": 4096},
    "HRA, many reflections": {"target_modules": FOUR, "r": MAX_KIND_ROWS},
    "HRA, made orthogonal": {"target_modules": FOUR, "r": MAX_KIND_ROWS, "apply_GS": True},
    "DEFT, made orthogonal": {"target_modules": FOUR, "r": MAX_KIND_ROWS, "decomposition_method": "qr"},
    "OFT, one block": {"target_modules": FOUR, "oft_block_size": SIZE, "num_cayley_neumann_terms": 1},
    "BOFT, one block": {"target_modules": FOUR, "boft_block_size": SIZE},
    "OFT, many terms": {"target_modules": FOUR, "oft_block_size": SIZE // 2, "num_cayley_neumann_terms": 64},
    "OFT, solved": {"target_modules": FOUR, "oft_block_size": SIZE, "use_cayley_neumann": False},
    "UNILORA": {"r": MAX_WHOLE}, "HRA": {"r": MAX_WHOLE}, "OFT": {"oft_block_size": SIZE}, "SHIRA": {"r": 4000},
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_its_number_alone(name: str) -> None:
    config = kind_config(name.partition(",")[0], **({"target_modules": ["q_proj"]} | BOMBS[name]))
    _, infos = parsed({"base_model.model.model.layers.0.q_proj.x": np.zeros(1, np.float32)})
    refusal(read_adapter, config, infos, WIDE)  # imports the needed modules
    tracemalloc.start()
    try:
        text = refusal(read_adapter, config, infos, WIDE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert any(f"where {limit} are served" in text for limit in (MAX_KIND_ROWS, MAX_KIND_NUMBERS, MAX_KIND_PRODUCTS))
    assert peak < MAX_BYTES


def test_a_small_file_within_the_limits_is_read() -> None:
    """The largest expansion allowed for a file with 64 numbers per layer."""
    config = kind_config("MISS", target_modules=["q_proj"], r=64, init_weights="mini", mini_r=1)
    tensors = {f"base_model.model.{site.name}.miss_block": np.ones((64, 1), np.float32) for site in WIDE.sites}
    spec = read_file(config, tensors, WIDE)
    assert sum(part.rank * 2 * SIZE for part in spec.sites) == 64 * 64 * 2 * SIZE <= MAX_KIND_NUMBERS


def test_sums_of_many_vectors_take_no_more_memory_than_what_they_make() -> None:
    """VB-LoRA's sums take memory for one vector at a time, for any topk."""
    size = 1024
    base = structs.replace(BASE, sites=[SiteShape("model.layers.0.q_proj", size, size)])
    config = kind_config("VBLORA", target_modules=["q_proj"], r=64, vector_length=size, num_vectors=64, topk=64)
    tensors = kind_tensors(config, base)
    (part,) = read_file(config, tensors, base).sites
    assert part.of_kind is not None
    tracemalloc.start()
    try:
        a, b = part.of_kind.matrices(tensors.__getitem__)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * (a.nbytes + b.nbytes)
    assert a.any()
    assert b.any()
