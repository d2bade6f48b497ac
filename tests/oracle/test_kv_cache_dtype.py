"""An int8 KV cache: tokens are those of transformers with keys and values rounded in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracle.peft_oracle import TINY_VOCAB, Oracle, ask, greedy_request, prompts, warm
from pydantic import ValidationError
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gpu_worker.model.kv_dtype import choose_kv_dtype
from lora_kernels import kv_codes
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

NUM_TOKENS = 16
NUM_ADAPTERS = 5  # of the oracle, including the base
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"prefix_cache": False},
    "prefixes": {},
    "chunked": {"max_step_tokens": 40, "max_num_seqs": 40},
    "reference": {"kernels": "reference"},
    "preempted": {"kv_cache_bytes": 10 * 16 * 160, "max_model_len": 64, "prefix_cache": False},
    "drafts": {"max_draft_tokens": 6, "max_num_seqs": 8},
}


@contextmanager
def rounded_cache() -> Iterator[None]:
    """Let transformers' own attention see keys and values rounded as in the cache."""
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def rounded(x: Tensor) -> Tensor:
        codes, scales = kv_codes.encode(x)
        return (codes.float() * scales[..., None]).to(x.dtype)

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(module, q, rounded(k), rounded(v), *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


@pytest.fixture(scope="module")
def asked(tiny: Oracle) -> list[tuple[str, np.ndarray]]:
    texts = prompts(4, TINY_VOCAB)
    return [(name, texts[(i + k) % 4]) for k, name in enumerate(tiny.names[-NUM_ADAPTERS:]) for i in range(2)]


@pytest.fixture(scope="module")
def expected(tiny: Oracle, asked: list[tuple[str, np.ndarray]]) -> list[list[int]]:
    with rounded_cache():
        return [tiny.greedy(name, prompt, NUM_TOKENS) for name, prompt in asked]


@pytest.mark.parametrize("settings", SETTINGS)
def test_tokens_are_those_of_rounded_keys_and_values(
    settings: str, tiny: Oracle, asked: list[tuple[str, np.ndarray]], expected: list[list[int]]
) -> None:
    engine = tiny.engine(kv_cache_dtype="int8", **SETTINGS[settings])
    warm(engine, {name for name, _ in asked})
    got = ask(engine, [greedy_request(str(i), *one, NUM_TOKENS) for i, one in enumerate(asked)])
    assert [got.ids[str(i)] for i in range(len(asked))] == expected
    assert (engine.counters.num_preemptions > 0) == (settings == "preempted")


def test_rounding_is_seen(tiny: Oracle, asked: list[tuple[str, np.ndarray]]) -> None:
    """Otherwise the test above would pass without rounding."""
    _, prompt = asked[0]
    with rounded_cache():
        other = tiny.logits("", prompt)
    assert 1e-4 < (other - tiny.logits("", prompt)).abs().max() < 0.1


def test_the_same_memory_holds_more_tokens(tiny: Oracle) -> None:
    few: dict[str, Any] = {"kv_cache_bytes": 40 * 16 * 512, "max_num_seqs": 64, "max_model_len": 96}
    plain, coded = (tiny.engine(kv_cache_dtype=dtype, **few) for dtype in ("auto", "int8"))
    head_dim = plain.model.layers[0].call.head_dim
    assert coded.model.layers[0].k_cache is not None
    assert coded.model.layers[0].k_cache.dtype == torch.int8
    assert plain.config.num_blocks == 40
    assert coded.config.num_blocks == 40 * 4 * head_dim // (head_dim + kv_codes.SCALE_BYTES)


def _model(**changes: Any) -> Any:
    layer = SimpleNamespace(call=SimpleNamespace(head_dim=64, value_dim=64))
    return SimpleNamespace(**{"device": torch.device("cpu"), "passes": None, "layers": [layer]} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": torch.device("cuda")}, "served on a CPU only; the device is cuda"),
        ({"passes": object()}, "sequences run unbatched"),
        ({"layers": []}, "keeps no keys and values"),
        ({"layers": [SimpleNamespace(call=SimpleNamespace(head_dim=64, value_dim=6))]}, "have 6 numbers, no multiple"),
    ],
)
def test_what_int8_is_not_served_for_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    assert choose_kv_dtype(_model(), "int8") == torch.int8
    assert choose_kv_dtype(_model(**changes), "auto") is None
    with pytest.raises(BadRequest, match=f"kv_cache_dtype is int8.*{message}"):
        choose_kv_dtype(_model(**changes), "int8")


def test_fp8_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match=r"kv_cache_dtype\n.*'auto' or 'int8'.*input_value='fp8'"):
        Settings.model_validate({"kv_cache_dtype": "fp8"})
