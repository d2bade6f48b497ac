"""Adapters that cannot be served are refused by name, with all reasons at once."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.adapter_files import BASE, lora_config, lora_tensors, read_file, refusal

from peft_adapters.format import CONFIG_FILE, AdapterSpec, canonical_config, parse_config
from peft_adapters.kinds.refused import REFUSED, why_refused
from peft_adapters.reasons import show
from protocol.wire import messages as m
from protocol.wire.errors import AdapterRefused


def read(config: dict[str, Any], base: m.ServedModel | None = BASE, **tensor_changes: Any) -> AdapterSpec:
    """Read an adapter for BASE with this config, and with some tensors replaced, or removed if None."""
    tensors = {**lora_tensors(), **tensor_changes}
    return read_file(config, {name: tensor for name, tensor in tensors.items() if tensor is not None}, base)


reasons = partial(refusal, read)


UNSERVED: dict[str, Any] = {
    "layer_replication": [[0, 2], [1, 3]],
    "use_qalora": True,
    "use_bdlora": False,  # PEFT accepts only a config object or null
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 0.1},
    "monteclora_config": {"num_samples": 2},
    "velora_config": {"num_groups": 4},
    "megatron_config": {"a": 1},
    "brand_new_option": 3,
    "init_r": 4,
    "bias": "some",
}
SERVED: dict[str, Any] = {
    "use_dora": "lora_magnitude_vector",
    "lora_bias": "lora_bias",
    "trainable_token_indices": "trainable_token_indices",
    "target_parameters": "target_parameters",
    "modules_to_save": "modules_to_save",
    "ensure_weight_tying": "",
    "alora_invocation_tokens": "alora_invocation_tokens",
}
"""Field that changes the computation -> a word of the refusal of an invalid value."""


def test_the_helper_adapter_is_good() -> None:
    assert len(read(lora_config()).sites) == 4
    assert read(lora_config(), None).modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize("field", UNSERVED)
def test_refuses_features_by_name(field: str) -> None:
    assert field in reasons(lora_config(**{field: UNSERVED[field]}))
    assert field in reasons(lora_config(**{field: UNSERVED[field]}), None)


@pytest.mark.parametrize("field", sorted({*UNSERVED, *SERVED} - {"bias"}))
@pytest.mark.parametrize("off", [None, False, 0, "", [], {}])
def test_features_switched_off_are_no_matter(field: str, off: Any) -> None:
    config = lora_config(**{field: off})
    takes_objects = field.endswith("_config") or field == "use_bdlora"
    if takes_objects and off is not None:  # {} is KaSA with its defaults, and PEFT fails on false
        assert field in reasons(config)
        assert field in reasons(canonical_config(config))
    else:
        assert read(config)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "x"])
def test_refuses_inits_that_change_the_base(init: str) -> None:
    assert re.search(rf"{init}.*base weights|base weights.*{init}", reasons(lora_config(init_lora_weights=init)))


@pytest.mark.parametrize("peft_type", [*REFUSED, "lora", None, 3, ["LORA"], {"LOHA": 1}])
def test_refuses_other_types_by_name(peft_type: Any) -> None:
    reason, *_ = reasons(lora_config(peft_type=peft_type)).splitlines()
    assert reason == f"peft_type {peft_type} is not served{why_refused(peft_type)}"
    assert ("served: " in reason) == (isinstance(peft_type, str) and peft_type in REFUSED)


def test_gives_every_reason_at_once() -> None:
    """One refusal covers config, features, and missing, superfluous and misshapen tensors."""
    q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    v1 = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    text = reasons(
        lora_config(use_qalora=True, init_lora_weights="pissa", rank_pattern={"layers.0.self_attn.v_proj": 0}),
        **{q0: None, v1: np.zeros((16, 5)), "base_model.model.lm_head.weight": np.zeros((2, 2)),
           "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": np.zeros((4, 16))},
    )  # fmt: skip
    for part in ("use_qalora", "pissa", "rank 0", "missing", "layers.0.self_attn.q_proj.lora_A", "[16, 5]",
                 "lm_head.weight", "layers.7"):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"r": 0}, "rank 0"),
        ({"r": -1}, "rank -1"),
        ({"r": 4.0}, "r 4.0"),
        ({"r": True}, "r True"),
        ({"r": None}, "r None"),
        ({"r": 3}, "shape [4, 16]"),
        ({"lora_alpha": float("nan")}, "finite"),
        ({"lora_alpha": float("inf")}, "finite"),
        ({"lora_alpha": 10**400}, "finite"),
        ({"lora_alpha": "16"}, "finite"),
        ({"alpha_pattern": {"q_proj": float("-inf")}}, "alpha_pattern"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 4.5}}, "rank_pattern"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern"),
        ({"rank_pattern": {f"x{i}": 4 for i in range(5000)}}, "at most"),
        ({"rank_pattern": {f"x{i}.*": 4 for i in range(257)}}, "257 regular expressions; the limit is 256"),
        ({"r": 10**400}, "is not a whole number"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"target_modules": "("}, "pattern"),
        ({"target_modules": "(?=q)q_proj"}, "pattern"),
        ({"target_modules": "x" * 20_000}, "characters"),
        ({"target_modules": ["nothing"]}, "matches no layer"),
        ({"target_modules": ["q_proj"]}, "does not target"),
        ({"exclude_modules": 5}, "exclude_modules"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "matches no layer"),
        ({"layers_to_transform": [0]}, "does not target"),
        ({"layers_to_transform": [0.5]}, "layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"target_modules": ".*_proj", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"use_dora": "yes"}, "use_dora"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"bias": None}, "bias None is not none"),
        ({"lora_bias": 1}, "lora_bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"lora_bias": True, "use_dora": True}, "combine lora_bias and use_dora"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "combine lora_bias"),
        ({"use_dora": True, "alora_invocation_tokens": [1]}, "combine use_dora and alora"),
        ({"alora_invocation_tokens": "abc"}, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [64]}, "outside 0 … 63"),
        ({"alora_invocation_tokens": [-1]}, "alora_invocation_tokens"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
        ({"modules_to_save": ["("]}, "modules_to_save"),
        ({"modules_to_save": [f"x{i}" for i in range(513)]}, "at most 512 names"),
        ({"modules_to_save": [f"x.{i}" for i in range(257)]}, "257 regular expressions"),
        ({"layers_to_transform": [0], "layers_pattern": [f"l{i}" for i in range(65)]}, "layers_pattern"),
        ({"trainable_token_indices": {f"x{i}": [1] for i in range(65)}}, "65 modules; the limit is 64"),
        ({"alora_invocation_tokens": [1] * 1025}, "1025 tokens; the limit is 1024"),
        ({"target_parameters": [f"x{i}" for i in range(5000)]}, "at most 4096 names"),
        ({"modules_to_save": ["q_proj"]}, "tensors missing for modules_to_save"),
        ({"trainable_token_indices": [1, 1]}, "names a token twice"),
        ({"trainable_token_indices": [1.5]}, "trainable_token_indices"),
        ({"trainable_token_indices": [1]}, "names no module"),
        ({"trainable_token_indices": {"q_proj": [1]}}, "also adapted"),
        ({"target_parameters": "q_proj.weight"}, "target_parameters"),
        ({"target_parameters": ["q_proj.weight"]}, "layer and its parameter"),
        ({"target_parameters": ["x"], "use_dora": True}, "combine target_parameters and use_dora"),
    ],
)
def test_refuses_bad_fields(fields: dict[str, Any], part: str) -> None:
    assert part in reasons(lora_config(**fields))


QUANTISED = msgspec.structs.replace(BASE, sites=[msgspec.structs.replace(site, kind=m.OPAQUE) for site in BASE.sites])


@pytest.mark.parametrize(
    ("fields", "tensors", "part"),
    [
        ({"use_dora": True}, {}, "DoRA is not served on quantised layers"),
        ({"modules_to_save": ["v_proj"], "target_modules": ["q_proj"]}, {}, "whole weights of quantised layers"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]}, {}, "LoRA on this parameter"),
        ({}, {f"base_model.model.{BASE.sites[0].name}.base_layer.weight": np.zeros((16, 16))}, "whole weights"),
    ],
)
def test_refuses_what_needs_the_weights_of_quantised_layers(fields: Any, tensors: Any, part: str) -> None:
    assert len(read(lora_config(), QUANTISED).sites) == 4
    assert part in reasons(lora_config(**fields), QUANTISED, **tensors)


def test_refuses_another_base() -> None:
    """For unknown layers, and for the same layers with other shapes."""
    other = m.ServedModel(
        model="o", name="o", fingerprint="", model_type="gpt2", vocab_size=9, max_model_len=9,
        sites=[m.SiteShape("transformer.h.0.attn.q_proj", 16, 16)],
    )  # fmt: skip
    assert "does not have" in reasons(lora_config(), other)
    wide = m.ServedModel(
        model="o", name="o", fingerprint="", model_type="llama", vocab_size=9, max_model_len=9,
        sites=[m.SiteShape(site.name, 32, 16) for site in BASE.sites],
    )  # fmt: skip
    assert "[4, 32]" in reasons(lora_config(), wide)


def test_refuses_a_vocabulary_of_nothing() -> None:
    """The file decides how many tokens an embedding has, but there must be at least one."""
    embedding = m.SiteShape("model.embed_tokens", BASE.vocab_size, 16, "embedding")
    base = msgspec.structs.replace(BASE, sites=[*BASE.sites, embedding])
    config = lora_config(modules_to_save=["embed_tokens"])
    name = "base_model.model.model.embed_tokens.weight"
    assert "has no tokens" in reasons(config, base, **{name: np.zeros((0, 16))})
    assert "shape" in reasons(config, base, **{name: np.zeros((64, 0))})


def test_a_value_without_bottom_is_shown_too() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    assert show(value) == "a value that is nested too deeply"


def test_a_refusal_stays_short() -> None:
    junk: dict[str, Any] = {f"x{i}" * 50: np.zeros((1, 1)) for i in range(2000)}
    found = reasons(lora_config(), **junk)
    assert len(found) < 4000
    assert "and 1994 more" in found.splitlines()[0]


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"r":1,"r":2}', b"\xff", b'{"a":' * 100_000, b" " * (2 << 20)])
def test_refuses_what_is_no_config(raw: bytes) -> None:
    with pytest.raises(AdapterRefused, match=re.escape(CONFIG_FILE)):
        parse_config(raw)


def test_a_tensor_of_no_module_is_not_understood() -> None:
    names = ["base_model.model..lora_A.weight", "base_model.model..lora_B.weight"]
    unknown: dict[str, Any] = {name: np.zeros((2, 2), np.float32) for name in names}
    assert reasons(lora_config(), **unknown) == f"tensors that are not understood: {', '.join(names)}"
