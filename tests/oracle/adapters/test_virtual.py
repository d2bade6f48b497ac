"""Virtual tokens: every kind gives the logits and greedy tokens of PEFT's forward, whatever runs beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import examples
from llguidance import LLMatcher, LLTokenizer
from oracle.adapters.peft_kinds import (
    LLAMA,
    MAX_DIFFERENCE,
    Kind,
    base_for,
    engine_logits,
    load,
    make_adapter,
    make_engine,
    model_logits,
    read_files,
)
from oracle.adapters.virtual_cases import (
    BASES,
    CASES,
    NUM,
    PREFIX,
    SOFT,
    SOME,
    asked,
    peft_greedy,
    virtual_logits,
)
from oracle.models_table import read_table
from oracle.peft_oracle import (
    TINY_VOCAB,
    ask,
    greedy_request,
    oracle_settings,
    packed_engine,
    prompts,
    refusal,
    warm,
    watch,
)
from oracle.test_grammars import END, GRAMMARS, TOKENIZER, VOCAB
from oracle.test_kv_cache_dtype import rounded_cache
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpu_worker.engine.engine import Engine
from gpu_worker.model.prepare import prepare_model
from peft_adapters.format import WEIGHTS_FILE
from peft_adapters.recipe import Merge, digest_of_merge
from protocol.runtime.settings import BLOCK_TOKENS
from protocol.wire.errors import AdapterRefused, BadRequest
from protocol.wire.messages import Sampling

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # PEFT passes prefixes by it

ALL = CASES | BASES
ONE_OF_EACH = (
    "prompt_tuning", "p_tuning", "prefix_tuning", "cartridge", "prompt_tuning on qwen3", "prefix_tuning on qwen3",
    "prompt_tuning on a hybrid", "prefix_tuning in layers with windows",
)  # fmt: skip
TWO = ("prompt_tuning", "prefix_tuning")
"""One kind with embeddings, and one with keys and values."""


def made(name: str, folder: Path, **fields: Any) -> Kind:
    """Let PEFT make an adapter in a folder. fields: further fields of its config."""
    kind = ALL[name]
    kind = replace(kind, options=kind.options | fields)
    make_adapter(kind, folder)
    return kind


def several(tmp_path: Path) -> dict[str, Path]:
    """Return folders of adapters of every kind, and of LoRA, for the same base."""
    folders = {name: tmp_path / name for name in (*CASES, "lora")}
    for name, kind in CASES.items():
        make_adapter(kind, folders[name])
    make_adapter(Kind(LLAMA), folders["lora"])
    return folders


@pytest.mark.parametrize("name", examples.some(ALL, *ONE_OF_EACH))
def test_logits_and_tokens_are_those_of_peft(name: str, tmp_path: Path) -> None:
    """In small chunks, so that virtual tokens and text are computed in one step and in several."""
    kind = made(name, tmp_path)
    engine = make_engine(kind.base, {"tuned": tmp_path}, max_step_tokens=16, max_num_seqs=8)
    texts = {"short": asked(), "long": asked(40), "one": asked(1)}
    requests = [greedy_request(text, "tuned", prompt, 6) for text, prompt in texts.items()]
    got = engine_logits(engine, [*requests, greedy_request("base", "", asked(), 6)])
    peft, base = load(kind, tmp_path), base_for(kind)
    for text, prompt in texts.items():
        ids, logits = got[text]
        assert ids == peft_greedy(kind, peft, prompt, 6)
        assert (logits - virtual_logits(kind, peft, prompt, ids)).abs().max() <= MAX_DIFFERENCE, text
    ids, logits = got["short"]
    assert (logits - model_logits(base, asked(), ids)).abs().max() > 100 * MAX_DIFFERENCE, "it must change the answer"
    ids, logits = got["base"]
    assert (logits - model_logits(base, asked(), ids)).abs().max() <= MAX_DIFFERENCE
    engine.check_integrity()


def test_all_kinds_and_lora_in_one_batch_are_what_each_is_alone(tmp_path: Path) -> None:
    folders = several(tmp_path)
    together = make_engine(LLAMA, folders, max_num_seqs=32, max_step_tokens=2048)
    warm(together, folders)
    requests = [greedy_request(f"{name} {n}", name, asked(n), 6) for name in folders for n in (9, 30)]
    mixed = engine_logits(together, [*requests, greedy_request("base 9", "", asked(), 6)])
    alone = make_engine(LLAMA, folders)
    for request in (*requests, greedy_request("base 9", "", asked(), 6)):
        single = engine_logits(alone, [request])[request.rid]
        assert mixed[request.rid][0] == single[0], request.rid
        assert (mixed[request.rid][1] - single[1]).abs().max() <= MAX_DIFFERENCE, request.rid
    answers = {rid: ids for rid, (ids, _) in mixed.items()}
    assert all(answers[f"{name} 9"] != answers["base 9"] for name in folders), "adapters must change the answer"


SETTINGS: dict[str, dict[str, Any]] = {
    "overlap": {"overlap": "on"},
    "drafts": {"max_draft_tokens": 6, "max_num_seqs": 8},
    "no prefix cache": {"prefix_cache": False},
    "preempted": {"kv_cache_bytes": 14 * 16 * 512, "max_model_len": 128, "max_step_tokens": 32, "max_num_seqs": 8},
    "reference": {"kernels": "reference"},
}


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("settings", examples.some(SETTINGS, "overlap", "drafts", "preempted"))
def test_tokens_are_the_same_however_steps_are_made(name: str, settings: str, tmp_path: Path) -> None:
    kind, num = made(name, tmp_path), 24
    engine = make_engine(LLAMA, {"tuned": tmp_path}, **SETTINGS[settings])
    repeated = np.tile(asked(5), 6)  # prompt lookup finds drafts in it
    texts = {"repeated": repeated, "short": asked(), "long": asked(40), "other": prompts(1, TINY_VOCAB, (33,))[0]}
    requests = [greedy_request(text, "tuned", prompt, num) for text, prompt in texts.items()]
    got, peft = ask(engine, requests), load(kind, tmp_path)
    for text, prompt in texts.items():
        assert got.ids[text] == peft_greedy(kind, peft, prompt, num), text
    if settings == "drafts":
        assert engine.counters.num_drafted_tokens
    if settings == "preempted":
        assert engine.counters.num_preemptions


@pytest.mark.parametrize("name", TWO)
def test_int8_keys_and_values_are_those_of_peft_rounded_likewise(name: str, tmp_path: Path) -> None:
    kind = made(name, tmp_path)
    engine = make_engine(LLAMA, {"tuned": tmp_path}, kv_cache_dtype="int8", prefix_cache=False)
    ids = ask(engine, [greedy_request("r", "tuned", asked(30), 16)]).ids["r"]
    peft = load(kind, tmp_path)
    base: Any = peft.get_base_model()
    base.set_attn_implementation("sdpa")
    with rounded_cache():
        assert ids == peft_greedy(kind, peft, asked(30), 16)


@pytest.mark.parametrize("name", TWO)
def test_a_resumed_request_goes_on_exactly(name: str, tmp_path: Path) -> None:
    kind = made(name, tmp_path)
    whole = peft_greedy(kind, load(kind, tmp_path), asked(30), 12)
    for cut in (1, 7, 11):
        request = replace(greedy_request("r", "tuned", asked(30), 12), epoch=2, output=whole[:cut])
        resumed = ask(make_engine(LLAMA, {"tuned": tmp_path}), [request])
        assert resumed.ids["r"] == whole[cut:]
        assert resumed.finish["r"].seq0 == 11
        assert resumed.finish["r"].finish == "length"


# ---------------------------------------------------------------- the cache


def count_rows(engine: Engine) -> list[int]:
    """Return a list to which each step appends its number of tokens."""
    counts: list[int] = []
    watch(engine, lambda inputs, _: counts.append(len(inputs.input_ids)))
    return counts


@pytest.mark.parametrize("name", TWO)
def test_virtual_tokens_are_computed_once_for_all_requests_and_tenants(name: str, tmp_path: Path) -> None:
    """Another tenant reuses the full blocks of virtual tokens, but no block of the first tenant's prompt."""
    kind = made(name, tmp_path, num_virtual_tokens=3 * BLOCK_TOKENS + 5)
    engine = make_engine(LLAMA, {"tuned": tmp_path})
    peft, rows = load(kind, tmp_path), count_rows(engine)
    expected = peft_greedy(kind, peft, asked(40), 4)

    def tokens_of(tenant: str) -> tuple[int, int]:
        """Return how many tokens a tenant's request computes, and how many of its own tokens are reported as cached."""
        before = sum(rows)
        got = ask(engine, [greedy_request("r", "tuned", asked(40), 4, salt=tenant)])
        assert got.ids["r"] == expected
        return sum(rows) - before, got.finish["r"].num_cached_tokens

    whole = 3 * BLOCK_TOKENS + 5 + 40 + 3
    assert tokens_of("one") == (whole, 0)
    assert tokens_of("two") == (whole - 3 * BLOCK_TOKENS, 0)
    cached = (3 * BLOCK_TOKENS + 5 + 39) // BLOCK_TOKENS * BLOCK_TOKENS
    assert tokens_of("two") == (whole - cached, cached - 3 * BLOCK_TOKENS - 5)


