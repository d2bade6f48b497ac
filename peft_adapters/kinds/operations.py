"""Kinds that scale or rotate a layer's inputs or outputs, or change single numbers of its weight.

IA3: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022. RoAd:
Liao and Monz, "3-in-1: 2D Rotary Adaptation", 2024. OFT: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal
Finetuning", 2023. BOFT: Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", 2023.
SHiRA: Bhardwaj et al., "Sparse High Rank Adapters", 2024.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_adapters.json_values import is_list
from peft_adapters.kinds.kind import (
    Change,
    Field,
    Kind,
    Layer,
    Numbers,
    Operation,
    Shape,
    Transform,
    Unfit,
    choice,
    number,
    whole,
)
from peft_adapters.targets import BadPattern, compile_pattern

# ---------------------------------------------------------------- IA3

MAX_FEEDFORWARD = 1_024
"""Maximum names in `feedforward_modules`, each of which is compared with every layer."""


def _ia3(layer: Layer) -> Operation:
    """Return a factor per output of a layer, or per input for those in `feedforward_modules`."""
    ends = layer.options["feedforward_modules"]
    if isinstance(ends, str):
        is_forward = _pattern(ends).fullmatch(layer.name) is not None
    else:
        is_forward = layer.name.endswith(tuple(ends))
    shape = (1, layer.in_features) if is_forward else (layer.out_features, 1)
    return Operation({"ia3_l": shape}, partial(_ia3_change, is_forward=is_forward), max(shape))


@lru_cache(16)
def _pattern(pattern: str) -> Any:
    try:
        return compile_pattern(pattern)
    except BadPattern as error:
        raise Unfit(f"feedforward_modules {error}") from None


def _ia3_change(get: Numbers, *, is_forward: bool) -> Change:
    factors = Transform(scale=get("ia3_l").ravel())
    return Change(inputs=factors) if is_forward else Change(outputs=factors)


def _are_modules(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return is_list(value) and len(value) <= MAX_FEEDFORWARD and all(isinstance(item, str) and item for item in value)


# ---------------------------------------------------------------- RoAd

_ANGLES = {"road_1": (1, 2), "road_2": (1, 1), "road_4": (2, 1)}
"""A variant's number of angles per output, as a fraction."""


