"""Label heads that adapters bring: with their own number of labels, complete, within a limit."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from peft_adapters.format import AdapterSpec, TensorInfo, read_adapter
from protocol.wire.errors import AdapterRefused
from protocol.wire.messages import MAX_LABELS, ServedModel, SiteShape

WIDTH = 8
QUERY, DENSE, HEAD = "bert.encoder.layer.0.query", "bert.pooler.dense", "classifier"
BASE = ServedModel(
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


def read(shapes: dict[str, tuple[int, ...]], base: ServedModel = BASE, **config: Any) -> AdapterSpec:
    """Read an adapter with LoRA on the query, plus tensors of these shapes, by name."""
    lora = {f"{QUERY}.lora_A.weight": (2, WIDTH), f"{QUERY}.lora_B.weight": (WIDTH, 2)}
    infos: dict[str, TensorInfo] = {}
    begin = 0
    for name, shape in (lora | shapes).items():
        num = 4
        for size in shape:
            num *= size
        infos[f"base_model.model.{name}"] = TensorInfo("F32", shape, begin, begin + num)
        begin += num
    return read_adapter(CONFIG | config, infos, base)


def head(num: int) -> dict[str, tuple[int, ...]]:
    return {f"{HEAD}.weight": (num, WIDTH), f"{HEAD}.bias": (num,)}


def reasons(shapes: dict[str, tuple[int, ...]], base: ServedModel = BASE) -> str:
    with pytest.raises(AdapterRefused) as caught:
        read(shapes, base)
    return "; ".join(caught.value.reasons)


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
    headless = msgspec.structs.replace(BASE, labels=[], missing=[DENSE, HEAD])
    told = "the base model has no weights of this layer, and the adapter does not bring it"
    assert f"{told}: {DENSE}" in reasons(head(3), headless)
    assert HEAD in reasons({}, headless)
    whole = read(head(3) | {f"{DENSE}.weight": (WIDTH, WIDTH)}, headless, modules_to_save=["classifier", "pooler"])
    assert whole.num_labels == 3