@pytest.mark.parametrize("name", TWO)
def test_an_evicted_adapter_takes_its_blocks_along(name: str, tmp_path: Path) -> None:
    """A later load of it gives the same tokens."""
    kind = made(name, tmp_path)
    engine = make_engine(LLAMA, {"tuned": tmp_path})
    expected = peft_greedy(kind, load(kind, tmp_path), asked(30), 4)
    for _ in range(2):
        assert ask(engine, [greedy_request("r", "tuned", asked(30), 4)]).ids["r"] == expected
        assert engine.adapters.extras["tuned"].num_virtual == NUM
        freed = engine.adapters.drop("tuned")
        assert freed is not None
        assert min(freed) > 0, "virtual tokens count in pool and host memory"
        assert "tuned" not in engine.adapters.extras
        assert set(engine.blocks.allocate(3)) <= {0, 1, 2, 3}, "its blocks are the next to be reused"
        engine.blocks.release([0, 1, 2, 3][:3])
    assert engine.adapters.num_fetches == 2


def test_steps_behind_virtual_tokens_cost_nothing_more(tmp_path: Path) -> None:
    """A decode is a plain step of the base, without extras for any row."""
    made("prefix_tuning", tmp_path)
    engine = make_engine(LLAMA, {"tuned": tmp_path})
    found: list[bool] = []
    watch(engine, lambda *_: found.append(bool(engine.model.context.extras)))
    ask(engine, [greedy_request("r", "tuned", asked(), 5)])
    assert found == [True, False, False, False, False]


