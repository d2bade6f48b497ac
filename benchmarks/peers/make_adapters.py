"""Write random adapters for measurements, of every linear layer, in PEFT's format and as GGUF for llama.cpp.

    python benchmarks/peers/make_adapters.py --model FOLDER --out FOLDER --count 32 [--llama-cpp FOLDER]

Adapter i is `OUT/peft/adapter-<i>` and `OUT/gguf/adapter-<i>.gguf`. The matrices B are small but not zero, so a server
that skips an adapter gives other answers, and no server gains by skipping zeros.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file
from transformers import AutoConfig

from protocol.runtime.environment import COMPUTE, child_environment

MODULES = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
B_STD = 0.01


def module_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Return (out, in) features of each adapted module of a Llama layer, keyed like "mlp.up_proj"."""
    config = AutoConfig.from_pretrained(model)
    hidden, mlp = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sizes = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    sizes |= {"gate_proj": (mlp, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp)}
    return {f"{block}.{name}": sizes[name] for block, names in MODULES.items() for name in names}


def make_adapter(model: Path, folder: Path, rank: int, seed: int) -> None:
    """Write one adapter in PEFT's format, bf16."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(AutoConfig.from_pretrained(model).num_hidden_layers):
        for module, (out_features, in_features) in module_shapes(model).items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            lora_a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
            lora_b = torch.randn(out_features, rank, generator=generator) * B_STD
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
        "target_modules": [name for names in MODULES.values() for name in names],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def convert(llama_cpp: Path, model: Path, adapter: Path, gguf: Path) -> None:
    """Write `adapter` as a bf16 GGUF file. Raises CalledProcessError with llama.cpp's own message on stderr."""
    gguf.parent.mkdir(parents=True, exist_ok=True)
    script = str(llama_cpp / "convert_lora_to_gguf.py")
    command = [sys.executable, script, "--base", str(model), "--outtype", "bf16", "--outfile", str(gguf), str(adapter)]
    environment = child_environment(*COMPUTE)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def main() -> None:
    """Write the adapters that the command line describes."""
    parser = argparse.ArgumentParser(description="Write random adapters for measurements.")
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama model")
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
