"""Adapters on quantized bases: PEFT's results on the same base, or a refusal that says why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from oracle.adapters.kind_cases import CASES
from oracle.adapters.peft_kinds import LLAMA, MAX_DIFFERENCE, Kind, asked_prompts, make_adapter
from oracle.adapters.quantised import BASE, CPU, GPU_ONLY, SCHEMES, Scheme, engine_on, measure, refusal
from oracle.adapters.quantised_table import DOCUMENT, NAME, read_table
from oracle.adapters.virtual_cases import CASES as VIRTUAL
from oracle.peft_oracle import ask, greedy_request

from gpu_worker.loading.checkpoint import read_model
from gpu_worker.model.model import fingerprint_of

pytestmark = pytest.mark.filterwarnings("ignore")  # the quantization libraries emit many


def need(scheme: Scheme) -> None:
    if scheme.missing:
        pytest.skip(f"not installed: {scheme.missing}")


@pytest.mark.parametrize("name", SCHEMES)
def test_logits_are_those_of_peft_on_the_same_base(name: str, tmp_path: Path) -> None:
    scheme = SCHEMES[name]
    need(scheme)
    measured = measure(scheme, tmp_path)
    assert measured.difference <= scheme.allowed(measured.sensitivity)
    assert measured.change >= 100 * MAX_DIFFERENCE
    assert measured.change >= 4 * measured.difference
    assert 0 < measured.rounding < measured.change, "the file must be the base, quantised"


NOT_OF_PEFT = {
    # these kinds depend on the sizes of packed weights, TinyLoRA on their singular vectors; UniLoRA's scales are zero
    "bitsandbytes nf4": {"loha", "lokr", "delora", "tinylora", "unilora"},
    "torchao int8": {"delora"},
}
"""Kinds whose adapters PEFT cannot load, or loads without effect, on a base quantized by this library."""

NEED_WEIGHTS = {"hra", "deft"}


@pytest.mark.parametrize("name", NOT_OF_PEFT)
def test_every_kind_is_what_peft_computes_on_the_same_base(name: str, tmp_path: Path) -> None:
    """The kinds run in one batch with the base."""
    need(SCHEMES[name])
    kinds = {case: replace(kind, base=BASE) for case, kind in (CASES | VIRTUAL).items() if kind.base == LLAMA}
    served = {case: kind for case, kind in kinds.items() if case not in NOT_OF_PEFT[name] | NEED_WEIGHTS}
    assert len(served) > 15
    measured = measure(SCHEMES[name], tmp_path, served)
    assert measured.difference <= SCHEMES[name].allowed(measured.sensitivity)
    assert measured.change >= max(2 * measured.difference, 100 * MAX_DIFFERENCE)


@pytest.mark.parametrize("name", GPU_ONLY)
def test_what_only_a_gpu_can_run_is_loaded_and_refused_by_name(name: str, tmp_path: Path) -> None:
    need(GPU_ONLY[name])
    reason = refusal(GPU_ONLY[name], tmp_path)
    assert reason.startswith("it has layers quantised with torchao that cannot run here: ")
    assert "\n" not in reason


@pytest.mark.parametrize("name", ["bitsandbytes nf4", "torchao int8", "compressed-tensors W4A16", "GPTQ int4"])
def test_what_needs_the_weights_of_a_quantised_layer_is_refused(name: str, tmp_path: Path) -> None:
    """Also where PEFT supports it: refused by name, while other requests get correct answers."""
    scheme = SCHEMES[name]
    need(scheme)
    base = tmp_path / "base"
    base.mkdir()
    scheme.write(base)
    options = {
        "dora": {"use_dora": True},
        "saved": {"modules_to_save": ["v_proj"]},
        "parameter": {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]},
        "bias": {"bias": "all"},
    }
    folders = {kind: tmp_path / kind for kind in options}
    for kind, fields in options.items():
        make_adapter(Kind(BASE, fields), folders[kind])
    engine = engine_on(base, scheme.dtype, folders)
    prompt = asked_prompts(Kind(BASE))[0]
    asked = ask(engine, [greedy_request(kind, kind, prompt, 2) for kind in options])
    errors = {kind: end.error.message if end.error else "" for kind, end in asked.finish.items()}
    assert "DoRA is not served on quantised layers" in errors["dora"]
    assert "whole weights of quantised layers are not served" in errors["saved"]
    assert "LoRA on this parameter is not served" in errors["parameter"]
    assert errors["bias"] == ""
    assert fingerprint_of(read_model(base, CPU, scheme.dtype)) == engine.model.fingerprint


def test_the_documented_table_is_of_these_bases() -> None:
    rows = read_table(NAME, DOCUMENT)
    assert [*rows] == [*SCHEMES, *GPU_ONLY]
    for name, scheme in SCHEMES.items():
        difference, sensitivity = rows[name][2:4]
        assert float(difference) <= scheme.allowed(float(sensitivity))