# ---------------------------------------------------------------- what a request may ask


@pytest.mark.parametrize("name", TWO)
def test_logprobs_of_a_prompt_are_of_the_users_tokens(name: str, tmp_path: Path) -> None:
    kind = made(name, tmp_path)
    engine = make_engine(LLAMA, {"tuned": tmp_path}, max_step_tokens=16, max_num_seqs=8)
    prompt = asked(30)
    sampling = Sampling(temperature=0.0, ignore_eos=True, prompt_logprobs=2, num_logprobs=1)
    got = ask(engine, [replace(greedy_request("r", "tuned", prompt, 4), sampling=sampling)])
    logits = virtual_logits(kind, load(kind, tmp_path), prompt[:1], [*prompt[1:], *got.ids["r"]])
    text = np.concatenate([prompt, got.ids["r"]]).astype(np.int64)
    expected = logits.log_softmax(-1)[torch.arange(len(text) - 1), torch.from_numpy(text[1:])].numpy()
    given = np.frombuffer(got.prompt_logprobs["r"], "<f4").reshape(len(prompt), -1)[:, 0]
    assert np.isnan(given[0])
    assert np.allclose(given[1:], expected[: len(prompt) - 1], atol=1e-4)
    chosen = np.frombuffer(got.logprobs["r"], "<f4").reshape(4, -1)[:, 0]
    assert np.allclose(chosen, expected[len(prompt) - 1 :], atol=1e-4)


