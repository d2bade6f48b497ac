"""Models in GGUF's formats compared with llama.cpp: both serve the same file, at 1, 8 and 32 in flight.

    python -m benchmarks.peers.quantised --peers /opt/peers --lab FOLDER [--models smol,1b] [--kinds Q4_0,BF16]

`smol` is the quickstart model; `1b` has Llama-3.2-1B's shape and `4b` Qwen3-4B's, with random weights, because only the
shape determines the speed. llama.cpp's converter and quantizer write missing files into the lab. The servers of one
file run side by side and are measured alternately, so that a change of the machine's speed affects both; everything
else is as in `benchmarks.peers.run`. For other lengths: --prompt-words 512 --output-tokens 8 --concurrency 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.common.fleet import quickstart_model
from benchmarks.common.random_model import random_model, save_with_tokenizer
from benchmarks.peers.run import Point, in_turns, lab_of, parse_arguments, save
from benchmarks.peers.servers import SYSTEMS, Lab, Server, llama_cpp_folder, scenario_names
from protocol.runtime.environment import COMPUTE, child_environment

SHAPES = {
    "1b": (LlamaForCausalLM, LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131_072, rms_norm_eps=1e-5,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, bos_token_id=1,
        eos_token_id=2,
    )),
    "4b": (Qwen3ForCausalLM, Qwen3Config(
        vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, rms_norm_eps=1e-6,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, bos_token_id=1,
        eos_token_id=2,
    )),
}  # fmt: skip
"""Models with the published shapes of Llama-3.2-1B and Qwen3-4B."""


def gguf_file(lab: Path, peers: Path, model: str, kind: str) -> Path:
    """Return a model's file of a kind, creating it if it is missing."""
    found = lab / f"{model}-{kind}.gguf"
    if found.exists():
        return found
    part = found.with_suffix(".part")
    if kind == "BF16":
        folder = quickstart_model() if model == "smol" else lab / model
        if not folder.exists():
            save_with_tokenizer(random_model(*SHAPES[model]), folder)
        script = peers / "llama.cpp/convert_hf_to_gguf.py"
        command = [sys.executable, str(script), "--outtype", "bf16", "--outfile", str(part), str(folder)]
    else:
        source = gguf_file(lab, peers, model, "BF16")
        command = [str(llama_cpp_folder(peers) / "llama-quantize"), str(source), str(part), kind, "2"]
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=child_environment(*COMPUTE)
    )
    return part.rename(found)


def servers(lab: Lab, args: argparse.Namespace, model: str, kind: str, scratch: Path) -> list[Server]:
    """Return the servers of one file; their load is named after it."""
    own, base = lab.root / f"{model}-{kind}", scenario_names(lab)[0]
    (own / "adapters/peft").mkdir(parents=True, exist_ok=True)
    file = gguf_file(lab.root, args.peers, model, kind)
    links = {"model": file, "model.bf16.gguf": file, "llama": args.peers.resolve() / "llama"}
    for name, target in links.items():
        if not (own / name).exists():
            (own / name).symlink_to(target)
    found = [SYSTEMS[system](replace(lab, root=own), scratch)[0] for system in args.systems]
    return [replace(server, scenarios={f"{model} {kind}": server.scenarios[base]}) for server in found]


def main() -> None:
    """Create missing files, measure, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="the folder that setup.sh made")
    parser.add_argument("--lab", type=Path, required=True, help="a folder to keep the models in")
    parser.add_argument("--models", default="smol,1b", help="%(default)s")
    parser.add_argument("--kinds", default="Q4_0,Q4_K_M,Q8_0,BF16", help="%(default)s")
    args = parse_arguments(parser, "lorafleet,llama.cpp", waves=1)
    lab = lab_of(args.lab, args)
    lab.root.mkdir(parents=True, exist_ok=True)

    def measured(scratch: Path) -> list[list[Point]]:
        files = product(args.models.split(","), args.kinds.split(","))
        return in_turns((servers(lab, args, *file, scratch) for file in files), args, scratch)

    save(measured, "quantised-peers", args)


if __name__ == "__main__":
    main()
