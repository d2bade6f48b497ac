"""Loads a model whose weights are memory-mapped files: nothing is copied, and pages are read on first use.

This works if the folder's safetensors have exactly the tensors of transformers' model, with its names. Otherwise the
result is None, and transformers loads the model.
"""

from __future__ import annotations

import json
import mmap
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from gpu_worker.loading.weights import weight_files
from gpu_worker.quantised.modules import parameters_on_meta

KEPT_IN_FP32 = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
"""Attributes by which transformers names modules that stay in fp32, whatever the model's dtype."""

COMPUTED = ("inv_freq", "embed_scale")
"""Name suffixes of buffers that a model computes at construction, always with the same bits."""

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Dtypes of safetensors that can be mapped."""

MAX_TENSORS = 10_000
"""Linux limits a process to 65,530 memory mappings."""


def map_model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel | None:
    """Return a folder's causal LM on the CPU, with tensors of `dtype` mapped and others converted; None if impossible.

    Raises the errors of transformers and safetensors.
    """
    found = _tensors_of(folder)
    if not found:
        return None
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    if wanted.keys() != found.keys() or any(found[name].shape != tensor.shape for name, tensor in wanted.items()):
        return None
    if any(getattr(model, name, None) for name in KEPT_IN_FP32) or any(t.dtype != dtype for t in wanted.values()):
        return None
    if any(tensor.is_floating_point() and not name.endswith(COMPUTED) for name, tensor in _computed(model)):
        return None
    for name in wanted:
        module, _, child = name.rpartition(".")
        _put(model.get_submodule(module), child, found[name].to(dtype))
    model.tie_weights()
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    return model.eval().requires_grad_(False)


def _computed(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the buffers that are not stored in files."""
    kept = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name not in kept]


def _tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder's safetensors, each with a mapping of its own, so that dropping it unmaps it.

    Empty if a file is missing, or if there are more tensors than a process may map.
    """
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        if not path.is_file():
            return {}
        with safe_open(path, framework="pt"):
            pass  # checks that the tensors are in the file, without gaps or overlap
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
            header.pop("__metadata__", None)
            if len(found) + len(header) > MAX_TENSORS or any(entry["dtype"] not in DTYPES for entry in header.values()):
                return {}
            found |= {key: _map(file.fileno(), 8 + header_bytes, entry) for key, entry in header.items()}
    return found


def _map(fd: int, data: int, entry: dict[str, Any]) -> Tensor:
    """Map a tensor of a file whose tensor data begins at byte `data`.

    entry: the tensor's entry in the file's header.
    """
    start, end = (data + offset for offset in entry["data_offsets"])
    dtype = DTYPES[entry["dtype"]]
    if start == end:
        return torch.empty(entry["shape"], dtype=dtype)
    page = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    memory = mmap.mmap(fd, end - page, access=mmap.ACCESS_COPY, offset=page)
    return torch.frombuffer(memory, dtype=dtype, offset=start - page).view(entry["shape"])


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    if name in dict(module.named_parameters(recurse=False)):
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    else:
        module.register_buffer(name, value)
