"""PEFT is the oracle: what it adapts, at which rank and scale, is what we read; all else is refused by name."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_files import BASE, lora_config, lora_tensors, safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.peft_types import PeftType
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_adapters.format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterSpec,
    adapter_digest,
    canonical_config,
    parse_config,
    parse_header,
    read_adapter,
)
from peft_adapters.targets import BadPattern, Names, PatternMap, compile_pattern
from protocol.wire import messages as m
from protocol.wire.errors import AdapterRefused

VOCAB = 48


def tiny_llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def tiny_gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    )


FAMILIES = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def served(model: PreTrainedModel) -> m.ServedModel:
    """Describe a model as a worker would."""
    sites: list[m.SiteShape] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            has_bias = module.bias is not None
            sites.append(m.SiteShape(name, module.in_features, module.out_features, has_bias=has_bias))
        elif isinstance(module, Conv1D):
            sites.append(m.SiteShape(name, *module.weight.shape, kind="conv1d", has_bias=True))
        elif isinstance(module, torch.nn.Embedding):
            sites.append(m.SiteShape(name, module.num_embeddings, module.embedding_dim, kind="embedding"))
    return m.ServedModel(
        model="tiny", name="tiny", fingerprint="", model_type=model.config.model_type, vocab_size=VOCAB,
        max_model_len=16, sites=sites,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Saved:
    """An adapter that PEFT made: as configured, as saved, and as PEFT applies it."""

    asked: dict[str, Any]
    config: dict[str, Any]
    weights: bytes
    applied: dict[str, tuple[int, float]]  # module -> rank, scale

    def read(self, config: dict[str, Any], base: m.ServedModel | None) -> AdapterSpec:
        return read_adapter(config, parse_header(self.weights, len(self.weights)), base)


def save(model: PreTrainedModel, config: LoraConfig) -> Saved:
    """Let PEFT apply and save a random adapter. Raises what PEFT raises."""
    asked = as_json(config)
    peft_model = get_peft_model(model, config)
    layers = {n: layer for n, layer in peft_model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    with tempfile.TemporaryDirectory() as folder:
        peft_model.save_pretrained(folder)
        raw = (Path(folder) / CONFIG_FILE).read_bytes()
        weights = (Path(folder) / WEIGHTS_FILE).read_bytes()
    applied = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}
    return Saved(asked, parse_config(raw), weights, applied)


def as_json(config: LoraConfig) -> dict[str, Any]:
    """Write a config as PEFT does, before it was applied to a model."""
    fields = config.to_dict()
    return json.loads(json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}))


# ---------------------------------------------------------------- the supported space, against PEFT

LEAVES = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "attn.c_proj", "mlp.c_proj"],
}
PREFIX = {"llama": "model.layers", "gpt2": "transformer.h"}
PATTERNS = {
    "llama": [r".*\.(q_proj|v_proj)", r".*self_attn\.[qk]_proj", r"model\.layers\.[01]\..*_proj", r".*mlp.*", ".*",
              r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.down_proj)"],
    "gpt2": [r".*\.c_attn", r".*\.(c_attn|c_fc)", r"transformer\.h\.\d\.mlp\.c_fc", r".*h.[12].*c_.*"],
}  # fmt: skip


@st.composite
def pattern_maps(draw: st.DrawFn, family: str, values: st.SearchStrategy[Any]) -> dict[str, Any]:
    """Draw rank or alpha patterns: names, endings, full names, anchored and wild expressions, and some that miss."""
    leaf = st.sampled_from([name.rpartition(".")[2] for name in LEAVES[family]])
    layer = st.integers(0, 3)
    key = st.one_of(
        leaf,
        st.builds(lambda n, i: f"{PREFIX[family]}.{i}.self_attn.{n}", leaf, layer),
        st.builds(lambda n, i: rf"^{PREFIX[family]}\.{i}\..*{n}", leaf, layer),
        st.builds(lambda n, i: rf".*\.{i}\..*{n}", leaf, layer),
        st.builds(lambda n: n.replace("_", "."), leaf),
        st.builds(lambda a, b: f"{a}|{b}", leaf, leaf),
        st.just("nothing"),
    )
    # PEFT sorts the keys of the file it saves, and the first match counts: only sorted maps mean the same once saved.
    return dict(sorted(draw(st.dictionaries(key, values, max_size=3)).items()))


@st.composite
def lora_configs(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Draw the arguments of a LoraConfig, most of them in the space that is served."""
    leaves = st.lists(st.sampled_from(LEAVES[family]), min_size=1, max_size=4, unique=True)
    full = st.builds(lambda n, i: f"{PREFIX[family]}.{i}.self_attn.{n}", st.sampled_from(LEAVES[family]), st.just(1))
    targets = draw(
        st.one_of(leaves, st.builds(lambda a, b: [*a, b], leaves, full), st.sampled_from(PATTERNS[family]),
                  st.just("all-linear"), st.just("All-Linear"))
    )  # fmt: skip
    fields: dict[str, Any] = {
        "r": draw(st.integers(1, 6)),
        "lora_alpha": draw(st.one_of(st.integers(-4, 64), st.floats(0.1, 50))),
        "use_rslora": draw(st.booleans()),
        "target_modules": targets,
        "lora_dropout": draw(st.sampled_from([0.0, 0.1])),
        "fan_in_fan_out": draw(st.booleans()),
        "init_lora_weights": draw(st.sampled_from([True, False, "gaussian"])),
        "rank_pattern": draw(pattern_maps(family, st.integers(1, 9))),
        "alpha_pattern": draw(pattern_maps(family, st.one_of(st.integers(1, 64), st.floats(0.5, 8)))),
        "exclude_modules": draw(
            st.one_of(st.none(), st.just([]), leaves, st.sampled_from([r".*\.0\..*", ".*mlp.*", ".*q_proj"]))
        ),
    }
    if not isinstance(targets, str):
        fields["layers_to_transform"] = draw(
            st.one_of(st.none(), st.just([]), st.integers(0, 3), st.lists(st.integers(0, 3), max_size=3))
        )
        if fields["layers_to_transform"] is not None:
            fields["layers_pattern"] = draw(st.sampled_from([None, "layers", "h", ["layers", "h"], "block"]))
    return fields


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_reads_what_peft_applies(family: str, data: st.DataObject) -> None:
    """Same modules, ranks and scales, from the config as written and as saved; PEFT's errors are refusals."""
    fields = data.draw(lora_configs(family))
    model = FAMILIES[family]()
    base = served(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of patterns that match nothing, and the like
        try:
            saved = save(model, LoraConfig(**fields))
        except (ValueError, TypeError):  # nothing matches, or the fields contradict each other
            with pytest.raises(AdapterRefused):
                read_adapter({"peft_type": "LORA", **fields}, {}, base)
            return
    for config in (saved.asked, saved.config, canonical_config(saved.config)):
        spec = saved.read(config, base)
        assert {s.site: (s.rank, s.scale) for s in (*spec.sites, *spec.embeddings)} == saved.applied
        assert spec.rank == max(rank for rank, _ in saved.applied.values())
    spec = saved.read(saved.config, None)
    assert {site.site for site in (*spec.sites, *spec.embeddings)} == set(saved.applied)


def test_the_base_weights_that_peft_saves_with_a_head_are_read_as_replacements() -> None:
    model = tiny_llama()
    base = served(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = save(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    spec = saved.read(saved.config, base)
    assert "lm_head" in {site.site for site in spec.sites}
    assert [(part.site, part.parameter) for part in spec.replaced] == [("lm_head", "weight")]


# ---------------------------------------------------------------- refusals


def read(config: dict[str, Any], base: m.ServedModel | None = BASE, **tensor_changes: Any) -> AdapterSpec:
    """Read an adapter for BASE with a changed config, or with tensors replaced (None: removed)."""
    tensors = {**lora_tensors(), **tensor_changes}
    raw = safetensors({name: tensor for name, tensor in tensors.items() if tensor is not None})
    return read_adapter(config, parse_header(raw, len(raw)), base)


def reasons(config: dict[str, Any], base: m.ServedModel | None = BASE, **tensor_changes: Any) -> list[str]:
    with pytest.raises(AdapterRefused) as refused:
        read(config, base, **tensor_changes)
    return refused.value.reasons


UNSERVED: dict[str, Any] = {
    "layer_replication": [[0, 2], [1, 3]],
    "use_qalora": True,
    "use_bdlora": False,  # for PEFT a config object or null
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
"""Fields that change the maths -> a word of the refusal of what is no value for them."""


def test_the_helper_adapter_is_good() -> None:
    assert len(read(lora_config()).sites) == 4
    assert read(lora_config(), None).modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize("field", UNSERVED)
def test_refuses_features_by_name(field: str) -> None:
    assert any(field in reason for reason in reasons(lora_config(**{field: UNSERVED[field]})))
    assert any(field in reason for reason in reasons(lora_config(**{field: UNSERVED[field]}), None))


@pytest.mark.parametrize("field", sorted({*UNSERVED, *SERVED} - {"bias"}))
@pytest.mark.parametrize("off", [None, False, 0, "", [], {}])
def test_features_switched_off_are_no_matter(field: str, off: Any) -> None:
    config = lora_config(**{field: off})
    takes_objects = field.endswith("_config") or field == "use_bdlora"
    if takes_objects and off is not None:  # {} is KaSA with its defaults, and PEFT stumbles over false
        assert any(field in reason for reason in reasons(config))
        assert any(field in reason for reason in reasons(canonical_config(config)))
    else:
        assert read(config)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "x"])
def test_refuses_inits_that_change_the_base(init: str) -> None:
    assert any(init in reason and "base weights" in reason for reason in reasons(lora_config(init_lora_weights=init)))


OTHER_TYPES = sorted({kind.value for kind in PeftType} - {"LORA", "ADALORA"})


@pytest.mark.parametrize("peft_type", [*OTHER_TYPES, "lora", None, 3, ["LORA"]])
def test_refuses_other_types_by_name(peft_type: Any) -> None:
    reason = reasons(lora_config(peft_type=peft_type))[0]
    assert "only LORA and ADALORA are" in reason
    assert str(peft_type) in reason


def test_gives_every_reason_at_once() -> None:
    """Config, feature, missing, superfluous and misshapen tensors, in one refusal."""
    q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    v1 = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    found = reasons(
        lora_config(use_qalora=True, init_lora_weights="pissa", rank_pattern={"layers.0.self_attn.v_proj": 0}),
        **{q0: None, v1: np.zeros((16, 5)), "base_model.model.lm_head.weight": np.zeros((2, 2)),
           "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": np.zeros((4, 16))},
    )  # fmt: skip
    text = "\n".join(found)
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
    assert any(part in reason for reason in reasons(lora_config(**fields)))


def test_refuses_another_base() -> None:
    """Unknown layers, and the same layers in other shapes."""
    other = m.ServedModel(
        model="o", name="o", fingerprint="", model_type="gpt2", vocab_size=9, max_model_len=9,
        sites=[m.SiteShape("transformer.h.0.attn.q_proj", 16, 16)],
    )  # fmt: skip
    assert any("does not have" in reason for reason in reasons(lora_config(), other))
    wide = m.ServedModel(
        model="o", name="o", fingerprint="", model_type="llama", vocab_size=9, max_model_len=9,
        sites=[m.SiteShape(site.name, 32, 16) for site in BASE.sites],
    )  # fmt: skip
    assert any("[4, 32]" in reason for reason in reasons(lora_config(), wide))


def test_a_refusal_stays_short() -> None:
    junk = {f"x{i}" * 50: np.zeros((1, 1)) for i in range(2000)}
    found = reasons(lora_config(), **junk)
    assert sum(map(len, found)) < 4000
    assert "and 1994 more" in found[0]


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"r":1,"r":2}', b"\xff", b'{"a":' * 100_000, b" " * (2 << 20)])
def test_refuses_what_is_no_config(raw: bytes) -> None:
    with pytest.raises(AdapterRefused, match=re.escape(CONFIG_FILE)):
        parse_config(raw)


# ---------------------------------------------------------------- patterns

PIECES = ["q_proj", "model", "layers", ".", r"\.", ".*", ".*?", "[0-9]", r"\d", r"\d+", "(", ")", "|", "^", "$", "?",
          "+", "*", "{2}", "{,3}", "{1,}", "[^.]", "[[:alpha:]]", r"\w", r"\b", "(?:", "(?i)", "(?P<a>", r"\Z", r"\1",
          "(?=", "[a-z_]+", "x", "0", "_"]  # fmt: skip
MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.12.mlp.gate_proj", "lm_head", "q_proj", "MODEL.x", "0"]


@settings(max_examples=500)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_an_accepted_pattern_means_what_python_says(pattern: str) -> None:
    try:
        compile_pattern(pattern)
    except BadPattern:
        return
    names = Names.read(pattern)
    for module in MODULES:
        assert names.chosen(module) == (re.fullmatch(pattern, module) is not None)


@pytest.mark.parametrize("pattern", [r"(.*a){20}$", r"(a|aa)+$", r"(.*.*.*.*.*)*x", r"(?:.*?){9}y"])
def test_hostile_patterns_take_no_time(pattern: str) -> None:
    """Each would keep Python's `re` busy for ages on one name: the test's time limit is the check."""
    names = Names.read(pattern)
    assert not any(names.chosen("a" * 5000 + "b") for _ in range(20))


@pytest.mark.parametrize("pattern", ["é", "a\nb", "a\x00", "((((a{1000}){1000}){1000}){1000})", r"\pL", r"\C", "(?U)a"])
def test_refuses_patterns_that_are_read_differently(pattern: str) -> None:
    with pytest.raises(BadPattern):
        compile_pattern(pattern)


def test_the_first_matching_pattern_counts() -> None:
    ranks = PatternMap({"q_proj": 1, r".*layers\.0\..*": 2, "proj": 3})
    assert ranks.get("model.layers.0.self_attn.q_proj", 9) == 1
    assert ranks.get("model.layers.0.self_attn.v_proj", 9) == 2
    assert ranks.get("model.layers.1.self_attn.v_proj", 9) == 9
    assert PatternMap({"q.proj": 1}).get("q_proj", 9) == 1, "a dot matches any character"


# ---------------------------------------------------------------- identity


def digest(config: dict[str, Any], raw: bytes) -> str:
    return adapter_digest(config, parse_header(raw, len(raw)), raw)


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
        assert digest(lora_config(**same), raw) == expected, same
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


@settings(max_examples=50)
@given(st.data())
def test_canonical_config_is_stable(data: st.DataObject) -> None:
    fields = data.draw(lora_configs("llama"))
    once = canonical_config({"peft_type": "LORA", **fields})
    assert canonical_config(json.loads(json.dumps(once))) == once
    assert list(canonical_config(dict(reversed(fields.items())))) == list(canonical_config(fields))
