"""The logprobs of prompts, on which lm-eval relies: a real fleet against transformers and PEFT, in float32."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio
import torch
from helpers.fleets import tiny_fleet
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from chaos.fleet import ProcessFleet

ADAPTERS = ("one", "two")
NAMES = ("base", *ADAPTERS)
PROMPT = "What do you say of the sea and the sky"
TOLERANCE = 1e-4

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]


class Oracle:
    """transformers and PEFT, one request at a time."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        self.model: Any = PeftModel.from_pretrained(base, folder / "adapters" / "one", adapter_name="one")
        self.model.load_adapter(folder / "adapters" / "two", adapter_name="two")

    def logprobs(self, name: str, ids: list[int]) -> torch.Tensor:
        """Return the logprobs [T, V] of the token after each token."""
        off = self.model.disable_adapter() if name == "base" else nullcontext(self.model.set_adapter(name))
        with torch.inference_mode(), off:
            return self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ProcessFleet]:
    folder: Path = tmp_path_factory.mktemp("fleet")
    async with tiny_fleet(folder, ADAPTERS) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def http(fleet: ProcessFleet) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=fleet.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def oracle(fleet: ProcessFleet) -> Oracle:
    oracle = Oracle(fleet.folder)
    ids = oracle.tokenizer(PROMPT)["input_ids"]
    answers = [oracle.logprobs(name, ids).argmax(-1).tolist() for name in NAMES]
    assert len(set(map(tuple, answers))) == len(NAMES), "each adapter must change the answer"
    return oracle


async def test_scoring_counts_and_scores_every_token(http: httpx2.AsyncClient, oracle: Oracle) -> None:
    """Prompts as ids, several in a call, with echo and `max_tokens` 1 or 0; the model predicts the end or does not."""
    end = oracle.tokenizer.eos_token_id
    prompts = [oracle.tokenizer(text)["input_ids"] for text in (PROMPT, "Blue is", "and a rather longer one, " * 9)]
    for name, bias, max_tokens in itertools.product(NAMES, ({}, {str(end): 100}), (0, 1)):
        body = {"model": name, "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": max_tokens, "seed": 1234}
        told = await http.post("/v1/completions", json={**body, "temperature": 0, "logit_bias": bias})
        assert told.status_code == 200, told.text
        answer = told.json()
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        usage = answer["usage"]
        assert usage["prompt_tokens"] == sum(map(len, prompts))
        assert usage["completion_tokens"] == max_tokens * len(prompts)
        for choice, ids in zip(choices, prompts, strict=True):
            logprobs = choice["logprobs"]
            assert {len(values) for values in logprobs.values()} == {len(ids) + max_tokens}
            expected = oracle.logprobs(name, ids)
            own = [float(row[token]) for row, token in zip(expected, ids[1:], strict=False)]
            assert logprobs["token_logprobs"][1 : len(ids)] == pytest.approx(own, abs=TOLERANCE)
            greedy = [float(row.max()) for row in expected[:-1]]
            best = [max(top.values()) for top in logprobs["top_logprobs"][1 : len(ids)]]
            assert best == pytest.approx(greedy, abs=TOLERANCE)
            if max_tokens and bias:
                assert logprobs["tokens"][-1] == oracle.tokenizer.decode([end])
                assert choice["finish_reason"] == "stop"
