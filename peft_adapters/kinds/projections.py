"""HRA and DEFT: changes of the base model's weight that have a low rank (`peft/tuners/hra`, `peft/tuners/deft`).

Their A or B is computed from the weight itself, so that quantised layers cannot have them. HRA: Yuan et al., "Bridging
The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation", 2024.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_adapters.kinds.kind import BASE_WEIGHT, Field, Kind, Layer, Numbers, Rows, Shape, choice, is_alpha, whole

# ---------------------------------------------------------------- HRA


def _hra(layer: Layer) -> Rows:
    """Return the weight times r reflections, W (H - I): each reflection adds one rank row."""
    r = layer.options["r"]
    make = partial(_hra_rows, orthogonal=layer.options["apply_GS"])
    return Rows({"hra_u": (layer.in_features, r)}, r, make, needs_weight=True)


def _hra_rows(get: Numbers, *, orthogonal: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    u = get("hra_u").copy()
    for i in range(u.shape[1]):
        if orthogonal:  # Gram and Schmidt's way, one vector after the other as PEFT does it
            for j in range(i):
                u[:, i] -= (u[:, j] @ u[:, i]) * u[:, j]
        u[:, i] /= np.linalg.norm(u[:, i])
    b = get(BASE_WEIGHT) @ u
    # A reflection I - 2 u uᵀ acts on the weight as changed by those before it.
    for i in range(u.shape[1] if not orthogonal else 0):
        b[:, i] -= 2 * b[:, :i] @ (u[:, :i].T @ u[:, i])
    return u.T, -2 * b


# ---------------------------------------------------------------- DEFT


def _deft(layer: Layer) -> Rows:
    """Return the weight without a subspace of its outputs and, but for PaRa, with a product in its place."""
    r, para, alpha = min(layer.options["r"], layer.out_features), layer.options["para"], layer.options["alpha"]
    shapes: dict[str, Shape] = {"deft_P": (layer.out_features, r)}
    if not para:
        shapes["deft_R"] = (r, layer.in_features)
    scale = alpha / r if alpha else 1.0
    make = partial(_deft_rows, method=layer.options["decomposition_method"], para=para, scale=np.float32(scale))
    return Rows(shapes, r, make, needs_weight=True)


def _deft_rows(get: Numbers, *, method: str, para: bool, scale: np.float32) -> tuple[NDArray[Any], NDArray[Any]]:
    directions = get("deft_P") if method == "relu" else np.linalg.qr(get("deft_P"))[0]
    right = np.maximum(directions, 0) if method == "relu" else directions
    removed = right.T @ get(BASE_WEIGHT)
    return (-removed if para else get("deft_R") * scale - removed), directions


KINDS = {
    "HRA": Kind(
        "HRA", {"r": whole(8), "apply_GS": choice(False, True)}, frozenset({"init_weights"}), ("hra_u",), _hra
    ),
    "DEFT": Kind(
        "DEFT",
        {"r": whole(8), "decomposition_method": choice("relu", "qr"), "para": choice(False, True),
         "alpha": Field(None, lambda value: value is None or is_alpha(value), "a finite number")},
        frozenset({"init_scale", "fan_in_fan_out", "deft_dropout", "init_weights"}), ("deft_P", "deft_R"), _deft,
        conv1d=True,
    ),
}  # fmt: skip
