"""Lorafleet compared with engines without a server: OpenVINO GenAI, mistral.rs, ONNX Runtime GenAI, ik_llama.cpp.

    python -m benchmarks.peers.in_process --peers /opt/peers [--bits 16,8,4] [--isa avx512_vnni] [--rounds 3]

All run alternately. Each engine computes the same prompts in its own process (`engine_program.py`), so it has no cost
for HTTP, queue and streaming, all of which Lorafleet's figures include. With 16 bits: the base, one adapter and many
adapters; with 8 and 4 bits only the base. Lorafleet serves Q8_0 and Q4_0, with inputs of quantized layers as by
default, and in the other way: in int8, or exact.

- OpenVINO's weights are those of `optimum-cli export openvino`: fp16, int8 (a scale per row) and int4 (a scale per 64
  weights). Its keys and values are int8, and it rounds the inputs of quantized layers to int8.
- mistral.rs mixes adapters in a batch. It computes in fp32, which is faster there than bf16. Weights quantized at load
  time are left out: version 0.9.5 panics with eight requests at a time.
- ONNX Runtime computes the base in fp32 or int4 (its own builder's), ik_llama.cpp in bf16, Q8_0 or Q4_0.

--isa sets Lorafleet's instruction set (`--kernels`). For sets without bf16, OpenVINO computes in fp32 and sees a
processor that has no other set (`mask_cpuid.c`): the limit of its oneDNN, `ONEDNN_MAX_CPU_ISA`, does not hold for its
products in fp32. The other engines choose by the processor. `setup_engines.sh` prepares everything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.peers.run import in_turns, lab_of, parse_arguments, save
from benchmarks.peers.servers import MODEL_NAME, Lab, Server, lorafleet, scenarios_by_name
from gpu_worker.build import ROUNDING_SETS
from lorafleet.bench import BenchTarget
from protocol.runtime.environment import child_environment

PROGRAM = Path(__file__).with_name("engine_program.py")
WITHOUT_BF16 = ("avx2", "avx2_vnni", "avx512", "avx512_vnni")


def lorafleets(lab: Lab, bits: int, isa: str, scratch: Path) -> list[Server]:
    """Return Lorafleet with weights of `bits` bits; for 8 and 4 bits also with the inputs that are not the default."""
    flags = ["--threads", str(lab.num_threads)]
    flags += ["--kernels", isa] if isa else []
    if bits < 16:
        flags += ["--quantization", f"int{bits}"]
    [server] = lorafleet(lab, scratch / f"{bits}")
    own = replace(server, command=[*server.command, *flags], scenarios=_loads(lab, bits))
    if bits == 16:
        return [own]
    [server] = lorafleet(lab, scratch / f"{bits}-other")
    name, flag = "int8", "--quantize-activations"
    if isa in ROUNDING_SETS:
        name, flag = "exact", "--no-quantize-activations"
    return [own, replace(own, name=f"Lorafleet, {name} inputs", command=[*server.command, *flags, flag])]


def openvino(lab: Lab, bits: int, isa: str, scratch: Path) -> list[Server]:
    """Return OpenVINO GenAI without adapters, and with all of them registered."""
    environment = masked(isa, scratch) if isa in WITHOUT_BF16 else {}
    model = lab.root / f"openvino-{'fp' if bits == 16 else 'int'}{bits}"
    options = {
        "model": str(model),
        "threads": lab.num_threads,
        "max_seqs": lab.max_concurrency,
        "precision": "f32" if isa in WITHOUT_BF16 else "",
        "cache_gib": 1,
    }
    return _programs("OpenVINO GenAI", lab, bits, "openvino", options, environment)


def masked(isa: str, scratch: Path) -> dict[str, str]:
    """Return the environment of a program that sees a processor without any better instruction set."""
    library = scratch / "mask_cpuid.so"
    if not library.exists():
        source = str(PROGRAM.with_name("mask_cpuid.c"))
        command = ["gcc", "-O2", "-shared", "-fPIC", source, "-o", str(library), "-ldl"]
        subprocess.run(command, check=True, env=child_environment())
    return {"LD_PRELOAD": str(library), "CPUID_MASK": isa}


def mistral_rs(lab: Lab, bits: int, _: str, scratch: Path) -> list[Server]:
    """Return mistral.rs without adapters and with all of them loaded; only for 16 bits."""
    if bits < 16:
        return []
    model = _with_older_fields(lab.model, scratch / "mistralrs")
    options = {"model": str(model), "max_seqs": lab.max_concurrency, "dtype": "F32"}
    return _programs("mistral.rs", lab, bits, "mistralrs", options, {"RAYON_NUM_THREADS": str(lab.num_threads)})


def _with_older_fields(model: Path, folder: Path) -> Path:
    """Return a copy of a model with the config's fields of transformers 4, and a chat template without markers."""
    folder.mkdir(exist_ok=True)
    for path in model.iterdir():
        if path.name != "config.json" and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((model / "config.json").read_text())
    config.setdefault("rope_theta", config.get("rope_parameters", {}).get("rope_theta"))
    config.setdefault("max_window_layers", config["num_hidden_layers"])
    if "num_local_experts" in config:
        config.setdefault("num_experts", config["num_local_experts"])
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "plain.jinja").write_text("{{ messages[0].content }}")
    return folder


