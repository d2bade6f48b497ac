"""PEFT is the oracle: we read the same adapted modules, ranks and scales as PEFT applies."""

from __future__ import annotations

import json
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from helpers import examples
from helpers.peft_configs import lora_configs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_adapters.format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterSpec,
    canonical_config,
    parse_config,
    parse_header,
    read_adapter,
)
from protocol.wire import messages as m
from protocol.wire.errors import AdapterRefused

VOCAB = 48


def tiny_llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def tiny_gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    )


FAMILIES = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def served(model: PreTrainedModel) -> m.ServedModel:
    """Return a model's description as a worker makes it."""
    sites: list[m.SiteShape] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            has_bias = module.bias is not None
            sites.append(m.SiteShape(name, module.in_features, module.out_features, has_bias=has_bias))
        elif isinstance(module, Conv1D):
            sites.append(m.SiteShape(name, *module.weight.shape, kind="conv1d", has_bias=True))
        elif isinstance(module, torch.nn.Embedding):
            sites.append(m.SiteShape(name, module.num_embeddings, module.embedding_dim, kind="embedding"))
    return m.ServedModel(
        model="tiny", name="tiny", fingerprint="", model_type=model.config.model_type, vocab_size=VOCAB,
        max_model_len=16, sites=sites,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Saved:
    """An adapter made by PEFT: as configured, as saved, and as applied."""

    asked: dict[str, Any]
    config: dict[str, Any]
    weights: bytes
    applied: dict[str, tuple[int, float]]  # module -> rank, scale

    def read(self, config: dict[str, Any], base: m.ServedModel | None) -> AdapterSpec:
        return read_adapter(config, parse_header(self.weights, len(self.weights)), base)


def save(model: PreTrainedModel, config: LoraConfig) -> Saved:
    """Let PEFT apply and save a random adapter. Raises PEFT's own errors."""
    asked = as_json(config)
    peft_model = get_peft_model(model, config)
    layers = {
        n: layer
        for n, layer in cast("torch.nn.Module", peft_model.base_model.model).named_modules()
        if isinstance(layer, LoraLayer)
    }
    with tempfile.TemporaryDirectory() as folder:
        peft_model.save_pretrained(folder)
        raw = (Path(folder) / CONFIG_FILE).read_bytes()
        weights = (Path(folder) / WEIGHTS_FILE).read_bytes()
    applied = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}
    return Saved(asked, parse_config(raw), weights, applied)


def as_json(config: LoraConfig) -> dict[str, Any]:
    """Return a config as PEFT writes it before it is applied to a model."""
    fields = config.to_dict()
    return json.loads(json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=examples.of(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_reads_what_peft_applies(family: str, data: st.DataObject) -> None:
    """Modules, ranks and scales match, from the config as written and as saved; where PEFT fails, we refuse."""
    fields = data.draw(lora_configs(family))
    model = FAMILIES[family]()
    base = served(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for example about patterns without a match
        try:
            saved = save(model, LoraConfig(**fields))
        except (ValueError, TypeError):  # nothing matches, or the fields contradict each other
            with pytest.raises(AdapterRefused):
                read_adapter({"peft_type": "LORA", **fields}, {}, base)
            return
    for config in (saved.asked, saved.config, canonical_config(saved.config)):
        spec = saved.read(config, base)
        assert {s.site: (s.rank, s.scale) for s in (*spec.sites, *spec.embeddings)} == saved.applied
        assert spec.rank == max(rank for rank, _ in saved.applied.values())
    spec = saved.read(saved.config, None)
    assert {site.site for site in (*spec.sites, *spec.embeddings)} == set(saved.applied)


def test_base_weights_saved_with_an_adapted_head_are_replacements() -> None:
    model = tiny_llama()
    base = served(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = save(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    spec = saved.read(saved.config, base)
    assert "lm_head" in {site.site for site in spec.sites}
    assert [(part.site, part.parameter) for part in spec.replaced] == [("lm_head", "weight")]
