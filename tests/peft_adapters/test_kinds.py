"""Adapter kinds besides LoRA: what each config field does, what is refused, and what their digests cover."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections import UserDict
from collections.abc import KeysView
from functools import partial
from typing import Any

import numpy as np
import peft
import pytest
from helpers.adapter_files import BASE, effect, parsed, read_file, refusal
from helpers.kind_files import KIND_BASE, SMALL, kind_config, kind_tensors
from msgspec import structs
from numpy.typing import NDArray
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lokr.layer import factorization as peft_factorization

from peft_adapters import config as config_module
from peft_adapters.config import read_config
from peft_adapters.format import AdapterSpec, adapter_digest, canonical_config
from peft_adapters.kinds import table, virtual
from peft_adapters.kinds.kind import MAX_KIND_NUMBERS, MAX_KIND_ROWS, MAX_WHOLE
from peft_adapters.kinds.lycoris import factorization
from peft_adapters.kinds.refused import CONVERTIBLE
from peft_adapters.kinds.registry import NAMES, kind_of
from peft_adapters.reader import read_spec
from peft_adapters.reasons import Reasons
from peft_adapters.tensors import sort_tensors
from protocol.wire import messages as m
from protocol.wire.errors import AdapterRefused

CHANGED: dict[str, Any] = {
    "r": 1, "alpha": 3, "apply_GS": True, "decompose_both": True, "decompose_factor": 2, "gralora_k": 1, "hybrid_r": 2,
    "init_weights": "mini", "mini_r": 2, "para": True, "decomposition_method": "qr", "num_vectors": 9, "topk": 1,
    "vector_length": 2, "save_only_topk_weights": False, "feedforward_modules": ["q_proj"], "variant": "road_4",
    "group_size": 2, "oft_block_size": 8, "coft": True, "eps": 0.1, "block_share": True, "use_cayley_neumann": False,
    "num_cayley_neumann_terms": 3, "boft_block_size": 8, "boft_block_num": 4, "token_indices": [7], "theta_d_length": 9,
}  # fmt: skip
"""Field that changes the computation -> another valid value. A field that is not here has only one served value."""


UNKNOWN_EFFECT = {"HRA", "DEFT", "BOFT", "IA3", "ROAD", "LN_TUNING", "TRAINABLE_TOKENS"}
"""Kinds whose effect cannot be told from the file alone."""


def read(config: dict[str, Any], tensors: dict[str, Any], base: m.ServedModel | None = KIND_BASE) -> AdapterSpec:
    return read_file(config, tensors, base)


reasons = partial(refusal, read)


# ---------------------------------------------------------------- the table


def test_the_table_has_a_row_for_every_kind_of_peft() -> None:
    assert set(table.rows()) == {kind.value for kind in PeftType}
    assert table.table() in table.PAGE.read_text(), "python -m peft_adapters.kinds.table"


def test_what_the_table_calls_served_is_read() -> None:
    assert set(table.SERVED) == {"LORA", "ADALORA", *NAMES, *virtual.NO_EFFECT}
    assert set(SMALL) == set(NAMES), "every kind is tested here"


def test_peft_can_convert_what_is_told_to_be_converted() -> None:
    can = {kind.value for kind in PeftType if _converts(kind)}
    assert can - {"LORA", "ADALORA"} == CONVERTIBLE


def _converts(kind: PeftType) -> bool:
    """Return whether the source code of a kind's layers says that PEFT can convert them."""
    layer = getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(kind), "tuner_layer_cls", None)
    if layer is None:
        return False
    classes: list[Any] = list(vars(inspect.getmodule(layer)).values())
    own: list[Any] = [c for c in classes if inspect.isclass(c) and issubclass(c, layer)]
    answers = [layer_class.supports_lora_conversion for layer_class in own]
    texts = [inspect.getsource(answer) for answer in answers]
    return any("return True" in text or "return not isinstance" in text for text in texts)  # any but Conv1D


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_peft_is_known(name: str) -> None:
    """We read each of PEFT's fields or know that it has no effect; each of our fields exists in PEFT."""
    kind = kind_of(name)
    assert kind is not None
    theirs = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)])}
    common = {*config_module._COMMON, *config_module.ALWAYS_WITHOUT_EFFECT, "bias", "modules_to_save"}
    assert theirs <= {*kind.fields, *kind.no_effect, *common}
    assert set(kind.fields) <= theirs
    assert {pattern for pattern in ("rank_pattern", "alpha_pattern") if pattern in theirs} == kind.patterns
    defaults = {field.name: field.default for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)])}
    defaults["token_indices"] = ()  # PEFT has a default factory
    assert {key: field.default for key, field in kind.fields.items()} == {key: defaults[key] for key in kind.fields}


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("name", NAMES)
def test_reads_the_layers_and_refuses_what_does_not_fit(name: str) -> None:
    config = kind_config(name)
    tensors = kind_tensors(config)
    spec = read(config, tensors)
    changed = [part.site for part in (*spec.sites, *spec.operations, *spec.replaced, *spec.tokens)]
    assert changed == [
        site.name for site in KIND_BASE.sites if site.name.rpartition(".")[2] in config["target_modules"]
    ]
    first = next(iter(tensors))
    assert "missing" in reasons(config, {key: value for key, value in tensors.items() if key != first})
    assert "has shape" in reasons(config, tensors | {first: np.zeros((3, 3), np.float32)})
    other = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert other in reasons(config, tensors | {other: np.zeros((2, 16), np.float32)})
    assert "not understood: brand_new" in reasons(config | {"brand_new": 1}, tensors)
    assert "matches no layer" in reasons(config | {"target_modules": ["nothing"]}, tensors)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_base_only_the_config_is_checked(name: str) -> None:
    config = kind_config(name)
    assert read(config, kind_tensors(config), None).sites == ()
    assert "brand_new" in reasons(config | {"brand_new": 1}, {}, None)


