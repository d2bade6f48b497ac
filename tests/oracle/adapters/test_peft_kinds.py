"""Every adapter that PEFT saves gives PEFT's logits, in chunks and beside others, however it was made."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import examples
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle.adapters.peft_kinds import (
    BIASED,
    GPT2,
    INVOCATION,
    KINDS,
    LLAMA,
    MAX_DIFFERENCE,
    MIXTRAL,
    TIED,
    Kind,
    asked_prompts,
    check_exact,
    difference,
    engine_logits,
    load,
    make_adapter,
    make_base,
    make_engine,
    measure,
    model_logits,
    peft_logits,
    train_adapter,
)
from oracle.peft_oracle import TINY_VOCAB, greedy_request, warm
from safetensors.torch import load_file, save_file

from peft_adapters.format import WEIGHTS_FILE

TABLE = Path(__file__).parents[3] / "docs" / "peft.md"


ESSENTIAL = (
    "lora", "patterns", "conv1d", "dora and biases", "dora embedding", "embedding and head, tied", "scaled embedding",
    "trained tokens, tied to a head with lora_bias", "added tokens", "experts", "experts, transposed", "router",
    "weights as parameters",
)  # fmt: skip
"""Kinds with code that no other kind and no adapter of `DENSE` runs; `make test-all` runs all kinds."""


@pytest.mark.parametrize("name", examples.some(KINDS, *ESSENTIAL))
def test_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    make_adapter(KINDS[name], tmp_path)
    check_exact(KINDS[name], tmp_path, max_step_tokens=16, max_num_seqs=8)


def test_the_documented_table_is_of_these_kinds() -> None:
    rows = re.findall(r"^\| ([^|]+) \| (\S+) \| (\S+) \| (\S+) \|$", TABLE.read_text(), re.MULTILINE)
    rows = [row for row in rows if row[0] != "---"]
    assert [(name, base) for name, base, _, _ in rows] == [(name, kind.base[0]) for name, kind in KINDS.items()]
    assert all(float(largest) <= MAX_DIFFERENCE for _, _, largest, _ in rows)


TRAINED = {
    "rslora": Kind(LLAMA, {"use_rslora": True}),
    "dora": Kind(BIASED, {"use_dora": True}),
    "modules_to_save": Kind(TIED, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "trained tokens": Kind(TIED, {"trainable_token_indices": list(range(40))}),
    "lora_bias": Kind(BIASED, {"lora_bias": True, "bias": "all"}),
}


@pytest.mark.parametrize("name", examples.some(TRAINED, "dora", "trained tokens"))
def test_trained_adapters_too(name: str, tmp_path: Path) -> None:
    before = train_adapter(TRAINED[name], tmp_path)
    assert before, "training must change every part of the adapter"
    check_exact(TRAINED[name], tmp_path)


HALVED = {
    "lora": KINDS["all-linear"],
    "dora": KINDS["dora and biases"],
    "ends": KINDS["embedding and head, tied"],
    "saved": KINDS["added tokens"],
    "tokens": KINDS["trained tokens"],
    "experts": KINDS["experts"],
}


@pytest.mark.parametrize("dtype", examples.some([torch.float16, torch.bfloat16], torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", examples.some(HALVED, "dora", "experts"))
def test_tensors_in_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make_adapter(HALVED[name], tmp_path)
    file = tmp_path / WEIGHTS_FILE
    save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)
    check_exact(HALVED[name], tmp_path)


def test_an_activated_adapter_shares_what_is_before_its_invocation(tmp_path: Path) -> None:
    """Whole blocks before the invocation are shared, whichever model computed them; later tokens equal PEFT's."""
    kinds = {"alora": KINDS["alora"], "lora": KINDS["lora"]}
    for name, kind in kinds.items():
        make_adapter(kind, tmp_path / name)
    engine = make_engine(LLAMA, {name: tmp_path / name for name in kinds})
    peft = load(kinds["alora"], tmp_path / "alora")
    shared = 70 // 16 * 16
    for first, second in (("", "alora"), ("alora", "")):
        prompt = np.random.default_rng(len(first)).integers(20, TINY_VOCAB, size=100).astype(np.int32)
        prompt[70:73] = INVOCATION
        got = {}
        for name in (first, "lora", second):
            before = engine.counters.num_cached_tokens
            got[name] = (*engine_logits(engine, [greedy_request(f"{first}/{name}", name, prompt, 5)]).values(),)[0]
            assert engine.counters.num_cached_tokens - before == (shared if name == second else 0)
        ids, logits = got["alora"]
        assert difference(logits, peft_logits(peft, prompt, ids)) <= MAX_DIFFERENCE
        ids, logits = got[""]
        assert difference(logits, model_logits(make_base(LLAMA), prompt, ids)) <= MAX_DIFFERENCE


