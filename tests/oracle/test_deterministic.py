"""With fixed sums, a text has the same bits in any batch, and its tokens are still the oracle's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle.peft_oracle import TINY_VOCAB, Lora, Oracle, ask, greedy_request, prompts, random_llama, warm
from oracle.tiny_models import tiny_model

from gpu_worker.planning.request import EngineRequest
from lora_kernels import ops
from protocol.wire.errors import BadRequest
from protocol.wire.messages import Sampling

WIDE = {
    "vocab_size": TINY_VOCAB, "hidden_size": 320, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 5, "num_key_value_heads": 1,
}  # fmt: skip
"""Wide enough that a library's order of sums depends on the shape of a product."""


@pytest.fixture
def fixed() -> Iterator[None]:
    ops.fix_sums(True)
    yield
    ops.fix_sums(False)


def requests_of(oracle: Oracle) -> list[EngineRequest]:
    """Return requests of every adapter, with logprobs, which show the bits of their logits."""
    wish = Sampling(temperature=0.0, ignore_eos=True, num_logprobs=5)
    texts = prompts(9, TINY_VOCAB, (3, 17, 32, 45, 70))
    return [
        EngineRequest(f"{name}/{i}", 1, name, text, wish, 12)
        for i, text in enumerate(texts)
        for name in [oracle.names[i % len(oracle.names)]]
    ]


@pytest.mark.parametrize(
    ("dtype", "kernels"),
    [
        pytest.param(torch.float32, "auto", marks=pytest.mark.thorough),
        (torch.bfloat16, "auto"),
        (torch.float32, "reference"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("fixed")
def test_logprobs_have_the_same_bits_in_any_batch(dtype: torch.dtype, kernels: str) -> None:
    base = random_llama(std=0.1, **WIDE)
    torch.nn.Module.to(base, dtype)
    oracle = Oracle(base, {"x8": Lora(8), "x40": Lora(40)}, scale=0.3)
    if kernels == "reference":  # its attention is one product over all queries of a chunk
        with pytest.raises(BadRequest, match="deterministic is on, but llama computes a text"):
            oracle.engine(kernels=kernels, deterministic=True)
        return
    few: dict[str, Any] = {"max_step_tokens": 24, "max_num_seqs": 5}
    settings: list[dict[str, Any]] = [{}, few, {**few, "overlap": "on"}, {"max_num_seqs": 1, "max_step_tokens": 400}]
    found: list[dict[str, bytes]] = []
    for own in settings:
        engine = oracle.engine(deterministic=True, prefix_cache=False, **own)
        warm(engine, oracle.names)
        asked = ask(engine, requests_of(oracle))
        found.append(asked.logprobs)
        if dtype == torch.float32:
            for request in requests_of(oracle):
                assert asked.ids[request.rid] == oracle.greedy(request.digest, request.prompt, 12)
    assert all(logprobs == found[0] for logprobs in found[1:])


def test_without_it_a_batch_changes_bits_or_nothing_would_be_shown() -> None:
    oracle = Oracle(random_llama(std=0.1, **WIDE), {}, scale=0.3)
    engine = oracle.engine()
    with pytest.raises(BadRequest, match="deterministic is on, but llama computes a text"):
        engine.model.refuse_unless_fixed(engine.config.num_blocks, 0)


@pytest.mark.usefixtures("fixed")
def test_models_that_cannot_be_fixed_are_refused() -> None:
    with pytest.raises(BadRequest, match="sequences run unbatched"):
        Oracle(tiny_model("falcon"), {}, scale=0.4).engine(deterministic=True)


@pytest.mark.usefixtures("fixed")
def test_draws_are_the_same_too() -> None:
    oracle = Oracle(random_llama(std=0.1, **WIDE), {"x8": Lora(8)}, scale=0.3)
    wish = Sampling(temperature=1.3, top_p=0.9, seed=5, ignore_eos=True)
    alone = replace(greedy_request("0", "x8", prompts(1, TINY_VOCAB)[0], 20), sampling=wish)
    crowd = [replace(alone, rid=str(i), prompt=text) for i, text in enumerate(prompts(12, TINY_VOCAB))]
    first = ask(oracle.engine(deterministic=True), [alone])
    assert ask(oracle.engine(deterministic=True, max_step_tokens=40, max_num_seqs=40), crowd).ids["0"] == first.ids["0"]
