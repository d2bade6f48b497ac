"""Adapters with virtual tokens: what each config field does, and refusals, which name the value and the limit."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from functools import partial
from typing import Any

import numpy as np
import pytest
from helpers.adapter_files import BASE, HIDDEN, effect, parsed, read_file, refusal
from helpers.kind_files import KIND_BASE
from helpers.virtual_files import (
    ENTRIES,
    HEADS,
    LAYERS,
    MULTITASK,
    NUM,
    VIRTUAL_BASE,
    Tensors,
    virtual_config,
    virtual_tensors,
)
from msgspec import structs
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peft_adapters.config import ALWAYS_WITHOUT_EFFECT
from peft_adapters.format import AdapterSpec, adapter_digest, canonical_config
from peft_adapters.kinds.kind import MAX_WHOLE
from peft_adapters.kinds.virtual import CLASSIFIES, NO_EFFECT, PREFIXES, TENSOR, fields_of
from protocol.wire.messages import ServedModel, SiteShape


def read(config: dict[str, Any], tensors: Tensors, base: ServedModel | None = VIRTUAL_BASE) -> AdapterSpec:
    return read_file(config, tensors, base)


reasons = partial(refusal, read)


# ---------------------------------------------------------------- fields


@pytest.mark.parametrize("kind", NO_EFFECT)
def test_every_field_of_peft_is_known(kind: str) -> None:
    theirs = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)])}
    assert theirs <= {*fields_of(kind), *NO_EFFECT[kind], *ALWAYS_WITHOUT_EFFECT, "peft_type", "modules_to_save"}
    assert set(fields_of(kind)) <= theirs


@pytest.mark.parametrize("kind", NO_EFFECT)
def test_reads_what_fits_and_refuses_what_does_not(kind: str) -> None:
    config, tensors = virtual_config(kind), virtual_tensors(kind)
    spec = read(config, tensors)
    assert spec.virtual is not None
    assert (spec.virtual.num, spec.unscaled, spec.rank, spec.modules) == (NUM, kind, 0, [])
    assert bool(spec.virtual.shape) == (kind in PREFIXES)
    assert spec.virtual.site == ("" if kind in PREFIXES else "model.embed_tokens")
    others = {name: tensor for name, tensor in tensors.items() if name != TENSOR}
    assert "tensors missing: prompt_embeddings" in reasons(config, others)
    wanted = LAYERS * 2 * HEADS * ENTRIES if kind in PREFIXES else HIDDEN
    for shape in ((NUM, wanted + 1), (NUM + 1, wanted), (NUM, 1, wanted), (wanted, NUM), (NUM * wanted,)):
        found = reasons(config, tensors | {TENSOR: np.zeros(shape, np.float32)})
        assert f"prompt_embeddings has shape {list(shape)} where config and base model want [{NUM}, {wanted}]" in found
    assert "prompt_embeddings has dtype U8" in reasons(config, tensors | {TENSOR: np.zeros((NUM, wanted), np.uint8)})
    assert "tensors that are not understood: more" in reasons(config, tensors | {"more": np.zeros(1, np.float32)})
    assert "not understood: brand_new" in reasons(config | {"brand_new": 1}, tensors)
    assert f"modules_to_save beside the virtual tokens of {kind}" in reasons(
        config | {"modules_to_save": ["norm"]}, tensors
    )


@pytest.mark.parametrize("kind", NO_EFFECT)
def test_refuses_wrong_fields_with_their_values(kind: str) -> None:
    tensors = virtual_tensors(kind)
    for field in fields_of(kind):
        for wrong in (-1, [7], {}, "odd value", True, 1 << 60, 1.5):
            assert f"{field} {wrong} of {kind} is not" in reasons(virtual_config(kind, **{field: wrong}), tensors)
    assert "num_virtual_tokens 0 of" in reasons(virtual_config(kind, num_virtual_tokens=0), tensors)
    assert "task_type SEQ_2_SEQ_LM of" in reasons(virtual_config(kind, task_type="SEQ_2_SEQ_LM"), tensors)


def test_sizes_that_are_not_the_bases_are_refused_with_both() -> None:
    for kind in PREFIXES:
        right = {"num_layers": LAYERS, "num_attention_heads": HEADS, "token_dim": HEADS * ENTRIES}
        assert read(virtual_config(kind, **right), virtual_tensors(kind)).virtual is not None
        for name, size in right.items():
            found = reasons(virtual_config(kind, **right | {name: size + 1}), virtual_tensors(kind))
            assert f"{name} is {size + 1} where the base model has {size}" in found
    found = reasons(virtual_config("P_TUNING", token_dim=HIDDEN + 1), virtual_tensors("P_TUNING"))
    assert f"token_dim is {HIDDEN + 1} where the base model has {HIDDEN}" in found
    several = virtual_config(MULTITASK, num_tasks=2)
    assert "num_tasks 2 of MULTITASK_PROMPT_TUNING is not 1" in reasons(several, virtual_tensors(MULTITASK))


# ---------------------------------------------------------------- bases


def test_more_virtual_tokens_than_the_context_has_are_refused_with_both() -> None:
    for num, fits in ((62, True), (63, False), (MAX_WHOLE, False)):
        config = virtual_config("PROMPT_TUNING", num_virtual_tokens=num)
        tensors = {TENSOR: np.zeros((min(num, 100), HIDDEN), np.float32)}
        if fits:
            assert read(config, tensors).virtual is not None
        else:
            assert f"num_virtual_tokens is {num}: this base model takes at most 64 tokens" in reasons(config, tensors)


def test_bases_that_have_no_place_for_them_are_refused_by_name() -> None:
    per_layer = SiteShape("model.embed_tokens_per_layer", BASE.vocab_size - 8, 4, "embedding")
    bases: dict[str, ServedModel] = {
        "does not keep keys and values, of one shape, in every layer": structs.replace(VIRTUAL_BASE, prefix=[]),
        "generates no text": structs.replace(VIRTUAL_BASE, task="embed"),
        "whose input embedding cannot be adapted": structs.replace(VIRTUAL_BASE, sites=BASE.sites),
        "embeds tokens in every layer: model.embed_tokens_per_layer": structs.replace(
            VIRTUAL_BASE, sites=[*KIND_BASE.sites, per_layer]
        ),
    }
    for reason, base in bases.items():
        assert reason in reasons(virtual_config("PREFIX_TUNING"), virtual_tensors("PREFIX_TUNING"), base)
    hybrid = structs.replace(VIRTUAL_BASE, prefix=[])
    assert read(virtual_config("P_TUNING"), virtual_tensors("P_TUNING"), hybrid).virtual


@pytest.mark.parametrize("base", [None, structs.replace(VIRTUAL_BASE, prefix=None)])
def test_where_a_base_is_not_known_whole_a_worker_decides(base: ServedModel | None) -> None:
    for kind in PREFIXES:
        assert read(virtual_config(kind), virtual_tensors(kind), base).virtual is not None
        wrong = {TENSOR: np.zeros((NUM + 1, 7), np.float32)}
        assert f"where config and base model want [{NUM}, any]" in reasons(virtual_config(kind), wrong, base)


# ---------------------------------------------------------------- classifiers

DECODER = structs.replace(
    VIRTUAL_BASE, label_head="score", width=HIDDEN,
    sites=[*KIND_BASE.sites, SiteShape("lm_head", HIDDEN, KIND_BASE.vocab_size)],
)  # fmt: skip
ENCODER = structs.replace(
    VIRTUAL_BASE,
    task="score",
    label_head="classifier",
    sites=[*KIND_BASE.sites, SiteShape("classifier", HIDDEN, 4, has_bias=True)],
)
BIAS: Tensors = {"base_model.classifier.bias": np.ones(7, np.float32)}
CLASSIFIER: dict[str, Any] = {"task_type": CLASSIFIES, "modules_to_save": ["score", "classifier", "score"]}


def saved(**weights: tuple[int, ...]) -> Tensors:
    """Return a prompt's tensors plus modules saved whole, each with only a weight of the given shape."""
    whole = {f"base_model.{name}.weight": np.ones(shape, np.float32) for name, shape in weights.items()}
    return virtual_tensors("PROMPT_TUNING") | whole


