"""A tied embedding has no memory of its own where the head's weight is packed, and returns the same rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle.tiny_models import tiny_model

from gpu_worker.layers.tied import TiedEmbedding
from gpu_worker.model.prepare import prepare_model
from lora_kernels import cpu, ops


@pytest.fixture(autouse=True)
def native() -> None:
    if not cpu.load():
        pytest.fail("this machine has no native kernels")


def embedding_of(model_type: str, dtype: torch.dtype, **config: Any) -> tuple[Any, Any]:
    """Return a model's embedding in two forms: of transformers, and as served."""
    model: Any = tiny_model(model_type, **config)
    model.to(dtype)
    served = prepare_model(copy.deepcopy(model), frozenset(), None)
    return model.get_input_embeddings(), served.module.get_input_embeddings()


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_rows_come_from_the_heads_packed_weight(model_type: str) -> None:
    before, after = embedding_of(model_type, torch.bfloat16, tie_word_embeddings=True)
    assert isinstance(after, TiedEmbedding)
    assert after.weight.is_meta
    ids = torch.arange(before.num_embeddings)[None]
    assert torch.equal(after(ids), before(ids))
    assert torch.equal(after.numbers(), before.weight)


def test_an_embedding_that_is_not_tied_stays() -> None:
    before, after = embedding_of("llama", torch.bfloat16, tie_word_embeddings=False)
    assert type(after) is type(before)
    assert torch.equal(after.weight, before.weight)


def test_a_weight_that_is_not_packed_is_shared_as_it_is() -> None:
    _, after = embedding_of("llama", torch.float32, tie_word_embeddings=True)
    assert not isinstance(after, TiedEmbedding)
    weight = torch.randn(40, 64)
    assert ops.pack_linear(weight).weight.data_ptr() == weight.data_ptr()
