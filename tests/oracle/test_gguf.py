"""GGUF models served from their own blocks: tokens of transformers, which dequantizes the same file, and of PEFT."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from helpers import examples
from helpers.gguf_models import CHAT_TEMPLATE, write_gguf
from oracle.adapters.peft_kinds import model_logits
from oracle.peft_oracle import ATTENTION, MLP, Lora, Oracle, ask, greedy_request, oracle_settings, prompts, vary_norms
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gpu_worker.build import build_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.loading.checkpoint import read_config, read_eos_ids, read_model
from gpu_worker.loading.gguf_folder import make_folder
from gpu_worker.model.prepare import prepare_model
from gpu_worker.quantised.modules import BlockEmbedding, BlockLinear
from lora_kernels import ops
from lora_kernels.quantised import Kind
from protocol.wire.errors import BadRequest

CPU = torch.device("cpu")
VOCAB, NUM_TOKENS = 320, 12
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.08,
}  # fmt: skip
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),  # the only size that transformers reads from a GGUF file
    "gemma2": ("gemma2", {"initializer_range": 0.01, "sliding_window": 64, "query_pre_attn_scalar": 256}),
    "gemma3": (
        "gemma3_text",
        {"initializer_range": 0.01, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2},
    ),
}
LORAS = {"few": Lora(4, ("q_proj", "down_proj")), "all": Lora(7, (*ATTENTION, *MLP))}


def tiny(name: str) -> Any:
    model_type, fields = TYPES[name]
    config = AutoConfig.for_model(model_type, **SIZES | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        vary_norms(model)
    return model


def dense(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def engine_on(folder: Path, oracle: Oracle, dtype: torch.dtype = torch.float32, impl: ops.Impl | None = None) -> Engine:
    model = read_model(folder, CPU, dtype)
    prepared = prepare_model(model, read_eos_ids(folder, model.config), impl)
    return build_engine(prepared, oracle_settings(), oracle.fetch)[0]


def answers(engine: Engine, oracle: Oracle) -> Iterator[tuple[str, Any, list[int]]]:
    """Yield adapter, prompt and tokens of each request of a mixed batch."""
    asked = [(name, prompt) for prompt in prompts(3, VOCAB - 2) for name in oracle.names]
    requests = [greedy_request(str(i), name, prompt, NUM_TOKENS) for i, (name, prompt) in enumerate(asked)]
    got = ask(engine, requests)
    for i, (name, prompt) in enumerate(asked):
        yield name, prompt, got.ids[str(i)]


FILES: dict[str, tuple[str, Kind, dict[str, str]]] = {
    "Q8_0": ("llama", "q8_0", {}),
    "Q4_0 and tied": ("llama, tied", "q4_0", {"token_embd": "q6_k"}),
    "Q4_K": ("llama", "q4_k", {"attn_v": "q6_k", "ffn_down": "q6_k", "output.": "q6_k"}),
    "Q5_K": ("llama", "q5_k", {"attn_k": "f16", "token_embd": "f32"}),
    "qwen2": ("qwen2", "q4_1", {}),
    "qwen3": ("qwen3", "q5_0", {"output.": "q8_0"}),
    "gemma2": ("gemma2", "q8_0", {}),
    "gemma3": ("gemma3", "q4_0", {"token_embd": "q8_0"}),
}


@pytest.mark.parametrize("case", examples.some(FILES, "Q4_K", "qwen2"))
def test_tokens_are_those_of_transformers_and_peft(case: str, tmp_path: Path) -> None:
    name, kind, others = FILES[case]
    file, folder = tmp_path / "tiny.gguf", tmp_path / "folder"
    write_gguf(tiny(name), file, kind, others)
    make_folder(file, folder)
    oracle = Oracle(dense(file), LORAS, scale=0.3)
    engine = engine_on(folder, oracle)
    told: dict[tuple[int, ...], dict[str, list[int]]] = {}
    for adapter, prompt, tokens in answers(engine, oracle):
        assert tokens == oracle.greedy(adapter, prompt, NUM_TOKENS), (adapter, len(prompt))
        told.setdefault(tuple(prompt), {})[adapter] = tokens
    assert any(of["few"] != of[""] for of in told.values())
    assert any(of["all"] != of[""] for of in told.values())
    assert engine.model.num_shortcuts == (0 if name.startswith("gemma") or "attn_k" in others else 2)
    left = [module for module in engine.model.module.modules() if isinstance(module, torch.nn.Linear)]
    assert not left


def test_config_tokenizer_and_template_are_those_of_the_file(tmp_path: Path) -> None:
    """Also for a file whose name does not reveal its format, such as Ollama's."""
    file, folder = tmp_path / "sha256-1234", tmp_path / "folder"
    write_gguf(tiny("llama"), file, "q4_0")
    make_folder(file, folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    expected: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    text = "the other thing, wörld"
    assert tokenizer(text).input_ids == expected(text).input_ids
    assert tokenizer.chat_template == CHAT_TEMPLATE
    config = read_config(folder)
    assert read_eos_ids(folder, config) == {VOCAB - 2}
    model = read_model(folder, CPU, torch.bfloat16)
    assert isinstance(model.get_output_embeddings(), BlockLinear)
    assert isinstance(model.get_input_embeddings(), BlockEmbedding)
    assert (folder / "model.gguf").resolve() == file


@pytest.mark.thorough
def test_bf16_logits_are_near_those_of_the_dequantised_weights(tmp_path: Path) -> None:
    file, folder = tmp_path / "tiny.gguf", tmp_path / "folder"
    write_gguf(tiny("llama"), file, "q4_k")
    make_folder(file, folder)
    models = dense(file), dense(file).to(torch.bfloat16), read_model(folder, CPU, torch.bfloat16)
    ratios: list[float] = []
    with torch.inference_mode():
        for prompt in prompts(40, VOCAB - 2):
            exact, *found = [model_logits(model, prompt, [1, 2, 3]).float() for model in models]
            rounded, ours = [(logits - exact).square().mean().item() for logits in found]
            ratios.append(ours / rounded)
    # Both errors are mostly from rounded activations: for single prompts their ratio is between 0.02 and 4.
    assert 0 < statistics.median(ratios) < 1.5


def test_rope_factors_of_the_file_are_applied(tmp_path: Path) -> None:
    """GGUF stores Llama 3's frequencies for long texts as a tensor, which transformers ignores."""
    file, folder = tmp_path / "tiny.gguf", tmp_path / "folder"
    factors = torch.linspace(1, 8, 16)
    write_gguf(tiny("llama"), file, "q8_0", rope_factors=factors)
    make_folder(file, folder)
    read = read_model(folder, CPU, torch.float32)
    plain: Any = dense(file)
    assert torch.allclose(read.model.rotary_emb.inv_freq * factors, plain.model.rotary_emb.inv_freq)


def test_types_that_are_not_served_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny("llama"), file, "q4_0", {"ffn_down": "tq1_0"})
    with pytest.raises(BadRequest, match=r"2 tensors that are not served: blk\.0\.ffn_down\.weight of type TQ1_0; blk"):
        make_folder(file, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_files_that_are_not_served_are_refused_by_name(tmp_path: Path) -> None:
    file, folder = tmp_path / "tiny.gguf", tmp_path / "folder"
    file.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(BadRequest, match=r"tiny\.gguf is (not a readable GGUF file|of the architecture)"):
        make_folder(file, folder)
    write_gguf(tiny("llama"), file, "q4_0")
    make_folder(file, folder)
    file.write_bytes(file.read_bytes()[:-70_000])
    with pytest.raises(BadRequest, match=r"are cut: .* reaches beyond their end"):
        read_model(folder, CPU, torch.float32)
    writer = gguf.GGUFWriter(file, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(BadRequest, match=r"of the architecture 'mamba'; of GGUF files llama, qwen2, .* are served"):
        make_folder(file, folder)