def test_a_classifier_brings_its_head() -> None:
    config = virtual_config("PROMPT_TUNING", **CLASSIFIER)
    spec = read(config, saved(score=(3, HIDDEN)), DECODER)
    assert (spec.head, spec.num_labels, spec.replaced) == ("base_model.score.weight", 3, ())
    assert spec.virtual is not None
    spec = read(config, saved(classifier=(7, HIDDEN)) | BIAS, ENCODER)
    assert (spec.head, spec.num_labels) == ("", 7)
    assert {(part.site, part.parameter) for part in spec.replaced} == {("classifier", "weight"), ("classifier", "bias")}
    assert read(config, saved(score=(3, HIDDEN)), None).virtual is not None


REFUSED: dict[str, tuple[ServedModel, Tensors, dict[str, Any]]] = {
    "is not served on a base model without a classifier's head": (VIRTUAL_BASE, saved(score=(3, HIDDEN)), {}),
    "does not bring the head that makes a classifier of the model: score": (DECODER, saved(), {}),
    "its head has 4097 labels": (DECODER, saved(score=(4097, HIDDEN)), {}),
    f"weight has shape [3, {HIDDEN + 1}]": (DECODER, saved(score=(3, HIDDEN + 1)), {}),
    "whole modules beside virtual tokens are not served, but for the head: model.embed_tokens": (
        DECODER, saved(score=(3, HIDDEN), **{"model.embed_tokens": (KIND_BASE.vocab_size, HIDDEN)}),
        {"modules_to_save": ["score", "embed_tokens"]},
    ),
    "whole modules beside virtual tokens are not served, but for what PEFT runs behind the embedding: model.embed": (
        ENCODER, saved(classifier=(7, HIDDEN), **{"model.embed_tokens": (KIND_BASE.vocab_size, HIDDEN)}) | BIAS,
        {"modules_to_save": ["classifier", "embed_tokens"]},
    ),
    "tensors for layers that the base model does not have": (
        DECODER, saved(score=(3, HIDDEN), other=(3, HIDDEN)), {},
    ),
    "tensors that are not understood: score.weight": (
        DECODER, saved() | {"score.weight": np.ones((3, HIDDEN), np.float32)}, {},
    ),
    "modules_to_save {'a': 1} is not a list": (DECODER, saved(score=(3, HIDDEN)), {"modules_to_save": {"a": 1}}),
    "modules_to_save [[]] is not a list": (DECODER, saved(score=(3, HIDDEN)), {"modules_to_save": [[]]}),
    "tensors missing for modules_to_save: classifier.bias": (ENCODER, saved(classifier=(7, HIDDEN)), {}),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_classifiers_that_are_not_served_are_refused_by_name(reason: str) -> None:
    base, tensors, fields = REFUSED[reason]
    config = virtual_config("PROMPT_TUNING", **CLASSIFIER | fields)
    assert reason in reasons(config, tensors, base)
    raw, infos = parsed(tensors)
    assert adapter_digest(config, infos, raw)  # nor does the digest fail on it


@pytest.mark.parametrize("kind", sorted(PREFIXES | {"CPT"}))
def test_kinds_with_which_peft_has_no_classifiers_are_refused(kind: str) -> None:
    config = virtual_config(kind, **CLASSIFIER)
    tensors = virtual_tensors(kind) | {"base_model.score.weight": np.ones((3, HIDDEN), np.float32)}
    assert f"PEFT does not compute {kind} with task_type SEQ_CLS" in reasons(config, tensors, DECODER)


# ---------------------------------------------------------------- digests, limits


@pytest.mark.parametrize("kind", NO_EFFECT)
def test_a_digest_is_of_what_counts(kind: str) -> None:
    tensors = virtual_tensors(kind)
    raw, infos = parsed(tensors)

    def digest(**fields: Any) -> str:
        return adapter_digest(virtual_config(kind, **fields), infos, raw)

    assert digest() == digest(inference_mode=True, revision="x", modules_to_save=None)
    assert all(digest() == digest(**{field: None}) for field in NO_EFFECT[kind])
    assert digest() != digest(num_virtual_tokens=NUM + 1)
    assert digest(modules_to_save=["a", "b"]) == digest(modules_to_save=["b", "a", "b"]) != digest()
    assert len({adapter_digest(virtual_config(other), infos, raw) for other in NO_EFFECT}) == len(NO_EFFECT)
    canonical = canonical_config(virtual_config(kind, inference_mode=True, token_dim=None))
    assert read(json.loads(json.dumps(canonical)), tensors) == read(virtual_config(kind), tensors)
    assert canonical_config(canonical) == canonical
    assert effect(virtual_config(kind), tensors, VIRTUAL_BASE)


def test_a_bomb_is_refused_before_anything_is_made() -> None:
    """The configs request a million tokens, and products of matrices that the file does not have."""
    wide = structs.replace(VIRTUAL_BASE, max_model_len=0)
    bombs = [
        virtual_config(kind, num_virtual_tokens=MAX_WHOLE, **({"num_ranks": MAX_WHOLE} if kind == MULTITASK else {}))
        for kind in NO_EFFECT
    ]
    for config in bombs:
        reasons(config, virtual_tensors(config["peft_type"]), wide)  # a first call imports what it needs
        tracemalloc.start()
        try:
            found = reasons(config, virtual_tensors(config["peft_type"]), wide)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert f"where config and base model want [{MAX_WHOLE}, " in found
        assert peak < 1 << 20
    assert "multiplications to load, where" in reasons(
        bombs[list(NO_EFFECT).index(MULTITASK)], virtual_tensors(MULTITASK), wide
    )
