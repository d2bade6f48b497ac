"""Sequence classifiers: mixed batches of texts and pairs give the logits of transformers and PEFT, with own heads."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import examples
from oracle.peft_oracle import TINY_VOCAB, oracle_settings, prompts, saved_files, vary_norms
from oracle.test_encoders import ATTENTION, LENGTHS, MORE, SIZES, ask, floats
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gpu_worker.adapters.loader.fetch import FetchedAdapter
from gpu_worker.build import build_encoder_engine
from gpu_worker.encoder.engine import EncoderEngine
from gpu_worker.encoder.model import prepare_encoder, types_of
from gpu_worker.loading.checkpoint import read_headless, tokenizer_types
from gpu_worker.planning.request import EngineRequest
from protocol.wire.errors import BadRequest
from protocol.wire.messages import Sampling

MAX_DIFFERENCE = 1e-4
MIN_EFFECT = 100 * MAX_DIFFERENCE
NUM_LABELS = 4

TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {"type_vocab_size": 1}),
    "xlm-roberta": ("xlm-roberta", {"type_vocab_size": 1}),
    "distilbert": ("distilbert", {}),
    "albert": ("albert", MORE["albert"]),
    "electra": ("electra", {"embedding_size": 32}),
    "deberta": ("deberta-v2", MORE["deberta-v2"]),
    "mpnet": ("mpnet", {}),
    "modernbert": ("modernbert", MORE["modernbert"]),
    "modernbert, mean": ("modernbert", MORE["modernbert"] | {"classifier_pooling": "mean"}),
}
"""Kind of model -> its type in transformers, and fields of its config besides the sizes."""

LAYERS = ATTENTION | {"xlm-roberta": ["key", "value"], "electra": ["query", "value"]}


def make_classifier(kind: str, num_labels: int = NUM_LABELS) -> PreTrainedModel:
    """Return a tiny random fp32 classifier; only its last layer depends on the number of labels."""
    model_type, more = TYPES[kind]
    config = type(AutoConfig.for_model(model_type))(**SIZES | more)
    config.num_labels = NUM_LABELS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
        vary_norms(model)
        if num_labels != NUM_LABELS:
            last = "classifier" if isinstance(model.classifier, torch.nn.Linear) else "classifier.out_proj"
            width = model.get_submodule(last).in_features
            model.set_submodule(last, torch.nn.Linear(width, num_labels))
            model.config.num_labels = model.num_labels = num_labels
    return model


ADAPTERS: dict[str, dict[str, Any]] = {
    "its own head": {"r": 3},
    "three labels": {"r": 4, "num_labels": 3},
    "one label": {"r": 4, "num_labels": 1},
    "seven labels": {"r": 4, "num_labels": 7, "use_dora": True},
    "the base's head": {"r": 5, "task_type": None, "target_modules": "all-linear"},
}
"""Name -> fields of the adapter's LoraConfig, and its number of labels."""


@dataclass
class Oracle:
    """A classifier and its adapters under PEFT, each on its own copy of the base, one text at a time."""

    kind: str
    adapters: dict[str, dict[str, Any]] = field(default_factory=lambda: ADAPTERS)
    files: dict[str, FetchedAdapter] = field(default_factory=dict[str, FetchedAdapter])

    def __post_init__(self) -> None:
        self.models: dict[str, Any] = {"": make_classifier(self.kind)}
        generator = torch.Generator().manual_seed(7)
        for name, fields in self.adapters.items():
            options = {"lora_alpha": 16, "task_type": "SEQ_CLS", "target_modules": LAYERS[TYPES[self.kind][0]]}
            options |= {key: value for key, value in fields.items() if key != "num_labels"}
            config = LoraConfig(**options)
            model: Any = get_peft_model(make_classifier(self.kind, fields.get("num_labels", NUM_LABELS)), config)
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if ".default" in parameter_name:
                        noise = torch.randn(parameter.shape, generator=generator)
                        is_lora = "lora_" in parameter_name and "magnitude" not in parameter_name
                        parameter.copy_(0.15 * noise if is_lora else parameter + 0.2 * noise)
            self.files[name] = saved_files(model, config)
            self.models[name] = model.eval()

    def says(self, name: str, text: np.ndarray, second: int = 0) -> Tensor:
        """Return the logits [N] of a text, or of a pair whose second text begins at index `second`."""
        ids = torch.from_numpy(text.astype(np.int64))[None]
        more = {"token_type_ids": torch.from_numpy(types_of(len(text), second))[None]} if second else {}
        with torch.inference_mode():
            return self.models[name](input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0]

    def engine(self, missing: tuple[str, ...] = (), **settings: Any) -> EncoderEngine:
        model = prepare_encoder(copy.deepcopy(self.models[""]), "score", None, missing=missing)
        return build_encoder_engine(model, oracle_settings(max_step_tokens=4096, **settings), self.files.__getitem__)[0]


