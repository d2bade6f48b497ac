"""Random arguments of a LoraConfig; most of them are supported."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

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
    """Draw rank or alpha patterns: names, suffixes, full names, anchored and free expressions, some without a match."""
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
    # PEFT sorts the keys in its file, and the first match wins: only sorted maps keep their meaning when saved.
    return dict(sorted(draw(st.dictionaries(key, values, max_size=3)).items()))


@st.composite
def lora_configs(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Draw the arguments of a LoraConfig; most draws are supported."""
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
