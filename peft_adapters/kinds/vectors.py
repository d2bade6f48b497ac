"""Kinds whose layers share matrices or vectors: VeRA, PVeRA, VB-LoRA, UniLoRA and TinyLoRA.

VeRA: Kopiczko et al., 2024. PVeRA: a probabilistic VeRA, served with its means. VB-LoRA: Li et al., 2024. TinyLoRA:
Morris et al., "Learning to Reason in 13 Parameters", 2026.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_adapters.config_fields import is_alpha
from peft_adapters.kinds.kind import Field, Kind, Layer, Numbers, Rows, Shape, Unfit, choice, whole

# ---------------------------------------------------------------- VeRA and PVeRA


def _vera(layer: Layer, *, prefix: str, halves: int) -> Rows:
    """Return two matrices shared by all layers, cut to the layer's size, with scaled rank rows and outputs."""
    r = layer.options["r"]
    shapes: dict[str, Shape] = {
        f"{prefix}_A": (halves * r, layer.widest[0]),
        f"{prefix}_B": (layer.widest[1], r),
        f"{prefix}_lambda_d": (halves * r,),
        f"{prefix}_lambda_b": (layer.out_features,),
    }
    make = partial(_vera_rows, prefix=prefix, r=r, inputs=layer.in_features, outputs=layer.out_features)
    return Rows(shapes, r, make, zero_if=tuple(shapes))


def _vera_rows(get: Numbers, *, prefix: str, r: int, inputs: int, outputs: int) -> tuple[NDArray[Any], NDArray[Any]]:
    a, b = get(f"{prefix}_A")[:r, :inputs], get(f"{prefix}_B")[:outputs]
    return get(f"{prefix}_lambda_d")[:r, None] * a, get(f"{prefix}_lambda_b")[:, None] * b


# ---------------------------------------------------------------- VB-LoRA


