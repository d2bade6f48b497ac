"""MiSS, GraLoRA and DeLoRA: low-rank products with special structure (`peft/tuners/miss`, `gralora`, `delora`).

MiSS: Kang and Yin, "Balancing LoRA Performance and Efficiency with Simple Shard Sharing", 2024. GraLoRA: Jung et al.,
2025. DeLoRA: Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation", 2025.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_adapters.kinds.kind import Kind, Layer, Numbers, Rows, Shape, Unfit, choice, number, whole

# ---------------------------------------------------------------- MiSS


def _miss(layer: Layer) -> Rows:
    """Return a matrix B times sums of every r-th input: A has a one per summed input."""
    r, init, outputs = layer.options["r"], layer.options["init_weights"], layer.out_features
    if r > layer.in_features:
        raise Unfit(f"r is {r}, of a layer with {layer.in_features} inputs")
    width = layer.options["mini_r"] if init == "mini" else outputs
    if outputs % width:
        raise Unfit(f"mini_r is {width}, by which {outputs} outputs cannot be divided")
    make = partial(_miss_rows, inputs=layer.in_features, repeats=outputs // width)
    return Rows({"miss_block": (r, width)}, r, make, zero_if=("miss_block",))


def _miss_rows(get: Numbers, *, inputs: int, repeats: int) -> tuple[NDArray[Any], NDArray[Any]]:
    block = get("miss_block")
    a = np.zeros((len(block), inputs), np.float32)
    columns = np.arange(inputs)
    a[columns % len(block), columns] = 1
    return a, np.tile(block, (1, repeats)).T


# ---------------------------------------------------------------- GraLoRA


def _gralora(layer: Layer) -> Rows:
    """Return a product of rank r / k for each pair of the k input and k output blocks, plus ordinary LoRA if hybrid."""
    r, k, hybrid = (layer.options[name] for name in ("r", "gralora_k", "hybrid_r"))
    for what, size in (("in_features", layer.in_features), ("out_features", layer.out_features), ("r", r)):
        if size % k:
            raise Unfit(f"gralora_k is {k}, by which {what} {size} cannot be divided")
    shapes: dict[str, Shape] = {
        "gralora_A": (k, layer.in_features // k, r),
        "gralora_B": (k, r, layer.out_features // k),
    }
    if hybrid:
        shapes["gralora_A_general.weight"] = (hybrid, layer.in_features)
        shapes["gralora_B_general.weight"] = (layer.out_features, hybrid)
    make = partial(_gralora_rows, has_general=bool(hybrid))
    scale = layer.options["alpha"] / (r + hybrid)
    return Rows(shapes, k * r + hybrid, make, scale, zero_if=() if hybrid else tuple(shapes))


def _gralora_rows(get: Numbers, *, has_general: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    blocks_a, blocks_b = get("gralora_A"), get("gralora_B")
    k, inputs, r = blocks_a.shape
    outputs, share = blocks_b.shape[2], r // k
    a = np.zeros((k, k, share, k * inputs), np.float32)  # [block of outputs, block of inputs, row, input]
    b = np.zeros((k * outputs, k, k, share), np.float32)
    for block in range(k):
        of_inputs, of_outputs = (slice(block * size, (block + 1) * size) for size in (inputs, outputs))
        a[:, block, :, of_inputs] = blocks_a[block].reshape(inputs, k, share).transpose(1, 2, 0)
        b[of_outputs, block] = blocks_b[block].reshape(k, share, outputs).transpose(2, 0, 1)
    a, b = a.reshape(-1, k * inputs), b.reshape(k * outputs, -1)
    if not has_general:
        return a, b
    return np.concatenate([a, get("gralora_A_general.weight")]), np.hstack([b, get("gralora_B_general.weight")])


# ---------------------------------------------------------------- DeLoRA

_LEAST_NORM = np.float32(1e-4)


def _delora(layer: Layer) -> Rows:
    """Return LoRA with rows divided by their norms and multiplied by the column norms of the weight."""
    r = layer.options["r"]
    shapes: dict[str, Shape] = {
        "delora_A": (r, layer.in_features),
        "delora_B": (layer.out_features, r),
        "delora_lambda": (1,),
        "delora_w_norm": (layer.in_features,),
    }
    return Rows(shapes, r, _delora_rows, zero_if=tuple(shapes))


def _delora_rows(get: Numbers) -> tuple[NDArray[Any], NDArray[Any]]:
    a, b = get("delora_A"), get("delora_B")
    norms = np.maximum(np.linalg.norm(a, axis=1), _LEAST_NORM) * np.maximum(np.linalg.norm(b, axis=0), _LEAST_NORM)
    return (get("delora_lambda") / np.float32(len(a)) / norms)[:, None] * a * get("delora_w_norm"), b


KINDS = {
    "MISS": Kind(
        "MISS", {"r": whole(64), "mini_r": whole(1), "init_weights": choice(True, False, "mini")},
        frozenset({"miss_dropout"}), ("miss_block",), _miss,
    ),
    "GRALORA": Kind(
        "GRALORA", {"r": whole(32), "hybrid_r": whole(0, 0), "alpha": number(64), "gralora_k": whole(2)},
        frozenset({"gralora_dropout", "fan_in_fan_out", "init_weights"}),
        ("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"), _gralora, conv1d=True,
    ),
    "DELORA": Kind(
        "DELORA", {"r": whole(8)}, frozenset({"delora_lambda", "module_dropout", "init_weights", "lambda_pattern"}),
        ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"), _delora, patterns=frozenset({"rank_pattern"}),
    ),
}  # fmt: skip