@pytest.mark.parametrize("name", NAMES)
def test_refuses_wrong_fields_with_their_values(name: str) -> None:
    config = kind_config(name)
    tensors = kind_tensors(config)
    kind = kind_of(name)
    assert kind is not None
    for field, form in kind.fields.items():
        whole = [-7.5, 1 << 60] if type(form.default) is int and form.wants.startswith("a whole") else []
        texts = [] if field == "feedforward_modules" else ["odd value"]  # there a string is a valid pattern
        for wrong in ([-1], {}, *texts, *whole):
            assert f"{field} " in reasons(config | {field: wrong}, tensors)
    assert "bias some" in reasons(config | {"bias": "some"}, tensors)


def test_refuses_features_that_are_not_served_by_name() -> None:
    for name, field, value in (
        ("MISS", "init_weights", "bat"), ("VERA", "save_projection", False), ("PVERA", "sample_at_inference", True)
    ):  # fmt: skip
        config = kind_config(name)
        assert f"{field} {value} of {name}" in reasons(config | {field: value}, kind_tensors(config))
    config = kind_config("LOHA")
    assert "rank_pattern has values" in reasons(config | {"rank_pattern": {"q_proj": 0}}, kind_tensors(config))
    config = kind_config("MISS")
    assert "not understood: rank_pattern" in reasons(config | {"rank_pattern": {"q_proj": 1}}, kind_tensors(config))


def test_refuses_what_boft_cannot_be_on_a_layer() -> None:
    config = kind_config("BOFT")
    tensors = kind_tensors(config)
    assert len(read(config, tensors).operations) == 4
    both = {"boft_block_num": 4}, {"boft_block_size": 0}
    assert all("one of boft_block_size and boft_block_num must be 0" in reasons(config | one, tensors) for one in both)
    assert "boft_block_size is 3, of 16 inputs" in reasons(config | {"boft_block_size": 3}, tensors)
    more = {name: np.repeat(value, 2, 0) if name.endswith("boft_R") else value for name, value in tensors.items()}
    assert "boft_R has shape [2, 4, 4, 4]" in reasons(config | {"boft_n_butterfly_factor": 2}, more)
    biased = structs.replace(KIND_BASE, sites=[structs.replace(site, has_bias=True) for site in KIND_BASE.sites])
    assert "it scales outputs without the layer's bias" in reasons(config, tensors, biased)


def test_numbered_vectors_have_one_name_each() -> None:
    """PEFT ignores vectors without the prefix; such a tensor must not silently replace one of the same number."""
    config = kind_config("TINYLORA")
    tensors = kind_tensors(config)
    other = {"tinylora_v.0": 2 * tensors["base_model.tinylora_v.0"]}
    assert "tensors that are not understood: tinylora_v.0" in reasons(config, tensors | other)
    assert "tinylora_v.0" in reasons(config, other | {k: v for k, v in tensors.items() if not k.endswith("_v.0")})


def test_vectors_are_numbered_by_layers_that_run_alone() -> None:
    """PEFT also counts idle layers, so a file without their tensors would assign other vectors to all layers."""
    config = kind_config("TINYLORA")
    idle = structs.replace(KIND_BASE, idle=[m.SiteShape("model.layers.0.cross.q_proj", 16, 16)])
    text = "TINYLORA is not served where it counts layers that the model does not run: model.layers.0.cross.q_proj"
    assert text in reasons(config, kind_tensors(config), idle)
    read(config | {"exclude_modules": ["cross.q_proj"]}, kind_tensors(config), idle)
    other = kind_config("VERA")
    read(other, kind_tensors(other), idle)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5, 1.5, 10**400, "0.5", True, None, [0]])
