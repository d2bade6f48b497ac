"""Any change to an adapter's files ends in one of two ways: a refusal with its reasons, or PEFT's results.

There is no third way, so a file that nobody has foreseen is not served wrongly.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle.adapters.peft_kinds import (
    BIASED,
    INVOCATION,
    MAX_DIFFERENCE,
    Kind,
    asked_prompts,
    difference,
    engine_logits,
    load,
    make_adapter,
    make_base,
    make_engine,
    model_logits,
    peft_logits,
    read_files,
)
from oracle.peft_oracle import ask, greedy_request
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE, adapter_digest, parse_header

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True}, "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]}, "tokens": {"trainable_token_indices": [3, 150]},
    "saved": {"modules_to_save": ["lm_head"]}, "alora": {"alora_invocation_tokens": INVOCATION},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 30}},
}  # fmt: skip
"""Valid adapters to start from, all on one base."""

NAMES = ["q_proj", "v_proj", "down_proj", "lm_head", "embed_tokens", "norm", "0", "mlp", "layers", ""]
names = st.lists(st.sampled_from(NAMES), max_size=3)
patterns = st.sampled_from(
    [r".*q_proj", r".*\.1\..*", ".*", "all-linear", "(", "q_proj", r"(?=.*q_proj).*", r".*[qd]\w+_proj"]
)
maps = st.dictionaries(
    st.sampled_from(["q_proj", "down_proj", r".*\.0\..*", "nothing", "("]), st.integers(-1, 8), max_size=2
)
tokens = st.lists(st.integers(-1, 230), max_size=3)
junk = st.sampled_from([None, True, False, 0, 1, 2.5, "x", "true", [], [1], {}, {"a": 1}, float("nan"), 1 << 40])

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "peft_type": st.sampled_from([*(kind.value for kind in PeftType), "lora", "LYCORIS", None]),
    "r": st.integers(-1, 9) | junk,
    "lora_alpha": st.integers(-5, 40) | st.floats() | junk,
    "use_rslora": junk,
    "use_dora": junk,
    "lora_bias": junk,
    "bias": st.sampled_from(["none", "all", "lora_only", "some"]) | junk,
    "fan_in_fan_out": junk,
    "target_modules": names | patterns | junk,
    "exclude_modules": names | patterns | junk,
    "layers_to_transform": st.integers(-1, 3) | st.lists(st.integers(-1, 3), max_size=2) | junk,
    "layers_pattern": st.sampled_from(["layers", "h", ["layers"], "("]) | junk,
    "rank_pattern": maps | junk,
    "alpha_pattern": maps | junk,
    "modules_to_save": names | junk,
    "trainable_token_indices": tokens | st.dictionaries(st.sampled_from(NAMES), tokens, max_size=2) | junk,
    "alora_invocation_tokens": tokens | junk,
    "target_parameters": st.lists(st.sampled_from(["q_proj.weight", "v_proj.weight", "x"]), max_size=2) | junk,
    "ensure_weight_tying": junk,
    "init_lora_weights": st.sampled_from(
        ["gaussian", "eva", "orthogonal", "mica", "pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"]
    ) | junk,
    "layer_replication": st.just([[0, 1], [0, 2]]) | junk,
    "use_qalora": junk,
    "use_bdlora": st.just({"target_modules_bd_a": ["q_proj"], "nblocks": 2}) | junk,
    "arrow_config": junk,
    "kasa_config": junk,
    "monteclora_config": junk,
    "velora_config": junk,
    "megatron_config": junk,
    "init_r": junk,
    "a_field_of_tomorrow": junk,
    "lora_dropout": st.sampled_from([0.0, 0.5]),
    "task_type": st.sampled_from(["CAUSAL_LM", None]),
}  # fmt: skip


def drop(found: dict[str, Tensor], name: str, _: st.DataObject) -> None:
    del found[name]


def rename(found: dict[str, Tensor], name: str, data: st.DataObject) -> None:
    old, new = data.draw(
        st.sampled_from(
            [("lora_A", "lora_B"), ("layers.0", "layers.1"), ("layers.0", "layers.7"), ("q_proj", "k_proj"),
             ("base_model.model.", ""), (".weight", ".bias"), ("lora_A", "lora_C"), ("lora_B", "lora_E")]
        )
    )  # fmt: skip
    found[name.replace(old, new)] = found.pop(name)


def reshape(found: dict[str, Tensor], name: str, data: st.DataObject) -> None:
    tensor = found[name]
    found[name] = data.draw(
        st.sampled_from([tensor.T.contiguous() if tensor.ndim == 2 else tensor[None], tensor[:-1].contiguous(),
                         tensor.repeat(2, *[1] * (tensor.ndim - 1)), tensor.reshape(-1)])
    )  # fmt: skip


def retype(found: dict[str, Tensor], name: str, data: st.DataObject) -> None:
    found[name] = found[name].to(
        data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.int32]))
    )


def add(found: dict[str, Tensor], name: str, data: st.DataObject) -> None:
    new = data.draw(
        st.sampled_from(
            ["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight", "base_model.model.lm_head.weight", "x",
             "base_model.model.model.norm.weight", "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias",
             "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", name + ".1"]
        )
    )  # fmt: skip
    found.setdefault(new, found[name].clone())


CHANGES = [drop, rename, reshape, retype, add]
SLOW_AND_LARGE = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.large_base_example,
    HealthCheck.filter_too_much,
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("outside")
    for name, options in ADAPTERS.items():
        make_adapter(Kind(BIASED, options), root / name)
    return root


def changed(name: str, root: Path, target: Path, data: st.DataObject) -> None:
    """Write a valid adapter into `target` with one to three changes."""
    config: dict[str, Any] = json.loads((root / name / CONFIG_FILE).read_text())
    found = load_file(root / name / WEIGHTS_FILE)
    in_file = data.draw(st.booleans())
    for field in data.draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=not in_file, max_size=2, unique=True)):
        config[field] = data.draw(FIELDS[field])
    if in_file:
        change = data.draw(st.sampled_from(CHANGES))
        change(found, data.draw(st.sampled_from(sorted(found))), data)
    target.mkdir()
    (target / CONFIG_FILE).write_text(json.dumps(config))
    save_file(found, target / WEIGHTS_FILE)


def digest_of(folder: Path) -> str:
    files = read_files(folder)
    weights = bytes(files.weights)
    return adapter_digest(files.config, parse_header(weights, len(weights)), weights)


def test_what_is_not_refused_is_what_peft_computes(root: Path, tmp_path: Path) -> None:
    folders: dict[str, Path] = {}
    engine = make_engine(BIASED, folders)
    numbers, ends = itertools.count(), Counter[str]()
    base = make_base(BIASED)
    prompt = asked_prompts(Kind(BIASED))[1]

    @settings(max_examples=examples.of(150), deadline=None, suppress_health_check=SLOW_AND_LARGE, derandomize=True)
    @given(data=st.data(), name=st.sampled_from(sorted(ADAPTERS)))
    def one(data: st.DataObject, name: str) -> None:
        key = f"{name}{next(numbers)}"
        folders[key] = tmp_path / key
        changed(name, root, folders[key], data)
        request = greedy_request(key, key, prompt, 3)
        error = ask(engine, [request]).finish[key].error
        ends["refused" if error else "served"] += 1
        if error:
            assert error.status == 422, "this is no refusal but a crash"
            return
        ids, logits = engine_logits(engine, [request])[key]
        try:
            peft = load(Kind(BIASED), folders[key])
        except Exception:  # noqa: BLE001 - whatever PEFT stumbles over in a field that is empty or false
            assert digest_of(folders[key]) == digest_of(root / name), "PEFT does not load it, and something was changed"
            return
        expected = peft_logits(peft, prompt, ids)
        largest = (expected - model_logits(base, prompt, ids)).abs().max().item()
        assert difference(logits, expected) <= MAX_DIFFERENCE * max(1.0, largest)

    one()
    assert min(ends["served"], ends["refused"]) >= examples.of(150) // 10, ends
