"""Patterns match exactly what Python's `re`, which PEFT uses, matches, or are refused; none takes long."""

from __future__ import annotations

import re

import pytest
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_adapters.targets import BadPattern, NameTargets, PatternMap, SavedModules, compile_pattern

PIECES = ["q_proj", "model", "layers", ".", r"\.", ".*", ".*?", "[0-9]", r"\d", r"\d+", "(", ")", "|", "^", "$", "?",
          "+", "*", "{2}", "{,3}", "{1,}", "[^.]", "[[:alpha:]]", r"\w", r"\b", "(?:", "(?i)", "(?P<a>", r"\Z", r"\1",
          "(?=", "[a-z_]+", "x", "0", "_"]  # fmt: skip
MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.12.mlp.gate_proj", "lm_head", "q_proj", "MODEL.x", "0"]


@settings(max_examples=examples.of(500))
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_an_accepted_pattern_means_what_python_says(pattern: str) -> None:
    try:
        compile_pattern(pattern)
    except BadPattern:
        return
    names = NameTargets.read(pattern)
    for module in MODULES:
        assert names.chosen(module) == (re.fullmatch(pattern, module) is not None)


@pytest.mark.parametrize("pattern", [r"(.*a){20}$", r"(a|aa)+$", r"(.*.*.*.*.*)*x", r"(?:.*?){9}y"])
def test_hostile_patterns_take_no_time(pattern: str) -> None:
    """Each would keep Python's `re` busy for a very long time on one name: the test's timeout is the check."""
    names = NameTargets.read(pattern)
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


@given(
    st.lists(
        st.sampled_from(["q_proj", "q.proj", "proj", "0.q_proj", "layers.0", "12.mlp", "x", "lm-head"]), max_size=5
    ),
    st.sampled_from([*MODULES, "lm-head", "xq_proj", "layers_0"]),
)
def test_plain_keys_mean_what_python_says(keys: list[str], module: str) -> None:
    """They are compared without a regular expression, with the same results."""
    ranks = PatternMap({key: i for i, key in enumerate(keys)})
    matching = [key for key in ranks.numbers if re.match(rf"(.*\.)?({key})$", module)]
    assert ranks.get(module, -1) == (ranks.numbers[matching[0]] if matching else -1)


@given(
    st.lists(st.sampled_from(["q_proj", "self.attn", "proj", "layers", ".*norm", "0", "mlp"]), max_size=4),
    st.sampled_from(MODULES),
)
def test_saved_modules_mean_what_python_says(names: list[str], module: str) -> None:
    expected = any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in names)
    assert SavedModules.read(names).excludes(module) == expected


def test_many_plain_names_compile_nothing() -> None:
    """A regular expression takes a millisecond to compile, so 20,000 of them would take twenty seconds."""
    saved = SavedModules.read([f"module_{i}" for i in range(20_000)])
    ranks = PatternMap({f"model.layers.{i}.q_proj": i for i in range(20_000)})
    assert saved.patterns == ()
    assert all(compiled is None for _, _, compiled in ranks._patterns)
    assert saved.excludes("model.module_7.weight")
    assert ranks.get("model.layers.19999.q_proj", -1) == 19_999
