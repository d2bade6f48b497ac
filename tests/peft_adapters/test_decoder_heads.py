"""Label heads that adapters bring to decoders, which have no such layer among their sites."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.adapter_files import BASE, HIDDEN, lora_config, lora_tensors, safetensors

from peft_adapters.effect import has_effect
from peft_adapters.format import AdapterSpec, parse_header, read_adapter
from protocol.wire.errors import AdapterRefused
from protocol.wire.messages import MAX_LABELS, ServedModel

DECODER = msgspec.structs.replace(BASE, label_head="score", width=HIDDEN)
SAVED = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
HEAD = "base_model.model.score"


def read(more: dict[str, tuple[int, ...]], base: ServedModel = DECODER, **fields: Any) -> AdapterSpec:
    """Read an adapter with LoRA on all sites of BASE, plus zero tensors of the shapes in `more`."""
    tensors = lora_tensors() | {name: np.zeros(shape) for name, shape in more.items()}
    file = safetensors(tensors)
    return read_adapter(lora_config(**SAVED | fields), parse_header(file, len(file)), base)


@pytest.mark.parametrize("num", [1, 3, MAX_LABELS])
def test_an_adapter_brings_a_head_of_any_number_of_labels(num: int) -> None:
    spec = read({f"{HEAD}.weight": (num, HIDDEN)})
    assert (spec.head, spec.num_labels) == (f"{HEAD}.weight", num)
    assert not spec.replaced


def test_copies_that_peft_does_not_read_are_left_aside() -> None:
    copies = {f"{HEAD}.{copy}.weight": (2, HIDDEN) for copy in ("original_module", "modules_to_save")}
    assert read({f"{HEAD}.weight": (3, HIDDEN), **copies}).num_labels == 3


def test_an_adapter_without_a_head_has_no_labels() -> None:
    assert (read({}).head, read({}).num_labels) == ("", 0)


def test_a_head_is_an_effect_though_all_else_is_zero() -> None:
    tensors = {name: np.zeros_like(tensor) for name, tensor in lora_tensors().items()}
    for more, is_one in (({}, False), ({f"{HEAD}.weight": np.ones((2, HIDDEN))}, True)):
        file = safetensors(tensors | more)
        infos = parse_header(file, len(file))
        spec = read_adapter(lora_config(**SAVED), infos, DECODER)
        assert has_effect(spec, infos, memoryview(file)) == is_one


REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], ServedModel]] = {
    "its head has 4097 labels, where 1 to 4096 are served": ({f"{HEAD}.weight": (MAX_LABELS + 1, HIDDEN)}, DECODER),
    "weight has shape [2, 17] where config and base model want [2, 16]": ({f"{HEAD}.weight": (2, 17)}, DECODER),
    "tensors for layers that the base model does not have": (
        {f"{HEAD}.weight": (2, HIDDEN), f"{HEAD}.bias": (2,)}, DECODER,
    ),
    "cannot adapt": ({f"{HEAD}.lora_A.weight": (4, HIDDEN), f"{HEAD}.lora_B.weight": (2, 4)}, DECODER),
    "or cannot adapt": ({f"{HEAD}.weight": (2, HIDDEN)}, BASE),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_heads_that_are_not_served_are_refused_by_name(reason: str) -> None:
    tensors, base = REFUSED[reason]
    with pytest.raises(AdapterRefused, match=re.escape(reason)):
        read(tensors, base)
