"""Tiny random models as GGUF files in quantized blocks, in the format of llama.cpp's converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from helpers.quantised_weights import random_weight
from lora_kernels.quantised import Kind

PYTHON_QUANTISES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "bf16", "tq1_0")
"""Kinds that the gguf package can quantize itself; the blocks of other kinds are random."""

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def write_gguf(
    model: PreTrainedModel, path: Path, kind: Kind, others: dict[str, str] | None = None,
    rope_factors: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Write a model whose linear layers and embedding are of a kind.

    others: part of a GGUF tensor name -> kind of those tensors, also f32, f16 or bf16. rope_factors: divisors of the
    rotary frequencies, as in Llama 3.
    """
    config: Any = model.config
    arch: str = {"gemma3_text": "gemma3"}.get(config.model_type) or config.model_type
    writer = gguf.GGUFWriter(path, arch)
    _write_config(writer, config)
    _write_tokenizer(writer, config.vocab_size)
    key = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(key, config.num_hidden_layers)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.numpy())
    tied = config.tie_word_embeddings
    for i, (name, weight) in enumerate(model.state_dict().items()):
        if tied and name == "lm_head.weight":
            continue
        stem, _, suffix = name.rpartition(".")
        own = f"{names.get_name(stem)}.{suffix}"
        numbers = _as_llama_cpp(own, weight.float(), config).numpy()
        chosen = next((other for part, other in (others or {}).items() if part in own), kind)
        if numbers.ndim == 1:
            chosen = "f32"
        if chosen in ("f32", "f16"):
            writer.add_tensor(own, numbers.astype(np.float32 if chosen == "f32" else np.float16))
            continue
        ggml = gguf.GGMLQuantizationType[chosen.upper()]
        if chosen in PYTHON_QUANTISES:
            rows = gguf.quantize(numbers, ggml)
        else:
            scale = float(np.abs(numbers).std()) * numbers.shape[1] ** 0.5
            rows = random_weight(chosen, *numbers.shape, seed=i, scale=scale).rows.numpy()  # pyright: ignore[reportArgumentType]
        writer.add_tensor(own, rows, raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _as_llama_cpp(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Return a weight in llama.cpp's layout."""
    if config.model_type == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        halves = weight.view(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
        return halves.transpose(1, 2).reshape(weight.shape).contiguous()
    if config.model_type.startswith("gemma") and "norm" in name:
        return weight + 1
    return weight


def _write_config(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)


def _write_tokenizer(writer: Any, vocab_size: int) -> None:
    """Write a byte-level tokenizer: bytes, two merges, and unused tokens; the last two tokens end and begin texts."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), "th", "he"]
    tokens += [f"<unused{i}>" for i in range(vocab_size - len(tokens) - 2)] + ["<end>", "<begin>"]
    types = [gguf.TokenType.NORMAL] * 258 + [gguf.TokenType.CONTROL] * (vocab_size - 258)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["t h", "h e"])
    writer.add_eos_token_id(vocab_size - 2)
    writer.add_bos_token_id(vocab_size - 1)
    writer.add_chat_template(CHAT_TEMPLATE)