def test_shares_of_vectors_are_numbers_from_0_to_1(value: Any) -> None:
    config = kind_config("TINYLORA")
    assert "weight_tying " in reasons(config | {"weight_tying": value}, kind_tensors(config))


def test_tensors_that_layers_share_are_looked_up_and_not_copied_for_each() -> None:
    """A file of 2 MB may have 20,000 of them: copying them for each of 4,000 layers took three seconds."""
    config, found = kind_config("TINYLORA"), Reasons()
    _, infos = parsed(kind_tensors(config))
    fields = read_config(config, found)
    tensors = sort_tensors({name: name for name in infos}, found, kind_of("TINYLORA"))
    shared: Any = Shared(tensors.shared)
    tensors.shared = shared
    assert fields is not None
    assert len(read_spec(fields, tensors, infos, KIND_BASE, found).sites) == 4
    assert not found
    assert shared.num_copies == 0


class Shared(UserDict[str, str]):
    """Counts how often it is copied."""

    num_copies = 0

    def keys(self) -> KeysView[str]:
        self.num_copies += 1
        return super().keys()


def test_refuses_modules_that_no_kind_has() -> None:
    for name, module in (("LOHA", "embed_tokens"), ("IA3", "norm"), ("LN_TUNING", "q_proj")):
        config = kind_config(name, target_modules=["q_proj", "v_proj", module])
        assert f"{name} is not served on modules of this kind" in reasons(config, kind_tensors(config))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"LN_TUNING", "TRAINABLE_TOKENS"}))
def test_on_quantised_layers_only_what_needs_their_weight_is_refused(name: str) -> None:
    base = structs.replace(KIND_BASE, sites=[structs.replace(site, kind=m.OPAQUE) for site in BASE.sites])
    config = kind_config(name)
    if name in ("HRA", "DEFT"):
        assert f"{name} needs weights of the base model, which are quantised" in reasons(
            config, kind_tensors(config), base
        )
        return
    spec = read(config, kind_tensors(config), base)
    assert len(spec.sites) + len(spec.operations) == len(BASE.sites)


# ---------------------------------------------------------------- limits


def test_rows_are_counted_before_any_are_made() -> None:
    """A few kB may expand to gigabytes; the refusal names the number of rows."""
    config = kind_config("LOHA", r=65)
    found = reasons(config, kind_tensors(config))
    assert f"LOHA makes {65 * 65} rank rows, where {MAX_KIND_ROWS} are served" in found
    assert "lorafleet adapters convert" in found
    size = 8192
    wide = structs.replace(BASE, sites=[m.SiteShape(f"model.layers.{i}.q_proj", size, size) for i in range(40)])
    config = kind_config("LOKR", r=1, decompose_factor=64, decompose_both=False, target_modules=["q_proj"])
    tensors = kind_tensors(config, wide)
    assert sum(tensor.nbytes for tensor in tensors.values()) < 3_000_000
    read(config, tensors, wide)
    config = kind_config("LOKR", r=40, decompose_factor=64, target_modules=["q_proj"])
    num = 40 * 64 * 40 * 2 * size
    assert num > MAX_KIND_NUMBERS
    assert f"LOKR makes {num} numbers" in reasons(config, kind_tensors(config, wide), wide)


