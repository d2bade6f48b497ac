"""Reads a model whose weights are the memory of its files: nothing is copied, and nothing read before it is used.

That is so where a folder has safetensors with exactly the tensors of transformers' model, under its names. For every
other one the answer is None, and transformers reads it.
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
"""Where transformers says which modules of a model keep fp32, whatever its dtype is."""

COMPUTED = ("inv_freq", "embed_scale")
"""Ends of the names of numbers that a model computes when it is made, and to the same bits however that is."""

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""What safetensors call the numbers of a model that can be mapped."""

MAX_TENSORS = 10_000
"""Linux lets a process map 65,530 ranges of memory."""


def map_model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel | None:
    """Return a folder's causal LM on the CPU, tensors of `dtype` mapped and others converted; None where it cannot be.

    Raises what transformers and safetensors raise.
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
    """Return the buffers that no file has."""
    kept = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name not in kept]


def _tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder's safetensors, each mapped by itself, so that one that is dropped is unmapped.

    There are none where a file is missing, or where there are more tensors than a process may map.
    """
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        if not path.is_file():
            return {}
        with safe_open(path, framework="pt"):
            pass  # it checks that the tensors lie in the file, one behind the other
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
            header.pop("__metadata__", None)
            if len(found) + len(header) > MAX_TENSORS or any(entry["dtype"] not in DTYPES for entry in header.values()):
                return {}
            found |= {key: _map(file.fileno(), 8 + header_bytes, entry) for key, entry in header.items()}
    return found


def _map(fd: int, data: int, entry: dict[str, Any]) -> Tensor:
    """Map a tensor of a file whose tensors begin at byte `data`. entry: its part of the file's header."""
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