def request(rid: str, name: str, text: np.ndarray, **fields: Any) -> EngineRequest:
    return EngineRequest(rid, 1, name, text.astype(np.int32), Sampling(), 0, task="score", **fields)


@pytest.mark.parametrize("kind", examples.some(TYPES, "bert", "deberta", "modernbert"))
def test_a_mixed_batch_has_the_logits_of_peft(kind: str) -> None:
    oracle = Oracle(kind)
    engine = oracle.engine()
    texts = prompts(len(LENGTHS), TINY_VOCAB, LENGTHS)
    texts[1][4] = SIZES["pad_token_id"]
    seconds = [0, 7, 0, 1, 0] if engine.model.takes_types else [0] * len(texts)
    assert engine.model.takes_types == (kind in ("bert", "albert", "electra"))
    asked = [
        request(f"{name}/{i}", name, text, second=second)
        for i, (text, second) in enumerate(zip(texts, seconds, strict=True))
        for name in ("", *oracle.files)
    ]
    found = ask(engine, asked)
    effects: dict[str, float] = dict.fromkeys(oracle.files, 0.0)
    for one in asked:
        said, base = (oracle.says(name, one.prompt, one.second) for name in (one.digest, ""))
        got = torch.from_numpy(floats(found[one.rid]))
        assert len(got) == len(said), one.rid
        assert (got - said).abs().max() < MAX_DIFFERENCE, one.rid
        if one.digest:
            num = min(len(said), len(base))
            effects[one.digest] = max(effects[one.digest], (said[:num] - base[:num]).abs().max().item())
        if one.second:
            assert (said - oracle.says(one.digest, one.prompt)).abs().max() > MAX_DIFFERENCE  # token types matter
    assert min(effects.values()) > MIN_EFFECT, effects
    assert engine.counters.num_steps == 1


def test_a_head_that_only_adapters_bring(tmp_path: Path) -> None:
    model_type, more = TYPES["roberta"]
    AutoModelForMaskedLM.from_config(type(AutoConfig.for_model(model_type))(**SIZES | more)).save_pretrained(tmp_path)
    module, heads = read_headless(tmp_path, torch.device("cpu"), torch.float32)
    assert heads == [f"classifier.{layer}.{part}" for layer in ("dense", "out_proj") for part in ("bias", "weight")]
    assert type(module).__name__ == "RobertaForSequenceClassification"
    oracle = Oracle("roberta", {name: ADAPTERS[name] for name in ("its own head", "three labels")})
    engine = oracle.engine(tuple(heads))
    assert engine.model.missing == ["classifier.dense", "classifier.out_proj"]
    [text] = prompts(1, TINY_VOCAB, (9,))
    found = ask(engine, [request("own", "three labels", text), request("none", "", text)])
    assert (torch.from_numpy(floats(found["own"])) - oracle.says("three labels", text)).abs().max() < MAX_DIFFERENCE
    error = found["none"].error
    assert error is not None
    assert error.message == (
        "the base model's folder has no weights of classifier.dense, classifier.out_proj: use an adapter"
    )


def test_type_ids_are_given_where_the_tokenizer_has_them(tmp_path: Path) -> None:
    names = ["input_ids", "token_type_ids"]
    for options, expected in (({}, False), ({"model_input_names": names}, True)):
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})), **options).save_pretrained(tmp_path)
        assert tokenizer_types(tmp_path) == expected


def test_a_head_that_no_adapter_can_bring_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"no weights for head\.norm, which adapters cannot bring"):
        prepare_encoder(make_classifier("modernbert"), "score", None, missing=("head.norm.weight",))
