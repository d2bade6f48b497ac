"""Adapters in the formats of MLX-LM and llama.cpp, converted from PEFT's by the rules of their code.

MLX-LM: `mlx_lm/tuner/lora.py` and `trainer.py`. llama.cpp: `convert_lora_to_gguf.py`, and `LlamaModel.permute` in
`conversion/llama.py`; its own library writes the GGUF file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file

from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE

Array = np.ndarray[Any, Any]

PREFIX = "base_model.model."


def peft_pairs(folder: Path) -> dict[str, tuple[Array, Array]]:
    """Return the matrices A and B of a PEFT adapter by module."""
    found = load_file(folder / WEIGHTS_FILE)
    modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in found if ".lora_A." in name}
    return {
        module: (found[f"{PREFIX}{module}.lora_A.weight"], found[f"{PREFIX}{module}.lora_B.weight"])
        for module in sorted(modules)
    }


def write_mlx(peft: Path, folder: Path, scale: float, kind: str = "lora", **parameters: Any) -> Path:
    """Write a PEFT adapter into a folder in MLX-LM's format. scale: the total factor of the product."""
    tensors: dict[str, Array] = {}
    for module, (a, b) in peft_pairs(peft).items():
        tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"] = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    for name, tensor in load_file(peft / WEIGHTS_FILE).items():
        if name.endswith(".lora_magnitude_vector"):
            tensors[name.removeprefix(PREFIX).replace(".lora_magnitude_vector", ".m")] = tensor
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors", {"format": "mlx"})
    save_file(tensors, folder / "0000100_adapters.safetensors", {"format": "mlx"})  # a checkpoint, to be ignored
    rank = next(iter(peft_pairs(peft).values()))[0].shape[0]
    config = {
        "fine_tune_type": kind, "num_layers": 16, "model": "mlx-community/model", "train": True, "batch_size": 4,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, **parameters},
    }  # fmt: skip
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


def permute(weights: Array, num_heads: int) -> Array:
    """Return rows of q or k in llama.cpp's order, where the halves of a head are interleaved."""
    return weights.reshape(num_heads, 2, len(weights) // num_heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    pairs: Mapping[str, tuple[Array, Array]], path: Path, architecture: str, alpha: float,
    heads: tuple[int, int] = (0, 0), dtype: type = np.float32, **fields: Any,
) -> Path:  # fmt: skip
    """Write PEFT's pairs as `convert_lora_to_gguf.py` does. heads: of q and k, if the architecture reorders them."""
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, 8)
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(fields.get("type", gguf.GGUFType.ADAPTER))
    writer.add_string(gguf.Keys.Adapter.TYPE, fields.get("adapter_type", "lora"))
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if "invocation" in fields:
        writer.add_array(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, fields["invocation"])
    for module, (a, b) in pairs.items():
        name = names.get_name(f"{module}.weight", (".weight",))
        assert name, f"gguf knows no name for {module}"
        if heads[0] and module.endswith(("q_proj", "k_proj")):
            b = permute(b, heads[module.endswith("k_proj")])
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a.astype(dtype)))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b.astype(dtype)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
