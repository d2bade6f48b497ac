#!/usr/bin/env bash
# Prove the GPU path on a machine that has a GPU, torch, transformers, peft and Triton, and perhaps no network:
#
#   deploy/gpu-proof.sh wheels FOLDER     where there is a network, by the same version of Python: fetch the other
#                                         packages' wheels into FOLDER
#   deploy/gpu-proof.sh tests             with the GPU: every test that needs one                 (ten minutes at most)
#   deploy/gpu-proof.sh bench             with the GPU: every measurement, see `python -m benchmarks.gpu`      (the same)
#
# Variables: PYTHON (python3), WHEELS (the folder; without it PYTHON's own packages are used as they are), OUT
# (build/gpu-proof: everything that comes out), LIMIT_S (580), DEVICE (cuda; cpu tries the commands without a GPU: every
# test is skipped) and SHAPE (llama-3.1-8b) of the benchmark.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3} out=${OUT:-build/gpu-proof} limit_s=${LIMIT_S:-580}
there='^(torch|transformers|peft|accelerate|triton|numpy|safetensors|tokenizers|huggingface_hub)\b'
tools=(pytest pytest-asyncio pytest-randomly pytest-timeout pytest-xdist hypothesis jsonschema)

# requirements: what the engine needs besides the packages that are there
requirements() { "$python" deploy/requirements.py worker | grep -Ev "$there"; }

# with_wheels: an environment that sees the machine's own packages and has the others from WHEELS
with_wheels() {
  [ -n "${WHEELS:-}" ] || return 0
  [ -x "$out/venv/bin/python" ] || "$python" -m venv "$out/venv"
  # By path: --system-site-packages would be those of the Python from which PYTHON's own environment was made.
  "$python" -c 'import site; print(*site.getsitepackages(), site.getusersitepackages(), sep="\n")' \
    > "$(echo "$out"/venv/lib/python3*/site-packages)/machine.pth"
  requirements | "$out/venv/bin/python" -m pip install --disable-pip-version-check --quiet --no-index \
    --find-links "$WHEELS" --requirement /dev/stdin "${tools[@]}"
  python="$out/venv/bin/python"
}

# need_device: ends in one line where there is no GPU, of which all tests would be skipped
need_device() {
  [ "${DEVICE:-cuda}" != cuda ] || "$python" -c 'if True:
    import torch
    if not torch.cuda.is_available():
        raise SystemExit(f"gpu-proof: torch {torch.__version__} finds no CUDA device; nothing was run")'
}

# run NAME COMMAND...: its output to the screen and to OUT/NAME.log; says so where it takes too long
run() {
  local name=$1 code=0
  shift
  timeout --kill-after=10 "$limit_s" "$@" 2>&1 | tee "$out/$name.log" || code=$?
  [ $code != 124 ] || echo "== $name took more than $limit_s s" | tee -a "$out/$name.log"
  return $code
}

mkdir -p "$out"
export PYTHONPATH=.:kernels:tests
case ${1:-} in
  wheels)
    requirements | "$python" -m pip download --disable-pip-version-check --quiet --only-binary=:all: \
      --dest "${2:?a folder for the wheels}" --requirement /dev/stdin "${tools[@]}"
    ;;
  tests)
    with_wheels
    need_device
    # The files that have such tests: others import packages that are not in WHEELS.
    mapfile -t files < <(grep -rl --include='*.py' 'pytest\.mark\.gpu' tests)
    run tests "$python" -m pytest -m gpu -n 0 -p no:cacheprovider --junitxml="$out/tests.xml" "${files[@]}"
    ;;
  bench)
    with_wheels
    need_device
    run bench "$python" -m benchmarks.gpu --device "${DEVICE:-cuda}" --shape "${SHAPE:-llama-3.1-8b}" \
      --budget-s "$((limit_s - 20))" --out "$out" ${ONLY:+--only "$ONLY"}
    ;;
  *)
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
