"""Adapters with other names are mapped to the base's own modules, each tensor to its place, or refused."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.adapter_files import BASE, lora_config, read_file, refusal

from peft_adapters.format import AdapterSpec
from peft_adapters.names.fused import Cut, FusedPart, uncut
from peft_adapters.names.layouts import LAYOUTS
from peft_adapters.reasons import Reasons
from peft_adapters.spec import LoraWeights
from protocol.wire import messages as m

RANK, IN = 2, 16
SIZES = {"q_proj": 16, "k_proj": 8, "v_proj": 8, "o_proj": 16, "gate_proj": 24, "up_proj": 24}
SPLIT = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
FUSED = {"self_attn.qkv_proj": 32, "mlp.gate_up_proj": 48}
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r"\.(?:(?:k_proj|v_proj|q_proj)))"
)
"""Patterns that Unsloth's `get_peft_regex` writes for the language part of a multimodal model."""


def base(decoder: str = "model", model_type: str = "llama", fused: bool = False) -> m.ServedModel:
    """Return a base with a head, whose decoder has this name.

    `model.language_model` makes it a multimodal wrapper, with a vision tower.
    """
    layout = LAYOUTS[decoder]
    own = FUSED if fused else {name: SIZES[name.rpartition(".")[2]] for name in SPLIT}
    sites = [m.SiteShape(layout.inside("embed_tokens"), 64, IN, "embedding")]
    sites += [m.SiteShape(name, IN, size) for name, size in layers(decoder, own).items()]
    sites += [m.SiteShape(layout.inside("norm"), IN, IN, "norm"), m.SiteShape(layout.head, IN, 64)]
    if decoder == "model.language_model":
        sites.append(m.SiteShape("model.visual.blocks.0.attn.qkv", IN, 3 * IN))
    return msgspec.structs.replace(BASE, model_type=model_type, sites=sites)