def _vblora(layer: Layer) -> Rows:
    """Return A and B assembled from pieces, each a weighted sum of the bank's vectors with the largest logits."""
    r, num_vectors, length, topk, best = (
        layer.options[name] for name in ("r", "num_vectors", "vector_length", "topk", "save_only_topk_weights")
    )
    if topk > num_vectors:
        raise Unfit(f"topk is {topk}, of {num_vectors} vectors")
    shapes: dict[str, Shape] = {"vblora_vector_bank": (num_vectors, length)}
    for half, size in (("A", layer.in_features), ("B", layer.out_features)):
        if size % length:
            raise Unfit(f"vector_length is {length}, of which {size} features are no multiple")
        pieces = (r, size // length) if half == "A" else (size // length, r)
        name = f"vblora_logits_{half}"
        if best:
            shapes |= {f"{name}_topk_indices": (*pieces, topk), f"{name}_topk_weights": (*pieces, topk - 1)}
        else:
            shapes[name] = (*pieces, num_vectors)
    integers = frozenset(name for name in shapes if name.endswith("_indices"))
    make = partial(_vblora_rows, topk=topk, best=best)
    num_added = num_vectors * length + topk * r * (layer.in_features + layer.out_features)
    return Rows(shapes, r, make, zero_if=("vblora_vector_bank",), integers=integers, num_added=num_added)


def _vblora_rows(get: Numbers, *, topk: int, best: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    bank = get("vblora_vector_bank")
    a, b = (
        _sums(bank, *(_kept_weights(get, name, len(bank)) if best else _chosen_weights(get, name, topk)))
        for name in ("vblora_logits_A", "vblora_logits_B")
    )
    return a.reshape(len(a), -1), b.transpose(0, 2, 1).reshape(-1, b.shape[1])


def _sums(bank: NDArray[Any], index: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """Return weighted sums [.., length] of the bank's vectors at index [.., topk], adding one vector at a time."""
    found = np.zeros((*index.shape[:-1], bank.shape[1]), np.float32)
    for k in range(index.shape[-1]):
        found += weights[..., k, None] * bank[index[..., k]]
    return found


def _chosen_weights(get: Numbers, name: str, topk: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the indices of each piece's largest logits, and their softmax."""
    logits = get(name)
    index = np.argpartition(logits, logits.shape[-1] - topk, axis=-1)[..., logits.shape[-1] - topk :]
    chosen = np.take_along_axis(logits, index, axis=-1)
    powers = np.exp(chosen - chosen.max(-1, keepdims=True))
    return index, powers / powers.sum(-1, keepdims=True)


def _kept_weights(get: Numbers, name: str, num_vectors: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return each piece's saved indices and weights; the last weight is 1 minus the others."""
    index, first = get(f"{name}_topk_indices"), get(f"{name}_topk_weights")
    if index.size and not 0 <= index.min() <= index.max() < num_vectors:
        raise Unfit(f"{name}_topk_indices name vectors outside the {num_vectors} of the bank")
    return index.astype(np.int64), np.concatenate([first, 1 - first.sum(-1, keepdims=True)], axis=-1)


# ---------------------------------------------------------------- UniLoRA


def _unilora(layer: Layer) -> Rows:
    """Return A and B with elements of one vector, picked by the file's indices and multiplied by its factors."""
    r = layer.options["r"]
    shapes: dict[str, Shape] = {"unilora_theta_d": (layer.options["theta_d_length"],)}
    for half, shape in (("A", (r, layer.in_features)), ("B", (layer.out_features, r))):
        shapes |= {f"unilora_indices_{half}": shape, f"unilora_scales_{half}": shape}
    integers = frozenset({"unilora_indices_A", "unilora_indices_B"})
    return Rows(shapes, r, _unilora_rows, zero_if=("unilora_theta_d",), integers=integers)


def _unilora_rows(get: Numbers) -> tuple[NDArray[Any], NDArray[Any]]:
    vector = get("unilora_theta_d")
    a, b = (_picked(vector, get(f"unilora_indices_{half}")) * get(f"unilora_scales_{half}") for half in "AB")
    return a, b


def _picked(vector: NDArray[Any], index: NDArray[Any]) -> NDArray[Any]:
    if index.size and not 0 <= index.min() <= index.max() < len(vector):
        raise Unfit(f"unilora_indices are outside a vector of {len(vector)} numbers")
    return vector[index]


# ---------------------------------------------------------------- TinyLoRA


def _tinylora(layer: Layer) -> Rows:
    """Return the saved singular vectors of the layer's weight, with a matrix between them.

    The matrix is a sum of random ones, weighted by a short vector. Consecutive layers of the model share a vector
    (`TinyLoraModel._create_and_replace`).
    """
    options, (number, num_layers) = layer.options, layer.place
    rank = min(options["r"], layer.in_features, layer.out_features)
    num_vectors = max(1, round(num_layers * (1.0 - options["weight_tying"])))
    vector = f"tinylora_v.{min(number // max(1, num_layers // num_vectors), num_vectors - 1)}"
    shapes: dict[str, Shape] = {
        "tinylora_A": (rank, layer.in_features),
        "tinylora_B": (layer.out_features, rank),
        "tinylora_P": (options["u"], rank, rank),
        vector: (options["u"],),
    }
    num_products = rank * rank * (options["u"] + layer.in_features)
    make = partial(_tinylora_rows, vector=vector)
    return Rows(
        shapes, rank, make, zero_if=tuple(shapes), num_added=options["u"] * rank * rank, num_products=num_products
    )


def _tinylora_rows(get: Numbers, *, vector: str) -> tuple[NDArray[Any], NDArray[Any]]:
    between = np.tensordot(get(vector), get("tinylora_P"), 1)
    return between @ get("tinylora_A"), get("tinylora_B")


def _vera_kind(name: str, halves: int, **more: Any) -> Kind:
    prefix = name.lower()
    fields = {"r": whole(256), "save_projection": choice(True), **more}
    training = frozenset(
        {f"{prefix}_dropout", "projection_prng_key", "d_initial", "fan_in_fan_out", "init_weights", "generator_seed"}
    )
    return Kind(
        name,
        fields,
        training,
        (f"{prefix}_lambda_b", f"{prefix}_lambda_d"),
        partial(_vera, prefix=prefix, halves=halves),
        shared=(f"{prefix}_A", f"{prefix}_B"),
        conv1d=True,
    )


_SHARE = Field(0.0, lambda value: is_alpha(value) and 0 <= value <= 1, "a number from 0 to 1")
_SAVED = Field(False, lambda value: value is True, "true: without its indices, they depend on the order of all modules")

KINDS = {
    "VERA": _vera_kind("VERA", 1),
    "PVERA": _vera_kind("PVERA", 2, sample_at_inference=choice(False)),
    "VBLORA": Kind(
        "VBLORA",
        {"r": whole(4), "num_vectors": whole(256), "vector_length": whole(256), "topk": whole(2),
         "save_only_topk_weights": choice(False, True)},
        frozenset({"vblora_dropout", "fan_in_fan_out", "init_vector_bank_bound", "init_logits_std"}),
        tuple(f"vblora_logits_{half}{end}" for half in "AB" for end in ("", "_topk_indices", "_topk_weights")),
        _vblora, shared=("vblora_vector_bank",), conv1d=True,
    ),
    "UNILORA": Kind(
        "UNILORA", {"r": whole(4), "theta_d_length": whole(256), "save_indices": _SAVED},
        frozenset({"proj_seed", "unilora_dropout", "fan_in_fan_out", "init_theta_d_bound", "init_weights"}),
        tuple(f"unilora_{what}_{half}" for what in ("indices", "scales") for half in "AB"), _unilora,
        shared=("unilora_theta_d",), conv1d=True,
    ),
    "TINYLORA": Kind(
        "TINYLORA", {"r": whole(2), "u": whole(64), "weight_tying": _SHARE, "save_projection": choice(True)},
        frozenset({"projection_seed", "init_v_bound", "tinylora_dropout", "fan_in_fan_out", "init_weights"}),
        ("tinylora_A", "tinylora_B", "tinylora_P"), _tinylora, numbered="tinylora_v", conv1d=True,
    ),
}  # fmt: skip
