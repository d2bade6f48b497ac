"""HRA and DEFT: low-rank changes that depend on the base model's weight (`peft/tuners/hra`, `peft/tuners/deft`).

Their A or B is computed from the weight, which rules out quantized layers. HRA: Yuan et al., "Bridging The Gap between
Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation", 2024.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_adapters.kinds.kind import (
    BASE_WEIGHT,
    Field,
    Kind,
    Layer,
    Numbers,
    Rows,
    Shape,
    Unfit,
    choice,
    is_alpha,
    whole,
)

# ---------------------------------------------------------------- HRA


_LEAST_PART = np.float32(1e-6)
"""Minimum share of a vector's length that is orthogonal to the previous vectors: less is rounding error in fp32."""


def _hra(layer: Layer) -> Rows:
    """Return the change by r reflections H of the weight, W (H - I): each reflection adds one rank row."""
    r, orthogonal, inputs = layer.options["r"], layer.options["apply_GS"], layer.in_features
    if orthogonal and r > inputs:
        raise Unfit(f"r is {r}, of a layer with {inputs} inputs, which have no more orthogonal vectors")
    num_products = r * r * (2 * inputs if orthogonal else inputs + layer.out_features)
    make = _orthogonal_rows if orthogonal else _hra_rows
    return Rows({"hra_u": (inputs, r)}, r, make, needs_weight=True, num_products=num_products)


def _hra_rows(get: Numbers) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return Uᵀ and -W U T, where I - U T Uᵀ is the product of the reflections I - 2 u uᵀ, in order.

    T is the inverse of the upper triangle of UᵀU with 1/2 on its diagonal: Schreiber and Van Loan, "A Storage-Efficient
    WY Representation for Products of Householder Transformations", 1989.
    """
    u = get("hra_u")
    u = u / np.linalg.norm(u, axis=0)
    inverse: NDArray[np.float32] = np.tril(u.T @ u, -1)  # transposed
    np.fill_diagonal(inverse, 0.5)
    changed: NDArray[np.float32] = u.T @ get(BASE_WEIGHT).T
    return u.T, -np.linalg.solve(inverse, changed).T


def _orthogonal_rows(get: Numbers) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the rows of reflections along Gram-Schmidt vectors, whose signs do not matter."""
    given = get("hra_u")
    u, own = np.linalg.qr(given)
    if (np.abs(np.diag(own)) <= _LEAST_PART * np.linalg.norm(given, axis=0)).any():
        raise Unfit(f"hra_u has {given.shape[1]} vectors, of which some depend on others")
    return u.T, -2 * get(BASE_WEIGHT) @ u


# ---------------------------------------------------------------- DEFT


def _deft(layer: Layer) -> Rows:
    """Return the removal of a subspace of the weight's outputs and, except for PaRa, a product that replaces it."""
    r, para, alpha = min(layer.options["r"], layer.out_features), layer.options["para"], layer.options["alpha"]
    shapes: dict[str, Shape] = {"deft_P": (layer.out_features, r)}
    if not para:
        shapes["deft_R"] = (r, layer.in_features)
    scale = alpha / r if alpha else 1.0
    method = layer.options["decomposition_method"]
    make = partial(_deft_rows, method=method, para=para, scale=np.float32(scale))
    num_products = 2 * r * r * layer.out_features if method == "qr" else 0
    return Rows(shapes, r, make, needs_weight=True, num_products=num_products)


def _deft_rows(get: Numbers, *, method: str, para: bool, scale: np.float32) -> tuple[NDArray[Any], NDArray[Any]]:
    directions = get("deft_P") if method == "relu" else np.linalg.qr(get("deft_P"))[0]
    right = np.maximum(directions, 0) if method == "relu" else directions
    removed = right.T @ get(BASE_WEIGHT)
    return (-removed if para else get("deft_R") * scale - removed), directions


KINDS = {
    "HRA": Kind("HRA", {"r": whole(8), "apply_GS": choice(False, True)}, frozenset({"init_weights"}), ("hra_u",), _hra),
    "DEFT": Kind(
        "DEFT",
        {
            "r": whole(8),
            "decomposition_method": choice("relu", "qr"),
            "para": choice(False, True),
            "alpha": Field(None, lambda value: value is None or is_alpha(value), "a finite number"),
        },
        frozenset({"init_scale", "fan_in_fan_out", "deft_dropout", "init_weights"}),
        ("deft_P", "deft_R"),
        _deft,
        conv1d=True,
    ),
}