@pytest.mark.parametrize("config", [SOFT, PREFIX])
def test_outputs_follow_a_grammar(config: Any, tmp_path: Path) -> None:
    """The oracle is the most likely token by PEFT's forward that a matcher without masks accepts."""
    kind = Kind(("llama", {"vocab_size": VOCAB}), SOME, config=config)
    make_adapter(kind, tmp_path)
    engine = packed_engine(
        prepare_model(base_for(kind), frozenset(), None),
        oracle_settings(max_draft_tokens=4),
        lambda _: read_files(tmp_path),
        TOKENIZER.to_str(),
    )
    grammar, prompt, ids = GRAMMARS["regex"], asked(30), list[int]()
    got = ask(engine, [replace(greedy_request("r", "tuned", prompt, 30), grammar=grammar)])
    matcher = LLMatcher(LLTokenizer(TOKENIZER.to_str(), n_vocab=VOCAB, eos_token=END), grammar)
    peft = load(kind, tmp_path)
    while len(ids) < 30 and not matcher.is_stopped():
        best = virtual_logits(kind, peft, prompt, [*ids, 0])[-1].argsort(descending=True).tolist()
        ids.append(next(token for token in best if matcher.validate_tokens([token])))
        assert matcher.consume_token(ids[-1])
    assert got.ids["r"] == ids


@pytest.mark.parametrize("name", TWO)
def test_the_context_counts_virtual_tokens(name: str, tmp_path: Path) -> None:
    kind = made(name, tmp_path)
    engine = make_engine(LLAMA, {"tuned": tmp_path}, max_model_len=64)
    room = 64 - NUM
    got = ask(engine, [greedy_request("r", "tuned", asked(room - 3), 40)])
    assert got.ids["r"] == peft_greedy(kind, load(kind, tmp_path), asked(room - 3), 3)
    assert got.finish["r"].finish == "length"
    error = refusal(engine, greedy_request("r", "tuned", asked(room), 4))
    assert isinstance(error, BadRequest)
    assert error.code == "context_length_exceeded"
    assert f"the prompt has {room} tokens and its adapter {NUM} virtual ones before it" in error.message
    assert "at most 64" in error.message
    assert ask(engine, [greedy_request("r", "", asked(room), 4)]).finish["r"].error is None