def _road(layer: Layer) -> Operation:
    """Return rotations and scalings of pairs of outputs, half a group apart."""
    variant, group, size = layer.options["variant"], layer.options["group_size"], layer.out_features
    if size % group or group % 2:
        raise Unfit(f"group_size is {group}, of {size} outputs: it must be even and divide them")
    times, by = _ANGLES[variant]
    shape = (size * times // by,)
    make = partial(_road_change, variant=variant, group=group)
    return Operation({"road_theta": shape, "road_alpha": shape}, make, 2 * size)


def _road_change(get: Numbers, *, variant: str, group: int) -> Change:
    theta, alpha = get("road_theta"), get("road_alpha")
    if variant == "road_1":  # both halves of a group share values
        theta, alpha = (np.repeat(part.reshape(-1, group // 2), 2, axis=0).ravel() for part in (theta, alpha))
    if variant == "road_4":
        theta, alpha = theta.reshape(-1, 2, group), alpha.reshape(-1, 2, group)
        scale, across = alpha[:, 0] * np.cos(theta[:, 0]), alpha[:, 1] * np.sin(theta[:, 1])
        return Change(outputs=Transform(scale=scale.ravel(), across=across.ravel(), group=group))
    return Change(outputs=Transform(scale=alpha * np.cos(theta), across=alpha * np.sin(theta), group=group))


# ---------------------------------------------------------------- BEFT


def _beft(layer: Layer) -> Operation:
    """Return a bias that is added to the output."""
    shape = (1, layer.out_features)
    return Operation({"beft_bias": shape}, _beft_change, layer.out_features, zero_if=("beft_bias",))


def _beft_change(get: Numbers) -> Change:
    return Change(bias=get("beft_bias").ravel())


# ---------------------------------------------------------------- OFT


def _nearest_divisor(size: int, wanted: int) -> int:
    """Return the divisor of a size that PEFT uses for a requested one (`adjust_oft_parameters`)."""
    if wanted >= size:
        return size
    higher = next(number for number in range(wanted, size + 1) if size % number == 0)
    lower = next(number for number in range(wanted, 0, -1) if size % number == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _oft(layer: Layer) -> Operation:
    """Return rotations of blocks of the inputs, each the Cayley transform of a skew-symmetric matrix."""
    options, inputs = layer.options, layer.in_features
    r, size = options["r"], options["oft_block_size"]
    if bool(r) == bool(size):
        raise Unfit(f"one of r and oft_block_size must be 0; they are {r} and {size}")
    size = inputs // _nearest_divisor(inputs, r) if r else _nearest_divisor(inputs, size)
    num = 1 if options["block_share"] else inputs // size
    terms = options["num_cayley_neumann_terms"] if options["use_cayley_neumann"] else 0
    eps = options["eps"] if options["coft"] else None
    make = partial(_oft_change, size=size, repeats=inputs // size // num, terms=terms, eps=eps)
    shapes: dict[str, Shape] = {"oft_R.weight": (num, size * (size - 1) // 2)}
    num_products = num * size**3 * max(terms, 2)  # the Cayley transform costs as much as two products
    return Operation(shapes, make, inputs * size, zero_if=tuple(shapes), num_products=num_products)


def _oft_change(get: Numbers, *, size: int, repeats: int, terms: int, eps: float | None) -> Change:
    values = get("oft_R.weight")
    skew = np.zeros((len(values), size, size), np.float32)
    skew[:, *np.triu_indices(size, 1)] = values
    skew -= skew.transpose(0, 2, 1)
    if eps is not None:  # limits the distance from the identity
        norms = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
        most = np.float32(eps / np.sqrt(len(values)))
        skew = np.where(norms <= most, skew, most * (skew / norms))
    rotations = _series(skew, terms) if terms else _cayley(skew)
    return Change(inputs=Transform(blocks=np.repeat(rotations, repeats, axis=0) if repeats > 1 else rotations))


def _cayley(skew: NDArray[Any]) -> NDArray[Any]:
    """Return (I + Q)⁻¹ (I - Q), whose factors commute."""
    identity = np.eye(skew.shape[-1], dtype=np.float32)
    return np.linalg.solve(identity + skew, identity - skew)


def _boft(layer: Layer) -> Operation:
    """Return rotations of blocks of the inputs, by Cayley transforms, and factors of the outputs.

    PEFT supports further butterfly factors, with permutations between them, only on a GPU with a compiler. Files with
    these have other shapes, and are refused for that.
    """
    options, inputs, outputs = layer.options, layer.in_features, layer.out_features
    size, num = options["boft_block_size"], options["boft_block_num"]
    if bool(size) == bool(num):
        raise Unfit(f"one of boft_block_size and boft_block_num must be 0; they are {size} and {num}")
    if inputs % (size or num):
        raise Unfit(f"{'boft_block_size' if size else 'boft_block_num'} is {size or num}, of {inputs} inputs")
    if layer.has_bias:
        raise Unfit("it scales outputs without the layer's bias")
    size = size or inputs // num
    num = inputs // size
    shapes: dict[str, Shape] = {"boft_R": (1, num, size, size), "boft_s": (outputs, 1)}
    return Operation(shapes, _boft_change, inputs * size + outputs, num_products=2 * num * size**3)


def _boft_change(get: Numbers) -> Change:
    values = get("boft_R")[0]
    skew = np.float32(0.5) * (values - values.transpose(0, 2, 1))
    return Change(inputs=Transform(blocks=_cayley(skew)), outputs=Transform(scale=get("boft_s").ravel()))


def _series(skew: NDArray[Any], terms: int) -> NDArray[Any]:
    """Return the first terms of (I + Q)(I - Q)⁻¹ as PEFT sums them: powers of Q twice, except the last."""
    total = np.broadcast_to(np.eye(skew.shape[-1], dtype=np.float32), skew.shape).copy()
    if terms == 1:
        return total
    total += 2 * skew
    if terms == 2:
        return total
    power = skew @ skew
    total += 2 * power
    for _ in range(3, terms - 1):
        power = power @ skew
        total += 2 * power
    return total + power @ skew


# ---------------------------------------------------------------- SHiRA


def _shira(layer: Layer) -> Operation:
    """Return numbers at a few places of the weight, as many as LoRA of the same rank has."""
    num = layer.options["r"] * (layer.in_features + layer.out_features)
    if num > layer.in_features * layer.out_features:
        raise Unfit(f"r is {layer.options['r']}, of which a layer has more numbers than its weight")
    shapes: dict[str, Shape] = {"shira_weight": (num,), "shira_indices": (2, num)}
    make = partial(_shira_change, shape=(layer.out_features, layer.in_features))
    integers = frozenset({"shira_indices"})
    return Operation(shapes, make, 3 * num, integers=integers, zero_if=("shira_weight",), has_scale=True)


def _shira_change(get: Numbers, *, shape: tuple[int, int]) -> Change:
    places = get("shira_indices").astype(np.int64)
    if places.size and (places.min() < 0 or (places.max(1) >= shape).any()):
        raise Unfit(f"shira_indices are outside a weight of {shape[0]} x {shape[1]}")
    flat, where = np.unique(places[0] * shape[1] + places[1], return_inverse=True)
    numbers = np.zeros(len(flat), np.float32)
    np.add.at(numbers, where, get("shira_weight"))  # a place may occur twice
    return Change(places=np.stack(np.divmod(flat, shape[1])), numbers=numbers)


KINDS = {
    "IA3": Kind(
        "IA3", {"feedforward_modules": Field(None, _are_modules, "a pattern or a list of names")},
        frozenset({"fan_in_fan_out", "init_ia3_weights"}), ("ia3_l",), _ia3, conv1d=True,
    ),
    "ROAD": Kind(
        "ROAD", {"variant": choice("road_1", "road_2", "road_4"), "group_size": whole(64)},
        frozenset({"init_weights"}), ("road_theta", "road_alpha"), _road,
    ),
    "BEFT": Kind("BEFT", {}, frozenset({"init_weights"}), ("beft_bias",), _beft),
    "OFT": Kind(
        "OFT",
        {"r": whole(0, 0), "oft_block_size": whole(32, 0), "coft": choice(False, True), "eps": number(6e-5),
         "block_share": choice(False, True), "use_cayley_neumann": choice(True, False),
         "num_cayley_neumann_terms": Field(5, lambda value: type(value) is int and 1 <= value <= 64, "from 1 to 64")},
        frozenset({"module_dropout", "fan_in_fan_out", "init_weights"}), ("oft_R.weight",), _oft,
    ),
    "BOFT": Kind(
        "BOFT",
        {"boft_block_size": whole(4, 0), "boft_block_num": whole(0, 0)},
        frozenset({"boft_n_butterfly_factor", "boft_dropout", "fan_in_fan_out", "init_weights"}),
        ("boft_R", "boft_s"), _boft,
    ),
    "SHIRA": Kind(
        "SHIRA", {"r": whole(32)}, frozenset({"mask_type", "random_seed", "fan_in_fan_out", "init_weights"}),
        ("shira_weight", "shira_indices"), _shira,
    ),
}  # fmt: skip
