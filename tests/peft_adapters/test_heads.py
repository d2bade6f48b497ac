"""Label heads that adapters bring, for classifiers and for decoders, which have no such layer among their sites."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.adapter_files import BASE, HIDDEN, effect, lora_config, lora_tensors, read_file, refusal

from peft_adapters.format import AdapterSpec
from protocol.wire.messages import MAX_LABELS, ServedModel, SiteShape

WIDTH = 8
QUERY, DENSE, HEAD = "bert.encoder.layer.0.query", "bert.pooler.dense", "classifier"
CLASSIFIER = ServedModel(
    model="base", name="base", fingerprint="f", model_type="bert", vocab_size=100, max_model_len=64, task="score",
    labels=["bad", "good"], label_head=HEAD,
    sites=[
        SiteShape(QUERY, WIDTH, WIDTH, has_bias=True), SiteShape(DENSE, WIDTH, WIDTH),
        SiteShape(HEAD, WIDTH, 2, has_bias=True),
    ],
)  # fmt: skip
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "SEQ_CLS", "r": 2, "target_modules": ["query"],
    "modules_to_save": ["classifier", "score"],
}  # fmt: skip


def read(shapes: dict[str, tuple[int, ...]], base: ServedModel = CLASSIFIER, **config: Any) -> AdapterSpec:
    """Read an adapter with LoRA on the query, plus tensors of these shapes, by name."""
    lora = {f"{QUERY}.lora_A.weight": (2, WIDTH), f"{QUERY}.lora_B.weight": (WIDTH, 2)}
    tensors = {f"base_model.model.{name}": np.zeros(shape) for name, shape in (lora | shapes).items()}
    return read_file(CONFIG | config, tensors, base)


def head(num: int) -> dict[str, tuple[int, ...]]:
    return {f"{HEAD}.weight": (num, WIDTH), f"{HEAD}.bias": (num,)}


reasons = partial(refusal, read)


def test_a_head_has_as_many_labels_as_its_file_says() -> None:
    for num in (1, 2, 7, MAX_LABELS):
        spec = read(head(num))
        assert (spec.num_labels, [part.site for part in spec.replaced]) == (num, [HEAD, HEAD])
    plain = read({}, modules_to_save=None, task_type=None)
    assert (plain.num_labels, plain.replaced) == (0, ())


def test_a_head_has_a_limit_of_labels() -> None:
    assert f"its head has {MAX_LABELS + 1} labels, where 1 to {MAX_LABELS} are served" in reasons(head(MAX_LABELS + 1))
    assert "its head has 0 labels" in reasons(head(0))


def test_a_head_is_whole_and_fits_the_body() -> None:
    assert "tensors missing for modules_to_save: classifier.bias" in reasons({f"{HEAD}.weight": (3, WIDTH)})
    assert re.search(r"bias has shape \[2\] where .* want \[3\]", reasons(head(3) | {f"{HEAD}.bias": (2,)}))
    assert re.search(
        r"weight has shape \[3, 9\] where .* want \[3, 8\]", reasons({**head(3), f"{HEAD}.weight": (3, 9)})
    )


def test_layers_that_the_base_lacks_must_be_brought() -> None:
    headless = msgspec.structs.replace(CLASSIFIER, labels=[], missing=[DENSE, HEAD])
    told = "the base model has no weights of this layer, and the adapter does not bring it"
    assert f"{told}: {DENSE}" in reasons(head(3), headless)
    assert HEAD in reasons({}, headless)
    whole = read(head(3) | {f"{DENSE}.weight": (WIDTH, WIDTH)}, headless, modules_to_save=["classifier", "pooler"])
    assert whole.num_labels == 3


# ---------------------------------------------------------------- decoders

DECODER = msgspec.structs.replace(BASE, label_head="score", width=HIDDEN)
SAVED = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
SCORE = "base_model.model.score"


def read_decoder(more: dict[str, tuple[int, ...]], base: ServedModel = DECODER, **fields: Any) -> AdapterSpec:
    """Read an adapter with LoRA on all sites of BASE, and further tensors of these shapes."""
    tensors = lora_tensors() | {name: np.zeros(shape) for name, shape in more.items()}
    return read_file(lora_config(**SAVED | fields), tensors, base)


@pytest.mark.parametrize("num", [1, 3, MAX_LABELS])
def test_an_adapter_brings_a_head_of_any_number_of_labels(num: int) -> None:
    spec = read_decoder({f"{SCORE}.weight": (num, HIDDEN)})
    assert (spec.head, spec.num_labels) == (f"{SCORE}.weight", num)
    assert not spec.replaced


def test_copies_that_peft_does_not_read_are_left_aside() -> None:
    copies = {f"{SCORE}.{copy}.weight": (2, HIDDEN) for copy in ("original_module", "modules_to_save")}
    assert read_decoder({f"{SCORE}.weight": (3, HIDDEN), **copies}).num_labels == 3


def test_an_adapter_without_a_head_has_no_labels() -> None:
    assert (read_decoder({}).head, read_decoder({}).num_labels) == ("", 0)


def test_a_head_is_an_effect_though_all_else_is_zero() -> None:
    tensors = {name: np.zeros_like(tensor) for name, tensor in lora_tensors().items()}
    assert not effect(lora_config(**SAVED), tensors, DECODER)
    assert effect(lora_config(**SAVED), tensors | {f"{SCORE}.weight": np.ones((2, HIDDEN))}, DECODER)


REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], ServedModel]] = {
    "its head has 4097 labels, where 1 to 4096 are served": ({f"{SCORE}.weight": (MAX_LABELS + 1, HIDDEN)}, DECODER),
    "weight has shape [2, 17] where config and base model want [2, 16]": ({f"{SCORE}.weight": (2, 17)}, DECODER),
    "tensors for layers that the base model does not have": (
        {f"{SCORE}.weight": (2, HIDDEN), f"{SCORE}.bias": (2,)}, DECODER,
    ),
    "cannot adapt": ({f"{SCORE}.lora_A.weight": (4, HIDDEN), f"{SCORE}.lora_B.weight": (2, 4)}, DECODER),
    "or cannot adapt": ({f"{SCORE}.weight": (2, HIDDEN)}, BASE),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_heads_that_are_not_served_are_refused_by_name(reason: str) -> None:
    tensors, base = REFUSED[reason]
    assert reason in refusal(read_decoder, tensors, base)
