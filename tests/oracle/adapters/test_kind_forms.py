"""Other forms of the kinds besides LoRA: on Qwen3, a mixture and a hybrid; with int8 rows; and after training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle.adapters.kind_cases import BASES, CASES, FORMS
from oracle.adapters.peft_kinds import (
    LLAMA,
    MAX_DIFFERENCE,
    Kind,
    asked_prompts,
    check_exact,
    engine_logits,
    load,
    make_adapter,
    make_base,
    make_engine,
    measure,
    model_logits,
    peft_logits,
    train_adapter,
)
from oracle.peft_oracle import greedy_request, refusal
from peft import (
    C3AConfig,
    FourierFTConfig,
    HiraConfig,
    PsoftConfig,
    RandLoraConfig,
    TinyLoraConfig,
    WaveFTConfig,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_store.blobs import AdapterFolder
from gpu_worker.svd_convert import convert
from lorafleet.__main__ import main
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from peft_adapters.kinds.converted import CONVERTED_FIELD, read_converted
from protocol.wire.errors import BadRequest

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # from PEFT's SHiRA

ELSEWHERE = [
    (name, base) for name, kind in CASES.items() for base in BASES
    if kind.base == LLAMA and (name, base) != ("ln_tuning", "falcon_h1")  # PEFT fails on its norm, which has no weight
]  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    make_adapter(FORMS[name], tmp_path)
    check_exact(FORMS[name], tmp_path, max_step_tokens=16, max_num_seqs=8)


@pytest.mark.parametrize("name", ["oft of a head", "deft of a head"])
def test_kinds_that_read_a_weight_do_not_read_a_replaced_one(name: str, tmp_path: Path) -> None:
    make_adapter(FORMS[name], tmp_path)
    file, weight = tmp_path / WEIGHTS_FILE, "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(file)
    save_file(tensors | {weight: tensors[weight] + 1}, file)
    request = greedy_request("asked", "tuned", asked_prompts(FORMS[name])[0], 3)
    error = refusal(make_engine(LLAMA, {"tuned": tmp_path}), request)
    assert "is not served on a layer whose weight the adapter replaces: lm_head" in error.message


@pytest.mark.parametrize(("name", "base"), ELSEWHERE)
def test_other_bases_give_what_peft_gives(name: str, base: str, tmp_path: Path) -> None:
    kind = replace(CASES[name], base=BASES[base])
    make_adapter(kind, tmp_path)
    measured = measure(kind, tmp_path, max_step_tokens=16, max_num_seqs=8)
    assert measured.difference <= MAX_DIFFERENCE
    assert measured.change >= 10 * MAX_DIFFERENCE


@pytest.mark.parametrize("name", CASES)
def test_a_trained_adapter_is_read(name: str, tmp_path: Path) -> None:
    """As PEFT saves it after a few training steps from its own initialization, in which much is zero."""
    train_adapter(CASES[name], tmp_path)
    measured = measure(CASES[name], tmp_path)
    assert measured.difference <= MAX_DIFFERENCE
    assert measured.change > 2 * MAX_DIFFERENCE


FULL_RANK = {
    "c3a": Kind(LLAMA, {"block_size": 16, "init_weights": "gaussian"}, config=C3AConfig),
    "fourierft": Kind(LLAMA, {"n_frequency": 500, "scaling": 30.0}, config=FourierFTConfig),
    "randlora": Kind(LLAMA, {"r": 8}, config=RandLoraConfig),
    "waveft": Kind(LLAMA, {"n_frequency": 500}, config=WaveFTConfig),
    "psoft": Kind(LLAMA, {"r": 8}, config=PsoftConfig),
    "tinylora": Kind(LLAMA, {"r": 2, "u": 8}, config=TinyLoraConfig),
}


@pytest.mark.parametrize("name", FULL_RANK)
def test_a_kind_of_full_rank_is_approximated_on_request(name: str, tmp_path: Path) -> None:
    """A conversion that keeps all gives PEFT's logits; one that keeps less has fewer rows and the reported error."""
    kind = FULL_RANK[name]
    make_base(LLAMA).save_pretrained(str(tmp_path / "base"))
    make_adapter(kind, tmp_path / "adapter")
    peft, prompt = load(kind, tmp_path / "adapter"), asked_prompts(kind)[1]
    differences: list[float] = []
    for keep in (1.0, 0.9):
        errors = convert(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / f"lora-{keep}", keep)
        assert len(errors) == 4
        assert max(errors.values()) <= (1 - keep * keep) ** 0.5 + 4e-4  # error of PEFT's fp32 squares: 6e-8
        record = json.loads((tmp_path / f"lora-{keep}" / CONFIG_FILE).read_text())[CONVERTED_FIELD]
        assert record == {"peft_type": name.upper(), "keep": keep, "errors": errors}
        told = AdapterFolder.read(tmp_path / f"lora-{keep}")
        converted = read_converted(told.config, told.tensors)
        assert converted is not None
        assert (converted.kind, converted.errors.keys()) == (name.upper(), errors.keys())
        engine = make_engine(LLAMA, {"tuned": tmp_path / f"lora-{keep}"})
        ids, logits = engine_logits(engine, [greedy_request("r", "tuned", prompt, 4)])["r"]
        differences.append(float((logits - peft_logits(peft, prompt, ids)).abs().max()))
        assert (logits - model_logits(make_base(LLAMA), prompt, ids)).abs().max() > 100 * MAX_DIFFERENCE
    assert differences[0] <= 20 * MAX_DIFFERENCE < differences[1]