def onnxruntime(lab: Lab, bits: int, _isa: str, _: Path) -> list[Server]:
    """Return ONNX Runtime GenAI without adapters; nothing for 8 bits, which its builder does not support."""
    model = lab.root / f"onnxruntime-{ {16: 'fp32', 4: 'int4'}.get(bits, '') }"
    options = {"model": str(model), "threads": lab.num_threads}
    return [] if bits == 8 else _programs("ONNX Runtime GenAI", lab, bits, "onnxruntime", options, {})[:1]


def ik_llama(lab: Lab, bits: int, _isa: str, _: Path) -> list[Server]:
    """Return ik_llama.cpp without adapters."""
    model = lab.root / f"ik_llama-{ {16: 'bf16', 8: 'q8_0', 4: 'q4_0'}[bits] }.gguf"
    sizes = {"max_seqs": lab.max_concurrency, "slot_tokens": lab.slot_tokens}
    return _programs(
        "ik_llama.cpp", lab, bits, "ik_llama", {"model": str(model), "threads": lab.num_threads, **sizes}, {}
    )[:1]


SYSTEMS = {
    "lorafleet": lorafleets, "openvino": openvino, "mistralrs": mistral_rs, "onnxruntime": onnxruntime,
    "ik_llama": ik_llama,
}  # fmt: skip


def _programs(
    name: str, lab: Lab, bits: int, engine: str, options: dict[str, object], environment: dict[str, str]
) -> list[Server]:
    def command(adapters: list[str]) -> list[str]:
        python = lab.root / engine / "bin/python"
        return [str(python), str(PROGRAM), engine, json.dumps({**options, "adapters": adapters})]

    loads = _loads(lab, bits)
    base = {name: targets for name, targets in loads.items() if targets[0].name == MODEL_NAME}
    found = [Server(f"{name}, LoRA off", command([]), base, environment, {})]
    if with_adapters := {name: targets for name, targets in loads.items() if name not in base}:
        folders = {adapter: str(lab.adapters / adapter) for adapter in lab.adapter_names}
        found.append(Server(f"{name}, LoRA on", command([*folders.values()]), with_adapters, environment, folders))
    return found


def _loads(lab: Lab, bits: int) -> dict[str, tuple[BenchTarget, ...]]:
    loads = scenarios_by_name(lab)
    wanted = loads if bits == 16 else {"base": loads["base"]}
    return {f"{name}, {bits} bits": targets for name, targets in wanted.items()}


def main() -> None:
    """Measure, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="the folder that setup_engines.sh made")
    parser.add_argument("--bits", default="16,8,4", help="of the weights (%(default)s)")
    parser.add_argument("--isa", default="", help="the instruction set (default: the best)")
    parser.add_argument("--threads", type=int, default=0, help="of each engine (default: one for each core)")
    args = parse_arguments(parser, ",".join(SYSTEMS), waves=2)
    lab = lab_of(args.peers, args)
    lab = replace(lab, num_threads=args.threads or lab.num_threads)

    def groups(scratch: Path) -> Iterator[list[Server]]:
        for bits in args.bits.split(","):
            found = [SYSTEMS[system](lab, int(bits), args.isa, scratch) for system in args.systems]
            servers = [_only(server, args.loads) if args.loads else server for some in found for server in some]
            yield [server for server in servers if server.scenarios]

    save(lambda scratch: in_turns(groups(scratch), args, scratch), "engines", args)


def _only(server: Server, loads: list[str]) -> Server:
    return replace(server, scenarios={name: at for name, at in server.scenarios.items() if name.split(",")[0] in loads})


if __name__ == "__main__":
    main()
