"""An adapter's digest covers everything that changes the computation, and nothing else."""

from __future__ import annotations

import json
import re
from typing import Any

from helpers import examples
from helpers.adapter_files import lora_config, lora_tensors, safetensors
from helpers.peft_configs import lora_configs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_adapters.format import adapter_digest, canonical_config, parse_header
from peft_adapters.kinds.converted import CONVERTED_FIELD


def digest(config: dict[str, Any], raw: bytes) -> str:
    return adapter_digest(config, parse_header(raw, len(raw)), raw)


def test_digest_is_of_what_a_conversion_cost() -> None:
    """Another claim makes another adapter, so no claim is shown for a file that contains another or none."""
    tensors = lora_tensors()
    raw = safetensors(tensors)
    layer, other = (
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in list(tensors)[:3:2]
    )

    def claimed(errors: dict[str, float], kind: str = "C3A", keep: float = 0.9) -> str:
        return digest(lora_config() | {CONVERTED_FIELD: {"peft_type": kind, "keep": keep, "errors": errors}}, raw)

    errors = {layer: 0.25, other: 0.125}
    assert claimed({other: 0.125, layer: 0.2500001}) == claimed(errors), "written otherwise"
    assert claimed(errors, "CALL ME") == claimed({"elsewhere": 0.5}) == digest(lora_config(), raw), "no claim"
    claims = (
        claimed(errors), claimed(errors, "VERA"), claimed(errors, keep=0.8), claimed({layer: 0.25}),
        digest(lora_config(), raw),
    )  # fmt: skip
    assert len(set(claims)) == len(claims)


def test_digest_is_of_the_maths_only() -> None:
    tensors = lora_tensors()
    raw = safetensors(tensors)
    expected = digest(lora_config(), raw)
    assert re.fullmatch("[0-9a-f]{64}", expected)
    reordered = safetensors(dict(reversed(tensors.items())), __metadata__={"who": "me"})
    assert digest(lora_config(), reordered) == expected
    for same in (
        {"lora_dropout": 0.5},
        {"base_model_name_or_path": "/home/me"},
        {"use_dora": False},
        {"trainable_token_indices": []},
        {"bias": "none"},
        {"target_modules": ["v_proj", "q_proj"]},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {}},
        {"modules_to_save": None},
        {"init_lora_weights": "mica"},
    ):
        changed: dict[str, Any] = same
        assert digest(lora_config(**changed), raw) == expected, same
    others = [{"r": 5}, {"lora_alpha": 9}, {"use_rslora": True}, {"target_modules": ["q_proj"]}, {"use_dora": True},
              {"alpha_pattern": {"q_proj": 1}}, {"exclude_modules": ["x"]}, {"layers_to_transform": [0]},
              {"lora_bias": True},
              {"modules_to_save": ["x"]}, {"alora_invocation_tokens": [1]}]  # fmt: skip
    for other in others:
        assert digest(lora_config(**other), raw) != expected, other
    assert digest(lora_config(rank_pattern={"a": 1, "b": 2}), raw) != digest(
        lora_config(rank_pattern={"b": 2, "a": 1}), raw
    ), "the first match counts, so the order does"


def test_digest_sees_every_byte_and_name() -> None:
    raw = bytearray(safetensors(lora_tensors(rank=1)))
    tensors = parse_header(bytes(raw), len(raw))
    expected = adapter_digest(lora_config(), tensors, raw)
    for tensor in tensors.values():
        for at in (tensor.begin, tensor.end - 1):
            raw[at] ^= 1
            assert adapter_digest(lora_config(), tensors, raw) != expected
            raw[at] ^= 1
    assert adapter_digest(lora_config(), tensors, raw) == expected
    renamed = {name.replace("q_proj", "k_proj"): tensor for name, tensor in tensors.items()}
    assert adapter_digest(lora_config(), renamed, raw) != expected


@settings(max_examples=examples.of(50), suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_canonical_config_is_stable(data: st.DataObject) -> None:
    fields = data.draw(lora_configs("llama"))
    once = canonical_config({"peft_type": "LORA", **fields})
    assert canonical_config(json.loads(json.dumps(once))) == once
    assert list(canonical_config(dict(reversed(fields.items())))) == list(canonical_config(fields))