def hra_rows(u: NDArray[Any], weight: NDArray[Any], *, orthogonal: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    outputs, inputs = weight.shape
    base = structs.replace(BASE, sites=[m.SiteShape("q_proj", inputs, outputs)])
    config = kind_config("HRA", target_modules=["q_proj"], r=u.shape[1], apply_GS=orthogonal)
    (part,) = read(config, {"base_model.model.q_proj.hra_u": u}, base).sites
    assert part.of_kind is not None
    return part.of_kind.matrices(lambda _: u, weight)


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_many_reflections_are_what_one_after_the_other_gives(shift: float, orthogonal: bool) -> None:
    """Compared with PEFT's loops in fp64. shift: added to all vectors, which makes them similar."""
    generator = np.random.default_rng(0)
    u = (generator.normal(size=(96, 70)) + shift).astype(np.float32)
    weight = generator.normal(size=(40, 96)).astype(np.float32)
    expected = weight.astype(np.float64)
    seen: list[NDArray[Any]] = []
    for vector in u.T.astype(np.float64):
        own = vector
        for other in seen if orthogonal else ():
            own = own - (own @ other) * other
        seen.append(own / np.linalg.norm(own))
        expected = expected - 2 * np.outer(expected @ seen[-1], seen[-1])
    a, b = hra_rows(u, weight, orthogonal=orthogonal)
    assert np.abs(weight + b @ a - expected).max() < 1e-4
    assert np.abs(weight - expected).max() > 1


def test_vectors_without_an_orthogonal_part_of_their_own_are_refused() -> None:
    """PEFT would compute directions from rounding errors for them."""
    generator = np.random.default_rng(0)
    pairs = np.repeat(generator.normal(size=(96, 4)).astype(np.float32), 2, axis=1)
    weight = generator.normal(size=(40, 96)).astype(np.float32)
    a, b = hra_rows(pairs, weight, orthogonal=False)
    assert np.abs(b @ a).max() < 1e-4, "a reflection undoes itself"
    for u in (pairs, pairs * 0):
        with pytest.raises(AdapterRefused, match="HRA: hra_u has 8 vectors, of which some depend on others"):
            hra_rows(u, weight, orthogonal=True)
    config = kind_config("HRA", r=17, apply_GS=True)
    assert "r is 17, of a layer with 16 inputs" in reasons(config, kind_tensors(config | {"apply_GS": False}))


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 8, 64, 10_000, MAX_WHOLE])
def test_dimensions_are_cut_as_peft_cuts_them(factor: int) -> None:
    for dimension in (*range(1, 130), 3072, 4096, 14336, 4099, 32003):
        assert factorization(dimension, factor) == peft_factorization(dimension, factor)


# ---------------------------------------------------------------- effect and digest


@pytest.mark.parametrize("name", sorted(set(NAMES) - UNKNOWN_EFFECT))
def test_knows_an_adapter_without_effect(name: str) -> None:
    """A hybrid GraLoRA is the sum of two products, and so is not tested."""
    config = kind_config(name, **({"hybrid_r": 0} if name == "GRALORA" else {}))
    tensors = kind_tensors(config)
    assert effect(config, tensors, KIND_BASE)
    assert not effect(config, {key: np.zeros_like(value) for key, value in tensors.items()}, KIND_BASE)


@pytest.mark.parametrize("name", NAMES)
def test_digest_is_of_the_maths_only(name: str) -> None:
    config = kind_config(name)
    raw, infos = parsed(kind_tensors(config))
    kind = kind_of(name)
    assert kind is not None

    def digest(**changes: Any) -> str:
        return adapter_digest(config | changes, infos, raw)

    assert digest(task_type="CAUSAL_LM", base_model_name_or_path="/x", peft_version="9", bias="none") == digest()
    assert digest(**dict.fromkeys(kind.no_effect, 0.5)) == digest()
    assert digest(target_modules=[*reversed(config["target_modules"])]) == digest()
    assert canonical_config(canonical_config(config)) == canonical_config(config)
    for field in kind.fields.keys() & CHANGED.keys():
        changed = CHANGED[field] if CHANGED[field] != config.get(field, kind.fields[field].default) else 2
        assert digest(**{field: changed}) != digest(), field
    assert digest(target_modules=["k_proj"]) != digest()
    assert digest(modules_to_save=["x"]) != digest()
    assert "peft_type" in canonical_config(config)


def test_a_bias_of_its_own_is_taken_in_any_case() -> None:
    """PEFT documents `MiSS_only`, but compares only the ending."""
    config = kind_config("MISS")
    for bias in ("MiSS_only", "miss_only", "MISS_only"):
        assert read(config | {"bias": bias}, kind_tensors(config)).sites
    for bias in ("vera_only", ["miss_only"], 1, None):
        assert "bias " in reasons(config | {"bias": bias}, kind_tensors(config))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_refused_has_no_digest_of_what_is_read(name: str) -> None:
    """1 is not true, 0 not false, 8.0 not 8: the canonical config keeps such a value, although it equals a default."""
    kind = kind_of(name)
    assert kind is not None
    config = kind_config(name)
    tensors = kind_tensors(config)
    for field, form in kind.fields.items():
        for value in (None, 0, 1, False, True, 0.0, float(form.default) if type(form.default) is int else 2.5):
            given = config | {field: value}
            if form.valid(value):
                continue
            text = reasons(given, tensors)
            assert f"{field} " in text
            assert reasons(canonical_config(given), tensors) == text, (field, value)
    without = {key: value for key, value in config.items() if key != "modules_to_save"}
    assert canonical_config(without | {"modules_to_save": None, "bias": "none"}) == canonical_config(without)


def test_peft_is_the_version_that_this_was_read_from() -> None:
    assert peft.__version__.startswith("0.21."), "compare `peft_adapters/kinds` with PEFT's layers again"