# ---------------------------------------------------------------- together

DENSE: dict[str, dict[str, Any]] = {
    "lora": {}, "rslora": {"use_rslora": True}, "layers": {"layers_to_transform": [0]}, "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True}, "bias": {"bias": "all"}, "head": {"target_modules": ["lm_head"]},
    "ends": {"target_modules": ["embed_tokens", "lm_head"]}, "saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]}, "tokens": {"trainable_token_indices": [3, 17, 150]},
    "alora": {"alora_invocation_tokens": INVOCATION},
    "alora-bias": {"alora_invocation_tokens": INVOCATION, "bias": "all"},
}  # fmt: skip
EXPERTS: dict[str, dict[str, Any]] = {
    "lora": {}, "experts": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "router": {"target_parameters": ["mlp.gate.weight"], "target_modules": []}, "dora": {"use_dora": True},
    "tokens": {"trainable_token_indices": [3, 17, 150]},
}  # fmt: skip
QKVO = {"target_modules": ["q_proj", "o_proj"]}
MIXED = {
    "dense": {name: Kind(BIASED, QKVO | options) for name, options in DENSE.items()}
    | {
        "added": Kind(BIASED, {"modules_to_save": ["lm_head", "embed_tokens"]}, TINY_VOCAB + 9),
        "fewer": Kind(BIASED, {"modules_to_save": ["lm_head", "embed_tokens"]}, TINY_VOCAB - 20),
        "adalora": KINDS["adalora"],
    },
    "experts": {name: Kind(MIXTRAL, QKVO | options) for name, options in EXPERTS.items()},
}


@pytest.mark.parametrize("family", examples.some(MIXED, "dense"))
def test_one_adapter_of_each_kind_in_one_batch(family: str, tmp_path: Path) -> None:
    """Chunked, preempted or found in the prefix cache: every row equals PEFT's result for it alone."""
    kinds = MIXED[family]
    base = next(iter(kinds.values())).base
    folders = {name: tmp_path / name for name in kinds}
    for name, kind in kinds.items():
        make_adapter(Kind(base, kind.options, kind.num_tokens, kind.config), folders[name])
    engine = make_engine(
        base, folders, max_step_tokens=32, max_num_seqs=32, kv_cache_bytes=24 * 16 * 512, max_model_len=72
    )
    alone = make_engine(base, folders)
    warm(engine, folders)
    requests = [
        greedy_request(f"{name}/{i}", name, prompt, 20)
        for name, kind in kinds.items()
        for i, prompt in enumerate(asked_prompts(kind)[1:])
    ]
    requests.append(greedy_request("base", "", asked_prompts(Kind(base))[1], 20))
    first, together = engine_logits(engine, requests), engine_logits(engine, requests)
    models = {
        name: load(Kind(base, kind.options, kind.num_tokens, kind.config), folders[name])
        for name, kind in kinds.items()
    }
    answers = set()
    for request in requests:
        ids, logits = together[request.rid]
        assert ids == first[request.rid][0], request.rid
        if request.rid.endswith("/0"):
            ids_alone, logits_alone = engine_logits(alone, [request])[request.rid]
            assert ids == ids_alone, request.rid
            width = min(logits.shape[-1], logits_alone.shape[-1])
            assert torch.allclose(logits[:, :width], logits_alone[:, :width], atol=MAX_DIFFERENCE), request.rid
        if request.digest:
            expected = peft_logits(models[request.digest], request.prompt, ids)
            assert difference(logits, expected) <= MAX_DIFFERENCE, request.rid
        if request.rid.endswith("/0"):
            answers.add(tuple(ids))
    assert len(answers) >= len(kinds) - 1, "adapters must answer differently"
    assert engine.counters.num_preemptions > 0
    assert engine.counters.num_cached_tokens > 0
    engine.check_integrity()


