"""LN tuning and trainable tokens: kinds whose tensors replace a norm's parameters or rows of an embedding."""

from __future__ import annotations

from peft_adapters.json_values import is_list
from peft_adapters.kinds.kind import Field, Kind, Layer, Operation, Unfit


def _nothing(layer: Layer) -> Operation:
    raise Unfit(f"it changes no linear layer, and {layer.name} is one")


KINDS = {
    "LN_TUNING": Kind(
        "LN_TUNING", {}, frozenset(), ("ln_tuning_layers.weight", "ln_tuning_layers.bias"), _nothing, changes="norms"
    ),
    "TRAINABLE_TOKENS": Kind(
        "TRAINABLE_TOKENS",
        {"token_indices": Field((), lambda value: is_list(value) and bool(value), "a list of token ids")},
        frozenset({"init_weights"}),
        ("trainable_tokens_delta",),
        _nothing,
        changes="tokens",
    ),
}
