"""Tiny real models and adapters: a random Llama with a byte tokenizer, and PEFT adapters for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, four special tokens and a chat template."""
    vocab = {text: i for i, text in enumerate([*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", model_max_length=512
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_tiny_model(
    folder: Path, *, num_layers: int = 2, hidden: int = 64, seed: int = 0, max_len: int = 512, scale: float = 0.2
) -> Path:
    """Write a random fp32 Llama (4 heads over 2 KV heads) and its tokenizer to `folder`; return it.

    scale: standard deviation of the weights, large enough that greedy choices differ between prompts.
    """
    tokenizer: Any = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=max_len, initializer_range=scale,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


WORDS = "my name is ada lovelace and i live in london with grace hopper of new york city , ?"
LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def make_tiny_encoder(folder: Path, *, labels: Sequence[str] = (), max_len: int = 64, of_texts: bool = False) -> Path:
    """Write a random fp32 BERT and a tokenizer of `WORDS`. labels: makes it a classifier of tokens, or of texts."""
    vocab = {text: i for i, text in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split()])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=max_len, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if labels:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
            kind = BertForSequenceClassification if of_texts else BertForTokenClassification
            model: PreTrainedModel = kind(config)
        else:
            model = BertModel(config)
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def make_encoder_adapter(folder: Path, base: PreTrainedModel, *, rank: int = 4, seed: int = 1) -> Path:
    """Write a PEFT LoRA adapter for an encoder to `folder`, with its own head if the encoder has one; return it."""
    kind = "TOKEN_CLS" if isinstance(base, BertForTokenClassification) else "FEATURE_EXTRACTION"
    kind = "SEQ_CLS" if isinstance(base, BertForSequenceClassification) else kind
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"], task_type=kind)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)  # PEFT draws the A matrices
        model: Any = get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def make_adapter(
    folder: Path,
    model_folder: Path,
    *,
    rank: int = 8,
    alpha: Any = None,
    targets: Sequence[str] = ALL_LINEAR,
    seed: int = 1,
    scale: float = 0.3,
) -> Path:
    """Write a PEFT LoRA adapter for the model in `model_folder` to `folder`; return it.

    Both matrices are random (normal, standard deviation `scale`), so that the adapter changes the answer.
    """
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=list(targets), task_type="CAUSAL_LM")
    return _write_random(folder, base, config, seed, scale)


def make_decoder_adapter(folder: Path, base: PreTrainedModel, *, rank: int = 4, seed: int = 1) -> Path:
    """Write a PEFT LoRA adapter for a bare decoder, or a sequence classifier with its own head, to `folder`; return it.

    Its matrices are random, so that it changes the answer.
    """
    kind = "SEQ_CLS" if type(base).__name__.endswith("ForSequenceClassification") else "FEATURE_EXTRACTION"
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type=kind)
    return _write_random(folder, base, config, seed, 0.3)


def _write_random(folder: Path, base: PreTrainedModel, config: LoraConfig, seed: int, scale: float) -> Path:
    model: Any = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, scale / config.r**0.5, generator=generator)
    model.save_pretrained(folder)
    return folder