def adapter(modules: dict[str, int]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the LoRA tensors of modules. modules: name in the base -> outputs."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for module, size in modules.items():
        found[f"base_model.model.{module}.lora_A.weight"] = np.ones((RANK, IN))
        found[f"base_model.model.{module}.lora_B.weight"] = np.ones((size, RANK))
    return found


def layers(decoder: str, names: dict[str, int], num: int = 2) -> dict[str, int]:
    return {LAYOUTS[decoder].inside(f"layers.{i}.{name}"): size for i in range(num) for name, size in names.items()}


Q_V = {"self_attn.q_proj": 16, "self_attn.v_proj": 8}


def read(tensors: dict[str, np.ndarray[Any, Any]], served: m.ServedModel, **fields: Any) -> AdapterSpec:
    return read_file(lora_config(RANK, **{"lora_alpha": 4} | fields), tensors, served)


@pytest.mark.parametrize("own", LAYOUTS)
@pytest.mark.parametrize("theirs", LAYOUTS)
def test_every_layout_is_read_for_every_other(own: str, theirs: str) -> None:
    head = LAYOUTS[theirs].head
    tensors = adapter(layers(theirs, Q_V)) | {f"base_model.model.{head}.weight": np.ones((64, IN))}
    served = base(own)
    ranks = {LAYOUTS[theirs].inside("layers.1.self_attn.q_proj"): RANK}
    spec = read(tensors, served, rank_pattern=ranks, modules_to_save=["lm_head"])
    assert {part.site for part in spec.sites} == set(layers(own, Q_V))
    assert [part.site for part in spec.replaced] == [LAYOUTS[own].head]
    for part in spec.sites:
        assert part.a.endswith(part.site.removeprefix(f"{own}.") + ".lora_A.weight")
    assert bool(spec.mapped) == (own != theirs)


def test_a_regex_means_what_it_meant_where_it_was_trained() -> None:
    spec = read(adapter(layers("model.language_model", Q_V | {"self_attn.k_proj": 8})), base(), target_modules=UNSLOTH)
    assert len(spec.sites) == 6
    spec = read(
        adapter(layers("model", Q_V | {"self_attn.k_proj": 8})), base("model.language_model"), target_modules=UNSLOTH
    )
    assert len(spec.sites) == 6
    assert spec.mapped == {"model.*": "model.language_model.*"}


def test_layers_and_ranks_are_chosen_by_the_adapter_s_names() -> None:
    alphas = {"language_model.model.layers.0.self_attn.q_proj": 8}
    chosen = {"layers_to_transform": [0], "layers_pattern": "language_model.model.layers"}
    spec = read(adapter(layers("language_model.model", Q_V, 1)), base(), alpha_pattern=alphas, **chosen)
    assert {part.site: part.scale for part in spec.sites} == {
        "model.layers.0.self_attn.q_proj": 4.0, "model.layers.0.self_attn.v_proj": 2.0
    }  # fmt: skip


def test_raw_state_dicts_keep_the_file_s_names() -> None:
    tensors = {
        name.replace(".weight", ".default.weight"): value for name, value in adapter(layers("model", Q_V)).items()
    }
    spec = read(tensors, base())
    assert {name for part in spec.sites for name in (part.a, part.b)} == set(tensors)
    assert spec.mapped == {"*.default.*": "*.*"}


def test_a_fused_adapter_shares_a_among_the_parts() -> None:
    spec = read(adapter(layers("model", FUSED)), base(), target_modules=["qkv_proj", "gate_up_proj"])
    found = {part.site: part for part in spec.sites}
    assert list(found) == list(layers("model", dict.fromkeys(SPLIT, 0)))
    k = found["model.layers.1.self_attn.k_proj"]
    assert (k.rank, k.scale, k.width) == (RANK, 2.0, 8)
    block = k.blocks[0]
    assert block.a == "base_model.model.model.layers.1.self_attn.qkv_proj.lora_A.weight"
    assert (block.begin, block.end, block.at) == (16, 24, 0)
    assert spec.mapped["*.qkv_proj"] == "*.q_proj, *.k_proj, *.v_proj"


def test_a_split_adapter_becomes_blocks_of_the_fused_layer() -> None:
    served = base("model", "phi3", fused=True)
    names = {name: SIZES[name.rpartition(".")[2]] for name in SPLIT}
    spec = read(
        adapter(layers("model", names)), served, target_modules=[*SIZES], alpha_pattern={"v_proj": 8, "up_proj": 2}
    )
    qkv = next(part for part in spec.sites if part.site == "model.layers.0.self_attn.qkv_proj")
    assert (qkv.rank, qkv.width, qkv.scale) == (3 * RANK, 32, 2.0)
    assert [(block.at, block.end, block.factor) for block in qkv.blocks] == [(0, 16, 1), (16, 8, 1), (24, 8, 2)]
    assert [part.site for part in spec.sites] == list(layers("model", FUSED))


@pytest.mark.parametrize(("part", "at"), [("q_proj", 0), ("k_proj", 16), ("v_proj", 24)])
def test_one_part_alone_says_where_it_lies(part: str, at: int) -> None:
    served = base("model", "phi3", fused=True)
    spec = read(adapter(layers("model", {f"self_attn.{part}": SIZES[part]})), served, target_modules=[part])
    assert [(lora.blocks[0].at, lora.rank) for lora in spec.sites] == [(at, RANK)] * 2


def test_other_names_and_fused_layers_together() -> None:
    served = base("model.language_model", "phi3", fused=True)
    spec = read(adapter(layers("model", Q_V)), served)
    assert {part.site for part in spec.sites} == {
        f"model.language_model.layers.{i}.self_attn.qkv_proj" for i in range(2)
    }


# ---------------------------------------------------------------- partial matches

WHOLE = adapter(layers("model", Q_V))
PHI = base("model", "phi3", fused=True)
QKV = adapter(layers("model", {"self_attn.qkv_proj": 32}))
TO_QKV, TO_Q = {"target_modules": ["qkv_proj"]}, {"target_modules": ["q_proj"]}
ROW = np.ones((1, IN))
TOWER = adapter({"visual.blocks.0.attn.qkv": 48})
WRAPPED = adapter(layers("model.language_model", Q_V))


def renamed(old: str, new: str, tensors: dict[str, np.ndarray[Any, Any]] = WHOLE, num: int = 99) -> Any:
    """Return the tensors with the first `num` of them renamed."""
    return {name.replace(old, new) if i < num else name: value for i, (name, value) in enumerate(tensors.items())}


NOT_THERE = "layers that the base model does not have"
UNKNOWN = "tensors that are not understood"
MISSING = "tensors missing for targeted layers"
NOTHING = "matches no layer"
SHAPE = "has shape"


def of_qkv(what: str, rows: int) -> dict[str, np.ndarray[Any, Any]]:
    return {f"base_model.model.model.layers.{i}.self_attn.qkv_proj.{what}": np.ones(rows) for i in range(2)}


def saved(module: str, rows: int) -> dict[str, np.ndarray[Any, Any]]:
    return {f"base_model.model.model.layers.{i}.{module}.weight": np.ones((rows, IN)) for i in range(2)}


Case = tuple[Any, m.ServedModel, dict[str, Any], str]
"""Tensors, base model, config fields, and a part of the reason for the refusal."""

NAMES: dict[str, Case] = {
    "one tensor of the wrapper": (renamed("model.layers", "model.language_model.layers", num=1), base(), {}, NOT_THERE),
    "half in the wrapper": (renamed("model.layers", "model.language_model.layers", num=4), base(), {}, NOT_THERE),
    "half in an older wrapper": (renamed("model.layers", "language_model.model.layers", num=4), base(), {}, NOT_THERE),
    "an unknown wrapper": (renamed("model.layers", "model.brain.layers"), base(), {}, NOT_THERE),
    "an unknown wrapper's head": (WHOLE | adapter({"brain.lm_head": 64}), base(), {}, NOT_THERE),
    "the head of another wrapper": (WRAPPED | adapter({"language_model.lm_head": 64}), base(), {}, NOT_THERE),
    "GPT-2's names": (renamed("model.layers", "transformer.h"), base(), {}, NOT_THERE),
    "BERT's names": (renamed("model.layers", "encoder.layer"), base(), {}, NOT_THERE),
    "T5's names": (renamed("model.layers", "encoder.block"), base(), {}, NOT_THERE),
    "a tower beside the decoder": (WRAPPED | TOWER, base(), {"target_modules": ["q_proj", "v_proj", "qkv"]}, NOT_THERE),
    "a tower on a text class": (WHOLE | TOWER, base(), {"target_modules": ["q_proj", "v_proj", "qkv"]}, NOT_THERE),
    "nothing but a tower": (TOWER, base(), {"target_modules": ["qkv"]}, NOT_THERE),
    "a projector": (WRAPPED | adapter({"model.multi_modal_projector.linear_1": 16}), base(), {}, NOT_THERE),
    "a layer too many": (adapter(layers("model", Q_V, 3)), base(), {}, NOT_THERE),
    "a layer too many in the wrapper": (adapter(layers("model.language_model", Q_V, 3)), base(), {}, NOT_THERE),
    "a layer too few": (adapter(layers("model", Q_V, 1)), base(), {}, MISSING),
    "a layer too few in the wrapper": (adapter(layers("model.language_model", Q_V, 1)), base(), {}, MISSING),
    "k without tensors": (WHOLE, base(), {"target_modules": ["q_proj", "k_proj", "v_proj"]}, MISSING),
    "v without a target": (WHOLE, base(), {"target_modules": ["q_proj"]}, "does not target"),
    "v without a target in the wrapper": (WRAPPED, base(), {"target_modules": ["q_proj"]}, "does not target"),
    "a regex of the other class": (WRAPPED, base(), {"target_modules": r"model\.layers\.\d+\..*[qv]_proj"}, NOTHING),
    "a regex of other layers": (WRAPPED, base(), {"target_modules": r".*transformer\.h.*"}, NOTHING),
    "a path of the other class": (WRAPPED, base(), {"target_modules": ["model.layers.0.self_attn.q_proj"]}, NOTHING),
    "excluded by the wrapper's name": (WRAPPED, base(), {"exclude_modules": ".*language_model.*"}, NOTHING),
    "an embedding of another wrapper": (
        WRAPPED | {"base_model.model.language_model.model.embed_tokens.weight": np.ones((64, 16))}, base(),
        {"modules_to_save": ["embed_tokens"]}, "missing for modules_to_save",
    ),
    "tokens of another wrapper": (
        WRAPPED | {"base_model.model.language_model.model.embed_tokens.token_adapter.trainable_tokens_delta": ROW},
        base(), {"trainable_token_indices": [3]}, NOT_THERE,
    ),
}  # fmt: skip

FILES: dict[str, Case] = {
    "no tensors": ({}, base(), {}, MISSING),
    "only A": ({name: value for name, value in WHOLE.items() if "lora_A" in name}, base(), {}, MISSING),
    "only B": ({name: value for name, value in WHOLE.items() if "lora_B" in name}, base(), {}, MISSING),
    "a third factor": (renamed("lora_A", "lora_C"), base(), {}, UNKNOWN),
    "MLX's names": (renamed(".lora_A.weight", ".lora_a"), base(), {}, UNKNOWN),
    "diffusers' names": (renamed("lora_A", "lora.down"), base(), {}, NOT_THERE),
    "kohya's names": (renamed("lora_A.weight", "lora_down.weight"), base(), {}, UNKNOWN),
    "one without the prefix": (renamed("base_model.model.", "", num=1), base(), {}, UNKNOWN),
    "one with an adapter's name": (renamed("lora_A.weight", "lora_A.default.weight", num=1), base(), {}, UNKNOWN),
    "two adapters": (renamed("lora_A.weight", "lora_A.a.weight", renamed("lora_B.weight", "lora_B.b.weight")), base(),
                     {}, UNKNOWN),
    "a prompt tuning": ({"prompt_embeddings": np.ones((4, 16))}, base(), {}, UNKNOWN),
    "another output size": (adapter(layers("model", Q_V | {"self_attn.v_proj": 9})), base(), {}, SHAPE),
    "another size in the wrapper": (adapter(layers("model.language_model", Q_V | {"self_attn.q_proj": 20})), base(),
                                    {}, SHAPE),
    "another rank": (WHOLE, base(), {"r": 3}, SHAPE),
    "rank 0": (WHOLE, base(), {"r": 0}, "not positive"),
}  # fmt: skip

FUSIONS: dict[str, Case] = {
    "a fused layer of another size": (adapter(layers("model", {"self_attn.qkv_proj": 30})), base(), TO_QKV, SHAPE),
    "fused and split": (WHOLE | QKV, base(), {"target_modules": ["q_proj", "v_proj", "qkv_proj"]}, NOT_THERE),
    "fused in one layer": (adapter(layers("model", {"self_attn.qkv_proj": 32}, 1)), base(), TO_QKV, MISSING),
    "fused but not targeted": (QKV, base(), {"target_modules": ["o_proj"]}, NOTHING),
    "interleaved by head": (adapter(layers("model", {"self_attn.query_key_value": 32})), base(), {}, NOT_THERE),
    "split of an unknown family": (WHOLE, base("model", "minimax", fused=True), {}, NOT_THERE),
    "fused with too few of DoRA's magnitudes": (
        QKV | of_qkv("lora_magnitude_vector", 31), base(), TO_QKV | {"use_dora": True}, SHAPE,
    ),
    "fused with too long a bias": (QKV | of_qkv("lora_B.bias", 33), base(), TO_QKV | {"lora_bias": True}, SHAPE),
    "parts that do not add up": (adapter(layers("model", Q_V | {"self_attn.v_proj": 7})), PHI, {}, SHAPE),
    "q of everything": (adapter(layers("model", {"self_attn.q_proj": 32})), PHI, TO_Q, NOT_THERE),
    "gate of another size": (adapter(layers("model", {"mlp.gate_proj": 20})), PHI, {"target_modules": ["gate_proj"]},
                             SHAPE),
    "a whole fused layer": (QKV | saved("mlp.gate_up_proj", 48), base(), TO_QKV | {"modules_to_save": ["gate_up_proj"]},
                            NOT_THERE),
    "a saved part of a fused layer": (
        adapter(layers("model", {"self_attn.q_proj": 16})) | saved("self_attn.v_proj", 8), PHI,
        TO_Q | {"modules_to_save": ["v_proj"]}, "fuses or splits",
    ),
}  # fmt: skip


def test_values_of_adalora_are_not_cut() -> None:
    own = LoraWeights("m.qkv_proj", 2, 1.0, "a", "b", singular="e")
    found = Reasons()
    assert uncut([own], [Cut(is_fused=True, fused="m.qkv_proj", parts=(FusedPart("m.q_proj", 0, 16),))], found) == []
    assert "AdaLoRA is not served" in found.render()[0]


REFUSED = {**NAMES, **FILES, **FUSIONS}


def test_there_are_enough_of_them() -> None:
    assert len(REFUSED) >= 50


@pytest.mark.parametrize("name", REFUSED)
def test_what_matches_in_part_is_refused_with_reasons(name: str) -> None:
    tensors, served, fields, reason = REFUSED[name]
    assert reason in refusal(read, tensors, served, **fields)
