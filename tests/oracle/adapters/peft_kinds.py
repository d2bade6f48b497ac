"""Adapters of every kind, made and saved by PEFT, and the logits that PEFT and our engine compute with them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle.peft_oracle import (
    TINY_VOCAB,
    ask,
    greedy_request,
    oracle_settings,
    packed_engine,
    prompts,
    round_rows,
    watch,
)
from oracle.tiny_models import decoder_of, tiny_model
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, PromptLearningConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from gpu_worker.adapters.loader.fetch import FetchedAdapter
from gpu_worker.drafting.load import LoadedDraft
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.runner import StepInputs
from gpu_worker.model.prepare import prepare_model
from gpu_worker.planning.request import EngineRequest
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE, parse_config

MAX_DIFFERENCE = 1e-4
"""Maximum difference of a logit from PEFT's, fp32. Every adapter must change the logits by 100 times as much."""

TINY = {
    "vocab_size": TINY_VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
BIASES = {"attention_bias": True, "mlp_bias": True}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4}
INVOCATION = [7, 11, 13]
NUM_TOKENS = 5  # output tokens per request

Base = tuple[str, dict[str, Any]]
"""Model type, and fields of its config besides TINY; {"tiny": True} takes the fields of `tiny_model`."""

LLAMA: Base = ("llama", {})
TIED: Base = ("llama", {"tie_word_embeddings": True})
BIASED: Base = ("llama", BIASES)
GPT2: Base = ("gpt2", {"n_inner": 96})
GEMMA: Base = ("gemma3_text", {"head_dim": 16, "sliding_window": 12, "tie_word_embeddings": True})
MIXTRAL: Base = ("mixtral", EXPERTS)
GPT_OSS: Base = ("gpt_oss", {"head_dim": 16, "sliding_window": 12, **EXPERTS})


def make_base(base: Base) -> PreTrainedModel:
    """Return a tiny random fp32 model in which no parameter has its usual initial value."""
    model_type, fields = base
    if fields.get("tiny"):
        return tiny_model(model_type, vocab_size=TINY_VOCAB)
    return decoder_of(type(AutoConfig.for_model(model_type))(**TINY | fields))


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of adapter on one base."""

    base: Base
    options: dict[str, Any] = field(default_factory=dict)
    num_tokens: int = TINY_VOCAB  # size of the adapter's vocabulary
    config: type[PeftConfig] = LoraConfig


def make_adapter(
    kind: Kind, folder: Path, scale: float = 0.3, seed: int = 5, model: PreTrainedModel | None = None
) -> None:
    """Let PEFT make and save an adapter whose trained parameters are all random. model: None for the kind's."""
    model = model or base_for(kind)
    fields = _fields(kind)
    if kind.config is AdaLoraConfig:
        fields["total_step"] = 10
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # about tied weights, layers without a bias and the like
        torch.manual_seed(seed)
        peft = get_peft_model(model, kind.config(**fields | kind.options))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if parameter.requires_grad and "ranknum" not in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    if not issubclass(kind.config, LoraConfig):
                        parameter += scale * noise
                        continue
                    is_lora = "lora_" in name and "magnitude" not in name
                    parameter.copy_(
                        scale * noise if is_lora else parameter + 0.3 * noise * parameter.std().nan_to_num(1)
                    )
        resized = kind.num_tokens != TINY_VOCAB
        peft.save_pretrained(str(folder), save_embedding_layers=True if resized else "auto")


def _fields(kind: Kind) -> dict[str, Any]:
    """Return the config fields of every adapter here, which the kind's options may override."""
    fields: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    if issubclass(kind.config, PromptLearningConfig):  # kinds with virtual tokens
        del fields["target_modules"]
    return fields | {"r": 4, "lora_alpha": 8} if issubclass(kind.config, LoraConfig) else fields