@pytest.mark.parametrize("name", TWO)
def test_what_has_no_scale_and_no_merge_is_refused_by_name(name: str, tmp_path: Path) -> None:
    made(name, tmp_path / "tuned")
    make_adapter(Kind(LLAMA), tmp_path / "lora")
    engine = make_engine(LLAMA, {"tuned": tmp_path / "tuned"})
    error = refusal(engine, greedy_request("r", "tuned", asked(), 2, lora_scale=0.5))
    assert isinstance(error, BadRequest)
    assert f"lora_scale 0.5: adapters of kind {name.upper()}" in error.message
    folders = {hex_of(part): tmp_path / part for part in ("tuned", "lora")}
    engine = make_engine(LLAMA, folders)
    merge = digest_of_merge(Merge([bytes.fromhex(digest) for digest in folders], [1.0, 1.0]))
    error = refusal(engine, greedy_request("r", merge, asked(), 2))
    assert isinstance(error, AdapterRefused)
    assert f"plain LoRA only; one of the adapters has peft_type {name.upper()}" in error.message


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_of_16_bits_are_what_their_numbers_are(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind = made(name, tmp_path)
    change_file(tmp_path, lambda tensor: tensor.to(dtype))
    ids = ask(make_engine(LLAMA, {"tuned": tmp_path}), [greedy_request("r", "tuned", asked(), 6)]).ids["r"]
    assert ids == peft_greedy(kind, load(kind, tmp_path), asked(), 6)


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(name: str, number: float, tmp_path: Path) -> None:
    made(name, tmp_path)

    def spoil(tensor: Tensor) -> Tensor:
        tensor[-1, -1] = number
        return tensor

    change_file(tmp_path, spoil)
    error = refusal(make_engine(LLAMA, {"tuned": tmp_path}), greedy_request("r", "tuned", asked(), 2))
    assert isinstance(error, AdapterRefused)
    assert "not finite" in error.message


def change_file(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    """Rewrite an adapter's tensors; `change` returns the new ones."""
    path = folder / WEIGHTS_FILE
    save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("name", TWO)
def test_embeddings_are_of_the_last_token(name: str, tmp_path: Path) -> None:
    """The oracle is the last hidden state of PEFT's forward."""
    kind = made(name, tmp_path)
    engine = make_engine(LLAMA, {"tuned": tmp_path}, max_step_tokens=16, max_num_seqs=8)
    tasks = engine.model.tasks
    assert tasks.pooling is not None
    engine.model.tasks = replace(tasks, pooling=replace(tasks.pooling, mode="lasttoken", unit_length=False))
    prompt = asked(30)
    got = ask(engine, [greedy_request("r", "tuned", prompt, 1, task="embed")]).ids["r"]
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    with torch.inference_mode():
        states = load(kind, tmp_path)(input_ids=ids, use_cache=True, output_hidden_states=True).hidden_states
    assert np.allclose(np.array(got, "<i4").view("<f4"), states[-1][0, -1].numpy(), atol=1e-4)
    engine.model.tasks = replace(tasks, pooling=replace(tasks.pooling, mode="mean"))
    error = refusal(engine, greedy_request("r", "tuned", prompt, 1, task="embed"))
    assert isinstance(error, BadRequest)
    assert "mean pooling is of the text's tokens alone" in error.message


def hex_of(name: str) -> str:
    """Return a digest derived from a name."""
    return name.encode().hex()


REFUSED = {
    "falcon_h1": "PREFIX_TUNING is not served on a base model that does not keep keys and values",
    "qwen3_next": "PREFIX_TUNING is not served on a base model that does not keep keys and values",
    "deepseek_v3": "PREFIX_TUNING is not served on a base model that does not keep keys and values",
    "deepseek_v4": "PEFT does not compute virtual tokens on deepseek_v4",
    "gemma3n_text": "where a model embeds tokens in every layer",
}


@pytest.mark.parametrize("model_type", examples.some(REFUSED, "falcon_h1", "gemma3n_text"))
def test_bases_without_room_for_a_prefix_are_refused_by_name(model_type: str, tmp_path: Path) -> None:
    make_adapter(Kind(LLAMA, SOME, config=PREFIX), tmp_path)
    engine = make_engine((model_type, {"tiny": True}), {"tuned": tmp_path})
    error = refusal(engine, greedy_request("r", "tuned", asked(), 2))
    assert isinstance(error, AdapterRefused)
    assert REFUSED[model_type] in error.message


# ---------------------------------------------------------------- every model type

ROBERTA = {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
"""Types whose own positions start after the padding token's id; the engine's and the oracle's start at 0."""

NO_MODEL = {"mllama", "moshi", "gemma4_unified"}
"""Types on which PEFT cannot make such an adapter, or does not find the text model's embedding."""

NOT_SERVED = {"gemma3n_text", "inkling_text", "inkling2_text", "inkling2_loop_text"}
"""Types with an embedding in every layer, or with one that is more than a look-up."""


@pytest.mark.models
@pytest.mark.parametrize("config", [SOFT, PREFIX])
@pytest.mark.parametrize("model_type", sorted(read_table("served").keys() - ROBERTA - NO_MODEL))
def test_every_type_is_served_as_peft_or_refused(model_type: str, config: Any, tmp_path: Path) -> None:
    """Where PEFT's own forward fails, the adapter is refused. Prompts only, since states may depend on chunking."""
    options = SOME if config is PREFIX else {**SOME, "num_attention_heads": 1}  # PEFT cannot derive it for every type
    kind = Kind((model_type, {"tiny": True}), options, config=config)
    try:
        make_adapter(kind, tmp_path)
        expected = virtual_logits(kind, load(kind, tmp_path), asked(), [0])
    except Exception:  # noqa: BLE001  whatever a model's code raises
        expected = None
    if not (tmp_path / WEIGHTS_FILE).exists():
        return  # PEFT could not make the adapter
    engine = make_engine(kind.base, {"tuned": tmp_path}, max_step_tokens=64, max_num_seqs=8)
    asking = [greedy_request("r", "tuned", asked(), 1)]
    error = ask(engine, asking).finish["r"].error
    if expected is None or error is not None:
        assert isinstance(error, AdapterRefused)
        is_refused = config is PREFIX or model_type in NOT_SERVED
        assert expected is None or is_refused, "what PEFT computes of embeddings is served"
        return
    _, logits = engine_logits(engine, asking)["r"]
    assert (logits - expected[:, : logits.shape[1]]).abs().max() <= MAX_DIFFERENCE
    assert (logits - model_logits(base_for(kind), asked(), [0])).abs().max() > 100 * MAX_DIFFERENCE
