#!/usr/bin/env bash
# Make what benchmarks.peers.in_process needs, each engine in an environment of its own; what is there already stays.
#
#     PEERS_DIR=/opt/peers PYTHON=.venv/bin/python benchmarks/peers/setup_engines.sh
#
# PYTHON is Lorafleet's own environment (extras worker, demo). Model and adapters are those of setup.sh, if it has run.
set -euo pipefail

peers=${PEERS_DIR:-$HOME/.cache/lorafleet/peers}
python=$(command -v "${PYTHON:-python3}")
mkdir -p "$peers"

if [ ! -e "$peers/model" ]; then
    model=$("$python" -c 'import pathlib, sys; from lorafleet.quickstart import fetch_quickstart_model as fetch
print(fetch(pathlib.Path(sys.argv[1])))' "$peers/models")
    ln -s "$model" "$peers/model"
fi
if [ ! -e "$peers/adapters/peft" ]; then
    "$python" -m benchmarks.peers.make_adapters --model "$peers/model" --out "$peers/adapters.part" \
        --count "${NUM_ADAPTERS:-32}"
    mv "$peers/adapters.part" "$peers/adapters"
fi

if [ ! -e "$peers/openvino/.ready" ]; then
    "$python" -m venv "$peers/openvino"
    "$peers/openvino/bin/pip" install --quiet openvino-genai==2026.4.1.0 openvino==2026.4.1
    touch "$peers/openvino/.ready"
fi
if [ ! -e "$peers/openvino-int4" ]; then
    "$python" -m venv "$peers/optimum"
    "$peers/optimum/bin/pip" install --quiet --extra-index-url https://download.pytorch.org/whl/cpu \
        optimum-intel==2.2.0 openvino==2026.4.1 openvino-tokenizers==2026.4.1.0 nncf==3.4.0 transformers==5.5.4
    for format in fp16 int8 int4; do
        rm -rf "$peers/openvino.part"
        group=$([ "$format" = int4 ] && echo "--group-size 64" || true)  # 576 inputs are no multiple of 128
        "$peers/optimum/bin/optimum-cli" export openvino --model "$peers/model" --task text-generation-with-past \
            --weight-format "$format" $group "$peers/openvino.part"
        mv "$peers/openvino.part" "$peers/openvino-$format"
    done
fi

if [ ! -e "$peers/mistralrs/.ready" ]; then
    "$python" -m venv "$peers/mistralrs"
    "$peers/mistralrs/bin/pip" install --quiet mistralrs==0.9.5
    touch "$peers/mistralrs/.ready"
fi

if [ ! -e "$peers/onnxruntime/.ready" ]; then
    "$python" -m venv "$peers/onnxruntime"
    "$peers/onnxruntime/bin/pip" install --quiet onnxruntime-genai==0.18.0
    touch "$peers/onnxruntime/.ready"
fi
if [ ! -e "$peers/onnxruntime-int4" ]; then
    "$python" -m venv "$peers/builder"
    "$peers/builder/bin/pip" install --quiet --extra-index-url https://download.pytorch.org/whl/cpu \
        onnxruntime-genai==0.18.0 onnx onnx-ir torch transformers
    for format in fp32 int4; do
        rm -rf "$peers/onnxruntime.part"
        "$peers/builder/bin/python" -m onnxruntime_genai.models.builder -i "$peers/model" -o "$peers/onnxruntime.part" \
            -p "$format" -e cpu -c "$peers/builder/cache"
        mv "$peers/onnxruntime.part" "$peers/onnxruntime-$format"
    done
fi

if [ ! -e "$peers/ik_llama/.ready" ]; then
    "$python" -m venv "$peers/ik_llama"
    "$peers/ik_llama/bin/pip" install --quiet ik-llama-cpp-python==0.1.5 numpy
    touch "$peers/ik_llama/.ready"
fi
if [ ! -e "$peers/ik_llama-bf16.gguf" ]; then
    cp -L "$peers/model.bf16.gguf" "$peers/ik_llama-bf16.gguf"  # setup.sh makes it
    for format in q8_0 q4_0; do
        "$peers"/ik_llama/lib/python3.*/site-packages/ik_llama_cpp/bin/llama-quantize "$peers/ik_llama-bf16.gguf" "$peers/ik_llama-$format.gguf" "$format"
    done
fi

echo "ready in $peers"
