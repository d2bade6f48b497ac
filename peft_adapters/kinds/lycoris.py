"""LoHa and LoKr, from LyCORIS, as PEFT saves them (`peft/tuners/loha`, `peft/tuners/lokr`).

LoHa: Hyeon-Woo et al., "FedPara", 2022. LoKr: Edalati et al., "KronA", 2022.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_adapters.kinds.kind import MAX_WHOLE, Field, Kind, Layer, Numbers, Rows, Shape, choice, number, whole

_TRAINING = frozenset({"rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights", "rank_dropout_scale"})
_PATTERNS = frozenset({"rank_pattern", "alpha_pattern"})


# ---------------------------------------------------------------- LoHa


def _loha(layer: Layer) -> Rows:
    """Return the elementwise product of two low-rank matrices as r² rank rows, by Khatri-Rao products."""
    r = layer.options["r"]
    shapes: dict[str, Shape] = {}
    for half in ("hada_w1", "hada_w2"):
        shapes |= {f"{half}_a": (layer.out_features, r), f"{half}_b": (r, layer.in_features)}
    return Rows(shapes, r * r, _loha_rows, layer.options["alpha"] / r, zero_if=tuple(shapes))


def _loha_rows(get: Numbers) -> tuple[NDArray[Any], NDArray[Any]]:
    b1, a1, b2, a2 = get("hada_w1_a"), get("hada_w1_b"), get("hada_w2_a"), get("hada_w2_b")
    a = a1[:, None, :] * a2[None, :, :]
    b = b1[:, :, None] * b2[:, None, :]
    return a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1)


# ---------------------------------------------------------------- LoKr


@lru_cache(4096)
def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """Return two factors of a dimension, like PEFT's `factorization`: near its root, or `factor` and the quotient."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    most = dimension if factor == -1 else factor
    first, second = 1, dimension
    while first < second:
        larger = next(number for number in range(first + 1, dimension + 1) if dimension % number == 0)
        if larger > most:
            break
        first, second = larger, dimension // larger
    return min(first, second), max(first, second)


def _lokr(layer: Layer) -> Rows:
    """Return a Kronecker product of two matrices, each of which may be a product of rank r.

    If their ranks are c and d, the result has rank c * d: the Kronecker products of the factors.
    """
    r, factor = layer.options["r"], layer.options["decompose_factor"]
    (in_m, in_n), (out_l, out_k) = (factorization(size, factor) for size in (layer.in_features, layer.out_features))
    shapes: dict[str, Shape] = {}
    rank = 1
    whole_first = not (layer.options["decompose_both"] and r < max(out_l, in_m) / 2)
    whole_second = not r < max(out_k, in_n) / 2
    for name, is_whole, rows, columns in (
        ("lokr_w1", whole_first, out_l, in_m),
        ("lokr_w2", whole_second, out_k, in_n),
    ):
        shapes |= {name: (rows, columns)} if is_whole else {f"{name}_a": (rows, r), f"{name}_b": (r, columns)}
        rank *= min(rows, columns) if is_whole else r
    make = partial(_lokr_rows, whole_first=whole_first, whole_second=whole_second)
    return Rows(shapes, rank, make, layer.options["alpha"] / r, zero_if=tuple(shapes))


def _lokr_rows(get: Numbers, *, whole_first: bool, whole_second: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    b1, a1 = _factors(get, "lokr_w1", is_whole=whole_first)
    b2, a2 = _factors(get, "lokr_w2", is_whole=whole_second)
    return np.kron(a1, a2), np.kron(b1, b2)


def _factors(get: Numbers, name: str, *, is_whole: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return B and A of one of LoKr's matrices; for an undecomposed one, itself and an identity of its shorter side."""
    if not is_whole:
        return get(f"{name}_a"), get(f"{name}_b")
    matrix = get(name)
    rows, columns = matrix.shape
    return (np.eye(rows, dtype=np.float32), matrix) if rows < columns else (matrix, np.eye(columns, dtype=np.float32))


_FACTOR = Field(
    -1, lambda value: type(value) is int and (value == -1 or 1 <= value <= MAX_WHOLE), f"-1, or from 1 to {MAX_WHOLE}"
)

KINDS = {
    "LOHA": Kind(
        "LOHA", {"r": whole(8), "alpha": number(8)}, _TRAINING, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        _loha, patterns=_PATTERNS,
    ),
    "LOKR": Kind(
        "LOKR",
        {"r": whole(8), "alpha": number(8), "decompose_both": choice(False, True), "decompose_factor": _FACTOR},
        _TRAINING, ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"), _lokr,
        patterns=_PATTERNS,
    ),
}  # fmt: skip
