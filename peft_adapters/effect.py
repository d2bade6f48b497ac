"""Whether an adapter changes anything, as far as its own files show.

LoRA's B is initialized to zero, and stays zero where training never reached it: such an adapter loads and answers, but
gives the base's results.
"""

from __future__ import annotations

from collections.abc import Mapping

from peft_adapters.reasons import Reasons
from peft_adapters.safetensors_header import ITEM_BYTES, TensorInfo
from peft_adapters.spec import AdapterSpec, LayerOperation, LoraWeights
from protocol.wire.errors import AdapterRefused

CHUNK_BYTES = 1 << 20


def has_effect(spec: AdapterSpec, tensors: Mapping[str, TensorInfo], weights: memoryview) -> bool:
    """Return whether an adapter may change a result; False only if every product that it adds is exactly zero.

    tensors: of its weights file. weights: the file's content. Replacements (whole modules, heads, trained tokens,
    DoRA's magnitudes) count as changes: only the base's weights could show whether they differ. Reads up to the first
    number that is not zero.
    """
    if spec.replaced or spec.tokens or spec.head or spec.virtual is not None:
        return True
    if not all(is_zero_operation(part, tensors, weights) for part in spec.operations):
        return True
    parts = (*spec.sites, *spec.embeddings, *spec.parameters)
    return any(not is_zero_product(part, tensors, weights) for part in parts)


def check_idle(spec: AdapterSpec, tensors: Mapping[str, TensorInfo], weights: memoryview) -> None:
    """Raise AdapterRefused for nonzero LoRA on layers that do not run on every token.

    On layers that never run, PEFT adds LoRA to an unused output, so it stays zero in training. If it is not zero, it
    may only have an effect when merged into the weights, and PEFT would give two different results. tensors, weights:
    as in `has_effect`.
    """
    reasons = Reasons()
    for part in spec.idle:
        if not is_zero_product(part, tensors, weights):
            reasons.add("LoRA must be zero here, since the model does not run this layer on every token", part.site)
    if reasons:
        raise AdapterRefused(reasons.render())


def is_zero_operation(part: LayerOperation, tensors: Mapping[str, TensorInfo], weights: memoryview) -> bool:
    """Return whether an operation on one layer changes nothing. tensors, weights: as in `has_effect`."""
    return any(_is_zero(tensors[part.tensors[name]], weights) for name in part.operation.zero_if)


def is_zero_product(part: LoraWeights, tensors: Mapping[str, TensorInfo], weights: memoryview) -> bool:
    """Return whether LoRA on one module adds exactly zero: a factor, or one half of each pair, is zero.

    tensors, weights: as in `has_effect`.
    """

    def is_zero(name: str) -> bool:
        return _is_zero(tensors[name], weights)

    if part.magnitude:
        return False
    if part.of_kind is not None:
        zero_if = (part.of_kind.tensors[name] for name in part.of_kind.rows.zero_if)
        return not part.scale or any(map(is_zero, zero_if))
    if not part.scale:
        return True
    if not all(is_zero(bias) for bias in part.biases):
        return False
    if part.singular and is_zero(part.singular):
        return True
    return all(is_zero(b) or is_zero(a) for a, b in part.tensors)


def _is_zero(info: TensorInfo, weights: memoryview) -> bool:
    import numpy as np  # imported here, since a store that has read no adapter does not need it

    item = np.uint32 if ITEM_BYTES[info.dtype] == 4 else np.uint16
    for begin in range(info.begin, info.end, CHUNK_BYTES):
        bits = np.frombuffer(weights[begin : min(begin + CHUNK_BYTES, info.end)], item)
        if (bits << 1).any():  # the shift drops the signs: minus zero is zero
            return False
    return True
