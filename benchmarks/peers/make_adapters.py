"""Write random adapters of every linear layer for measurements, in PEFT's format and as GGUF for llama.cpp.

    python benchmarks/peers/make_adapters.py --model FOLDER --out FOLDER --count 32 [--llama-cpp FOLDER]

Adapter i is `OUT/peft/adapter-<i>` and `OUT/gguf/adapter-<i>.gguf`. The matrices B are small but not zero, so a server
that ignores an adapter gives other answers, and no server gains by skipping zeros.
"""

import argparse
import functools
import json
import subprocess
import sys
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from protocol.runtime.environment import COMPUTE, child_environment

B_STD = 0.01


@functools.cache
def module_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Return (out, in) features of each linear layer of a model except its head, by name, "model.layers.0.mlp…"."""
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head = module.get_output_embeddings()
    return {
        name: (part.out_features, part.in_features)
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and part is not head
    }


def make_adapter(
    model: Path, folder: Path, rank: int, seed: int, *, targets: tuple[str, ...] = ("",), b_std: float = B_STD
) -> None:
    """Write one adapter in PEFT's format, bf16. targets: what the names of its layers end with."""
    shapes = {name: shape for name, shape in module_shapes(model).items() if name.endswith(targets)}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for module, (out_features, in_features) in shapes.items():
        prefix = f"base_model.model.{module}"
        lora_a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        lora_b = torch.randn(out_features, rank, generator=generator) * b_std
        weights[f"{prefix}.lora_A.weight"] = lora_a.to(torch.bfloat16)
        weights[f"{prefix}.lora_B.weight"] = lora_b.to(torch.bfloat16)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def convert(llama_cpp: Path, model: Path, adapter: Path, gguf: Path) -> None:
    """Write `adapter` as a bf16 GGUF file. Raises CalledProcessError with llama.cpp's own message in `stderr`."""
    gguf.parent.mkdir(parents=True, exist_ok=True)
    script = str(llama_cpp / "convert_lora_to_gguf.py")
    command = [sys.executable, script, "--base", str(model), "--outtype", "bf16", "--outfile", str(gguf), str(adapter)]
    environment = child_environment(*COMPUTE)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def main() -> None:
    """Write the adapters that the command line describes."""
    parser = argparse.ArgumentParser(description="Write random adapters for measurements.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--llama-cpp", type=Path, help="folder with convert_lora_to_gguf.py; default: no GGUF")
    args = parser.parse_args()
    for index in track(range(args.count), description="adapters"):
        adapter = args.out / "peft" / f"adapter-{index}"
        make_adapter(args.model, adapter, args.rank, seed=index)
        if args.llama_cpp is not None:
            convert(args.llama_cpp, args.model, adapter, args.out / "gguf" / f"{adapter.name}.gguf")


if __name__ == "__main__":
    main()