# ---------------------------------------------------------------- any config

LEAVES = {"llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], "gpt2": ["c_attn", "c_fc", "c_proj"]}
ENDS = {"llama": ["embed_tokens", "lm_head"], "gpt2": ["wte", "lm_head"]}
NORMS = {"llama": ["norm", "input_layernorm"], "gpt2": ["ln_f", "ln_1"]}


@st.composite
def kinds(draw: st.DrawFn) -> Kind:
    """Draw any combination of served options, including combinations that PEFT refuses."""
    family = draw(st.sampled_from([BIASED, TIED, GPT2]))
    model_type = family[0]
    leaves = draw(st.lists(st.sampled_from(LEAVES[model_type]), min_size=1, max_size=3, unique=True))
    ends = draw(st.lists(st.sampled_from(ENDS[model_type]), max_size=2, unique=True))
    saved = draw(st.lists(st.sampled_from(ENDS[model_type] + NORMS[model_type]), max_size=2, unique=True))
    options: dict[str, Any] = {
        "r": draw(st.integers(1, 20)),
        "lora_alpha": draw(st.integers(1, 16)),
        "target_modules": leaves + ends,
        "fan_in_fan_out": family is GPT2,
    }
    optional = {
        "use_rslora": st.just(True),
        "use_dora": st.just(True),
        "lora_bias": st.just(True),
        "bias": st.sampled_from(["all", "lora_only"]),
        "modules_to_save": st.just(saved),
        "trainable_token_indices": st.just([3, 150]),
        "alora_invocation_tokens": st.just(INVOCATION),
        "layers_to_transform": st.just([1]),
        "rank_pattern": st.just({leaves[0]: 3}),
        "alpha_pattern": st.just({leaves[-1]: 5}),
        "exclude_modules": st.just(r".*\.0\..*"),
        "init_lora_weights": st.sampled_from([False, "gaussian"]),
    }
    for name in draw(st.lists(st.sampled_from(sorted(optional)), max_size=4, unique=True)):
        options[name] = draw(optional[name])
    return Kind(family, options)


# Derandomized, because PEFT refuses countless combinations. Remove `derandomize` to search for more.
@pytest.mark.thorough
@settings(
    max_examples=examples.of(25), deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(kind=kinds())
def test_any_config_is_served_as_peft_does(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("any")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            make_adapter(kind, folder)
            load(kind, folder)
        except (ValueError, TypeError, KeyError):
            assume(False)  # PEFT refuses the combination: there is nothing to compare with
    if "trainable_token_indices" in kind.options:  # these combinations are refused by name
        options = kind.options
        assume(not ("use_dora" in options and "lm_head" in options["target_modules"]))
        assume(not {*ENDS[kind.base[0]]} & {*options.get("modules_to_save", ())})
    measured = measure(kind, folder, max_step_tokens=32, max_num_seqs=8)
    # Rounding errors grow with the change that an adapter makes: scales of 4 on every layer occur here.
    assert measured.difference <= MAX_DIFFERENCE * max(1.0, measured.change)
