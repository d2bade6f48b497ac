"""vLLM's parameters about tokens, and what lm-eval relies on: a real fleet, held to transformers and PEFT in fp32."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Callable
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
CHAT = [{"role": "user", "content": PROMPT}]
NUM = 24
TOLERANCE = 1e-4

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]


class Oracle:
    """transformers and PEFT, one request at a time."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        self.model: Any = PeftModel.from_pretrained(base, folder / "adapters" / "one", adapter_name="one")
        self.model.load_adapter(folder / "adapters" / "two", adapter_name="two")

    def under(self, name: str, do: Callable[[], Any]) -> Any:
        with torch.inference_mode():
            if name == "base":
                with self.model.disable_adapter():
                    return do()
            self.model.set_adapter(name)
            return do()

    def greedy(self, name: str, ids: list[int], **options: Any) -> list[int]:
        """Return the greedy continuation, to its length, the end token being one like others."""
        options = {"max_new_tokens": NUM, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
        given = torch.tensor([ids])
        mask = torch.ones_like(given)
        found = self.under(name, lambda: self.model.generate(input_ids=given, attention_mask=mask, **options))
        return found[0, len(ids) :].tolist()

    def logprobs(self, name: str, ids: list[int]) -> torch.Tensor:
        """Return the logprobs [T, V] of what follows each token."""
        return self.under(name, lambda: self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1))


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
    answers = [oracle.greedy(name, ids) for name in NAMES]
    assert len(set(map(tuple, answers))) == len(NAMES), "each adapter must change the answer"
    return oracle


async def post(http: httpx2.AsyncClient, name: str, *, chat: bool = False, **fields: Any) -> Any:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = {"messages": CHAT} if chat else {"prompt": PROMPT}
    answer = await http.post(path, json={"model": name, **body, "temperature": 0, "max_tokens": NUM, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat_ids(oracle: Oracle) -> list[int]:
    return oracle.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=False)


def words_of(ids: list[int], oracle: Oracle) -> list[str]:
    """Return a letter and longer words that an output contains."""
    text = "".join(chr(byte) if chr(byte).isalnum() else " " for id_ in ids for byte in _bytes(id_, oracle))
    return sorted({word for word in text.split() if word.isascii()}, key=len)[-3:]


def _bytes(id_: int, oracle: Oracle) -> bytes:
    text = oracle.tokenizer.decode([id_])
    return text.encode() if len(text) == 1 and text.isascii() else b" "


# ---------------------------------------------------------------- which tokens may be chosen


async def test_bad_words_and_allowed_tokens_are_those_of_generate(http: httpx2.AsyncClient, oracle: Oracle) -> None:
    """All requests run together; some wish nothing."""
    prompts = {False: oracle.tokenizer(PROMPT)["input_ids"], True: chat_ids(oracle)}
    jobs: list[tuple[str, bool, dict[str, Any]]] = []
    expected: list[list[int]] = []
    for name, chat in itertools.product(NAMES, (False, True)):
        plain = oracle.greedy(name, prompts[chat])
        words = words_of(plain, oracle)
        bad_ids = [oracle.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        allowed = sorted({*plain[::2], 60, 61, 62, 63})
        assert words
        wishes: list[tuple[dict[str, Any], dict[str, Any]]] = [
            ({}, {}),
            ({"bad_words": words}, {"bad_words_ids": bad_ids}),
            ({"allowed_token_ids": allowed}, {"prefix_allowed_tokens_fn": lambda *_, ids=allowed: ids}),
            (
                {"allowed_token_ids": allowed, "bad_words": words, "logit_bias": {str(allowed[0]): 2.5}},
                {
                    "prefix_allowed_tokens_fn": lambda *_, ids=allowed: ids, "bad_words_ids": bad_ids,
                    "sequence_bias": [[[allowed[0]], 2.5]],
                },
            ),
        ]  # fmt: skip
        for fields, options in wishes:
            jobs.append((name, chat, fields))
            expected.append(oracle.greedy(name, prompts[chat], **options))
    answers = await asyncio.gather(
        *(post(http, name, chat=chat, ignore_eos=True, return_token_ids=True, **fields) for name, chat, fields in jobs)
    )
    for (name, chat, fields), answer, ids in zip(jobs, answers, expected, strict=True):
        assert answer["choices"][0]["token_ids"] == ids, (name, chat, fields)
        assert (answer if chat else answer["choices"][0])["prompt_token_ids"] == prompts[chat]
    unlike = [a != b for a, b in itertools.pairwise(expected)]
    assert sum(unlike) > len(unlike) - 3, "the wishes must change the answers"


# ---------------------------------------------------------------- logprobs


# ---------------------------------------------------------------- what lm-eval relies on


async def test_scoring_counts_and_scores_every_token(http: httpx2.AsyncClient, oracle: Oracle) -> None:
    """Prompts as ids, several in a call, with echo and `max_tokens` 1 or 0; the model predicts the end, or does not."""
    end = oracle.tokenizer.eos_token_id
    prompts = [oracle.tokenizer(text)["input_ids"] for text in (PROMPT, "Blue is", "and a rather longer one, " * 9)]
    for name, bias, max_tokens in itertools.product(NAMES, ({}, {str(end): 100}), (0, 1)):
        answer = await post(
            http, name, prompt=prompts, echo=True, logprobs=1, max_tokens=max_tokens, seed=1234, logit_bias=bias
        )
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


async def test_an_answer_ends_where_an_expression_matches(http: httpx2.AsyncClient, oracle: Oracle) -> None:
    """Python's `re` says after which token of the answer without expressions, and before which text."""
    ids = oracle.tokenizer(PROMPT)["input_ids"]
    jobs: list[tuple[str, list[str], str]] = []
    for name in NAMES:
        answer = oracle.greedy(name, ids)
        texts = [oracle.tokenizer.decode(answer[:num], skip_special_tokens=True) for num in range(NUM + 1)]
        whole = texts[-1]
        given = [
            r"\w\W", r"[aeiou].?[^aeiou]", r"(\d|\s){2}", r"[^\w\s]", r"(.)(.){0,3}" + re.escape(whole[9:11]),
            f"(?i){re.escape(whole[6:8].swapcase())}", re.escape(whole[3:5]) + r"[\s\S]*" + re.escape(whole[12:13]),
            "never (there|here)", r"\b\w{3}$", r"\b[aeiou]\w+\b", r"(?m)\W$", r"\B[^\W_]\b",
        ]  # fmt: skip
        for expressions in [[one] for one in given] + [given]:
            found = [[re.search(one, text) for one in expressions] for text in texts]
            first = next((num for num, matches in enumerate(found) if any(matches)), NUM)
            begin = min((match.start() for match in found[first] if match), default=None)
            jobs.append((name, expressions, texts[first][:begin]))
    assert len({text for _, _, text in jobs}) > len(jobs) // 3, "the expressions must cut at different places"

    async def text_of(name: str, expressions: list[str], *, stream: bool) -> str:
        body = {"model": name, "prompt": PROMPT, "temperature": 0, "max_tokens": NUM, "ignore_eos": True}
        answer = await http.post("/v1/completions", json={**body, "stop_regex": expressions, "stream": stream})
        assert answer.status_code == 200, answer.text
        if not stream:
            return answer.json()["choices"][0]["text"]
        events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    for stream in (False, True):
        answers = await asyncio.gather(*(text_of(name, given, stream=stream) for name, given, _ in jobs))
        assert answers == [text for _, _, text in jobs]
