"""Adapters of every kind, made and saved by PEFT; what PEFT computes with them loaded again; what our engine does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle.peft_oracle import TINY_VOCAB, ask, vary_norms
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gpu_worker.engine import Engine
from gpu_worker.fetch import AdapterFiles
from gpu_worker.load import build_engine
from gpu_worker.model import prepare_model
from gpu_worker.request import EngineRequest
from gpu_worker.runner import StepInputs
from protocol.peft_format import CONFIG_FILE, WEIGHTS_FILE, parse_config
from protocol.settings import Settings

MAX_DIFFERENCE = 1e-4
"""Largest difference of a logit from PEFT's, fp32. Every adapter must change the logits by 100 times as much."""

TINY = {
    "vocab_size": TINY_VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
BIASES = {"attention_bias": True, "mlp_bias": True}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4}
INVOCATION = [7, 11, 13]

Base = tuple[str, dict[str, Any]]
"""Model type, and fields of its config besides TINY."""

LLAMA: Base = ("llama", {})
TIED: Base = ("llama", {"tie_word_embeddings": True})
BIASED: Base = ("llama", BIASES)
GPT2: Base = ("gpt2", {"n_inner": 96})
GEMMA: Base = ("gemma3_text", {"head_dim": 16, "sliding_window": 12, "tie_word_embeddings": True})
MIXTRAL: Base = ("mixtral", EXPERTS)
GPT_OSS: Base = ("gpt_oss", {"head_dim": 16, "sliding_window": 12, **EXPERTS})


def make_base(base: Base) -> PreTrainedModel:
    """Return a tiny random model in fp32 with no parameter at its usual start."""
    model_type, fields = base
    config = type(AutoConfig.for_model(model_type))(**TINY | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        vary_norms(model)
    return model


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of adapter on one base."""

    base: Base
    options: dict[str, Any] = field(default_factory=dict)
    num_tokens: int = TINY_VOCAB  # of the adapter's vocabulary
    config: type[PeftConfig] = LoraConfig


def make_adapter(kind: Kind, folder: Path, scale: float = 0.3) -> None:
    """Let PEFT make and save an adapter in which everything that is trained is random."""
    model = base_for(kind)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    if kind.config is AdaLoraConfig:
        fields["total_step"] = 10
    generator = torch.Generator().manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, layers without a bias, and the like
        peft = get_peft_model(model, kind.config(**fields | kind.options))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if parameter.requires_grad and "ranknum" not in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    is_lora = "lora_" in name and "magnitude" not in name
                    parameter.copy_(
                        scale * noise if is_lora else parameter + 0.3 * noise * parameter.std().nan_to_num(1)
                    )
        resized = kind.num_tokens != TINY_VOCAB
        peft.save_pretrained(str(folder), save_embedding_layers=True if resized else "auto")


def base_for(kind: Kind) -> PreTrainedModel:
    """Return the base as the adapter's user must prepare it: with rows for the adapter's own tokens."""
    model = make_base(kind.base)
    if kind.num_tokens != TINY_VOCAB:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model.resize_token_embeddings(kind.num_tokens, mean_resizing=False)
    return model


def read_files(folder: Path) -> AdapterFiles:
    return AdapterFiles(parse_config((folder / CONFIG_FILE).read_bytes()), (folder / WEIGHTS_FILE).read_bytes())


def load(kind: Kind, folder: Path) -> PeftModel:
    """Let PEFT load a saved adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base_for(kind), str(folder)).eval()


def peft_logits(model: PeftModel, prompt: np.ndarray, output: Sequence[int]) -> Tensor:
    """Return PEFT's logits for each output token [n, V], the adapter active as in `generate`."""
    options: dict[str, Any] = {}
    invocation = getattr(model.active_peft_config, "alora_invocation_tokens", None)
    if invocation:
        starts = [i for i in range(len(prompt)) if prompt[i : i + len(invocation)].tolist() == invocation]
        options["alora_offsets"] = [len(prompt) + len(output) - 1 - starts[-1] if starts else None]
    return model_logits(model, prompt, output, **options)


def model_logits(model: torch.nn.Module, prompt: np.ndarray, output: Sequence[int], **options: Any) -> Tensor:
    """Return a model's logits for each output token [n, V]."""
    ids = torch.from_numpy(np.concatenate([prompt, output[:-1]]).astype(np.int64))[None]
    with torch.inference_mode():
        return model(input_ids=ids, **options).logits[0, len(prompt) - 1 :]


def make_engine(base: Base, folders: dict[str, Path], **settings: Any) -> Engine:
    """Return an engine over a base that fetches adapters by name from folders."""
    values = {"model": "oracle", "adapter_pool_bytes": 64 << 20, "kv_cache_bytes": 64 << 20} | settings
    impl = "reference" if values.get("kernels") == "reference" else None
    model = prepare_model(make_base(base), frozenset(), impl)
    engine, _ = build_engine(model, Settings(**values), lambda name: read_files(folders[name]), None)
    return engine


def engine_logits(engine: Engine, requests: Sequence[EngineRequest]) -> dict[str, tuple[list[int], Tensor]]:
    """Run requests together. Returns the output ids of each and the logits [n, V] they were chosen from."""
    kept: dict[str, list[Tensor]] = {request.rid: [] for request in requests}
    run = engine.runner.run

    def spy(inputs: StepInputs) -> Tensor:
        logits = run(inputs)
        for seq, row in zip(inputs.ready, logits, strict=False):
            kept[seq.rid].append(row.clone())
        return logits

    engine.runner.run = spy
    try:
        asked = ask(engine, requests)
    finally:
        engine.runner.run = run
    errors = {rid: str(end.error) for rid, end in asked.finish.items() if end.error}
    assert not errors, errors
    width = max(len(row) for rows in kept.values() for row in rows)
    return {
        rid: (asked.ids[rid], torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=-torch.inf)
                                           for row in rows]))
        for rid, rows in kept.items()
    }  # fmt: skip


def difference(ours: Tensor, peft: Tensor) -> float:
    """Return the largest difference of a logit; tokens that PEFT does not know must be impossible in ours."""
    width = peft.shape[-1]
    assert (ours[:, width:] == -torch.inf).all(), "a token of another vocabulary is possible"
    return (ours[:, :width] - peft).abs().max().item()
