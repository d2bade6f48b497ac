"""Outputs that must follow a grammar: the same tokens in mixed batches, with drafts, after preemption and elsewhere.

The oracle is the most likely token by transformers' and PEFT's logits that a separate matcher accepts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event
from typing import Any

import numpy as np
import pytest
from helpers.factories import make_tokenizer
from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer
from oracle.peft_oracle import Lora, Oracle, ask, greedy_request, prompts, random_llama, warm
from tokenizers import Tokenizer

from gpu_worker.planning.request import EngineRequest
from gpu_worker.sampling.masks import Filling, MaskFiller
from protocol.wire.errors import BadRequest
from protocol.wire.grammar_limits import GRAMMAR_LIMITS
from protocol.wire.messages import Sampling

NUM_TOKENS = 60
TOKENIZER: Tokenizer = make_tokenizer().backend_tokenizer
VOCAB = TOKENIZER.get_vocab_size()
END = 0
FEW_BLOCKS: dict[str, Any] = {"kv_cache_bytes": 6 * 16 * 512, "max_model_len": 96}

SCHEMA = {
    "type": "object",
    "properties": {
        "size": {"enum": ["small", "large"]},
        "count": {"type": "integer", "minimum": 3, "maximum": 40},
        "flags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["size", "count"],
    "additionalProperties": False,
}


def grammar(**entry: Any) -> str:
    return json.dumps({"grammars": [entry]})


GRAMMARS = {
    "schema": grammar(json_schema={**SCHEMA, "x-guidance": {"whitespace_flexible": False}}),
    "choice": grammar(lark_grammar='start: "yes" | "yes, but" | "no"'),
    "regex": grammar(lark_grammar=r"start: /[a-f]{4}(-[0-9]{2}){2,14}/"),
    "rows": grammar(lark_grammar=r'start: ("<row/>\n"){4,7}'),
    "nested": grammar(lark_grammar='start: group\ngroup: "(" (group | WORD){1,3} ")"\nWORD: /[a-z]{1,4} /'),
}
NAMES = ["", *GRAMMARS]


@pytest.fixture(scope="module")
def tiny() -> Oracle:
    base = random_llama(
        std=0.2, vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return Oracle(base, {"x1": Lora(4), "x2": Lora(9)}, scale=0.3)


def by_hand(oracle: Oracle, request: EngineRequest) -> list[int]:
    """Return the greedy output, each token found with a matcher that has no masks."""
    matcher = LLMatcher(LLTokenizer(TOKENIZER.to_str(), n_vocab=VOCAB, eos_token=END), request.grammar)
    ids: list[int] = []
    while len(ids) < request.max_new_tokens:
        logits = oracle.logits(request.digest, np.concatenate((request.prompt, np.array(ids, np.int32))))[-1]
        token = next(token for token in logits.argsort(descending=True).tolist() if matcher.validate_tokens([token]))
        ids.append(token)
        assert matcher.consume_token(token)
        if matcher.is_stopped():
            break
    return ids


def requests_of(oracle: Oracle) -> list[EngineRequest]:
    """Return one request per adapter and grammar, and some without a grammar."""
    texts = prompts(4, VOCAB, (3, 17, 9, 24))
    made: list[EngineRequest] = []
    for i, name in enumerate(oracle.names):
        for k, which in enumerate(NAMES):
            request = greedy_request(f"{name}/{which}", name, texts[(i + k) % 4], NUM_TOKENS)
            made.append(replace(request, grammar=GRAMMARS.get(which, "")))
    return made


@pytest.fixture(scope="module")
def expected(tiny: Oracle) -> dict[str, list[int]]:
    return {
        request.rid: by_hand(tiny, request)
        if request.grammar
        else tiny.greedy(request.digest, request.prompt, NUM_TOKENS)
        for request in requests_of(tiny)
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_draft_tokens": 6},
        {"max_step_tokens": 12, "max_num_seqs": 12, **FEW_BLOCKS, "max_draft_tokens": 3},
        {"overlap": "on"},
        {"max_step_tokens": 12, "max_num_seqs": 12, **FEW_BLOCKS, "overlap": "on"},
    ],
    ids=["plain", "speculating", "preempted", "overlapped", "overlapped-preempted"],
)
def test_every_output_is_its_grammars_likeliest(
    tiny: Oracle, expected: dict[str, list[int]], settings: dict[str, Any]
) -> None:
    engine = tiny.engine(TOKENIZER, **settings)
    warm(engine, tiny.names)
    asked = ask(engine, requests_of(tiny))
    assert asked.ids == expected
    for request in requests_of(tiny):
        finish, ids = asked.finish[request.rid].finish, asked.ids[request.rid]
        assert finish == ("length" if len(ids) == NUM_TOKENS else "stop"), request.rid
        if request.rid.endswith("/schema"):
            assert finish == "stop"
            Draft202012Validator(SCHEMA).validate(json.loads(TOKENIZER.decode(ids)))
    assert {asked.finish[f"{name}/choice"].finish for name in tiny.names} == {"stop"}
    assert (engine.counters.num_preemptions > 0) == ("kv_cache_bytes" in settings)
    assert (engine.counters.num_accepted_tokens > 0) == ("max_draft_tokens" in settings)
    assert 0 < engine.counters.mask_s < engine.counters.sample_s


def test_a_request_resumed_elsewhere_goes_on_exactly(tiny: Oracle, expected: dict[str, list[int]]) -> None:
    resumed: list[EngineRequest] = []
    for request in requests_of(tiny):
        whole = expected[request.rid]
        for cut in {1, len(whole) // 2, len(whole) - 1} if request.grammar else {5}:
            resumed.append(replace(request, rid=f"{request.rid}/{cut}", output=whole[:cut]))
    asked = ask(tiny.engine(TOKENIZER, max_draft_tokens=4), resumed)
    for request in resumed:
        assert request.output + asked.ids[request.rid] == expected[request.rid.rpartition("/")[0]], request.rid


def test_an_output_that_is_whole_ends_without_another_token(tiny: Oracle, expected: dict[str, list[int]]) -> None:
    request = next(request for request in requests_of(tiny) if request.rid == "x1/schema")
    asked = ask(tiny.engine(TOKENIZER), [replace(request, output=expected["x1/schema"])])
    assert (asked.ids["x1/schema"], asked.finish["x1/schema"].finish) == ([], "stop")


def test_drawn_outputs_follow_their_grammars_too(tiny: Oracle) -> None:
    """Whatever other options a request has: the mask is applied last, just before sampling."""
    ways: list[dict[str, Any]] = [
        {"temperature": 1.5, "logit_bias": {END: 100.0}},
        {"temperature": 0.9, "top_p": 0.7, "min_tokens": 50, "ignore_eos": False},
        {"temperature": 2.0, "top_k": 3, "num_logprobs": 2, "logprobs_of": "choice"},
        {"temperature": 1.0, "typical_p": 0.5, "frequency_penalty": 2.0, "repetition_penalty": 1.3},
        {"temperature": 0.0, "watermark": True, "min_tokens": 3},
    ]
    [prompt] = prompts(1, VOCAB, (9,))
    requests = [
        EngineRequest(
            f"{which}/{i}/{seed}", 1, tiny.names[seed % 3], prompt, Sampling(**{"seed": seed, **way}), 200,
            stop_token_ids=[END], grammar=text,
        )
        for which, text in GRAMMARS.items() for i, way in enumerate(ways) for seed in range(3)
    ]  # fmt: skip
    plain, speculating = tiny.engine(TOKENIZER), tiny.engine(TOKENIZER, max_draft_tokens=5)
    asked = ask(plain, requests)
    assert ask(speculating, requests).ids == asked.ids
    assert ask(tiny.engine(TOKENIZER, overlap="on"), requests).ids == asked.ids
    vocabulary = LLTokenizer(TOKENIZER.to_str(), n_vocab=VOCAB, eos_token=END)
    for request in requests:
        ids, finish = asked.ids[request.rid], asked.finish[request.rid]
        assert finish.error is None, finish.error
        matcher = LLMatcher(vocabulary, request.grammar)
        assert matcher.consume_tokens(ids), (request.rid, TOKENIZER.decode(ids))
        assert finish.finish == ("stop" if matcher.is_accepting() or ids[-1] == END else "length"), request.rid
    assert len({tuple(ids) for ids in asked.ids.values()}) > len(requests) / 2


def test_what_cannot_be_followed_fails_its_own_request_only(tiny: Oracle) -> None:
    good = greedy_request("good", "x1", prompts(1, VOCAB)[0], 8)
    bad = {
        "syntax": grammar(lark_grammar="start: ("),
        "keyword": grammar(json_schema={"type": "array", "uniqueItems": True}),
        "json": "no grammar",
    }
    asked = ask(
        tiny.engine(TOKENIZER), [good, *(replace(good, rid=rid, digest="", grammar=text) for rid, text in bad.items())]
    )
    errors = {rid: output.error for rid, output in asked.finish.items() if output.error is not None}
    assert errors.keys() == bad.keys()
    assert all(isinstance(error, BadRequest) for error in errors.values())
    assert "uniqueItems" in str(errors["keyword"])
    assert asked.ids["good"] == tiny.greedy("x1", good.prompt, 8)
    without = ask(tiny.engine(), [replace(good, grammar=GRAMMARS["choice"])]).finish["good"].error
    assert without is not None
    assert "no tokenizer.json" in without.message


def test_a_grammar_is_compiled_once(tiny: Oracle) -> None:
    engine = tiny.engine(TOKENIZER)
    [prompt] = prompts(1, VOCAB)
    request = replace(greedy_request("0", "", prompt, 4), grammar=GRAMMARS["choice"])
    first = ask(engine, [request])
    again = ask(engine, [replace(request, rid=str(i)) for i in range(1, 5)])
    assert set(map(tuple, again.ids.values())) == {tuple(first.ids["0"])}
    assert engine.grammars.num_compiled == 1


class Impatient(MaskFiller):
    """Fills a mask only after a wait for it has failed: each mask is late once."""

    def __init__(self, on_filled: Callable[[], object]) -> None:
        super().__init__(on_filled)
        self.num_late = 0
        self._held: list[Event] = []

    def wait(self, fillings: Iterable[Filling], timeout_s: float) -> None:
        fillings = list(fillings)
        super().wait(fillings, 0.0)
        self.num_late += sum(not filling.is_done for filling in fillings)
        for held in self._held:
            held.set()
        self._held.clear()

    def _submit(self, pool: ThreadPoolExecutor, fill: Callable[[], None], fillings: list[Filling]) -> None:
        held = Event()
        self._held.append(held)

        def fill_late() -> None:
            held.wait()
            fill()

        super()._submit(pool, fill_late, fillings)


def assert_late_masks_change_no_token(oracle: Oracle, tokenizer: Tokenizer, **settings: Any) -> None:
    """Check the base's and every adapter's outputs for three grammars, with most masks late.

    tokenizer: the model's tokenizer, instead of `TOKENIZER`.
    """
    requests = [
        greedy_request(f"{name}/{which}", name, prompt, 20, grammar=text)
        for name in oracle.names
        for prompt, (which, text) in zip(prompts(3, 100, (3, 20, 40)), list(GRAMMARS.items())[1:4], strict=True)
    ]
    engine = oracle.engine(tokenizer, **settings)
    filler = engine.grammars._filler = Impatient(lambda: engine.grammars.on_ready())
    warm(engine, oracle.names)
    asked = ask(engine, requests)
    for request in requests:
        assert asked.ids[request.rid] == by_hand(oracle, request), request.rid
    assert filler.num_late > 20


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_draft_tokens": 6}, FEW_BLOCKS, {"overlap": "on", **FEW_BLOCKS}],
    ids=["plain", "speculating", "few", "overlapped"],
)
def test_masks_that_are_late_change_no_token(
    tiny: Oracle, expected: dict[str, list[int]], settings: dict[str, Any]
) -> None:
    engine = tiny.engine(TOKENIZER, **settings)
    filler = engine.grammars._filler = Impatient(lambda: engine.grammars.on_ready())
    warm(engine, tiny.names)
    assert ask(engine, requests_of(tiny)).ids == expected
    assert filler.num_late > 100


def test_grammars_that_cost_too_much_fail_alone(tiny: Oracle) -> None:
    [prompt] = prompts(1, VOCAB)
    plain = greedy_request("plain", "x1", prompt, NUM_TOKENS)
    wide = grammar(lark_grammar="start: " + " | ".join(f'"w{i}"' for i in range(3000)))
    guided = [replace(plain, rid=which, digest="", grammar=text) for which, text in GRAMMARS.items()]
    asked = ask(tiny.engine(TOKENIZER), [plain, replace(plain, rid="wide", digest="", grammar=wide), *guided])
    errors = {rid: output.error for rid, output in asked.finish.items() if output.error is not None}
    assert errors.keys() == {"wide"}
    assert isinstance(errors["wide"], BadRequest)
    assert f"max is {GRAMMAR_LIMITS['max_items_in_row']}" in errors["wide"].message
    asked = ask(tiny.engine(TOKENIZER, max_mask_s=1e-9), [plain, *guided])
    errors = {rid: output.error for rid, output in asked.finish.items() if output.error is not None}
    assert errors.keys() == GRAMMARS.keys()
    assert all("the limit is 1e-09 s" in error.message for error in errors.values())
    assert asked.ids["plain"] == tiny.greedy("x1", prompt, NUM_TOKENS)