def train_adapter(kind: Kind, folder: Path) -> bool:
    """Let PEFT make an adapter, train it for three steps and save it. Return whether all trained parameters changed."""
    fields = _fields(kind)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        peft = get_peft_model(base_for(kind), kind.config(**fields | kind.options))
        trained = {name: p for name, p in peft.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in trained.items()}
        optimizer = torch.optim.AdamW(trained.values(), lr=0.05)
        for _ in range(3):
            ids = torch.randint(kind.num_tokens, (4, 24))
            loss = peft(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        peft.save_pretrained(str(folder))
    return bool(trained) and all(not torch.equal(before[name], p) for name, p in trained.items())


def base_for(kind: Kind) -> PreTrainedModel:
    """Return the base as the adapter's user must prepare it: with embedding rows for the adapter's own tokens."""
    model = make_base(kind.base)
    if kind.num_tokens != TINY_VOCAB:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model.resize_token_embeddings(kind.num_tokens, mean_resizing=False)
    return model


def read_files(folder: Path) -> FetchedAdapter:
    return FetchedAdapter(parse_config((folder / CONFIG_FILE).read_bytes()), (folder / WEIGHTS_FILE).read_bytes())


def load(kind: Kind, folder: Path, model: PreTrainedModel | None = None) -> PeftModel:
    """Let PEFT load a saved adapter. model: None for the kind's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model or base_for(kind), str(folder)).eval()


def peft_logits(model: torch.nn.Module, prompt: np.ndarray, output: Sequence[int]) -> Tensor:
    """Return PEFT's logits for each output token [n, V], with the adapter active as in `generate`."""
    options: dict[str, Any] = {}
    invocation = getattr(getattr(model, "active_peft_config", None), "alora_invocation_tokens", None)
    if invocation:
        starts = [i for i in range(len(prompt)) if prompt[i : i + len(invocation)].tolist() == invocation]
        options["alora_offsets"] = [len(prompt) + len(output) - 1 - starts[-1] if starts else None]
    return model_logits(model, prompt, output, **options)


def model_logits(model: torch.nn.Module, prompt: np.ndarray, output: Sequence[int], **options: Any) -> Tensor:
    """Return a model's logits for each output token [n, V]."""
    ids = torch.from_numpy(np.concatenate([prompt, output[:-1]]).astype(np.int64))[None]
    with torch.inference_mode():
        return model(input_ids=ids, **options).logits[0, len(prompt) - 1 :]


def make_engine(base: Base, folders: dict[str, Path], *, draft: LoadedDraft | None = None, **settings: Any) -> Engine:
    """Return an engine on a base that reads adapters by name from folders."""
    impl = "reference" if settings.get("kernels") == "reference" else None
    model = prepare_model(make_base(base), frozenset(), impl)
    return packed_engine(model, oracle_settings(**settings), lambda name: read_files(folders[name]), draft=draft)


def engine_logits(engine: Engine, requests: Sequence[EngineRequest]) -> dict[str, tuple[list[int], Tensor]]:
    """Run requests in one batch. Return for each its output ids and the logits [n, V] from which they were chosen."""
    kept: dict[str, list[Tensor]] = {request.rid: [] for request in requests}

    def look(inputs: StepInputs, logits: Tensor) -> None:
        for seq, row in zip(inputs.ready, logits, strict=False):
            kept[seq.rid].append(row.clone())

    run = watch(engine, look)
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
    """Return the maximum logit difference; check that ours are -inf for tokens that PEFT does not know."""
    width = peft.shape[-1]
    assert (ours[:, width:] == -torch.inf).all(), "a token of another vocabulary is possible"
    return (ours[:, :width] - peft).abs().max().item()


@dataclass(frozen=True, slots=True)
class Measured:
    """How one kind of adapter compares with PEFT, as maxima over all logits."""

    difference: float  # from PEFT's logits
    change: float  # by which PEFT's logits differ from the base's

    def check(self) -> None:
        """Assert that our logits with an adapter are PEFT's, and that it changes them a hundred times as much."""
        assert self.difference <= MAX_DIFFERENCE
        assert self.change >= 100 * MAX_DIFFERENCE


def measure(kind: Kind, folder: Path, expected: PeftModel | None = None, **settings: Any) -> Measured:
    """Run a saved adapter in a mixed batch with its base; compare both with PEFT and the plain base.

    expected: the model to compare with; None for the adapter as PEFT loads it.
    """
    peft = expected or load(kind, folder)
    if settings.get("lora_dtype") == "int8":
        round_rows(peft)
    engine = make_engine(kind.base, {"tuned": folder}, **settings)
    return compare(engine, asked_prompts(kind), peft, base_for(kind), make_base(kind.base))


def compare(
    engine: Engine,
    asked: Sequence[np.ndarray],
    peft: torch.nn.Module,
    base: torch.nn.Module,
    untouched: torch.nn.Module,
) -> Measured:
    """Run the adapter "tuned" in a mixed batch with the base.

    peft: with the adapter; base: without it; untouched: the base with the engine's vocabulary.
    """
    requests = [greedy_request(f"{i}", "tuned", prompt, NUM_TOKENS) for i, prompt in enumerate(asked)]
    beside = greedy_request("base", "", asked_prompts(Kind(LLAMA))[2], NUM_TOKENS)
    got = engine_logits(engine, [requests[0], beside, *requests[1:]])
    largest, change = 0.0, 0.0
    for request in requests:
        ids, logits = got[request.rid]
        expected = peft_logits(peft, request.prompt, ids)
        largest = max(largest, difference(logits, expected))
        change = max(change, (expected - model_logits(base, request.prompt, ids)).abs().max().item())
    ids, logits = got["base"]
    largest = max(largest, difference(logits, model_logits(untouched, beside.prompt, ids)))
    engine.check_integrity()
    return Measured(largest, change)


def check_exact(kind: Kind, folder: Path, expected: PeftModel | None = None, **settings: Any) -> None:
    """Assert that our logits with a saved adapter equal PEFT's, and that it changes them 100 times as much or more."""
    measure(kind, folder, expected, **settings).check()


def asked_prompts(kind: Kind) -> list[np.ndarray]:
    """Return prompts that use the adapter's own tokens and, in one of them, its invocation."""
    vocab = min(kind.num_tokens, TINY_VOCAB) if kind.num_tokens < TINY_VOCAB else kind.num_tokens
    found = [prompt % vocab for prompt in prompts(3, vocab, (5, 40, 23))]
    found[0][1], found[1][3], found[1][20] = 3, vocab - 1, 150 % vocab
    found[1][8:11] = found[1][30:33] = INVOCATION
    return found


# ---------------------------------------------------------------- the kinds

GPT2_TARGETS = {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}
BOTH_ENDS = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
EXPERT_PARAMETERS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}

