"""`quantization`: a folder is quantized once, and compared with transformers on the same weights dequantized."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers import examples
from oracle.adapters.kind_cases import CASES
from oracle.adapters.peft_kinds import (
    LLAMA,
    MAX_DIFFERENCE,
    Kind,
    asked_prompts,
    engine_logits,
    make_adapter,
    make_base,
    model_logits,
    read_files,
)
from oracle.adapters.quantised import BASE
from oracle.adapters.test_quantised import NEED_WEIGHTS
from oracle.adapters.virtual_cases import CASES as VIRTUAL
from oracle.adapters.virtual_cases import task_of
from oracle.peft_oracle import ATTENTION, MLP, Lora, Oracle, ask, greedy_request, oracle_settings, prompts, random_llama
from peft import PeftModel
from transformers import LlamaForCausalLM

from gpu_worker.build import build_engine, load_engine
from gpu_worker.loading.checkpoint import read_config, read_model
from gpu_worker.model.prepare import prepare_model
from gpu_worker.quantised.quantise import quantised_folder
from lora_kernels import cpu
from lora_kernels.quantised import quantise
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

NUM_TOKENS = 12
KEPT = 2
LORAS = {"few": Lora(4, ("q_proj", "down_proj")), "all": Lora(7, (*ATTENTION, *MLP))}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cpu.load()  # the cache also holds the native kernels, which must not be built for each test
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantised"


def base(folder: Path, **fields: Any) -> LlamaForCausalLM:
    """Write a tiny model in which one layer's width is not a multiple of a block."""
    model = random_llama(
        std=0.1, vocab_size=160, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **fields,
    )  # fmt: skip
    model.save_pretrained(folder)
    return model


def dequantised(model: Any, quantization: str) -> LlamaForCausalLM:
    model.tie_weights()
    head = model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # untied: the embedding is not changed
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.in_features % 32 == 0:
            kind = "q8_0" if quantization == "int8" or module is head else "q4_0"
            module.weight = torch.nn.Parameter(quantise(module.weight.detach(), kind).dequantise())
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_tokens_are_those_of_the_dequantised_weights(
    quantization: Literal["int8", "int4"], tied: bool, tmp_path: Path, cache: Path
) -> None:
    folder = tmp_path / "base"
    oracle = Oracle(dequantised(base(folder, tie_word_embeddings=tied), quantization), LORAS, scale=0.4)
    made = quantised_folder(folder, read_config(folder), quantization, KEPT)
    written = (made / "weights.bin").stat().st_mtime_ns
    assert quantised_folder(folder, read_config(folder), quantization, KEPT) == made
    assert (made / "weights.bin").stat().st_mtime_ns == written, "made once"
    assert [*cache.iterdir()] == [made]
    model = prepare_model(read_model(made, torch.device("cpu"), torch.float32), frozenset(), None)
    engine, _ = build_engine(model, oracle_settings(), oracle.fetch)
    asked = [(name, prompt) for prompt in prompts(3, 160) for name in oracle.names]
    got = ask(engine, [greedy_request(str(i), name, prompt, NUM_TOKENS) for i, (name, prompt) in enumerate(asked)])
    for i, (name, prompt) in enumerate(asked):
        assert got.ids[str(i)] == oracle.greedy(name, prompt, NUM_TOKENS)
    assert len({tuple(got.ids[str(i)]) for i in range(3)}) == 3, "adapters change the answer"


@pytest.mark.filterwarnings("ignore")  # PEFT's warnings
@pytest.mark.parametrize("quantization", examples.some(["int8", "int4"], "int8"))
def test_kinds_besides_lora_are_what_peft_computes(quantization: Literal["int8", "int4"], tmp_path: Path) -> None:
    """The kinds run in one batch; those that need a layer's own weights are refused."""
    kinds = {name: replace(kind, base=BASE) for name, kind in (CASES | VIRTUAL).items() if kind.base == LLAMA}
    folders = {name: tmp_path / name for name in kinds}
    for name, kind in kinds.items():
        make_adapter(kind, folders[name], scale=0.1)
    make_base(BASE).save_pretrained(tmp_path / "base")
    made = quantised_folder(tmp_path / "base", read_config(tmp_path / "base"), quantization, KEPT)
    model = prepare_model(read_model(made, torch.device("cpu"), torch.float32), frozenset(), None)
    engine, _ = build_engine(model, oracle_settings(), lambda name: read_files(folders[name]))
    prompt = asked_prompts(Kind(BASE))[0]
    refused = ask(engine, [greedy_request(name, name, prompt, 1) for name in sorted(NEED_WEIGHTS)]).finish
    for name, end in refused.items():
        assert end.error is not None, name
        assert "needs weights of the base model, which are quantised" in end.error.message
    served = sorted(kinds.keys() - NEED_WEIGHTS)
    got = engine_logits(engine, [greedy_request(name, name, prompt, 2) for name in ("", *served)])
    plain = dequantised(make_base(BASE), quantization)
    for name in served:
        ids, logits = got[name]
        peft = PeftModel.from_pretrained(copy.deepcopy(plain), str(folders[name])).eval()
        expected = model_logits(peft, prompt, ids, **task_of(kinds[name]))[-len(ids) :]
        assert (logits - expected).abs().max() < MAX_DIFFERENCE, name
        assert (expected - model_logits(plain, prompt, ids)).abs().max() > 100 * MAX_DIFFERENCE, name


def test_changed_weights_are_quantised_anew_and_few_are_kept(tmp_path: Path, cache: Path) -> None:
    made: list[Path] = []
    for i in range(KEPT + 2):
        folder = tmp_path / str(i % 2)
        base(folder)
        made.append(quantised_folder(folder, read_config(folder), "int8", KEPT))
    assert len(set(made)) == len(made)
    assert {*cache.iterdir()} == {*made[-KEPT:]}


def test_what_cannot_be_quantised_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    base(folder)
    settings = Settings(model=str(folder), device="cpu", quantization="int4")
    made = quantised_folder(folder, read_config(folder), "int4", KEPT)
    with pytest.raises(BadRequest, match=r"quantization is int4, but the weights in .* are quantised already"):
        load_engine(settings.model_copy(update={"model": str(made)}), lambda _: pytest.fail("no adapter is asked for"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadRequest, match=r"quantization is int4, but .* has no safetensors"):
        load_engine(settings, lambda _: pytest.fail("no adapter is asked for"))
