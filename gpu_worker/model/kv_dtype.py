"""The dtype of keys and values in the KV cache."""

from __future__ import annotations

from typing import Literal

import torch

from gpu_worker.model.model import BaseModel
from protocol.wire.errors import BadRequest

CODE_MULTIPLE = 4
"""Int8 kernels multiply a head's codes four at a time."""


def choose_kv_dtype(model: BaseModel, wanted: Literal["auto", "int8"]) -> torch.dtype | None:
    """Return the value of `BaseModel.kv_dtype` for a setting. Raises BadRequest if int8 is not supported."""
    if wanted == "auto":
        return None
    given = f"kv_cache_dtype is {wanted}"
    if model.device.type != "cpu":
        raise BadRequest(f"{given}, which is served on a CPU only; the device is {model.device.type}")
    if model.passes is not None:
        raise BadRequest(f"{given}, but this model's sequences run unbatched, with caches of transformers' own")
    if not model.layers:
        raise BadRequest(f"{given}, but this model keeps no keys and values")
    for dim in (dim for layer in model.layers for dim in (layer.call.head_dim, layer.call.value_dim)):
        if dim % CODE_MULTIPLE:
            raise BadRequest(f"{given}, but heads of this model have {dim} numbers, no multiple of {CODE_MULTIPLE}")
    return torch.int8
