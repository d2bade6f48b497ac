"""Classifiers with virtual tokens: encoders and decoders give the logits of PEFT's classifier, with the saved head."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import examples
from oracle.peft_oracle import TINY_VOCAB, ask, prompts, saved_files, tiny_llama
from oracle.pooled_oracle import PooledOracle, classifier_of, difference, numbers_of, request_for
from oracle.test_classifiers import MAX_DIFFERENCE, MIN_EFFECT, SIZES, TYPES, Oracle, request
from oracle.test_encoders import ask as ask_encoder
from oracle.test_encoders import floats
from peft import (
    MultitaskPromptTuningConfig,
    PeftConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor

from gpu_worker.adapters.loader.fetch import FetchedAdapter

NUM = 5
KINDS: dict[str, PeftConfig] = {
    "soft": PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=NUM),
    "encoded": PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=NUM + 2, encoder_hidden_size=16),
    "multitask": MultitaskPromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=NUM, num_tasks=1, num_ranks=2),
}


def taught(base: Any, config: PeftConfig, seed: int, width: int = 0) -> tuple[Any, FetchedAdapter]:
    """Return PEFT's classifier with a random prompt and head, and the files that it saves.

    width: of the input embedding, if PEFT does not find it in the model's config.
    """
    config = copy.deepcopy(config)
    if width:
        config.token_dim, config.num_layers, config.num_attention_heads = width, 2, 4  # pyright: ignore
    model: Any = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter + 0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval(), saved_files(model, config)


def logits(model: Any, name: str, ids: Tensor, types: Tensor | None = None) -> Tensor:
    more: dict[str, Tensor] = {} if types is None else {"token_type_ids": types}
    if name == "multitask":
        more["task_ids"] = torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0]


@pytest.mark.parametrize(
    "kind",
    examples.some(
        [name for name in TYPES if name not in ("albert", "electra")], "bert", "roberta", "modernbert", "deberta"
    ),
)
def test_an_encoder_s_classifier_has_the_logits_of_peft(kind: str) -> None:
    oracle = Oracle(kind, {"lora": {"r": 3}})
    width = oracle.models[""].get_input_embeddings().weight.shape[1]
    models: dict[str, Any] = {}
    for seed, (name, config) in enumerate(KINDS.items()):
        models[name], oracle.files[name] = taught(copy.deepcopy(oracle.models[""]), config, seed, width)
    engine = oracle.engine()
    texts = prompts(3, TINY_VOCAB, (3, 17, 9))
    texts[1][4] = SIZES["pad_token_id"] if kind != "deberta" else texts[1][4]
    seconds = [0, 7, 0] if engine.model.takes_types else [0] * 3
    asked = [
        request(f"{name}/{i}", name, text, second=second)
        for i, (text, second) in enumerate(zip(texts, seconds, strict=True))
        for name in ("", "lora", *models)
    ]
    found = ask_encoder(engine, asked)
    assert engine.counters.num_steps == 1
    for one in asked:
        got = torch.from_numpy(floats(found[one.rid]))
        if one.digest not in models:
            assert (got - oracle.says(one.digest, one.prompt, one.second)).abs().max() < MAX_DIFFERENCE, one.rid
            continue
        ids = torch.from_numpy(one.prompt.astype(np.int64))[None]
        types = (torch.arange(ids.shape[1])[None] >= one.second).long() if one.second else None
        said = logits(models[one.digest], one.digest, ids, types)
        assert (got - said).abs().max() < MAX_DIFFERENCE, one.rid
        assert (said - oracle.says("", one.prompt, one.second)).abs().max() > MIN_EFFECT


def test_virtual_tokens_count_against_the_context() -> None:
    oracle = Oracle("bert", {})
    _, oracle.files["soft"] = taught(copy.deepcopy(oracle.models[""]), KINDS["soft"], 0)
    engine = oracle.engine(max_model_len=20)
    texts = prompts(3, TINY_VOCAB, (15, 16, 20))
    asked = [request(f"{name}/{len(text)}", name, text) for text in texts for name in ("", "soft")]
    found = ask_encoder(engine, asked)
    for rid in ("/15", "soft/15", "/16", "/20"):
        assert found[rid].error is None, rid
    for num in (16, 20):
        error = found[f"soft/{num}"].error
        assert error is not None
        assert error.message == (
            f"the text has {num} tokens and its adapter {NUM} virtual ones before it; this model takes at most 20"
        )


def test_a_decoder_s_classifier_has_the_logits_of_peft() -> None:
    """Also for a text that ends with the padding token, which transformers does not notice after embeddings."""
    base = tiny_llama()
    base.config.pad_token_id = 7
    oracle = PooledOracle(base)
    oracle.add("lora", "SEQ_CLS", 3)
    for seed, (name, config) in enumerate(KINDS.items()):
        oracle.models[name], oracle.files[name] = taught(classifier_of(base, 3), config, seed)
    texts = [np.array([*text, last]) for text, last in zip(prompts(3, TINY_VOCAB, (3, 17, 45)), (5, 7, 9), strict=True)]
    requests = [
        request_for("score", f"{name}/{i}", name, text)
        for i, text in enumerate(texts)
        for name in ("lora", *KINDS)
        if name != "lora" or text[-1] != 7
    ]
    asked = ask(oracle.engine(max_step_tokens=16, max_num_seqs=8), requests)
    for one in requests:
        ids = torch.from_numpy(one.prompt.astype(np.int64))[None]
        said = logits(oracle.models[one.digest], "" if one.digest == "lora" else one.digest, ids)
        assert difference(numbers_of(asked, one.rid), said) < MAX_DIFFERENCE, one.rid
        if one.digest != "lora":
            head = oracle.models[one.digest].base_model.score
            with torch.inference_mode():
                without = head(oracle.hidden("", one.prompt)[-1])
            assert (said - without).abs().max() > MIN_EFFECT
