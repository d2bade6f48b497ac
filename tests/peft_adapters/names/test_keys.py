"""Tensor names written by other trainers are mapped to those of PEFT, or left unchanged."""

from __future__ import annotations

import pytest

from peft_adapters.names.keys import peft_keys

Q = "base_model.model.model.layers.0.self_attn.q_proj"
PLAIN = [f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"]

SAME: dict[str, tuple[str, str]] = {
    "raw state dict": (f"{Q}.lora_A.default.weight", f"{Q}.lora_A.weight"),
    "another adapter name": (f"{Q}.lora_B.sql.weight", f"{Q}.lora_B.weight"),
    "bias of B": (f"{Q}.lora_B.default.bias", f"{Q}.lora_B.bias"),
    "embedding": (f"{Q}.lora_embedding_A.default", f"{Q}.lora_embedding_A"),
    "DoRA's magnitude": (f"{Q}.lora_magnitude_vector.default.weight", f"{Q}.lora_magnitude_vector"),
    "older magnitude": (f"{Q}.lora_magnitude_vector.default", f"{Q}.lora_magnitude_vector"),
    "AdaLoRA": (f"{Q}.lora_E.default", f"{Q}.lora_E"),
    "saved module": ("base_model.model.lm_head.modules_to_save.default.weight", "base_model.model.lm_head.weight"),
    "trained tokens": (
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
    ),
    "no prefix": ("model.layers.0.self_attn.q_proj.lora_A.weight", f"{Q}.lora_A.weight"),
    "FSDP": (f"_fsdp_wrapped_module.{Q}._fsdp_wrapped_module.lora_A.weight", f"{Q}.lora_A.weight"),
    "checkpointing": (Q.replace("0.", "0._checkpoint_wrapped_module.") + ".lora_A.weight", f"{Q}.lora_A.weight"),
    "torch.compile": (f"_orig_mod.{Q}.lora_A.weight", f"{Q}.lora_A.weight"),
    "DDP": (f"module.{Q}.lora_A.weight", f"{Q}.lora_A.weight"),
}


@pytest.mark.parametrize("name", SAME)
def test_names_of_other_savers_are_those_of_peft(name: str) -> None:
    own, expected = SAME[name]
    keys = peft_keys([own])
    assert keys.files == {expected: own}
    assert keys.rules


def test_peft_s_own_names_are_kept() -> None:
    names = [
        *PLAIN, f"{Q}.lora_B.bias", f"{Q}.lora_embedding_A", f"{Q}.lora_magnitude_vector", f"{Q}.base_layer.weight",
        "base_model.model.lm_head.modules_to_save.weight", "base_model.model.lm_head.original_module.weight",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
    ]  # fmt: skip
    keys = peft_keys(names)
    assert keys.files == {name: name for name in names}
    assert keys.rules == {}


MIXED: dict[str, list[str]] = {
    "one without the prefix": [PLAIN[0], PLAIN[1].removeprefix("base_model.model.")],
    "one with an adapter's name": [PLAIN[0], f"{Q}.lora_B.default.weight"],
    "two adapters": [f"{Q}.lora_A.one.weight", f"{Q}.lora_B.two.weight"],
    "two names of one tensor": [PLAIN[0], f"module.{PLAIN[0]}"],
}


@pytest.mark.parametrize("name", MIXED)
def test_a_file_that_mixes_names_keeps_its_own(name: str) -> None:
    keys = peft_keys(MIXED[name])
    assert keys.files == {own: own for own in MIXED[name]}
    assert keys.rules == {}