KINDS: dict[str, Kind] = {
    "lora": Kind(LLAMA),
    "rslora": Kind(LLAMA, {"use_rslora": True, "lora_alpha": 4}),
    "patterns": Kind(LLAMA, {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 30}}),
    "regex": Kind(LLAMA, {"target_modules": r".*\.1\..*_proj"}),
    "all-linear": Kind(LLAMA, {"target_modules": "all-linear", "exclude_modules": ["up_proj"]}),
    "some layers": Kind(LLAMA, {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "conv1d": Kind(GPT2, GPT2_TARGETS),
    "lora_bias": Kind(BIASED, {"lora_bias": True}),
    "lora_bias without a bias": Kind(LLAMA, {"lora_bias": True}),
    "bias all": Kind(GPT2, {**GPT2_TARGETS, "bias": "all"}),
    "bias lora_only": Kind(BIASED, {"bias": "lora_only"}),
    "dora": Kind(BIASED, {"use_dora": True}),
    "dora conv1d": Kind(GPT2, {**GPT2_TARGETS, "use_dora": True}),
    "dora and biases": Kind(BIASED, {"use_dora": True, "bias": "lora_only"}),
    "dora embedding": Kind(GEMMA, {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}),
    "head": Kind(LLAMA, {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": Kind(LLAMA, {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding and head, tied": Kind(TIED, BOTH_ENDS),
    "embedding and head, tied adapters": Kind(TIED, {**BOTH_ENDS, "ensure_weight_tying": True}),
    "scaled embedding": Kind(GEMMA, BOTH_ENDS),
    "positions": Kind(GPT2, {"target_modules": ["c_attn", "wte", "wpe"], "fan_in_fan_out": True}),
    "modules_to_save": Kind(LLAMA, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "modules_to_save, tied": Kind(TIED, {"modules_to_save": ["embed_tokens"]}),
    "modules_to_save, kept tied": Kind(TIED, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "modules_to_save norms": Kind(GEMMA, {"modules_to_save": ["input_layernorm", "q_norm", "norm"]}),
    "modules_to_save blocks": Kind(BIASED, {"target_modules": "all-linear", "modules_to_save": ["1.mlp"]}),
    "modules_to_save conv1d": Kind(GPT2, {"target_modules": ["c_fc"], "modules_to_save": ["c_attn", "ln_f"]}),
    "trained tokens": Kind(LLAMA, {"trainable_token_indices": [3, 150, 17]}),
    "trained tokens, tied": Kind(TIED, {"trainable_token_indices": [3, 150, 17]}),
    "trained tokens, tied to an adapted head": Kind(
        TIED, {"trainable_token_indices": [3, 150, 17], "target_modules": ["q_proj", "lm_head"]}
    ),
    "trained tokens, tied to a head with lora_bias": Kind(
        TIED, {"trainable_token_indices": [3, 150, 17], "target_modules": ["lm_head"], "lora_bias": True}
    ),
    "trained tokens of both": Kind(LLAMA, {"trainable_token_indices": {"embed_tokens": [9], "lm_head": [12, 4]}}),
    "trained tokens, scaled": Kind(GEMMA, {"trainable_token_indices": [3, 150, 17]}),
    "added tokens": Kind(LLAMA, {"modules_to_save": ["lm_head", "embed_tokens"]}, TINY_VOCAB + 9),
    "added tokens, tied": Kind(TIED, {}, TINY_VOCAB + 9),
    "added tokens, trained": Kind(TIED, {"trainable_token_indices": list(range(190, TINY_VOCAB + 5))}, TINY_VOCAB + 5),
    "added tokens, adapted": Kind(LLAMA, BOTH_ENDS, TINY_VOCAB + 9),
    "added tokens, dora": Kind(LLAMA, {**BOTH_ENDS, "use_dora": True}, TINY_VOCAB + 9),
    "fewer tokens": Kind(LLAMA, {"modules_to_save": ["lm_head", "embed_tokens"]}, TINY_VOCAB - 20),
    "alora": Kind(LLAMA, {"alora_invocation_tokens": INVOCATION}),
    "alora, bias": Kind(BIASED, {"alora_invocation_tokens": INVOCATION, "lora_bias": True, "bias": "all"}),
    "experts": Kind(MIXTRAL, EXPERT_PARAMETERS),
    "experts, down alone": Kind(MIXTRAL, {"target_parameters": ["experts.down_proj"], "target_modules": []}),
    "experts, transposed": Kind(GPT_OSS, {**EXPERT_PARAMETERS, "target_modules": ["q_proj"]}),
    "router": Kind(MIXTRAL, {"target_parameters": ["mlp.gate.weight"], "rank_pattern": {"gate.weight": 2}}),
    "weights as parameters": Kind(LLAMA, {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]}),
    "adalora": Kind(LLAMA, {"init_r": 6, "target_r": 3}, config=AdaLoraConfig),
    "mica": Kind(LLAMA, {"init_lora_weights": "mica"}),
}  # fmt: skip
