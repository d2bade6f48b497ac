"""A hybrid model, or a mixture of experts, under load: the base, one adapter and 32 adapters, at 1, 8 and 32 in flight.

    python -m benchmarks.fleet.hybrid [--shape mixture] [--peers /opt/peers --systems lorafleet,llama.cpp,vllm]

The hybrid has Qwen3.5-0.8B's shape. The mixture is a Qwen3-MoE of 0.9 billion parameters, of which a token uses 0.2
billion. The weights are random, in bf16, because only the shape determines the speed; the tokenizer is the quickstart
model's. Each server is measured as in `benchmarks.peers.run`: 64 random words in, 64 tokens out, streamed, end of text
ignored. Adapters have rank 16 on every linear layer, including those of the gated delta rule's layers; of the mixture
on attention alone, since peers have none on experts. Lorafleet alone takes about seven minutes on two cores, and 4 GB
of disk; peers are those of `benchmarks/peers/setup.sh`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.common.fleet import scratch_folder
from benchmarks.common.random_model import random_model, save_with_tokenizer
from benchmarks.peers.make_adapters import convert, make_adapter
from benchmarks.peers.run import compare, lab_of, parse_arguments, servers_of
from protocol.runtime.environment import COMPUTE, child_environment

RANK = 16
CACHE_GIB = 4  # 32 sequences have one or two states of 20 MB each, and as many again are saved
POOL_GIB = 2  # an adapter of all linear layers takes 23 MB

HYBRID = Qwen3_5TextConfig(
    vocab_size=248_320, hidden_size=1024, intermediate_size=3584, num_hidden_layers=24, num_attention_heads=8,
    num_key_value_heads=2, head_dim=256, linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128,
    linear_value_head_dim=128, linear_conv_kernel_dim=4, layer_types=[*3 * ["linear_attention"], "full_attention"] * 6,
    max_position_embeddings=32_768,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
)  # fmt: skip
"""The published shape of Qwen3.5-0.8B's text model: 18 layers with a gated delta rule, 6 with attention."""

MIXTURE = Qwen3MoeConfig(
    vocab_size=49_152, hidden_size=1024, intermediate_size=3072, moe_intermediate_size=512, num_hidden_layers=16,
    num_attention_heads=16, num_key_value_heads=4, num_experts=32, num_experts_per_tok=4,
    norm_topk_prob=True, decoder_sparse_step=1, max_position_embeddings=8_192, tie_word_embeddings=True,
)  # fmt: skip
"""A small Qwen3-MoE: every layer has 32 experts, and a token uses 4 of them, an eighth as of Qwen3-30B-A3B's."""

SHAPES: dict[str, tuple[type[Any], Any]] = {
    "hybrid": (Qwen3_5ForCausalLM, HYBRID),
    "mixture": (Qwen3MoeForCausalLM, MIXTURE),
}


def make_model(shape: str, folder: Path) -> None:
    """Write a model of one of `SHAPES` with random weights."""
    model = random_model(*SHAPES[shape])
    model.generation_config.eos_token_id = None
    if shape == "hybrid":
        model.config.update({"mtp_num_hidden_layers": 1})  # for llama.cpp's converters; the layer is not written
    save_with_tokenizer(model, folder)


def make_lab(shape: str, root: Path, num_adapters: int, peers: Path | None, systems: Sequence[str]) -> None:
    """Put the model and the adapters into a folder, and what the peers among `systems` need."""
    model = root / "model"
    if not model.exists():
        make_model(shape, model)
    adapters = [root / "adapters/peft" / f"adapter-{index}" for index in range(num_adapters)]
    for index, adapter in enumerate(adapters):
        if not adapter.exists():
            make_adapter(model, adapter, RANK, seed=index)
    if peers is not None:
        for name in ("vllm", "llama", "llama.cpp"):
            if not (root / name).exists():
                (root / name).symlink_to(peers.resolve() / name)
    if "llama.cpp" not in systems:
        return
    gguf = root / "model.bf16.gguf"
    if not gguf.exists():
        script = root / "llama.cpp/convert_hf_to_gguf.py"
        command = [sys.executable, str(script), "--no-nextn", "--outtype", "bf16", "--outfile", str(gguf), str(model)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=child_environment(*COMPUTE))
    for adapter in adapters:
        converted = root / "adapters/gguf" / f"{adapter.name}.gguf"
        if not converted.exists():
            convert(root / "llama.cpp", model, adapter, converted)


def main() -> None:
    """Create missing files, measure, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="the folder that benchmarks/peers/setup.sh made")
    parser.add_argument(
        "--lab", type=Path, help="a folder to keep the model and adapters in (default: a temporary one)"
    )
    parser.add_argument("--shape", choices=[*SHAPES], default="hybrid", help="of the model (%(default)s)")
    args = parse_arguments(parser, "lorafleet", waves=2)
    with scratch_folder() as scratch:
        root = args.lab or scratch / "lab"
        make_lab(args.shape, root, max(args.num_adapters), args.peers, args.systems)
        lab = lab_of(root, args, cache_gib=CACHE_GIB, pool_gib=POOL_GIB)
        compare(partial(servers_of, lab, args.systems), args.shape, args)


if __name__ == "__main__":
    main()