def test_the_command_says_the_largest_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, adapter, target = (str(tmp_path / name) for name in ("base", "adapter", "lora"))
    make_base(LLAMA).save_pretrained(base)
    make_adapter(FULL_RANK["c3a"], tmp_path / "adapter")
    words = ["adapters", "convert", adapter, target, "--base", base, "--rank", "auto"]
    assert main([*words, "--keep", "2"]) == 2
    assert "--keep 2 is not a fraction" in capfd.readouterr().err
    assert main(words) == 0
    assert "largest error of 4 layers: 0.0" in capfd.readouterr().out
    assert main(words) == 2
    assert "exists already" in capfd.readouterr().err


def test_what_peft_cannot_convert_is_refused(tmp_path: Path) -> None:
    make_base(LLAMA).save_pretrained(str(tmp_path / "base"))
    make_adapter(Kind(LLAMA, {"r": 2}, config=HiraConfig), tmp_path / "adapter")
    with pytest.raises(BadRequest, match="HIRA cannot be converted to LoRA by PEFT"):
        convert(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "lora", 0.9)
    assert not (tmp_path / "lora").exists()


SPOILED: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], Any], str]] = {
    "a field": ({"new_option": 3}, lambda _: None, "config fields that are not understood: new_option"),
    "a tensor more": ({}, lambda found: found.update(other=torch.zeros(1)), "tensors that fit nothing: other"),
    "a tensor less": ({}, lambda found: found.popitem(), "tensors that are missing: base_model"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_peft_would_leave_out_is_refused(name: str, tmp_path: Path) -> None:
    make_base(LLAMA).save_pretrained(str(tmp_path / "base"))
    make_adapter(FULL_RANK["c3a"], tmp_path / "adapter")
    fields, spoil, reason = SPOILED[name]
    config, file = tmp_path / "adapter" / CONFIG_FILE, tmp_path / "adapter" / WEIGHTS_FILE
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    tensors = load_file(file)
    spoil(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BadRequest, match=reason):
        convert(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "lora", 0.9)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("spoiled", ["adapter", "base"])
def test_what_has_no_finite_error_leaves_no_folder(spoiled: str, tmp_path: Path) -> None:
    """PEFT fails on infinities in the adapter; those in the base appear in the errors."""
    make_base(LLAMA).save_pretrained(str(tmp_path / "base"))
    make_adapter(FULL_RANK["c3a"], tmp_path / "adapter")
    (file,) = (tmp_path / spoiled).glob("*.safetensors")
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if "layers.0.self_attn.q_proj" in name).fill_(float("inf"))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BadRequest, match="C3A cannot be converted" if spoiled == "adapter" else "C3A: .* not finite"):
        convert(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "lora", 0.9)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_folder_that_cannot_be_written_leaves_nothing_beside_it(tmp_path: Path) -> None:
    make_base(LLAMA).save_pretrained(str(tmp_path / "base"))
    make_adapter(FULL_RANK["c3a"], tmp_path / "adapter")
    taken = tmp_path / "deep" / "lora"
    (taken / "other").mkdir(parents=True)
    with pytest.raises(OSError, match="not empty"):
        convert(str(tmp_path / "base"), tmp_path / "adapter", taken, 0.9)
    assert [path.name for path in (*taken.parent.iterdir(), *taken.iterdir())] == ["lora", "other"]
