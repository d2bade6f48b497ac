"""Which parts of an adapter a quantized layer can have, decided by its config and tensors alone."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.adapter_files import BASE, lora_config, lora_tensors, safetensors

from peft_adapters.format import AdapterSpec, parse_header, read_adapter
from protocol.wire.errors import AdapterRefused
from protocol.wire.messages import OPAQUE

QUANTISED = msgspec.structs.replace(BASE, sites=[msgspec.structs.replace(site, kind=OPAQUE) for site in BASE.sites])
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def read(fields: dict[str, Any], tensors: dict[str, Any]) -> AdapterSpec:
    raw = safetensors({**lora_tensors(), **tensors})
    return read_adapter(lora_config(**fields), parse_header(raw, len(raw)), QUANTISED)


def test_plain_lora_is_good() -> None:
    assert len(read({}, {}).sites) == 4


@pytest.mark.parametrize(
    ("fields", "tensors", "part"),
    [
        ({"use_dora": True}, {}, "DoRA is not served on quantised layers"),
        ({"modules_to_save": ["v_proj"], "target_modules": ["q_proj"]}, {}, "whole weights of quantised layers"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]}, {}, "LoRA on this parameter"),
        ({}, {f"{Q_PROJ}.base_layer.weight": np.zeros((16, 16))}, "whole weights"),
    ],
)
def test_what_needs_their_weights_is_refused(fields: Any, tensors: Any, part: str) -> None:
    with pytest.raises(AdapterRefused) as refused:
        read(fields, tensors)
    assert any(part in reason for reason in refused.value.reasons)
