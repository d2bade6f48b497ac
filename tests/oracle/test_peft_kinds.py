"""Every kind of adapter that PEFT saves gives PEFT's logits, in chunks and beside the base; or it is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from oracle.peft_kinds import (
    BIASED,
    GEMMA,
    GPT2,
    GPT_OSS,
    INVOCATION,
    LLAMA,
    MAX_DIFFERENCE,
    MIXTRAL,
    TIED,
    Kind,
    base_for,
    difference,
    engine_logits,
    load,
    make_adapter,
    make_base,
    make_engine,
    model_logits,
    peft_logits,
)
from oracle.peft_oracle import TINY_VOCAB, greedy_request, prompts
from peft import AdaLoraConfig

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

NUM_TOKENS = 5


def asked_prompts(kind: Kind) -> list[np.ndarray]:
    """Return prompts that use the adapter's own tokens and, once, its invocation."""
    vocab = min(kind.num_tokens, TINY_VOCAB) if kind.num_tokens < TINY_VOCAB else kind.num_tokens
    found = [prompt % vocab for prompt in prompts(3, vocab, (5, 40, 23))]
    found[0][1], found[1][3], found[1][20] = 3, vocab - 1, 150 % vocab
    found[1][8:11] = found[1][30:33] = INVOCATION
    return found


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    make_adapter(kind, tmp_path)
    engine = make_engine(kind.base, {"tuned": tmp_path}, max_step_tokens=16, max_num_seqs=8)
    requests = [greedy_request(f"{i}", "tuned", prompt, NUM_TOKENS) for i, prompt in enumerate(asked_prompts(kind))]
    beside = greedy_request("base", "", asked_prompts(KINDS["lora"])[2], NUM_TOKENS)
    got = engine_logits(engine, [requests[0], beside, *requests[1:]])
    peft, changed = load(kind, tmp_path), 0.0
    for request in requests:
        ids, logits = got[request.rid]
        expected = peft_logits(peft, request.prompt, ids)
        assert difference(logits, expected) <= MAX_DIFFERENCE
        changed = max(changed, (expected - model_logits(base_for(kind), request.prompt, ids)).abs().max().item())
    assert changed >= 100 * MAX_DIFFERENCE
    ids, logits = got["base"]
    assert difference(logits, model_logits(make_base(kind.base), beside.prompt, ids)) <= MAX_DIFFERENCE
    engine.check_integrity()
